"""What the machine code of the CUDA library costs, kernel by kernel: ``python -m benchmarks.machine_code``.

No GPU is needed. Prints a Markdown table, or with ``--write`` puts it and what follows here into docs/performance.md.
``--library`` reads another build, to compare two; ``--waits`` lists the exposed loads.

* *registers*, *shared*: of a thread; static bytes of a block, 1024 of which are the system's from sm_90 on. What a
  launch adds to shared memory is not in the code and left out, and so are the waves of a launch.
* *blocks*: on a multiprocessor, by registers and threads alone, of as many *threads* as the kernel is bounded to.
* *instructions*: of the whole kernel, with slow paths and the padding behind its end.
* *per HMMA*: other instructions per HMMA in the main loop, which is the one with the most HMMA. Of a loop inside of it
  neither instructions nor HMMA count. Taken is the cheapest way once round the loop, of those that pass a cp.async,
  be it in a loop inside, and a store to global memory, where any way does: what runs rarely is left out.
* *per cp.async*: instructions per LDGSTS of 16 bytes on the cheapest way round each loop that has some and no HMMA, in
  the order of the code; of the loops in the main loop, where it has such.
* *per output*: instructions of a lane per output, in the middle of a map, without sums. For `depthwise_mma_kernel` on
  aligned pixels then on whole maps of 56, 14 and 7 pixels, with sums: rows that only open windows, columns past the
  edge and what a warp does before its first row included, what it does once for several places not. Empty for other
  depthwise kernels: how often their loops run is not in the code.
* *exposed loads*: loads from global memory into registers with fewer than 8 instructions between them and the first
  one that names a register which they write, be it in another block, on the shortest way there. Loads do not count
  as instructions in between: those in a row wait together. Then all loads.
* *waits*: how many instructions wait for exposed loads, and how many of these are in a loop, slow paths included.
"""

from __future__ import annotations

import argparse
import graphlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks import sass
from benchmarks.cubins import Instructions, Kernel, blocks, cuobjdump, kernels, opcode, readable
from effnet_kernels import native

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
MARKER = re.compile(r"(<!-- machine-code -->\n).*?(<!-- /machine-code -->)", re.DOTALL)
HEADER: tuple[str, ...] = ("file", "kernel", "registers", "shared", "threads", "blocks", "instructions", "per HMMA")
HEADER += ("per cp.async", "per output", "exposed loads", "waits, in loops")
COVERED = 8  # instructions behind which a load is not exposed
REGISTERS = 65536  # of a multiprocessor
LIMITS = {"86": (1536, 16), "89": (1536, 24), "120": (1536, 24)}  # threads and blocks; the others have 2048 and 32
TYPES = {"float32": "float", "float16": "half", "bfloat16": "bfloat16"}
COPY = r"LDGSTS\S*\.128"

Kind = tuple[int, ...]
Place = tuple[int, int]  # number of a block, of an instruction in it


