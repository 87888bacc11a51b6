"""``fused_mbconv`` in CUDA: rectangles of output pixels, chunks of expanded channels, parts of the input; and stems."""

import dataclasses
import itertools

import pytest
import torch

from effnet_kernels import functional as F
from tests.cuda.tools import check
from tests.emulation.build import asan_is_loaded
from tests.ops.cases import Fused, cells
from tests.ops.device import native
from tests.ops.inputs import Problem, build, laid_out
from tests.ops.special_values import check_value, each_value
from tests.thinning import in_turns

# A block has up to 128 pixels; chunks are 64 expanded channels; 64 output channels, or 128 in 16 bits.
TILED = [
    Fused(1, (13, 11), cin=20, mid=20, cout=None, residual=True),
    Fused(2, (9, 11), cin=16, mid=40, cout=24, stride=(2, 2), padding="tf"),
    Fused(1, (9, 11), cin=20, mid=100, cout=40, stride=(2, 2), padding="tf"),  # no row of 16 bytes in x
    Fused(1, (9, 18), cin=48, mid=144, cout=48, residual=True),  # three chunks, the last one not full
    Fused(1, (7, 9), cin=32, mid=40, cout=136, kernel=(5, 5), stride=(2, 2)),  # two tiles of outputs
    Fused(1, (8, 9), cin=32, mid=70, cout=66, act="relu6"),
    Fused(1, (24, 25), cin=3, mid=40, cout=None, stride=(2, 2), padding="tf", layout="nchw"),
    Fused(1, (12, 13), cin=15, mid=24, cout=15, residual=True, act="hardswish"),
    Fused(1, (9, 13), cin=16, mid=200, cout=24, kernel=(1, 1)),  # a chunk is one step
    Fused(0, (7, 7), cin=8, mid=24, cout=8),
]
# At 99 KB of shared memory a rectangle holds only a part of these input channels.
PARTS = [
    Fused(1, (11, 13), cin=200, mid=72, cout=70, stride=(2, 2)),
    Fused(1, (9, 9), cin=168, mid=24, cout=None, kernel=(5, 5), stride=(2, 2)),
]
# Those whose weights stay in shared memory, or in registers; tiles are of 8 x 8.
RESIDENT = [
    Fused(3, (17, 9), cin=24, mid=24, cout=None, residual=True),
    Fused(2, (9, 18), cin=32, mid=32, cout=None, residual=True, act="relu"),
    Fused(2, (8, 25), cin=32, mid=16, cout=None, act="hardswish"),
    Fused(2, (33, 18), cin=16, mid=64, cout=32, stride=(2, 2)),
    Fused(3, (35, 17), cin=24, mid=96, cout=48, stride=(2, 2), padding="tf"),
    Fused(2, (17, 10), cin=32, mid=128, cout=32, residual=True),
    Fused(2, (31, 34), cin=32, mid=128, cout=48, stride=(2, 2), padding="tf"),
    Fused(1, (34, 33), cin=32, mid=128, cout=64, stride=(2, 2), padding="none"),
    Fused(3, (17, 15), cin=48, mid=192, cout=48, residual=True),
    Fused(1, (13, 11), cin=48, mid=192, cout=48, padding=(0, 2, 2, 0), residual=True, act="relu6"),
    Fused(2, (9, 9), cin=48, mid=192, cout=48, padding="none", layout="sliced"),
]
# A stem in 16 bits has a kernel of its own: a warp has 16 output columns of a band of rows, and x comes in pieces of 16
# bytes where its rows are NHWC and made of them, else element by element.
HALVES = [torch.float16, torch.bfloat16]
STEM = Fused(2, (37, 72), cin=3, mid=32, cout=None, stride=(2, 2))
STEMS = [
    STEM,
    Fused(2, (36, 72), cin=3, mid=32, cout=None, stride=(2, 2), padding="tf", act="hardswish"),
    Fused(2, (36, 72), cin=3, mid=32, cout=None, stride=(2, 2), padding="tf", layout="nchw"),
    Fused(1, (21, 80), cin=3, mid=24, cout=None, stride=(2, 2), padding="large", act="relu6"),
    Fused(1, (22, 35), cin=3, mid=40, cout=None, stride=(2, 2), layout="nchw", bn16=True),
    Fused(1, (22, 35), cin=3, mid=40, cout=None, stride=(2, 2), padding="tf"),
    Fused(1, (21, 33), cin=3, mid=48, cout=None, stride=(2, 2), padding=(0, 1, 2, 0), layout="transposed"),
    Fused(1, (19, 24), cin=3, mid=64, cout=None, stride=(2, 2), padding="none", layout="sliced", act="identity"),
    Fused(3, (9, 8), cin=3, mid=56, cout=None, stride=(2, 2), padding=(5, 3, 4, 11), layout="expanded"),
    Fused(1, (9, 72), cin=3, mid=7, cout=None, stride=(2, 2), act="relu6"),
    Fused(2, (3, 2), cin=3, mid=33, cout=None, stride=(2, 2), layout="nchw"),
    Fused(2, (1, 1), cin=3, mid=1, cout=None, stride=(2, 2), act="relu"),
    Fused(1, (1, 5), cin=3, mid=32, cout=None, stride=(2, 2)),  # the stride of its one row is odd
    Fused(0, (32, 32), cin=3, mid=32, cout=None, stride=(2, 2)),
]


