"""Emulated AVX-512 BF16 and AMX against exact arithmetic: a model in integers, rounded by the rules of the manual.

Where the processor has AVX-512 BF16 its own instructions are held against the same model.
"""

import ctypes
import signal
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from tests.bf16 import build
from tests.processor import NATIVE

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

# Numbers are integers, in units that make every product of two normal bfloat16 exact.
UNIT = 300
SMALLEST_NORMAL = 1 << UNIT - 126


EMULATED = ["of_avx2"] if build.lacks("avx512") else ["of_avx2", "of_avx512"]


@pytest.fixture(params=EMULATED)
def emulated(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return build.single_instructions(request.param)


@pytest.fixture(params=[*EMULATED, *(["natively"] if "avx512_bf16" in NATIVE else [])])
def instructions(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return build.single_instructions(request.param)


def rounded(exact: int) -> int:
    """To 24 bits, nearest even, as if the exponent had no lower end; then what is subnormal is zero."""
    magnitude = abs(exact)
    extra = max(magnitude.bit_length() - 24, 0)
    kept, rest, half = magnitude >> extra, magnitude & ((1 << extra) - 1), (1 << extra) >> 1
    result = kept + (rest > half or (rest == half > 0 and kept % 2 == 1)) << extra
    return 0 if result < SMALLEST_NORMAL else result if exact > 0 else -result


def number(value: float) -> int:
    """An operand: a subnormal one counts as zero."""
    numerator, denominator = value.as_integer_ratio()
    exact = (numerator << UNIT) // denominator
    return exact if abs(exact) >= SMALLEST_NORMAL else 0


def multiply_add(total: int, a: float, b: float) -> int:
    return rounded(total + (number(a) * number(b) >> UNIT))


def value(exact: int) -> float:
    return exact / (1 << UNIT)


def halves(words: Tensor) -> tuple[list[float], list[float]]:
    """The lower and the upper bfloat16 of every word."""
    pairs = words.flatten().view(torch.bfloat16).float().view(-1, 2)
    return pairs[:, 0].tolist(), pairs[:, 1].tolist()


def numbers(generator: torch.Generator, exponents: int, shift: int, n: int) -> Tensor:
    """float32 with exponents in a range around ``shift``."""
    scale = shift + torch.randint(-exponents, exponents + 1, (n,), generator=generator)
    return torch.ldexp(torch.randn(n, generator=generator).double(), scale).float()


def words(generator: torch.Generator, exponents: int, shift: int, n: int) -> Tensor:
    return numbers(generator, exponents, shift, 2 * n).bfloat16().view(torch.int32)


# Near one, where orders of summation differ; where products cancel and underflow; where nearly everything does.
SCALES = {"near one": (4, 0), "around the smallest normal number": (4, -63), "below it": (6, -68)}


@pytest.mark.parametrize(("exponents", "shift"), SCALES.values(), ids=SCALES)
def test_vdpbf16ps(exponents, shift, instructions):
    generator = torch.Generator().manual_seed(0)
    other_order = 0
    for _ in range(60):
        a, b = (words(generator, exponents, shift, 16) for _ in range(2))
        total = numbers(generator, exponents, 2 * shift, 16)
        expected = []
        for t, a_low, a_high, b_low, b_high in zip(total.tolist(), *halves(a), *halves(b), strict=True):
            expected.append(value(multiply_add(multiply_add(number(t), a_high, b_high), a_low, b_low)))
            other_order += expected[-1] != value(multiply_add(multiply_add(number(t), a_low, b_low), a_high, b_high))
        instructions.vdpbf16ps(*(ctypes.c_void_p(x.data_ptr()) for x in (total, a, b)))
        assert total.tolist() == expected
    if shift == 0:
        assert other_order > 0, "these operands cannot tell the order of the two products"


def test_vcvtneps2bf16(instructions):
    """All that the top 17 bits can be, with nothing, a little and nearly everything below them."""
    top = torch.arange(2**17, dtype=torch.int64) << 15
    bits = torch.stack([top + below for below in (0, 1, 2**15 - 1)]).flatten()
    values = (bits - (bits >= 2**31).long() * 2**32).int().view(torch.float32).clone()
    got = torch.empty(len(values), dtype=torch.bfloat16)
    for i in range(0, len(values), 16):
        instructions.vcvtneps2bf16(ctypes.c_void_p(values.data_ptr() + 4 * i), ctypes.c_void_p(got.data_ptr() + 2 * i))
    flushed = torch.where(values.abs() < torch.finfo(torch.float32).tiny, values * 0, values)
    expected = flushed.bfloat16()
    same = got.view(torch.int16) == expected.view(torch.int16)
    assert (same | (got.isnan() & values.isnan())).all()


@pytest.mark.parametrize(("rows", "depth", "columns"), [(16, 16, 16), (5, 3, 7), (1, 1, 1), (16, 1, 4), (2, 16, 16)])
@pytest.mark.parametrize(("exponents", "shift"), SCALES.values(), ids=SCALES)
def test_tdpbf16ps(rows, depth, columns, exponents, shift, emulated):
    generator = torch.Generator().manual_seed(rows)
    a, b = (words(generator, exponents, shift, 16 * 16) for _ in range(2))
    total = numbers(generator, exponents, 2 * shift, 16 * 16).view(16, 16)
    a_low, a_high = (torch.tensor(half).view(16, 16).tolist() for half in halves(a))
    b_low, b_high = (torch.tensor(half).view(16, 16).tolist() for half in halves(b))
    expected = torch.zeros(16, 16)  # beyond the shape of the result the register is cleared
    for m in range(rows):
        for n in range(columns):
            lower = upper = 0
            for k in range(depth):
                lower = multiply_add(lower, a_low[m][k], b_low[k][n])
                upper = multiply_add(upper, a_high[m][k], b_high[k][n])
            expected[m, n] = value(rounded(number(total[m, n].item()) + rounded(lower + upper)))
    pointers = (ctypes.c_void_p(x.data_ptr()) for x in (total, a, b))
    emulated.tdpbf16ps(*pointers, rows, depth, columns, columns)
    assert torch.equal(total, expected)


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        ("zero_a_released_tile()", "the tile is not configured"),
        ("tdpbf16ps(buffer, buffer, buffer, 4, 4, 4, 5)", "the shapes of the tiles do not match"),
        ("tdpbf16ps(buffer, buffer, buffer, 17, 4, 4, 4)", "the shape of a tile"),
    ],
)
def test_what_the_processor_refuses_ends_the_process(call, fault, emulated):
    code = f"import ctypes; buffer = ctypes.create_string_buffer(1024); ctypes.CDLL({emulated._name!r}).{call}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (result.returncode, fault in result.stderr) == (-signal.SIGABRT, True), result.stderr
