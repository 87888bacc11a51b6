"""What the compiler made of the bf16 products in the installed library, read from its disassembly."""

import functools
import re
import shutil
import subprocess

import pytest

from effnet_kernels import native

MATRIX_INSTRUCTION = re.compile(r":\s+(vdpbf16ps|vcvtne2?ps2bf16|tdpbf16ps|ldtilecfg|tile)")

# Some names are too long to demangle.
OF_BF16_BUILDS = re.compile("effnet::(avx512_bf16|amx)::|effnet(11avx512_bf16|3amx)")


@functools.cache
def functions() -> dict[str, list[str]]:
    """The instructions of every function of the CPU library."""
    command = ["objdump", "-d", "--demangle", "--no-show-raw-insn", str(native._CPU_LIBRARY)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, list[str]] = {}
    for block in re.split(r"\n\n", text):
        name = re.match(r"\n?[0-9a-f]+ <(.*)>:\n", block)
        if name:
            found[name[1]] = block[name.end() :].splitlines()
    return found


@pytest.fixture(autouse=True)
def disassembler():
    if not native._CPU_LIBRARY.exists():
        pytest.skip("the library was not built")
    if shutil.which("objdump") is None:
        pytest.skip("no objdump")


def built(isa: str) -> bool:
    """Whether the compiler knew the instruction set: the library has a table of kernels for it."""
    return any(name.startswith(f"effnet::kernels_{isa}") for name in functions())


def inner_loop(body: list[str], instruction: str) -> list[str]:
    """The smallest stretch that ends in a jump back to its beginning and has the instruction in it."""
    addresses = [line.split(":")[0].strip() for line in body]
    loops = []
    for end, line in enumerate(body):
        jump = re.search(r"\bj\w+\s+([0-9a-f]+)", line)
        if jump and jump[1] in addresses and addresses.index(jump[1]) < end:
            loop = body[addresses.index(jump[1]) : end + 1]
            if any(instruction in inside for inside in loop):
                loops.append(loop)
    assert loops, f"no loop with {instruction}"
    return min(loops, key=len)


def count(loop: list[str], instruction: str) -> int:
    return sum(re.search(rf":\s+({instruction})\b", line) is not None for line in loop)


def test_only_their_own_builds_have_these_instructions():
    """The dispatcher and the other builds run on processors that know none of them."""
    for name, body in functions().items():
        if not OF_BF16_BUILDS.search(name):
            found = [line for line in body if MATRIX_INSTRUCTION.search(line)]
            assert not found, f"{name}: {found[0]}"


@pytest.mark.parametrize("ahead", ["false", "true"])
def test_the_loop_of_avx512_bf16(ahead):
    """12 rows by 2 vectors, two words: each has 24 products on 12 broadcasts and 2 loads, the sums in registers."""
    if not built("avx512_bf16"):
        pytest.skip("the compiler did not know AVX-512 BF16")
    name = f"effnet::avx512_bf16::microkernel<effnet::bf16, 12, 2, {ahead}>("
    (body,) = (body for function, body in functions().items() if name in function)
    loop = inner_loop(body, "vdpbf16ps")
    assert count(loop, "vdpbf16ps") == 2 * 24
    assert count(loop, "vpbroadcastd") == 2 * 12
    assert count(loop, "vmovup[sd]|vmovdqu\\w*") == 2 * 2
    assert not [line for line in loop if "(%rsp" in line or "(%rbp" in line], "spills"


@pytest.mark.parametrize("cols", [1, 2])
def test_the_loop_of_amx(cols):
    """16 rows by ``cols`` vectors: one tile of A, and a tile of weights and a product for each vector."""
    if not built("amx"):
        pytest.skip("the compiler did not know AMX")
    (body,) = (body for name, body in functions().items() if f"effnet::amx::amx_microkernel<{cols}>(" in name)
    loop = inner_loop(body, "tdpbf16ps")
    assert count(loop, "tdpbf16ps") == cols
    assert count(loop, "tileloadd") == 1 + cols
    assert count(loop, "tilestored") == 0
    assert not [line for line in loop if "(%rsp" in line or "(%rbp" in line], "spills"
