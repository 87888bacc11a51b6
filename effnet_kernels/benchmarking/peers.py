"""Other runtimes on the CPU, on the same stock model with the same threads and precision."""

import copy
import io
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from effnet_kernels.benchmarking import UserError
from effnet_kernels.benchmarking.models import require


def onnxruntime(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """``model(x)`` as a call into ONNX Runtime with torch's number of threads; float32."""
    if x.dtype != torch.float32:
        raise UserError(f"ONNX Runtime runs this model in float32 only on a CPU, not {x.dtype}")
    ort = require("onnxruntime", "peers")
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.inter_op_num_threads = 1
    # Between its own calls the workers must not spin on the cores of whoever is measured next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(_onnx(model, x), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def openvino(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """``model(x)`` as a call into OpenVINO with torch's number of threads; float32 or bfloat16."""
    precision = {torch.float32: "f32", torch.bfloat16: "bf16"}.get(x.dtype)
    if precision is None:
        raise UserError(f"OpenVINO runs this model in float32 or bfloat16 on a CPU, not {x.dtype}")
    core = require("openvino", "peers").Core()
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(io.BytesIO(_onnx(model, x))), "CPU", options)
    request = compiled.create_infer_request()
    feed = x.contiguous().float().numpy()

    def call() -> Tensor:
        request.infer({0: feed}, share_inputs=True)
        return torch.from_numpy(request.get_output_tensor(0).data)

    return call


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    """The model as ONNX bytes in float32; 16-bit weights keep their rounded values."""
    require("onnx", "peers")
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracing exporter is deprecated, but needs no further package
        float32 = copy.deepcopy(model).float()
        torch.onnx.export(float32, (x.float(),), file, dynamo=False, opset_version=17)  # type: ignore[arg-type]
    return file.getvalue()
