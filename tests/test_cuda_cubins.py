"""What the machine code of the CUDA library must look like, read from the library with Triton's cuobjdump.

It is checked for the GPUs that the library was built for;
`TORCH_CUDA_ARCH_LIST="8.0 8.6 8.9 9.0a 10.0a 12.0" make build` builds it for all.
"""

import functools
import itertools
import re
import subprocess
from pathlib import Path

import pytest

from benchmarks import machine_code
from benchmarks.cubins import Kernel, blocks, cuobjdump, kernels, opcode, readable
from effnet_kernels import native
from tests.emulation import build

pytestmark = [
    pytest.mark.exhaustive,  # reading the library takes half a minute
    pytest.mark.skipif(not native._CUDA_LIBRARY.exists(), reason="the CUDA library is not built"),
    pytest.mark.skipif(cuobjdump() is None, reason="cuobjdump comes with Triton"),
]
# Of one multiprocessor.
REGISTERS = 65536


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


DEPTHWISE = r"16depthwise_kernelI\w*6TraitsIfLi(\d)ELi(\d)ELi(\d)ELi(\d)ELi(\d)E"


def test_no_kernel_uses_local_memory():
    wrong = [f"{k.architecture} {k.name}: {k.local} bytes" for k in kernels() if k.local or k.has("LDL|STL")]
    assert not wrong, "\n".join(wrong)


@pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))
def test_a_multiprocessor_has_registers_for_the_blocks_that_a_kernel_is_bounded_to():
    """Which launches keep to the bounds the emulation sees."""
    bounds = launch_bounds()
    assert {_without_file(kernel.name) for kernel in kernels()} == set(bounds)
    assert all(kernel.threads == bounds[_without_file(kernel.name)][0] for kernel in kernels())
    wrong = too_many_registers(bounds)
    assert not wrong, "\n".join(wrong)
    assert too_many_registers({name: (threads, blocks + 1) for name, (threads, blocks) in bounds.items()})


# On sm_100 and sm_120 one of its conditions is that one of five rows is padding: compared.
RIGHT = r"expand_depthwise_kernelILi5E"


def test_no_condition_has_lost_its_negations():
    """ptxas of CUDA 12.8 to 13.0 can make `a || (b && c)` of `a || bits == 0`, the bits being those of b and c.

    Right would be `a || (!b && !c)`. It showed as the only instruction of the library that joins three predicates. One
    that is right may do that, too: should one appear, compare it with the PTX (nvcc -ptx), and name it above.
    """
    three = re.compile(r"U?PLOP3\.LUT \S+, \S+, !?U?P\d, !?U?P\d, !?U?P\d,")
    found = [(k, text) for k in kernels() for _, text in k.instructions if three.search(text)]
    wrong = [
        f"{kernel.architecture} {kernel.name}: {text}" for kernel, text in found if not re.search(RIGHT, kernel.name)
    ]
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
        cost, multiplications = machine_code.with_fmas(
            machine_code.Code(kernel.instructions), kernel_size, stride, width
        )
        assert multiplications >= kernel_size**2 * channels * width, "the way is another one"
        per_element = cost / (channels * width)
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
        elif address < last and not any(opcode(text).startswith("LDG.") for text in texts):
            best[address] = len(texts) + min((best[a] for a in following if a > address and a in best), default=10**6)
        if address <= first < address + 16 * len(texts):
            return best[address] - (first - address) // 16
    raise AssertionError("there is no way")


def from_wait_to_store(kernel: Kernel) -> int:
    """Instructions of a row of depthwise_mma_kernel."""
    texts = [text for _, text in kernel.instructions]
    loop = next(i for i, text in enumerate(texts) if opcode(text).startswith("DEPBAR") and ", 0x0" not in text)
    last = max(i for i, text in enumerate(texts) if opcode(text).startswith("HMMA"))
    stores = [i for i, text in enumerate(texts) if i > last and opcode(text) == "STG.E.64"]
    return shortest_way(kernel, loop, stores[1])


