"""Squeeze-and-excitation on its own: ``x * squeeze_excite_gate(mean(x))``."""

from collections.abc import Sequence

from torch import Tensor

from effnet_kernels.ops import native_cpu, native_cuda, squeeze_excite_gate
from effnet_kernels.ops.common import empty_nhwc, register, to_nhwc, wide


def reference(
    x: Tensor,  # [N, C, H, W]
    se: Sequence[Tensor],  # w_reduce [R, C, 1, 1], b_reduce [R], w_expand [C, R, 1, 1], b_expand [C]
    act: str,
    gate: str,
) -> Tensor:  # [N, C, H, W]
    scale = squeeze_excite_gate.reference(wide(x).mean((2, 3)), se, act, gate)
    return to_nhwc((wide(x) * scale[:, :, None, None]).to(x.dtype))


def fake(x, se, act, gate) -> Tensor:  # type: ignore[no-untyped-def]
    return empty_nhwc(x, x.shape[1], x.shape[2], x.shape[3])


op = register(
    "squeeze_excite(Tensor x, Tensor[] se, str act, str gate, str backend) -> Tensor",
    fake=fake,
    reference=reference,
)
cpu = native_cpu.bind("squeeze_excite", fake)
cuda = native_cuda.bind("squeeze_excite", fake)