class Code:
    """A kernel's blocks by number, with its natural loops."""

    def __init__(self, instructions: Instructions) -> None:
        self.blocks = blocks(instructions)
        number = {block.address: i for i, block in enumerate(self.blocks)}
        edges = {i: [number[a] for a in block.following if a in number] for i, block in enumerate(self.blocks)}
        self.edges = {i: edges[i] for i in sorted(sass.reached_from([0], edges))}
        listed = [sass.Block(block.texts, None, False) for block in self.blocks]
        self.loops = sorted(sass.natural_loops(listed, self.edges), key=lambda loop: loop.head)

    def count(self, numbers: Iterable[int], pattern: str) -> int:
        """Instructions of these blocks whose opcode matches."""
        return sum(bool(re.match(pattern, opcode(text))) for number in numbers for text in self.blocks[number].texts)

    def own(self, loop: sass.Loop) -> set[int]:
        """The blocks of a loop that are in no loop inside of it."""
        return loop.body.difference(*(other.body for other in self.loops if other.body < loop.body))

    def with_most(self, pattern: str) -> sass.Loop | None:
        """The loop with most such instructions, those of loops inside of it left out; the first of equal ones."""
        most = max(self.loops, key=lambda loop: self.count(self.own(loop), pattern), default=None)
        return most if most is not None and self.count(self.own(most), pattern) else None

    def ways(self, loop: sass.Loop, kind: Callable[[int], Kind]) -> dict[Kind, int]:
        """The fewest instructions once round a loop, for every kind of way.

        The kind of a way is the sum of those of its blocks. Loops inside are passed through once: kinds of their blocks
        count, instructions do not.
        """
        heads = {other.head: other.body for other in self.loops if other.body <= loop.body}
        before: dict[int, list[int]] = {number: [] for number in loop.body}
        ends = []
        for number in loop.body:
            for to in self.edges[number]:
                if to == loop.head:
                    ends.append(number)
                elif to in loop.body and number not in heads.get(to, ()):
                    before[to].append(number)
        own = self.own(loop)
        best: dict[int, dict[Kind, int]] = {}
        for number in graphlib.TopologicalSorter(before).static_order():
            cost, of_block = len(self.blocks[number].texts) if number in own else 0, kind(number)
            starts = [best[other] for other in before[number]]
            if number == loop.head:
                starts = [{(0,) * len(of_block): 0}]
            best[number] = _least(starts, of_block, cost)
        return _least([best[number] for number in ends], (), 0)

    def counts(self, loop: sass.Loop, *patterns: str) -> dict[int, Kind]:
        """For ways(): how many instructions match, by block; in loops inside none."""
        own = self.own(loop)
        return {n: tuple(self.count({n} & own, pattern) for pattern in patterns) for n in loop.body}

    def cheapest(self, loop: sass.Loop, pattern: str) -> float:
        """Instructions per matching one, of which the loop has some, on its cheapest way: see *per HMMA*."""
        counts = self.counts(loop, pattern, r"STG")
        copies = {number: self.count([number], COPY) for number in loop.body}
        ways: dict[tuple[bool, bool], float] = {}
        for (matches, stores, copied), cost in self.ways(loop, lambda n: (*counts[n], copies[n])).items():
            if matches:
                key = copied > 0, stores > 0
                ways[key] = min(ways.get(key, cost / matches), cost / matches)
        return ways[max(ways)]

    def exposed_loads(self) -> list[tuple[Place, Place]]:
        """The exposed loads, each with the instruction that waits for it."""
        found = []
        for number in self.edges:
            for i, text in enumerate(self.blocks[number].texts):
                if written := _loaded(text):
                    passed, place = self._until_named(written, number, i + 1, COVERED)
                    if passed < COVERED:
                        found.append(((number, i), place))
        return found

    def _until_named(self, registers: set[int], number: int, start: int, most: int) -> tuple[int, Place]:
        """The fewest instructions but loads, `most` at most, before one that names one of the registers; that one."""
        passed = 0
        for i, text in enumerate(self.blocks[number].texts[start:], start):
            if passed >= most or registers & _registers(text):
                return min(passed, most), (number, i)
            passed += not opcode(text).startswith("LDG.")
        ways = [self._until_named(registers, to, 0, most - passed) for to in self.edges[number] if passed < most]
        further, place = min(ways, default=(most, (number, 0)))
        return min(passed + further, most), place


def _least(ways: Iterable[dict[Kind, int]], kind: Kind, cost: int) -> dict[Kind, int]:
    """The cheapest way of each kind, with a block of that kind and cost added to it."""
    least: dict[Kind, int] = {}
    for each in ways:
        for before, so_far in each.items():
            key = tuple(map(sum, zip(before, kind, strict=True))) if kind else before
            least[key] = min(least.get(key, so_far + cost), so_far + cost)
    return least


def _loaded(text: str) -> set[int]:
    """The registers that a load from global memory writes; none of any other instruction."""
    found = re.search(r"LDG\.\S* (?:P\w, )?R(\d+)", text)
    if found is None:
        return set()
    return set(range(int(found[1]), int(found[1]) + (4 if ".128" in found[0] else 2 if ".64" in found[0] else 1)))


