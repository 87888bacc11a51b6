"""Plain AVX-512 as emulated on AVX2, and as the processor has it where it does, against exact arithmetic."""

import ctypes
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from tests.bf16 import build
from tests.guarded import guarded

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))

NAN, INF = math.nan, math.inf
LARGEST = torch.finfo(torch.float32).max
ODD = [0.0, -0.0, 1.0, -1.0, 1e-40, -1e-40, LARGEST, -LARGEST, INF, -INF, NAN]
pairs = [(a, b) for a in ODD for b in ODD]


@pytest.fixture(params=["of_avx2"] if build.lacks("avx512") else ["of_avx2", "of_avx512"])
def instructions(request: pytest.FixtureRequest) -> ctypes.CDLL:
    return build.single_instructions(request.param)


def address(x: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


def bits(x: Tensor) -> list[int]:
    return x.view({2: torch.int16, 4: torch.int32}[x.itemsize]).tolist()


def in_sixteens(instruction, result: Tensor, *operands: Tensor) -> Tensor:
    """What an instruction makes of whole vectors, into ``result``."""
    for i in range(0, len(result), 16):
        instruction(*(address(x[i:]) for x in (*operands, result)))
    return result


def filled(values: list[float]) -> Tensor:
    """In whole vectors."""
    return torch.tensor([*values, *[1.0] * (-len(values) % 16)])


def to_float32(exact: Fraction, down: bool) -> float:
    """Rounded once: down, or to the nearest, even of two."""
    if exact == 0:
        return 0.0
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length()  # the denominator is a power of two
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    units = math.floor(exact / unit) if down else round(exact / unit)
    value = float(units * unit)
    if abs(value) <= LARGEST:
        return value
    return LARGEST if value > 0 and down else math.copysign(INF, value)


# Near one; where results and operands are subnormal; where results overflow; where one term is tiny beside the other.
SCALES = {"near one": (4, 0, 0), "tiny": (8, -70, -140), "huge": (4, 62, 125), "far apart": (40, 0, 0)}


@pytest.mark.parametrize(("exponents", "factors", "term"), SCALES.values(), ids=SCALES)
def test_multiplication_with_addition(exponents, factors, term, instructions):
    """One after the other on the same operands: the one that rounds down leaves the others as they were."""
    generator = torch.Generator().manual_seed(0)

    def numbers(shift: int) -> Tensor:
        scale = shift + torch.randint(-exponents, exponents + 1, (16,), generator=generator)
        return torch.ldexp(torch.randn(16, generator=generator).double(), scale).clamp(-LARGEST, LARGEST).float()

    differ = 0
    for _ in range(60):
        a, b, c = numbers(factors), numbers(factors), numbers(term)
        down, nearest, minus = (
            in_sixteens(getattr(instructions, name), c.clone(), a, b).tolist()
            for name in ("vfmadd_down", "vfmadd", "vfmsub")
        )
        for i in range(16):
            product, addend = Fraction(a[i].item()) * Fraction(b[i].item()), Fraction(c[i].item())
            assert down[i] == to_float32(product + addend, down=True)
            assert nearest[i] == to_float32(product + addend, down=False)
            assert minus[i] == to_float32(product - addend, down=False)
        differ += down != nearest
    assert differ > 0, "these operands cannot tell the roundings"


def test_not_a_number_stays_one_when_rounded_down(instructions):
    a = filled([NAN, INF, 1.0, 1.0])
    c = filled([1.0, -INF, NAN, -INF])
    got = in_sixteens(instructions.vfmadd_down, c, a, torch.ones(16)).tolist()
    assert [math.isnan(x) for x in got[:3]] == [True] * 3
    assert got[3:] == [-INF] + [2.0] * 12


def test_the_second_operand_wins(instructions):
    """Of two equal ones, and of two that cannot be compared."""
    a, b = (filled(list(operands)) for operands in zip(*pairs, strict=True))
    less, greater = (in_sixteens(f, torch.empty_like(a), a, b) for f in (instructions.vminps, instructions.vmaxps))
    assert bits(less) == bits(a.where(a < b, b))
    assert bits(greater) == bits(a.where(a > b, b))


def test_permutations(instructions):
    """By the last four bits of an index, whatever is above them."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        index = torch.randint(-(2**31), 2**31, (16,), generator=generator).int()
        words = torch.randint(-(2**31), 2**31, (16,), generator=generator).int()
        numbers = torch.randn(16, generator=generator)
        assert torch.equal(in_sixteens(instructions.vpermd, torch.empty_like(words), index, words), words[index & 15])
        got = in_sixteens(instructions.vpermps, torch.empty_like(numbers), index, numbers)
        assert torch.equal(got, numbers[index & 15])


def test_products_of_the_lower_halves(instructions):
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        a, b = (torch.randint(-(2**63), 2**63 - 1, (8,), generator=generator) for _ in range(2))
        got = torch.empty_like(a)
        instructions.vpmuludq(address(a), address(b), address(got))
        lower = ((x % 2**32, y % 2**32) for x, y in zip(a.tolist(), b.tolist(), strict=True))
        assert [x % 2**64 for x in got.tolist()] == [x * y for x, y in lower]


def test_approximate_reciprocal(instructions):
    generator = torch.Generator().manual_seed(0)
    x = torch.ldexp(1 + torch.rand(2**16, generator=generator), torch.arange(2**16) % 250 - 125)
    x = x.where(torch.arange(2**16) % 3 > 0, -x)
    got = in_sixteens(instructions.vrcp14ps, torch.empty_like(x), x)
    error = (got.double() * x.double() - 1).abs().max()
    assert 0 < error <= 2.0**-14
    x = filled([0.0, -0.0, INF, -INF, NAN, 0.5, -4.0])
    expected = [INF, -INF, 0.0, -0.0, NAN, 2.0, -0.25]
    got = in_sixteens(instructions.vrcp14ps, torch.empty_like(x), x)[:7]
    assert str(got.tolist()) == str(expected)


def test_what_rounding_down_leaves(instructions):
    generator = torch.Generator().manual_seed(0)
    x = torch.ldexp(torch.randn(2**12, generator=generator), torch.arange(2**12) % 40 - 8)
    got = in_sixteens(instructions.vreduceps_down, torch.empty_like(x), x)
    assert torch.equal(got, (x.double() - x.double().floor()).float())
    x = filled([INF, -INF, NAN, 3.0, -1.25])
    got = in_sixteens(instructions.vreduceps_down, torch.empty_like(x), x)[:5]
    assert str(got.tolist()) == str([0.0, 0.0, NAN, 0.0, 0.75])


def test_powers_of_two(instructions):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2**12, generator=generator)
    b = 100 * torch.randn(2**12, generator=generator)
    got = in_sixteens(instructions.vscalefps, torch.empty_like(a), a, b)
    expected = [
        to_float32(Fraction(x) * Fraction(2) ** math.floor(y), down=False)
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]
    assert got.tolist() == expected
    a, b = filled([1.0, 1.0, 1.0, NAN]), filled([INF, -INF, NAN, 1.0])
    got = in_sixteens(instructions.vscalefps, torch.empty_like(a), a, b)[:4]
    assert str(got.tolist()) == str([INF, 0.0, NAN, NAN])


def test_every_float16(instructions):
    halves = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16)
    got = in_sixteens(instructions.vcvtph2ps, torch.empty(2**16), halves)
    expected = halves.float()
    assert torch.equal(got.isnan(), expected.isnan())
    assert bits(got[~got.isnan()]) == bits(expected[~expected.isnan()])


def test_rounding_to_float16(instructions):
    """All that the top 20 bits can be, so that middles are among them, with nothing, a little and much below them."""
    top = torch.arange(-(2**19), 2**19) << 12
    for below in (0, 1, 2**12 - 1):
        x = (top + below).int().view(torch.float32)
        got = in_sixteens(instructions.vcvtps2ph, torch.empty(len(x), dtype=torch.float16), x)
        assert ((got.view(torch.int16) == x.half().view(torch.int16)) | (got.isnan() & x.isnan())).all()


@pytest.mark.parametrize("at_end", [False, True], ids=["front", "back"])
def test_masked_access(at_end, instructions):
    """Other lanes are zero in a register, untouched in memory, and may be where no memory is."""
    whole, other = torch.arange(1.0, 17.0), torch.arange(-16.0, 0.0)
    for n in range(1, 17):
        # The first n lanes in front of a forbidden page, or the last n behind one.
        lanes = torch.arange(16) < n if at_end else torch.arange(16) >= 16 - n
        mask = sum(1 << i for i in range(16) if lanes[i])
        before = 0 if at_end else 4 * (16 - n)
        inside, got = guarded(whole[:n].clone(), at_end), torch.empty(16)
        instructions.load_masked(ctypes.c_void_p(inside.data_ptr() - before), mask, address(got))
        expected = torch.zeros(16)
        expected[lanes] = whole[:n]
        assert torch.equal(got, expected)
        instructions.store_masked(address(other), mask, ctypes.c_void_p(inside.data_ptr() - before))
        assert torch.equal(inside, other[lanes])
    for mask in (0, 1, 0x8000, 0x5555, 0xF00F):
        got = torch.full((16,), 100.0)
        instructions.store_masked(address(whole), mask, address(got))
        assert got.tolist() == [whole[i].item() if mask >> i & 1 else 100.0 for i in range(16)]
