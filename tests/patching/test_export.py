"""Exported programs: decomposed, converted to ONNX and OpenVINO, compiled by AOTInductor, loaded in fresh processes."""

import copy
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import effnet_kernels as ek
from tests.criterion import rms
from tests.models import images, randomize
from tests.patching.conftest import NAMES, build
from tests.thinning import daily, in_turns

DYNAMIC = ({0: Dim("n", min=1), 2: Dim("h", min=33), 3: Dim("w", min=33)},)


class Blocks(nn.Sequential):
    """Every op and every argument that may be left out, in small."""

    def __init__(self) -> None:
        super().__init__(
            ek.FusedMBConv(3, 8, 3, stride=2, exp_ratio=1.0),
            ek.FusedMBConv(8, 8, 3, exp_ratio=2.0, se_layer=ek.SqueezeExcite),
            ek.DepthwiseSeparableConv(8, 8, 3, pad_type="same"),
            ek.MBConv(8, 16, 5, stride=2, exp_ratio=2.0, act_layer="hardswish"),
            ek.MBConv(16, 16, 3, exp_ratio=2.0, se_layer=ek.SqueezeExcite),
            ek.DepthwiseConvBNAct(16, 3),
            ek.SqueezeExcite(16),
        )
        randomize(self.eval())


def ours(program: ExportedProgram) -> list[str]:
    return [str(n.target) for n in program.graph.nodes if "effnet_kernels" in str(n.target)]


def stock(program: ExportedProgram) -> bool:
    """Whether all of its calls are of ATen, or of Python on sizes."""
    calls = [n.target for n in program.graph.nodes if n.op == "call_function"]
    return all(str(c).startswith("aten.") or c.__module__ in ("_operator", "torch") for c in calls)


def assert_same(got: Tensor, expected: Tensor, allowed: float = 1e-5) -> None:
    assert got.shape == expected.shape
    assert rms(torch.as_tensor(got) - expected) <= allowed * rms(expected)


def run_fresh(code: str, folder: Path) -> None:
    """Run the code in a process that has torch and that folder."""
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(folder)], check=True, cwd=folder)


@pytest.mark.parametrize("name", daily(NAMES, NAMES[::3]))
def test_decompositions_end_in_stock_ops(name, x):
    model = ek.patch(build(name))
    program = torch.export.export(model, (x,))
    assert len(ours(program)) == len(ek.report(model).patched)
    decomposed = program.run_decompositions()
    assert stock(decomposed)
    with torch.no_grad():
        assert_same(decomposed.module()(x), model(x))


@pytest.mark.parametrize("strict", daily([False, True], [False]))
def test_decomposed_for_every_size(strict):
    model = Blocks()
    with torch.no_grad():
        decomposed = torch.export.export(model, (images(2, 37),), dynamic_shapes=DYNAMIC, strict=strict)
        decomposed = decomposed.run_decompositions()
        assert stock(decomposed)
        for n, height, width in ((1, 33, 64), (3, 40, 34)):
            more = torch.randn(n, 3, height, width)
            assert_same(decomposed.module()(more), model(more))


@in_turns("size, strict", [15, 16], [False, True])
def test_same_padding_of_every_size(strict, size):
    """No padding at all for one size, and some for the next."""
    model = randomize(ek.MBConv(4, 8, 3, stride=2, exp_ratio=2.0, pad_type="same").eval())
    shapes = ({2: Dim("h", min=9), 3: Dim("w", min=9)},)
    with torch.no_grad():
        program = torch.export.export(model, (images(1, size, 4),), dynamic_shapes=shapes, strict=strict)
        decomposed = program.run_decompositions()
        for height in (10, 11):
            for width in (20, 21):
                more = torch.randn(1, 4, height, width)
                assert_same(program.module()(more), model(more))
                assert_same(decomposed.module()(more), model(more))


