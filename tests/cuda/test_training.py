"""The depthwise convolution in training: blocks against float64 by the criterion of tests/training/blocks.py."""

import pytest
import torch

from effnet_kernels.dispatch import Query, implementation
from effnet_kernels.functional import BatchNorm
from effnet_kernels.ops import train_reference as reference
from effnet_kernels.ops.native_cuda import KERNELS, STRIDES
from effnet_kernels.training import ConvBNAct, conv_block
from tests.ops.cases import DTYPES
from tests.ops.device import DEVICE, on_device
from tests.thinning import in_turns
from tests.training.blocks import CASES, Case, assert_as_accurate, build, cells
from tests.training.test_conv_block import subset

pytestmark = pytest.mark.usefixtures("poison")
SAME = {3: (1, 1, 1, 1), 5: (1, 2, 2, 2), 7: (3, 3, 2, 3)}  # and a little off


@pytest.fixture(autouse=True)
def only_the_kernels(monkeypatch):
    """Where a test asks for the kernels, the reference must not do their work."""
    convolve, backward = reference.convolve, reference.convolve_backward

    def refuse(layer, channels):
        w = layer.weight
        compiled = w.shape[:2] == (channels, 1) and w.shape[2:] in KERNELS and layer.stride in STRIDES
        assert not compiled or channels == 1, "a kernel was there for it"

    def checked_convolve(a, layer):
        refuse(layer, a.shape[1])
        return convolve(a, layer)

    def checked_backward(dy, a, through):
        refuse(through.layer, through.size[1])
        return backward(dy, a, through)

    monkeypatch.setattr(reference, "convolve", checked_convolve)
    monkeypatch.setattr(reference, "convolve_backward", checked_backward)


# A depthwise layer in front of the last one, without gate in front of it.
HERE = [case for case in CASES if "d" in case.kinds and not (case.se and case.kinds[-1] == "d")]


@pytest.mark.parametrize(("case", "dtype"), cells(HERE, DTYPES))
def test_gradients(case, dtype):
    assert_as_accurate(build(case, dtype), dtype, "cuda")


@in_turns("dtype, kernel, stride", DTYPES, (3, 5, 7), (1, 2))
def test_every_instance(dtype, kernel, stride):
    """Vectors of channels and single ones, every activation on either side, images of odd sizes, one image."""
    acts = ["silu", "identity"] if dtype != torch.float32 else ["silu", "identity", "relu", "relu6", "hardswish"]
    for i, act in enumerate(acts):
        for c in (20, 19):
            case = Case(
                "pd", (4, c, c), 1 + c % 2, (13, 9), (kernel, kernel), stride, SAME[kernel], act, acts[i - 1],
                frozen=("", "0", "1")[i % 3],
            )  # fmt: skip
            assert_as_accurate(build(case, dtype), dtype, "cuda")


IMAGES_TOGETHER = Case("dp", (4, 4, 4), 2100, (2, 5), se=True)  # two to a block, each with its gate
# Several blocks each way, more than one chunk of channels.
TILED = [
    Case("d", (36, 36), 3, (41, 70), last_act="silu"),
    Case("d", (70, 70), 2, (37, 67), (5, 5), 2, (1, 2, 1, 2), last_act="silu"),
    Case("d", (8, 8), 5, (67, 5), (3, 3), 2, (0, 1, 0, 1), last_act="silu"),
    Case("d", (1032, 1032), 3, (7, 7), (3, 3), last_act="silu"),
    Case("d", (3, 3), 1, (12, 300), (7, 7), 1, (3, 3, 3, 3), last_act="silu"),
    IMAGES_TOGETHER,
    Case("d", (4, 4), 2, (5, 4), (3, 3), 2, (7, 9, 11, 8), last_act="silu"),
]


@pytest.mark.parametrize("case", TILED, ids=str)
def test_many_blocks_and_the_same_bits_in_any_order(case, emulation):
    for dtype in (torch.float32, torch.bfloat16):
        problem = build(case, dtype)
        assert_as_accurate(problem, dtype, "cuda")
    results = []
    for seed in range(2):
        if emulation is not None:
            emulation.set_seed(seed)
        results.append(problem.to(torch.bfloat16, torch.float32).run("cuda"))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="leaves of the problem are on the CPU")
