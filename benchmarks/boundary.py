"""What a call costs in Python, per op and per block: the eager boundary that small batches pay.

    python -m benchmarks.boundary

On a GPU it is the time until the call returns, kernels running on behind it. Without one the Triton ops run on CPU
tensors and enqueueing is replaced by nothing: what is left is all that the package itself does.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch

import effnet_kernels as ek
import effnet_kernels.functional as F
from effnet_kernels.benchmarking.environment import describe, environment
from effnet_kernels.benchmarking.models import create_model
from effnet_kernels.benchmarking.tables import text_table
from effnet_kernels.dispatch import assume
from effnet_kernels.ops import triton_common

ROUNDS, CALLS = 50, 40


def bn(channels: int, device: str) -> F.BatchNorm:
    return F.BatchNorm(*(torch.ones(channels, device=device) for _ in range(4)))


def calls(device: str) -> dict[str, Callable[[], object]]:
    """One call of each op, as small as can be, arguments as a patched model gives them."""

    def half(*shape: int) -> torch.Tensor:
        x = torch.empty(shape, dtype=torch.float16, device=device)
        return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x

    x, wide, mean = half(1, 64, 4, 4), bn(64, device), torch.ones(1, 64, device=device)
    one, dw, dense = half(64, 64, 1, 1), half(64, 1, 3, 3), half(64, 64, 3, 3)
    se = F.SqueezeExciteWeights(half(16, 64, 1, 1), half(16), half(64, 16, 1, 1), half(64))
    conv, depthwise = F.ConvBN(one, wide), F.ConvBN(dw, wide)
    block = ek.MBConv(64, 64, exp_ratio=1.0, se_layer=ek.SqueezeExcite, device=device, dtype=torch.float16).eval()
    found: dict[str, Callable[[], object]] = {
        "pointwise_conv_bn_act": lambda: F.pointwise_conv_bn_act(x, one, wide),
        "depthwise_conv_bn_act": lambda: F.depthwise_conv_bn_act(x, dw, wide),
        "squeeze_excite_gate": lambda: F.squeeze_excite_gate(mean, se),
        "squeeze_excite": lambda: F.squeeze_excite(x, se),
        "fused_mbconv": lambda: F.fused_mbconv(x, F.ConvBN(dense, wide), conv, residual=True),
        "mbconv": lambda: F.mbconv(x, conv, depthwise, se, conv, residual=True),
        "mbconv, from its modules": lambda: block(x),
    }
    if device == "cuda":  # only there a forward can be captured
        image = half(1, 3, 224, 224)
        for words, frozen in (("", False), (", frozen", True)):
            model = create_model("efficientnet_b0").to(device, torch.float16, memory_format=torch.channels_last)  # type: ignore[call-overload]
            found[f"efficientnet_b0 @224{words}"] = functools.partial(ek.patch(model, frozen=frozen), image)
    return found


@contextlib.contextmanager
def enqueueing_left_out() -> Iterator[None]:
    class Everything(dict):
        def get(self, key: object, default: object = None) -> tuple[object, ...]:
            hash(key)
            return compiled

    def nothing(*arguments: object) -> None:
        pass

    compiled = (None, nothing, None, None, nothing)
    with contextlib.ExitStack() as patches:
        for owner, name, value in (
            (triton_common, "_compiled", Everything()),
            (triton_common, "arch", lambda device: 90),
            (torch.cuda, "current_device", lambda: -1),
            (torch.cuda, "get_device_name", lambda device: "none"),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.enter_context(assume("triton"))
        yield


@torch.inference_mode()
def main() -> None:
    if triton_common.INTERPRETED:
        raise SystemExit("unset TRITON_INTERPRET: it measures the interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    with ek.use_backend("triton") if device == "cuda" else enqueueing_left_out():
        for name, call in calls(device).items():
            call()
            rounds = []
            for _ in range(ROUNDS):
                start = time.perf_counter()
                for _ in range(CALLS):
                    call()
                rounds.append((time.perf_counter() - start) / CALLS)
                if device == "cuda":
                    torch.cuda.synchronize()
            rows.append((name, f"{statistics.median(rounds) * 1e6:.1f}", f"{min(rounds) * 1e6:.1f}"))
    print(text_table(("op", "us, median", "us, least"), rows))
    print(f"{'kernels enqueued' if device == 'cuda' else 'enqueueing left out'}; {describe(environment(device))}")


if __name__ == "__main__":
    main()