def _registers(text: str) -> set[int]:
    """The registers that an instruction names. Of wide operands without a suffix, as HMMA's, that is the first."""
    found = re.findall(r"\bR(\d+)(\.64)?", text)
    return {int(number) + i for number, wide in found for i in range(2 if wide else 1)}


# ---- the table -------------------------------------------------------------------------------------------------


def blocks_of_multiprocessor(architecture: str, registers: int, threads: int) -> int:
    """By registers, of which a warp takes multiples of 256 out of its quarter of them, and by threads."""
    most_threads, most_blocks = LIMITS.get(re.sub(r"\D", "", architecture), (2048, 32))
    warps = -(-threads // 32)
    by_registers = REGISTERS // 4 // (-(-registers * 32 // 256) * 256) * 4 // warps
    return min(by_registers, most_threads // 32 // warps, most_blocks)


def per_output(code: Code, name: str) -> list[float]:
    """Instructions of a lane per output: in the middle of a map, and, where known, on maps of 56, 14 and 7 pixels."""
    if found := re.match(r"depthwise_kernel<float, (\d), (\d), (\d), (\d)", name):
        kernel, stride, channels, width = map(int, found.groups())
        return [] if channels == 1 else [with_fmas(code, kernel, stride, width)[0] / (channels * width)]
    if found := re.match(r"depthwise_mma_kernel<\w+, (\d), (\d), true", name):
        kernel, stride = map(int, found.groups())
        row, first, sums, place = with_products(code)
        middle = row / 8
        return [middle, *(of_map(side, (kernel - 1) // stride, row, first, sums, place) for side in (56, 14, 7))]
    return []


def with_fmas(code: Code, kernel: int, stride: int, width: int) -> tuple[int, int]:
    """Instructions of a thread of depthwise_kernel for `width` pixels, and how many of them multiply.

    On the way round its largest loop that loads what the window reads of new rows and stores all pixels. Of such ways
    the one with SiLU, for the other activations have no reciprocal, that multiplies most; then the cheapest.
    """
    loop = max(code.loops, key=lambda loop: len(loop.body))
    ways = code.ways(loop, code.counts(loop, "LDG", "STG", "MUFU", "FFMA|FMUL").__getitem__)
    loads = stride * ((width - 1) * stride + kernel)
    _, multiplied, cost = max((k[2], k[3], -cost) for k, cost in ways.items() if k[:2] == (loads, width))
    return -cost, multiplied


def with_products(code: Code) -> tuple[int, int, int, int]:
    """Instructions of a lane of depthwise_mma_kernel: of a row, of one that only opens windows, of a row's sums, and of
    a place before its first row. On ways with all copies: what is not finite goes through registers, a second time.
    """
    rows = code.with_most("HMMA")
    assert rows is not None

    def cost(loop: sass.Loop, pairs: int, singles: int) -> int:
        ways = code.ways(loop, code.counts(loop, r"STG\.E\.64", r"STG\.E$", COPY).__getitem__).items()
        return -max((kind[2], -cost) for kind, cost in ways if kind[:2] == (pairs, singles))[1]

    place = min((loop for loop in code.loops if loop.body > rows.body), key=lambda loop: len(loop.body))
    row = cost(rows, 2, 0)
    return row, cost(rows, 0, 0), cost(rows, 2, 1) - row, cost(place, 0, 0)


def of_map(side: int, opening: int, row: int, first: int, sums: int, place: int) -> float:
    """Per output of a map, in bands of 32 rows and segments of 8 columns; a lane has 4 outputs of a segment's row."""
    bands = [min(32, side - begin) for begin in range(0, side, 32)]
    cost = sum(place + opening * first + rows * row + -(-rows // 8) * sums for rows in bands)
    return cost * -(-side // 8) / (side * side)


def row_of(kernel: Kernel) -> tuple[str, ...]:
    """The cells below HEADER."""
    file, name = readable(kernel.name)
    code = Code(kernel.instructions)
    main = code.with_most("HMMA")
    copying = [loop for loop in code.loops if code.count(code.own(loop), COPY) and not code.count(loop.body, "HMMA")]
    inside = [loop for loop in copying if main is not None and loop.body < main.body]
    exposed = code.exposed_loads()
    waits = {place for _, place in exposed}
    in_loops = sum(any(number in loop.body for loop in code.loops) for number, _ in waits)
    return (
        file,
        f"`{name}`",
        str(kernel.registers),
        str(kernel.shared),
        str(kernel.threads),
        str(blocks_of_multiprocessor(kernel.architecture, kernel.registers, kernel.threads)),
        str(len(kernel.instructions)),
        "" if main is None else f"{code.cheapest(main, 'HMMA') - 1:.1f}",
        ", ".join(f"{code.cheapest(loop, COPY):.0f}" for loop in inside or copying),
        ", ".join(f"{each:.1f}" for each in per_output(code, name)),
        f"{len(exposed)} of {code.count(code.edges, r'LDG[.]')}",
        f"{len(waits)}, {in_loops}",
    )


def chosen(library: Path, architecture: str, dtype: str, pattern: str) -> list[Kernel]:
    """The kernels of an architecture and an element type, by file and name; those without a type are of every type."""

    def is_of_type(name: str) -> bool:
        types = {each for each in TYPES.values() if re.search(rf"\b{each}\b", name)}
        return (types or {"float"} if name.startswith("expand_depthwise_kernel") else types) <= {TYPES[dtype]}

    found = [kernel for kernel in kernels(library) if kernel.architecture == architecture]
    found = [kernel for kernel in found if is_of_type(readable(kernel.name)[1])]
    found = [kernel for kernel in found if re.search(pattern, readable(kernel.name)[1])]
    return sorted(found, key=lambda kernel: readable(kernel.name))


def table(listed: Iterable[Kernel]) -> str:
    rows = [HEADER, ("---", "---", *("---:" for _ in HEADER[2:])), *map(row_of, listed)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sm_90a")
    parser.add_argument("--dtype", choices=TYPES, default="float16")
    parser.add_argument("--library", type=Path, default=native._CUDA_LIBRARY)
    parser.add_argument("--kernel", default="", metavar="REGEX", help="only kernels whose name has a match")
    parser.add_argument("--waits", action="store_true", help="list each exposed load and the instruction that waits")
    parser.add_argument("--write", type=Path, nargs="?", const=DOCUMENT, metavar="DOCUMENT", help="between its markers")
    options = parser.parse_args(arguments)
    if cuobjdump() is None:
        parser.error("cuobjdump comes with Triton, which is not installed")
    if not options.library.exists():
        parser.error(f"there is no {options.library}: `make build` makes it where there is an nvcc")
    listed = chosen(options.library, options.architecture, options.dtype, options.kernel)
    if not listed:
        parser.error(f"the library has no such kernel for {options.architecture}")
    text = table(listed)
    if options.waits:
        for kernel in listed:
            text += f"\n\n{readable(kernel.name)[1]}"
            code = Code(kernel.instructions)
            for places in code.exposed_loads():
                load, wait = (f"{code.blocks[n].address + 16 * i:04x} {code.blocks[n].texts[i]}" for n, i in places)
                text += f"\n  {load} -> {wait}"
    if options.write is None:
        print(text)
        return
    tools = re.search(rb"Cuda compilation tools, (release [\d.]+)", options.library.read_bytes())
    made = f"{options.architecture}, {options.dtype}" + (f", CUDA {tools[1].decode()}" if tools else "")
    explained = (__doc__ or "").partition("\n\n* ")[2]
    content = f"{text}\n\n{made}.\n\n* {explained}"
    options.write.write_text(MARKER.sub(lambda found: found[1] + content + found[2], options.write.read_text()))
    print(options.write)


if __name__ == "__main__":
    main()
