"""How often the instructions of a kernel run, from its machine code as ``nvdisasm -c -g`` lists it.

The code is cut into basic blocks. A block runs once per trip of each loop around it. The branch that closes a loop says
which loop of the source that is: Triton gives it the line of the ``for`` or ``while``. Loops that were unrolled whole
are no loops here, and their instructions stand as often as they run.

Slow paths of divisions and square roots do not run: they are blocks with a call, and those that lead nowhere else.
Subnormal and huge values take them, and divisions that need 64 bits. All else runs, whatever its predicates: a warp
issues an instruction for all lanes, and has some that need it.
"""

import graphlib
import re
from collections.abc import Iterable
from typing import NamedTuple

Line = tuple[str, int]  # a file and a line of it, where the loop is written: also if its function is inlined
Edges = dict[int, list[int]]  # successors by block

SOURCE = re.compile(r'\s*//## File "([^"]+)", line (\d+)')
LABEL = re.compile(r"(\.\w+):")
INSTRUCTION = re.compile(r"\s*(@!?U?P\w+\s+)?([A-Z][\w.]+)([^;]*);")
TARGET = re.compile(r"(?:(!?U?P\w+),?\s+)?`\((\.\w+)\)\s*$")  # of a branch: perhaps a second predicate, a label
JUMPS = ("BRX", "BRXU", "JMP", "JMX", "JMXU")  # to where a register says


class Part(NamedTuple):
    """Instructions that run equally often."""

    loops: tuple[Line, ...]  # around them, outermost first
    instructions: tuple[str, ...]  # mnemonics in order


class Block(NamedTuple):
    instructions: list[str]
    line: Line | None  # of the last one
    calls: bool


class Loop(NamedTuple):
    head: int
    line: Line | None
    body: set[int]


def parts(listing: str) -> list[Part]:
    """The instructions of the listing's kernel that run, by the loops they are in.

    Raises:
        ValueError: it cannot be told which loop of the source one of the machine code is, or what is a slow path.
    """
    blocks, edges = _blocks(_kernel(listing))
    reached = {number: edges[number] for number in reached_from([0], edges)}
    edges = _without_slow_paths(blocks, reached)
    loops = natural_loops(blocks, edges)
    if len(loops) < len(natural_loops(blocks, reached)):
        raise ValueError("no way through a loop is without a call")
    lines = [loop.line for loop in loops]
    for line in lines:
        if line is None:
            raise ValueError("a loop of the machine code has no line of the source")
        if lines.count(line) > 1:
            raise ValueError(f"the compiler made {lines.count(line)} loops of that in line {line[1]} of {line[0]}")
    found: dict[tuple[Line, ...], list[str]] = {}
    for number in sorted(edges):
        around = sorted((loop for loop in loops if number in loop.body), key=lambda loop: -len(loop.body))
        found.setdefault(tuple(loop.line for loop in around if loop.line), []).extend(blocks[number].instructions)
    return [Part(nest, tuple(instructions)) for nest, instructions in found.items()]


def in_loops(listing: str) -> list[str]:
    """The mnemonics in all loops of the listing's kernel, those of slow paths included.

    Raises:
        ValueError: it cannot be told what is a loop.
    """
    blocks, edges = _blocks(_kernel(listing))
    reached = {number: edges[number] for number in reached_from([0], edges)}
    numbers = set().union(*(loop.body for loop in natural_loops(blocks, reached)))
    return [mnemonic for number in sorted(numbers) for mnemonic in blocks[number].instructions]


def _kernel(listing: str) -> list[str]:
    """From the kernel's label to the next function's, which is a slow path."""
    lines = re.sub(r"/\*.*?\*/", "", listing).splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(".text."))
    ends = (i for i, line in enumerate(lines) if i > first and re.match(r"\$\S+:|\s*\.section\b", line))
    return lines[first : next(ends, len(lines))]


