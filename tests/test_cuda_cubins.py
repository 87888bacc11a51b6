"""What the machine code of the CUDA library must look like, read from the library with Triton's cuobjdump.

It is checked for the GPUs that the library was built for;
`TORCH_CUDA_ARCH_LIST="8.0 8.6 8.9 9.0a 10.0a 12.0" make build` builds it for all.
"""

import functools
import importlib.util
import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from effnet_kernels import native
from tests.emulation import build

TRITON = importlib.util.find_spec("triton")
pytestmark = [
    pytest.mark.skipif(not native._CUDA_LIBRARY.exists(), reason="the CUDA library is not built"),
    pytest.mark.skipif(TRITON is None, reason="cuobjdump comes with Triton"),
]
# Of one multiprocessor.
REGISTERS = 65536


class Kernel(NamedTuple):
    architecture: str
    name: str  # mangled
    registers: int
    local: int  # bytes a thread: spilled registers, and arrays that found none
    shared: int  # bytes a block, static
    instructions: tuple[tuple[int, str], ...]  # address, text

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, _opcode(text)) for _, text in self.instructions)


def _cuobjdump(option: str) -> str:
    tool = Path(TRITON.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, option, native._CUDA_LIBRARY]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+ ", "", text).split()[0]


@functools.cache
def kernels() -> list[Kernel]:
    usage = {}
    architecture = ""
    for line in _cuobjdump("-res-usage").splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function (\S+):", line):
            name = found[1]
        elif found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            usage[architecture, name] = registers, stack + local, shared
    code: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for line in _cuobjdump("-sass").splitlines():
        if found := re.search(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(r"Function : (\S+)", line):
            name = found[1]
            code[architecture, name] = []
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", line):
            code[architecture, name].append((int(found[1], 16), found[2]))
    assert set(usage) == set(code)
    return [Kernel(*key, *usage[key], tuple(code[key])) for key in usage]


def _without_file(name: str) -> str:
    """A mangled name less that of the anonymous namespace, in which nvcc names the file and g++ does not."""
    found = re.search(r"(\d+)(?=_GLOBAL__N_)", name)
    return name if found is None else name[: found.start()] + name[found.end() + int(found[1]) :]


@functools.cache
def launch_bounds() -> dict[str, tuple[int, int]]:
    """The ``__launch_bounds__`` of the kernels, threads and blocks, as the emulation has recorded them."""
    emulation = build.load()
    (library,) = Path(emulation.__file__).parent.glob("lib*.so")
    listed = subprocess.run(["nm", library], check=True, capture_output=True, text=True).stdout
    found = re.findall(r"^(\w+) [tT] (\w+)$", listed, re.MULTILINE)
    bounds = {_without_file(name): emulation.launch_bounds(int(address, 16)) for address, name in found}
    return {name: of for name, of in bounds.items() if of[0] > 0}


def too_many_registers(bounds: dict[str, tuple[int, int]]) -> list[str]:
    """The kernels that a multiprocessor has no registers for, in as many blocks and threads."""
    found = []
    for kernel in kernels():
        threads, blocks = bounds[_without_file(kernel.name)]
        if kernel.architecture.startswith("sm_8") and re.search(r"8BackwardI\w*Li[57]ELi1ELi\dE", kernel.name):
            blocks = 2  # by __CUDA_ARCH__, which the emulation does not have
        if -(-kernel.registers // 8) * 8 * threads * max(blocks, 1) > REGISTERS:
            found.append(f"{kernel.architecture} {kernel.name}: {kernel.registers} registers")
    return found


def named(pattern: str) -> list[tuple[Kernel, re.Match[str]]]:
    """The kernels whose mangled name has a match of the pattern; at least one."""
    found = [(kernel, match) for kernel in kernels() if (match := re.search(pattern, kernel.name))]
    assert found, f"no kernel is named {pattern}"
    return found


def blocks(instructions: tuple[tuple[int, str], ...]) -> list[tuple[int, list[str], list[int]]]:
    """Basic blocks in order: address, instructions, addresses of what may follow."""
    targets = {}
    for address, text in instructions:
        if _opcode(text).split(".")[0] == "BRA" and (found := re.findall(r"0x[0-9a-f]+", text)):
            targets[address] = int(found[-1], 16)
    ends = {a for a, text in instructions if _opcode(text).split(".")[0] in ("BRA", "BRX", "EXIT", "RET")}
    starts = {instructions[0][0], *targets.values()}
    starts |= {b for (a, _), (b, _) in itertools.pairwise(instructions) if a in ends}
    result: list[tuple[int, list[str], list[int]]] = []
    previous = 0
    for i, (address, text) in enumerate(instructions):
        if address in starts:
            if result and previous not in ends:
                result[-1][2].append(address)
            result.append((address, [], []))
        result[-1][1].append(text)
        if address in targets:
            result[-1][2].append(targets[address])
        # BRA.DIV is for warps that are not together.
        conditional = text.startswith("@") or re.search(r"BRA(\.\S+)? !?U?P\d|BRA\.DIV", text)
        if address in ends and conditional and "BRX" not in text and i + 1 < len(instructions):
            result[-1][2].append(instructions[i + 1][0])
        previous = address
    return result


def busiest_path(kernel: Kernel, loads: int, stores: int) -> list[str]:
    """The instructions of one iteration of the longest loop, on the path that multiplies most.

    Of the paths with that many loads from and stores to global memory; the shortest, where several multiply as much.
    That is an iteration in the middle of a map, without sums to write, with SiLU: the other activations have no
    reciprocal.
    """
    found = blocks(kernel.instructions)
    begin, end = max(
        ((target, address) for address, _, following in found for target in following if target <= address),
        key=lambda loop: loop[1] - loop[0],
    )
    body = [block for block in found if begin <= block[0] <= end]
    reached = {target for _, _, following in body for target in following}
    # From a block to the end of the iteration, by loads and stores on the way: reciprocals, multiplications, path.
    best: dict[int, dict[tuple[int, int], tuple[int, int, int, list[str]]]] = {}
    for address, texts, following in reversed(body):
        if _opcode(texts[-1]).startswith("BRX"):  # the cases of a switch: what nothing else leads to
            following = [a for a, _, _ in body if a > address and a not in reached]
        tails = [tail for a in following if a > address for tail in best.get(a, {}).items()]
        if begin in following or address == body[-1][0]:
            tails.append(((0, 0), (0, 0, 0, [])))
        ldg, stg, mufu, multiply = (
            sum(_opcode(t).startswith(op) for t in texts) for op in ("LDG", "STG", "MUFU", ("FFMA", "FMUL"))
        )
        best[address] = {}
        for (loaded, stored), (reciprocals, multiplied, negative_length, tail) in tails:
            key = (loaded + ldg, stored + stg)
            candidate = (reciprocals + mufu, multiplied + multiply, negative_length - len(texts), texts + tail)
            best[address][key] = max(best[address].get(key, candidate), candidate, key=lambda each: each[:3])
    return best[begin][loads, stores][3]


DEPTHWISE = r"16depthwise_kernelI\w*6TraitsIfLi(\d)ELi(\d)ELi(\d)ELi(\d)ELi(\d)E"


def test_no_kernel_uses_local_memory():
    wrong = [f"{k.architecture} {k.name}: {k.local} bytes" for k in kernels() if k.local or k.has("LDL|STL")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
def test_a_multiprocessor_has_registers_for_the_blocks_that_a_kernel_is_bounded_to():
    """Which launches keep to the bounds the emulation sees."""
    bounds = launch_bounds()
    assert {_without_file(kernel.name) for kernel in kernels()} == set(bounds)
    wrong = too_many_registers(bounds)
    assert not wrong, "\n".join(wrong)
    assert too_many_registers({name: (threads, blocks + 1) for name, (threads, blocks) in bounds.items()})


def test_no_condition_has_lost_its_negations():
    """ptxas of CUDA 12.8 to 13.0 can make `a || (b && c)` of `a || bits == 0`, the bits being those of b and c.

    Right would be `a || (!b && !c)`. It showed as the only instruction of the library that joins three predicates. One
    that is right may do that, too: should one appear, compare it with the PTX (nvcc -ptx), and name it here.
    """
    three = re.compile(r"U?PLOP3\.LUT \S+, \S+, !?U?P\d, !?U?P\d, !?U?P\d,")
    found = [(k, text) for k in kernels() for _, text in k.instructions if three.search(text)]
    wrong = [f"{kernel.architecture} {kernel.name}: {text}" for kernel, text in found]
    assert not wrong, "\n".join(wrong)


def test_depthwise_moves_vectors():
    for kernel, match in named(DEPTHWISE):
        if int(match[3]) > 1:
            assert all(kernel.has(rf"{op}\S*\.128") for op in ("LDG", "STG", "LDS")), kernel.name


# Instructions of a lane per element of the result, as the kernel's head says.
PER_ELEMENT = {(3, 1): 39, (3, 2): 40, (5, 1): 60, (5, 2): 61}


def test_instructions_per_element_of_the_depthwise_convolution():
    seen = set()
    for kernel, match in named(DEPTHWISE):
        kernel_size, stride, channels, width, _ = map(int, match.groups())
        if channels == 1 or kernel_size == 7:
            continue
        path = busiest_path(kernel, stride * ((width - 1) * stride + kernel_size), width)
        multiplications = sum(_opcode(text).startswith(("FFMA", "FMUL")) for text in path)
        assert multiplications >= kernel_size**2 * channels * width, "the path has lost its way"
        per_element = len(path) / (channels * width)
        limit = PER_ELEMENT[kernel_size, stride]
        assert per_element <= limit, f"{kernel.architecture} {match[0]}: {per_element:.1f}"
        seen.add((kernel_size, stride))
    assert seen == set(PER_ELEMENT)


# Of the kernels on tensor cores with SiLU: instructions from the wait for input rows to the last store, for each of the
# 8 outputs of a lane that they complete. As docs/performance.md says.
ON_TENSOR_CORES = {(3, 1): 18, (3, 2): 24, (5, 1): 20, (5, 2): 28, (7, 1): 24, (7, 2): 32}


def shortest_way(kernel: Kernel, begin: int, end: int) -> int:
    """How many instructions lead from one to another, by their numbers, past loads into registers."""
    addresses = [address for address, _ in kernel.instructions]
    first, last, best = addresses[begin], addresses[end], {}
    for address, texts, following in reversed(blocks(kernel.instructions)):
        if address <= last < address + 16 * len(texts):
            best[address] = (last - address) // 16
        elif address < last and not any(_opcode(text).startswith("LDG.") for text in texts):
            best[address] = len(texts) + min((best[a] for a in following if a > address and a in best), default=10**6)
        if address <= first < address + 16 * len(texts):
            return best[address] - (first - address) // 16
    raise AssertionError("there is no way")


def test_instructions_per_element_on_tensor_cores():
    seen = set()
    for kernel, match in named(r"depthwise_mma_kernelI\w*6TraitsI(6__half|13__nv_bfloat16)Li(\d)ELi(\d)ELb1ELb1E"):
        kernel_size, stride = int(match[2]), int(match[3])
        texts = [text for _, text in kernel.instructions]
        loop = next(i for i, text in enumerate(texts) if _opcode(text).startswith("DEPBAR") and ", 0x0" not in text)
        products = [i for i, text in enumerate(texts) if _opcode(text).startswith("HMMA")]
        stores = [i for i, text in enumerate(texts) if i > products[-1] and _opcode(text) == "STG.E.64"]
        per_element = shortest_way(kernel, loop, stores[1]) / 8
        limit = ON_TENSOR_CORES[kernel_size, stride]
        assert limit - 3 < per_element <= limit, f"{kernel.architecture} {kernel.name}: {per_element:.1f}"
        assert kernel.has(r"LDGSTS\S*\.128")
        assert kernel.has(r"LDSM\.16\.M88\.4")
        # For each row of the window: pairs of taps and the one that is left over, for two blocks of channels.
        assert len(products) == kernel_size * (kernel_size // 2 + 1) * 2, kernel.name
        seen.add((kernel_size, stride))
    assert seen == set(ON_TENSOR_CORES)


@pytest.mark.parametrize("traits", ["7Forward", "8Backward"])
def test_the_depthwise_convolution_in_training_moves_vectors(traits):
    seen = set()
    for kernel, match in named(rf"{traits}I(f|6__half|13__nv_bfloat16)Li(\d)ELi(\d)ELi(\d)E"):
        size = 4 if match[1] == "f" else 2
        kernel_size, stride, channels = map(int, match.groups()[1:])
        seen.add((size, kernel_size, stride))
        case = f"{kernel.architecture} {match[0]}"
        if width := {16: r"\.128", 8: r"\.64"}.get(channels * size):
            assert kernel.has(r"LDG\S*" + width), case
            assert kernel.has(r"STG\S*" + width), case
        if channels > 1:
            assert kernel.has(r"LDS\." + {4: "128", 2: "64"}[channels]), case
            assert kernel.has(r"STS\." + {4: "128", 2: "64"}[channels]), case
    assert seen == set(itertools.product((2, 4), (3, 5, 7), (1, 2)))


def test_squeeze_excite_moves_16_bytes():
    for kernel, match in named(r"map_kernelI(f|6__half|13__nv_bfloat16)Li(\d)ELb(\d)E"):
        if int(match[2]) > 1:
            assert kernel.has(r"LDG\S*\.128"), kernel.name
            assert kernel.has(r"STG\S*\.128") or match[3] == "1", kernel.name


DTYPE = r"(f|6__half|13__nv_bfloat16)"


@pytest.mark.parametrize("name", ["16pointwise_kernel", "19fused_mbconv_kernel"])
def test_gemms_copy_16_bytes_and_multiply_on_tensor_cores(name):
    for kernel, match in named(rf"{name}I{DTYPE}"):
        exact = match[1] == "f"
        case = f"{kernel.architecture} {match[0]}"
        assert kernel.has(r"LDGSTS\S*\.128"), case  # x and weights, past the registers
        assert kernel.has(r"HMMA\.16816\.F32") != exact, case
        assert kernel.has(r"LDSM\.16\.M88\.4") != exact, case
        pooled = re.search(r"Lb1EEEv", kernel.name)  # the last of the kernel's parameters
        if not pooled:
            assert kernel.has(r"STG\S*\.128"), case
