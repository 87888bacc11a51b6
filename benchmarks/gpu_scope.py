"""How much a run of ``benchmarks.gpu`` measures."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from benchmarks import cases, shapes
from benchmarks.cases import Case
from benchmarks.shapes import OpShape
from effnet_kernels.benchmarking.contenders import CHANNELS_LAST

Network = tuple[str, int, int]  # model, size, batch


class Scope(NamedTuple):
    """How much is measured: what a GPU is bought for, or as little as shows that everything runs."""

    device: str
    dtype: str
    flagship: Network
    models: tuple[Network, ...]
    training: tuple[Network, ...]
    ops: tuple[OpShape, ...]
    batch: int  # of ops and blocks
    blocks: int  # of each kind
    counted: tuple[str, ...]  # blocks of the flagship
    eager: tuple[str, ...]
    backends: tuple[str, ...]  # of ops
    whole: tuple[str, ...]  # of the flagship and of blocks
    networks: tuple[str, ...]  # of the other networks
    seconds: float  # for each contender of each case
    copy_bytes: int
    matrix: int

    def flagship_case(self) -> Case:
        return cases.model_case(*self.flagship, self.dtype, self.device)

    def model_cases(self) -> Iterator[Case]:
        for network in self.models:
            yield cases.model_case(*network, self.dtype, self.device)

    def large_cases(self) -> Iterator[Case]:
        """The models at the batch size of the ops: what kernels are tuned for."""
        yield self.flagship_case()
        yield from (case for case in self.model_cases() if case.batch == self.batch)

    def training_cases(self) -> Iterator[Case]:
        for network in self.training:
            yield cases.training_case(*network, self.dtype, self.device)

    def op_cases(self) -> Iterator[Case]:
        for op in self.ops:
            model = "tf_efficientnetv2_s" if op.kind == "fused" and op.channels[0] > 3 else "efficientnet_b0"
            yield cases.op_case(model, op, 1, self.batch, self.dtype, self.device)

    def block_cases(self) -> Iterator[Case]:
        """Those of the flagship and of a V2 that move the most bytes."""
        flagship, size, _ = self.flagship
        v2 = next((model for model in self.models if "v2" in model[0]), self.flagship)
        for model, side in {flagship: size, v2[0]: v2[1]}.items():
            found = shapes.blocks(model, side)
            for block in shapes.largest(found, self.blocks):
                yield cases.block_case(model, block, found[block], self.batch, self.dtype, self.device)

    def counted_cases(self) -> Iterator[Case]:
        """Those whose kernels are counted: some of the flagship's blocks, and the ops."""
        model, size, batch = self.flagship
        for block, count in shapes.blocks(model, size).items():
            if block.path in self.counted:
                yield cases.block_case(model, block, count, batch, self.dtype, self.device)
        yield from self.op_cases()

    def compiled_cases(self) -> Iterator[Case]:
        """Where torch.compile joins: the flagship, two of the other models, a training step, the others."""
        if self.device == "cpu":
            yield next(self.op_cases())  # a network takes it a minute
            return
        yield self.flagship_case()
        large = (cases.model_case(*network, self.dtype, self.device) for network in self.models if network[2] > 8)
        yield from itertools.islice(large, 2)
        yield next(self.training_cases())
        yield from large


# B0's depthwise convolutions whose maps exceed an L2 of 50 MB at batch 128, one of every other kind, and the dearest
# dense windows: B0's stem and two of V2-S.
OPS = (
    *(OpShape("depthwise", (c, c), size, kernel, stride) for c, size, kernel, stride in (
        (32, 112, 3, 1), (96, 112, 3, 2), (144, 56, 3, 1), (144, 56, 5, 2), (240, 28, 5, 1), (480, 14, 3, 1),
        (672, 14, 5, 1),
    )),
    OpShape("fused", (24, 24), 192, 3, 1), OpShape("fused", (48, 48), 96, 3, 1, 192),
    OpShape("fused", (3, 32), 224, 3, 2), OpShape("pointwise", (16, 96), 112), OpShape("pointwise", (144, 24), 56),
    OpShape("pointwise", (40, 240), 28), OpShape("pointwise", (192, 1152), 7),
    OpShape("squeeze_excite", (96, 4), 56), OpShape("squeeze_excite", (480, 20), 14),
)  # fmt: skip
GPU = Scope(
    device="cuda",
    dtype="float16",
    flagship=("efficientnet_b0", 224, 128),
    models=(
        ("efficientnet_b0", 224, 1), ("tf_efficientnetv2_s", 384, 128), ("efficientnet_b4", 380, 128),
        ("efficientnet_lite0", 224, 128), ("efficientnet_b0", 224, 8),
        *((name, size, batch) for batch in (1, 8) for name, size in (
            ("tf_efficientnetv2_s", 384), ("efficientnet_b4", 380),
        )),
        ("tf_efficientnet_b0", 224, 128), ("tf_efficientnetv2_m", 480, 64), ("efficientnet_b7", 600, 32),
        ("tf_efficientnetv2_l", 480, 64), ("efficientnet_b7", 600, 1),
    ),
    training=(("efficientnet_b0", 224, 128), ("tf_efficientnetv2_s", 300, 64), ("efficientnet_b4", 380, 32)),
    ops=OPS,
    batch=128,
    blocks=4,
    counted=("blocks.1.0", "blocks.5.1"),
    eager=(CHANNELS_LAST,),  # in NCHW every one of these networks is slower still
    backends=("triton", "cuda"),
    whole=("mixed", "triton", "cuda"),
    networks=("mixed",),
    seconds=0.5,
    copy_bytes=1 << 30,
    matrix=8192,
)  # fmt: skip
SMOKE = GPU._replace(
    device="cpu",
    dtype="float32",
    flagship=("test_efficientnet", 32, 2),
    models=(("test_efficientnet", 40, 1),),
    training=(("test_efficientnet", 96, 4),),  # smaller, and gradients are rounding errors
    ops=(OpShape("depthwise", (16, 16), 8, 3, 1), OpShape("fused", (8, 8), 8, 3, 1)),
    batch=2,
    blocks=1,
    counted=(),
    eager=(CHANNELS_LAST,),
    backends=("cpu", "reference"),
    whole=("cpu", "reference"),
    networks=("cpu", "reference"),
    seconds=0.01,
    copy_bytes=1 << 20,
    matrix=64,
)


def scope_of(device: str) -> Scope:
    return GPU if device == "cuda" else SMOKE