@pytest.mark.parametrize(("case", "dtype"), cells(TILED))
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_tiles(case, dtype, emulation):
    check(case, dtype, emulation)


@in_turns("case, dtype", RESIDENT, HALVES)
@pytest.mark.usefixtures("poison", "multiprocessors")
@torch.no_grad()
def test_resident_weights(case, dtype, emulation):
    check(case, dtype, emulation)


@torch.no_grad()
def test_strides_of_one_image_change_no_bit():
    problem = build(Fused(1, (9, 9), cin=16, mid=64, cout=32, stride=(2, 2)), torch.float16)
    x = problem.x
    other = dataclasses.replace(problem, args=(x.as_strided(x.shape, (3, *x.stride()[1:])), *problem.args[1:]))
    assert torch.equal(native(other).call("cuda")[0], native(problem).call("cuda")[0])


@in_turns("case, dtype", PARTS, [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_parts_of_the_input_channels(case, dtype, emulation, device):
    check(case, dtype, emulation, seeds=1)


@in_turns("case, dtype", STEMS, HALVES)
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_stems(case, dtype, emulation):
    check(case, dtype, emulation)


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("mid", [24, 64])
@pytest.mark.usefixtures("poison", "multiprocessors")
@torch.no_grad()
def test_a_stem_with_many_places_for_a_warp(mid, layout, emulation):
    check(Fused(9, (17, 72), cin=3, mid=mid, cout=None, stride=(2, 2), layout=layout), torch.float16, emulation)


def moved(x: torch.Tensor, offset: int, gap: int) -> torch.Tensor:
    """x in NHWC, in a buffer of NaN: its storage offset, and how much lies between two rows."""
    n, c, h, w = x.shape
    row = w * c + gap
    stride = (h * row + 8, 1, row, c)
    return torch.full((offset + n * stride[0],), torch.nan, dtype=x.dtype).as_strided(x.shape, stride, offset).copy_(x)


@pytest.mark.parametrize("padding", ["same", "tf", (3, 2, 4, 1)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@torch.no_grad()
def test_bits_of_a_stem(dtype, padding, emulation):
    """They depend neither on how x lies in memory, nor on the batch, nor on how many rows a warp takes."""
    problem = build(dataclasses.replace(STEM, hw=(36, 70), padding=padding), dtype)
    x = problem.x  # 210 elements in a row

    def call(x: torch.Tensor) -> torch.Tensor:
        other: Problem = dataclasses.replace(problem, args=(x, *problem.args[1:]))
        return native(other).call("cuda")[0]

    expected = call(x)
    for layout in ("nchw", "sliced", "transposed"):
        assert torch.equal(call(laid_out(x.contiguous(), layout)), expected)
    for offset, gap in ((1, 0), (1, 6), (8, 6), (8, 2), (4, 6)):  # with (8, 6) rows are aligned to 16 bytes
        assert torch.equal(call(moved(x, offset, gap)), expected)
    for i in range(len(x)):
        assert torch.equal(call(x[i : i + 1]), expected[i : i + 1])
    if emulation is not None:
        emulation.set_device(90, multiprocessors=1)
        try:
            assert torch.equal(call(x), expected)
        finally:
            emulation.set_device(90)


def kernel_of(problem: Problem, emulation) -> str:
    """The name of the kernel that the problem launches, with its parameters."""
    if emulation is None:
        pytest.skip("the emulation tells which kernel has run")
    emulation.count(True)
    try:
        native(problem).call("cuda")
        (kernel,) = {row[0] for row in emulation.costs()}
    finally:
        emulation.count(False)
    return kernel


counters = pytest.mark.skipif(asan_is_loaded(), reason="AddressSanitizer takes the place of the counters")


@counters
@torch.no_grad()
def test_rows_of_16_bytes_of_a_stem_are_copied_as_such(emulation):
    problem = build(STEM, torch.float16)
    x = problem.x
    for image, loader in (
        (x, "Pieces"),
        (moved(x[..., :70], 8, 6), "Pieces"),
        (moved(x, 4, 0), "Elements"),
        (moved(x, 8, 4), "Elements"),
        (x.contiguous(), "Elements"),
        (laid_out(x, "sliced"), "Elements"),
    ):
        kernel = kernel_of(dataclasses.replace(problem, args=(image, *problem.args[1:])), emulation)
        assert "stem_kernel" in kernel
        assert loader in kernel


@counters
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (STEM, torch.float32),
        (dataclasses.replace(STEM, cin=4), torch.float16),
        (dataclasses.replace(STEM, mid=65), torch.float16),
        (dataclasses.replace(STEM, cout=8), torch.float16),
        (dataclasses.replace(STEM, kernel=(5, 5)), torch.float16),
        (dataclasses.replace(STEM, stride=(2, 1)), torch.float16),
        (dataclasses.replace(STEM, stride=(1, 1), mid=3, residual=True), torch.float16),
    ],
    ids=str,
)
@torch.no_grad()
def test_what_is_no_stem_has_the_general_kernel(case, dtype, emulation):
    assert "fused_mbconv_kernel" in kernel_of(build(case, dtype), emulation)


@each_value
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Fused(2, (5, 6), cin=17, mid=19, cout=18),
        Fused(2, (5, 6), cin=17, mid=19, cout=18, act="relu"),
        Fused(2, (5, 6), cin=3, mid=19, cout=None, act="relu"),
        Fused(2, (5, 40), cin=3, mid=24, cout=None, stride=(2, 2)),
        Fused(2, (6, 40), cin=3, mid=19, cout=None, stride=(2, 2), padding="tf", act="relu"),
        Fused(2, (6, 7), cin=3, mid=19, cout=None, stride=(2, 2), padding=(1, 1, 0, 1), layout="nchw", act="relu"),
    ],
    ids=str,
)
@torch.no_grad()
def test_a_value_that_is_not_finite_goes_where_stock_lets_it_go(case, value, dtype):
    check_value(native(build(case, dtype)), value, "cuda")