@pytest.mark.parametrize("dtype", daily([torch.bfloat16, torch.float16, torch.float64], [torch.bfloat16]))
def test_decomposed_in_other_dtypes(dtype):
    model, x = Blocks().to(dtype), images(2, 37).to(dtype)
    with torch.no_grad(), ek.use_backend("reference"):
        decomposed = torch.export.export(model, (x,)).run_decompositions()
        assert stock(decomposed)
        assert_same(decomposed.module()(x), model(x), 4 * torch.finfo(dtype).eps)


@pytest.mark.exhaustive
def test_a_table_without_an_op_keeps_it():
    model, x = Blocks(), images(2, 37)
    kept = torch.ops.effnet_kernels.mbconv.default
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        assert ours(program.run_decompositions({})) == ours(program)
        table = torch.export.default_decompositions()
        del table[kept]
        partly = program.run_decompositions(table)
        assert set(ours(partly)) == {str(kept)}
        assert_same(partly.module()(x), model(x))
    assert stock(program.run_decompositions())


@pytest.mark.exhaustive
def test_compilers_keep_the_ops_after_export_has_decomposed_them():
    model, x = Blocks(), images(2, 37)
    with torch.no_grad():
        count = len(ours(torch.export.export(model, (x,))))
        torch.export.export(model, (x,)).run_decompositions()
        traced: list[str] = []

        def compiler(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
            traced.extend(str(n.target) for n in graph.graph.nodes if "effnet_kernels" in str(n.target))
            return graph

        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        torch._dynamo.reset()
        backend = aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(compiler(graph, inputs)))
        assert_same(torch.compile(model, fullgraph=True, backend=backend)(x), model(x))
        assert len(traced) == count


@pytest.mark.exhaustive
def test_the_first_use_of_a_library_is_not_exported():
    """What a fresh process finds out while it exports is no part of the program."""
    code = """
        import torch, effnet_kernels as ek
        model = ek.MBConv(4, 4, exp_ratio=2.0).eval()
        program = torch.export.export(model, (torch.randn(1, 4, 8, 8),))
        calls = [str(n.target) for n in program.graph.nodes if n.op == "call_function"]
        assert calls == ["effnet_kernels.mbconv.default"], calls
    """
    run_fresh(code, Path(__file__).parents[2])


def test_training_decomposes():
    model = Blocks().train()
    program = torch.export.export(copy.deepcopy(model), (images(2, 37),), dynamic_shapes=({0: Dim("n", min=2)},))
    assert any("conv_block_train" in target for target in ours(program))
    program = program.run_decompositions()
    assert stock(program)
    decomposed, x = program.module(), images(3, 37)
    with torch.no_grad():
        assert_same(decomposed(x), model(x))
    state = dict(decomposed.named_buffers())
    for name, buffer in model.named_buffers():
        assert_same(state[name].double(), buffer.double())


@pytest.mark.exhaustive
def test_forward_and_backward_decompose():
    from torch.export.experimental import _export_forward_backward

    class Loss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).square().mean()

    model, x = Loss(Blocks().train()), images(2, 37)
    joint = _export_forward_backward(torch.export.export(copy.deepcopy(model), (x,)))
    assert any("conv_block_train_backward" in target for target in ours(joint))
    decomposed = joint.run_decompositions()
    assert stock(decomposed)
    signature, exact = decomposed.graph_signature, copy.deepcopy(model).double()
    state = model.state_dict()
    inputs = [x if spec.target is None else state[spec.target].clone() for spec in signature.input_specs]
    outputs = dict(zip([s.arg.name for s in signature.output_specs], decomposed.graph_module(*inputs), strict=True))
    exact(x.double()).backward()
    scale = max(rms(p.grad) for p in exact.parameters())
    for output, name in signature.backward_signature.gradients_to_parameters.items():
        assert rms(outputs[output] - exact.get_parameter(name).grad) <= 1e-5 * scale