def test_instructions_per_element_on_tensor_cores():
    seen = set()
    for kernel, match in named(r"depthwise_mma_kernelI\w*6TraitsI(6__half|13__nv_bfloat16)Li(\d)ELi(\d)ELb1ELb1E"):
        kernel_size, stride = int(match[2]), int(match[3])
        products = [text for _, text in kernel.instructions if opcode(text).startswith("HMMA")]
        per_element = from_wait_to_store(kernel) / 8
        limit = ON_TENSOR_CORES[kernel_size, stride]
        assert limit - 3 < per_element <= limit, f"{kernel.architecture} {kernel.name}: {per_element:.1f}"
        assert kernel.has(r"LDGSTS\S*\.128")
        assert kernel.has(r"LDSM\.16\.M88\.4")
        # For each row of the window: pairs of taps and the one that is left over, for two blocks of channels.
        assert len(products) == kernel_size * (kernel_size // 2 + 1) * 2, kernel.name
        seen.add((kernel_size, stride))
    assert seen == set(ON_TENSOR_CORES)


# Of a stem with SiLU: instructions of a warp for a row of 16 output pixels, by the way x comes and by blocks of 8
# output channels.
STEM = {
    "Pieces": {3: 186, 4: 200, 6: 265, 8: 322},
    "Elements": {3: 222, 4: 238, 6: 304, 8: 356},
}


def test_instructions_of_a_stem():
    seen = set()
    for kernel, match in named(r"11stem_kernelI(6__half|13__nv_bfloat16)Li(\d)ENS1_\d(Pieces|Elements)E"):
        count, loader = int(match[2]), match[3]
        case = f"{kernel.architecture} {kernel.name}"
        code = machine_code.Code(kernel.instructions)
        main = code.with_most("HMMA")
        assert main is not None, case
        ways = code.ways(main, code.counts(main, "HMMA", "MUFU", "STG", r"LDG(STS)?\.").__getitem__)
        stores, loads = 2 if count == 4 else 4, 1 if loader == "Pieces" else 7
        cost = ways[2 * count, 8 * count, stores, loads]
        limit = STEM[loader][count]
        assert limit - 20 < cost <= limit, f"{case}: {cost}"
        assert kernel.has(r"LDGSTS\S*\.128") == (loader == "Pieces"), case
        if count > 3:
            assert kernel.has(r"STG\S*\.128"), case
        seen.add((loader, count))
    assert seen == {(loader, count) for loader, of in STEM.items() for count in of}


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


# Other instructions for each HMMA of fused_mbconv_resident.cu with SiLU, halo, epilogue and y included.
RESIDENT = {(24, 24, 0): 4.6, (32, 32, 0): 4.8, (32, 16, 0): 4.8, (16, 64, 32): 5.2, (24, 96, 48): 3.1}
RESIDENT |= {(32, 128, 32): 2.1, (32, 128, 48): 2.3, (32, 128, 64): 2.5, (48, 192, 48): 1.5}


def test_instructions_for_each_product_with_resident_weights():
    seen = set()
    for kernel, match in named(r"resident_kernelI\w*5ShapeI\w*Li(\d+)ELi(\d+)ELi(\d+)ELi\dELi\dELi\dE"):
        shape = c_in, c_mid, c_out = tuple(map(int, match.groups()))
        code = machine_code.Code(kernel.instructions)
        main = code.with_most("HMMA")
        assert main is not None, kernel.name
        split = 2 if c_out or c_mid > 24 else 1
        of_windows = (9 * c_in // 8 + 1) // 2 * 2 * (c_mid // 8 // split)
        of_projection = 2 * (c_mid // 16 // split) * (c_out // 8)
        assert code.count(code.own(main), "HMMA") == of_windows + of_projection, kernel.name
        others = code.cheapest(main, "HMMA") - 1
        assert others <= RESIDENT[shape], f"{kernel.architecture} {kernel.name}: {others:.1f}"
        seen.add(shape)
    assert seen == set(RESIDENT)


# ---- benchmarks.machine_code: what it says of this library -----------------------------------------------------------


@functools.cache
def cells(kernel: Kernel) -> dict[str, str]:
    return dict(zip(machine_code.HEADER, machine_code.row_of(kernel), strict=True))


def test_the_table_has_every_kernel_of_a_type_once():
    architecture = kernels()[0].architecture
    listed = [machine_code.chosen(native._CUDA_LIBRARY, architecture, dtype, "") for dtype in machine_code.TYPES]
    names = [[kernel.name for kernel in found] for found in listed]
    everywhere = set.intersection(*map(set, names))
    assert not [name for name in everywhere if re.search("float|half", readable(name)[1])]
    of_a_type = [name for each in names for name in each if name not in everywhere]
    assert sorted([*of_a_type, *everywhere]) == sorted(k.name for k in kernels() if k.architecture == architecture)
    for found in listed:
        assert [readable(kernel.name) for kernel in found] == sorted({readable(kernel.name) for kernel in found})
    files = {readable(kernel.name)[0] for kernel in kernels()}
    assert files == {source.stem for source in (build.ROOT / "csrc" / "cuda").glob("*.cu")}


def test_the_main_loop_of_a_gemm_has_the_products_of_its_steps():
    """All fragments of a warp, for 16 of depth or a multiple; what the gate takes is counted there."""
    tile = r"NS0_9BlockTileILi(\d+)ELi(\d+)EEE"
    for kernel, match in named(rf"16pointwise_kernelI(6__half|13__nv_bfloat16){tile}Lb([01])ELb0ELb0E"):
        code = machine_code.Code(kernel.instructions)
        main = code.with_most("HMMA")
        columns, rows = int(match[2]), int(match[3])
        products, fragments = code.count(code.own(main), "HMMA"), columns * rows // (128 * 8)
        assert products >= fragments, kernel.name
        assert products % fragments == 0, kernel.name
        gated = kernel.name.replace(f"Lb{match[4]}ELb0ELb0E", f"Lb{match[4]}ELb1ELb0E")
        other = next(k for k in kernels() if (k.architecture, k.name) == (kernel.architecture, gated))
        assert float(cells(other)["per HMMA"]) > float(cells(kernel)["per HMMA"]), kernel.name


def test_instructions_of_copies_are_those_of_their_loop_where_it_is_one_block():
    seen = 0
    for kernel, _ in named("6__half"):
        code = machine_code.Code(kernel.instructions)
        for loop in code.loops:
            copies = code.count([loop.head], machine_code.COPY)
            if len(loop.body) == 1 and copies:
                assert code.cheapest(loop, machine_code.COPY) == len(code.blocks[loop.head].texts) / copies, kernel.name
                seen += 1
    assert seen > 0


def test_instructions_per_output_agree_with_the_shortest_way():
    """From wait to store it is a part of a row's iteration, with all of its products and stores, but perhaps a copy."""
    for kernel, _ in named(r"depthwise_mma_kernelI\w*6TraitsI(6__half|13__nv_bfloat16)Li\dELi\dELb1ELb1E"):
        middle, *maps = map(float, cells(kernel)["per output"].split(", "))
        way = from_wait_to_store(kernel) / 8
        assert way < middle < way + 6, f"{kernel.architecture} {kernel.name}: {middle}"
        assert middle < maps[0] < maps[1] < maps[2], kernel.name


def test_loads_that_wait_in_their_block_are_exposed():
    """By another way of looking: backwards, from who waits."""
    for kernel, _ in named("6__half"):
        code = machine_code.Code(kernel.instructions)
        exposed = set(code.exposed_loads())
        for number in code.edges:
            texts = code.blocks[number].texts
            for at, text in enumerate(texts):
                named_here, named_since, passed = set(re.findall(r"\bR\d+\b", text)), set(), 0
                for i in range(at - 1, -1, -1):
                    loaded = re.match(r"(?:@\S+ )?LDG\.E(?:\.U16|\.CONSTANT)* (R\d+),", texts[i])
                    if loaded and loaded[1] in named_here - named_since:
                        assert ((number, i), (number, at)) in exposed, f"{kernel.name}: {texts[i]}"
                    named_since |= set(re.findall(r"\bR\d+\b", texts[i]))
                    passed += not opcode(texts[i]).startswith("LDG.")
                    if passed == 8:
                        break