@each_value
@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("padding", ["same", "tf"])
@torch.no_grad()
def test_a_stem_leaves_a_value_that_is_not_finite_to_its_windows(padding, layout, value):
    """In every channel, in odd and even rows and columns: the pairs of a product hold values of one window."""
    case = Fused(13, (6, 40), "relu", layout, cin=3, mid=24, cout=None, stride=(2, 2), padding=padding)
    problem = native(build(case, torch.float16))
    (clean,), (exact_clean,) = problem.call("cuda"), problem.call("reference", torch.float64)
    for image, place in enumerate(itertools.product(range(3), (2, 3), (8, 9))):
        problem.x[(image, *place)] = value
    (got,), (exact,) = problem.call("cuda"), problem.call("reference", torch.float64)
    assert torch.equal(got.isnan(), exact.isnan())
    assert torch.equal(got.isinf(), exact.isinf())
    same = exact == exact_clean
    assert torch.equal(got[same], clean[same])
    assert same[-1].all()
    assert not same[:-1].flatten(1).all(1).any()


@torch.no_grad()
def test_a_window_too_large_for_shared_memory_is_refused(device):
    """By name, before anything runs."""
    problem = native(build(Fused(1, (99, 99), cin=16, mid=16, cout=16, kernel=(99, 99), padding="none"), torch.float32))
    with pytest.raises(RuntimeError, match="fused_mbconv: the window of one output pixel does not fit"):
        problem.call("cuda")


@torch.no_grad()
def test_one_launch(emulation):
    """A block is one kernel, and a planar image costs a stem no pass."""
    if emulation is None:
        pytest.skip("launches are counted by the emulation")
    problem = build(Fused(1, (8, 9), cin=3, mid=12, cout=None, stride=(2, 2), layout="nchw"), torch.float32)
    emulation.set_seed(0)
    F.fused_mbconv(*problem.args, **problem.kwargs, backend="cuda")
    assert emulation.launches() == 1