@pytest.mark.exhaustive
def test_openvino():
    openvino = pytest.importorskip("openvino")
    model = Blocks()
    with torch.no_grad():
        program = torch.export.export(model, (images(2, 37),), dynamic_shapes=DYNAMIC)
        compiled = openvino.compile_model(openvino.convert_model(program), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        for more in (images(2, 37), torch.randn(1, 3, 40, 34)):
            assert_same(torch.from_numpy(compiled(more.numpy())[0]), model(more))


def test_onnx(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = Blocks()
    with torch.no_grad():
        program = torch.export.export(model, (images(2, 37),), dynamic_shapes=DYNAMIC)
        torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
        session = runtime.InferenceSession(tmp_path / "model.onnx")
        for more in (images(2, 37), torch.randn(1, 3, 40, 34)):
            (got,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
            assert_same(torch.from_numpy(got), model(more))


def test_the_table_of_the_onnx_exporter_has_the_ops(x):
    """Without the package that writes the file: as if it had every op of torch and none of ours."""
    from torch.onnx._internal.exporter._decomp import create_onnx_friendly_decomposition_table

    known = {*torch.export.default_decompositions(), *torch._decomp.decomposition_table}
    known = {op for op in known if getattr(op, "namespace", "") != "effnet_kernels"}
    model = Blocks()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        decomposed = program.run_decompositions(create_onnx_friendly_decomposition_table(known))
        assert stock(decomposed)
        assert_same(decomposed.module()(x), model(x))


_ONLY_TORCH = """
    import sys

    class Nothing:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ("effnet_kernels", "timm", "torchvision"):
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Nothing())
    import torch
    x, y = torch.load("data.pt")
    torch.testing.assert_close(torch.export.load("model.pt2").module()(x), y, rtol=1e-4, atol=1e-5)
"""


def test_a_decomposed_program_needs_only_torch(x, tmp_path):
    model = ek.patch(build("test_efficientnet"))
    with torch.no_grad():
        program = torch.export.export(model, (x,)).run_decompositions()
        torch.export.save(program, tmp_path / "model.pt2")
        torch.save((x, model(x)), tmp_path / "data.pt")
    run_fresh(_ONLY_TORCH, tmp_path)


def test_none_is_an_empty_list(backend):
    """AOTInductor makes None of the lists that are empty."""
    x = images(1, 8, 4).requires_grad_()
    weight, bn = torch.randn(4, 1, 3, 3), [torch.rand(4) + 0.5 for _ in range(4)]
    rest = (weight, bn, 1e-5, [1, 1], [1, 1, 1, 1], "relu")
    project = (torch.randn(8, 4, 1, 1), [torch.rand(8) + 0.5 for _ in range(4)], 1e-5, "identity", False, backend)
    results = []
    for empty in ([], None):
        y = torch.ops.effnet_kernels.mbconv(x, None, empty, 0.0, *rest, empty, "identity", "sigmoid", *project)
        results.append((y, *torch.autograd.grad(y.sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


_PACKAGE = """
    import sys
    sys.path.insert(0, {root!r})
    import torch, effnet_kernels
    model = torch._inductor.aoti_load_package("model.pt2")
    for x, y in torch.load("data.pt"):
        torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    assert "timm" not in sys.modules
"""


@pytest.mark.exhaustive
def test_aot_inductor(tmp_path):
    model = Blocks()
    with torch.no_grad():
        program = torch.export.export(model, (images(2, 37),), dynamic_shapes=DYNAMIC)
        options = {"aot_inductor.compile_wrapper_opt_level": "O0"}
        torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2"), inductor_configs=options
        )
        inputs = images(2, 37), torch.randn(1, 3, 40, 34)
        torch.save([(x, model(x)) for x in inputs], tmp_path / "data.pt")
    run_fresh(_PACKAGE.format(root=str(Path(ek.__file__).parents[1])), tmp_path)