@pytest.mark.parametrize("frozen", ["", "01"])
def test_any_single_gradient(frozen):
    case = Case("pd", (5, 17, 17), frozen=frozen)
    for i in range(len(build(case).leaves())):
        subset(build(case).to(torch.float32, torch.float32), [i], "cuda")


@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_statistics_far_from_zero(offset):
    """A variance by mean of squares minus square of mean would be noise here."""
    x = torch.randn(4, 9, 20, 21, generator=torch.Generator().manual_seed(0)) + offset
    weight = torch.zeros(9, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    bn = BatchNorm(torch.ones(9), torch.zeros(9), torch.zeros(9), torch.ones(9))
    layer = on_device(ConvBNAct(weight, bn, padding=0))
    _, (statistics,) = conv_block(on_device(x), [layer], backend="cuda")
    var, mean = torch.var_mean(x[:, :, 1:-1, 1:-1].double(), (0, 2, 3), correction=0)
    torch.testing.assert_close(statistics.cpu().double(), torch.stack([mean, var]), rtol=2e-6, atol=0)


def test_large_values_in_half_precision():
    """Finite wherever float32 is."""
    case = Case("pdp", (5, 17, 17, 7), scale=1e4, se=True)
    results = build(case, torch.float16).to(torch.float16, torch.float32).run("cuda")
    assert all(torch.isfinite(t).all() for t in results)


def test_an_empty_batch_has_gradients_of_zero():
    p = build(Case("d", (8, 8), frozen="0", last_act="silu"))
    p.x, p.grad = p.x[:0], p.grad[:0]
    for got in p.to(torch.float32, torch.float32).run("cuda")[2:]:
        assert (got == 0).all()


def test_what_is_not_compiled_is_a_reason():
    device = on_device(torch.zeros(1)).device.type
    implementation(Query("conv_block_train", device, torch.float16), "cuda")
    with pytest.raises(RuntimeError, match="only float32, float16 and bfloat16 have CUDA kernels"):
        implementation(Query("conv_block_train", device, torch.float64), "cuda")


def test_bad_arguments():
    native = torch.ops.effnet_kernels_cuda
    x, weight = on_device(torch.zeros(2, 8, 5, 5).to(memory_format=torch.channels_last)), torch.zeros(8, 1, 3, 3)
    weight, out, vectors = on_device(weight), torch.empty_like(x), on_device(torch.ones(4, 8))
    with pytest.raises(RuntimeError, match="x_norm must have size 4"):
        native.train_depthwise(out, None, x, vectors[:2], "silu", weight, [1, 1], [1, 1, 1, 1])
    with pytest.raises(RuntimeError, match="weight must be 3x3, 5x5 or 7x7"):
        native.train_depthwise(out, None, x, None, "silu", weight[:, :, :1, :1].contiguous(), [1, 1], [0] * 4)

    def backward(dx=None, dweight=None, raw=x, act="silu", source=x, norm=None, stride=1):
        native.train_depthwise_backward(
            dx, dweight, None, x, raw, vectors, act, None, None, vectors[:3], source, norm, "silu", weight,
            x.shape, [stride] * 2, [1] * 4,
        )  # fmt: skip

    backward(torch.empty_like(x), torch.empty_like(weight))
    for message, arguments in {
        "the derivative of act needs raw": {"raw": None},
        "gates are no activations": {"act": "sigmoid"},
        "dweight and x_norm need x": {"dweight": torch.empty_like(weight), "source": None},
        "grad must have size 3": {"stride": 2},
        "dx must be dense": {"dx": torch.empty_like(x, memory_format=torch.contiguous_format)},
        "dweight must have the dtype": {"dweight": weight.half()},
    }.items():
        with pytest.raises(RuntimeError, match=message):
            backward(**arguments)