def _blocks(lines: Iterable[str]) -> tuple[list[Block], Edges]:
    """Basic blocks in order, the first one the entry, and where each one goes on."""
    blocks: list[Block] = []
    edges: Edges = {}
    labels: dict[str, int] = {}
    branches: list[tuple[int, str]] = []
    source: Line | None = None
    begins, falls = True, False  # the next instruction begins a block; the one before falls through to it
    for text in lines:
        if match := SOURCE.match(text):
            source = match[1], int(match[2])
        elif match := LABEL.match(text):
            labels[match[1]] = len(blocks)
            begins = True
        elif match := INSTRUCTION.match(text):
            guard, mnemonic, operands = match.groups()
            if begins:
                if falls:
                    edges[len(blocks) - 1].append(len(blocks))
                edges[len(blocks)] = []
                blocks.append(Block([], None, False))
            last = blocks[-1]
            last.instructions.append(mnemonic)
            target = TARGET.search(operands)
            if mnemonic == "CALL.REL.NOINC" and target:
                mnemonic = "BRA"  # from a loop on sm_80: it never returns, a function's label begins otherwise
            name = mnemonic.split(".")[0]
            blocks[-1] = last._replace(line=source, calls=last.calls or (name == "CALL" and not guard))
            begins = name in ("BRA", "EXIT", "RET")
            falls = not begins or bool(guard)
            if name in JUMPS:
                raise ValueError(f"where this jumps to is not known: {text.strip()}")
            if mnemonic == "BRA.DIV":
                falls = True  # taken only by a warp whose lanes are apart; ours never are
            elif name == "BRA":
                if target is None or mnemonic not in ("BRA", "BRA.U"):
                    raise ValueError(f"where this branches to is not known: {text.strip()}")
                branches.append((len(blocks) - 1, target[2]))
                falls = bool(guard or target[1])
    for number, label in branches:
        edges[number].append(labels[label])
    return blocks, edges


def _without_slow_paths(blocks: list[Block], edges: Edges) -> Edges:
    """Only the blocks on a way from the entry to an exit that calls nothing."""
    free = {
        number: [to for to in successors if not blocks[to].calls]
        for number, successors in edges.items()
        if not blocks[number].calls
    }
    exits = [number for number in free if blocks[number].instructions[-1].startswith("EXIT")]
    live = reached_from([0], free) & reached_from(exits, _reversed(free))
    if not live:
        raise ValueError("no way through the kernel is without a call")
    return {number: [to for to in free[number] if to in live] for number in live}


def natural_loops(blocks: list[Block], edges: Edges) -> list[Loop]:
    """Natural loops: an edge back to a block that its source cannot be reached without, and the blocks between."""
    before = _reversed(edges)
    loops: dict[tuple[int, Line | None], Loop] = {}
    back = []
    for number, successors in edges.items():
        for head in successors:
            if number == head or number not in reached_from([0], edges, head):
                back.append((number, head))
                line = blocks[number].line  # nested loops may begin with the same block
                loop = loops.setdefault((head, line), Loop(head, line, {head}))
                loop.body.update(reached_from([number], before, head))
    forward = {n: [b for b in befores if (b, n) not in back] for n, befores in before.items()}
    try:
        graphlib.TopologicalSorter(forward).prepare()
    except graphlib.CycleError as error:
        raise ValueError("a loop of the machine code is entered in two places") from error
    return list(loops.values())


def reached_from(start: Iterable[int], edges: Edges, without: int | None = None) -> set[int]:
    """The blocks that edges lead to from these, never through block ``without``."""
    found: set[int] = set()
    todo = [number for number in start if number != without]
    while todo:
        number = todo.pop()
        if number not in found:
            found.add(number)
            todo += [to for to in edges.get(number, ()) if to != without]
    return found


def _reversed(edges: Edges) -> Edges:
    back: Edges = {number: [] for number in edges}
    for number, successors in edges.items():
        for to in successors:
            back[to].append(number)
    return back
