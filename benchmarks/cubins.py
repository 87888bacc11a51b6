"""The machine code of the CUDA library, read with Triton's cuobjdump: kernels, their resources, basic blocks."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from effnet_kernels import native

Instructions = tuple[tuple[int, str], ...]  # address, text


class Kernel(NamedTuple):
    architecture: str
    name: str  # mangled
    registers: int
    local: int  # bytes a thread: spilled registers, and arrays that found none
    shared: int  # bytes a block, static
    threads: int  # of a block, at most
    instructions: Instructions

    def has(self, pattern: str) -> bool:
        return any(re.match(pattern, opcode(text)) for _, text in self.instructions)


class Block(NamedTuple):
    address: int
    texts: list[str]
    following: list[int]  # addresses of what may come next


def opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+ ", "", text).split()[0]


def cuobjdump() -> Path | None:
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    return Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def kernels(library: Path = native._CUDA_LIBRARY) -> list[Kernel]:
    """All of the library, for every GPU that it was built for."""
    return _read(library)


@functools.cache
def _read(library: Path) -> list[Kernel]:

    def listed(option: str) -> str:
        command = [str(cuobjdump()), option, str(library)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    return parse(listed("-res-usage"), listed("-elf"), listed("-sass"))


def parse(resources: str, elf: str, code: str) -> list[Kernel]:
    """The kernels in what cuobjdump prints with -res-usage, -elf and -sass."""
    usage: dict[tuple[str, str], tuple[int, int, int]] = {}
    for key, line in _by_function(resources.splitlines(), r"Function (\S+):"):
        if found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            registers, stack, shared, local = map(int, found.groups())
            usage[key] = registers, stack + local, shared
    threads: dict[tuple[str, str], int] = {}
    is_bound = False
    for key, line in _by_function(elf.splitlines(), r"^\.nv\.info\.(\S+)"):
        if found := re.search(r"Attribute:\s+(\w+)", line):
            is_bound = found[1] == "EIATTR_MAX_THREADS"
        elif is_bound and (found := re.search(r"Value:\s+0x(\w+) 0x(\w+) 0x(\w+)", line)):
            threads[key] = int(found[1], 16) * int(found[2], 16) * int(found[3], 16)
    instructions: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for key, line in _by_function(code.splitlines(), r"Function : (\S+)"):
        # From sm_100 on, what an instruction waits for stands behind it: "&req={1} ?WAIT4_END_GROUP".
        if found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?)(?:\s+[&?].*)?\s*;", line):
            instructions.setdefault(key, []).append((int(found[1], 16), found[2]))
    assert set(usage) == set(instructions)
    return [Kernel(*key, *usage[key], threads.get(key, 1024), tuple(instructions[key])) for key in usage]


def _by_function(lines: Iterable[str], function: str) -> Iterator[tuple[tuple[str, str], str]]:
    """The lines below the name of a function, each with the architecture and that name."""
    architecture = name = ""
    for line in lines:
        if found := re.match(r"arch = (sm_\w+)", line):
            architecture = found[1]
        elif found := re.search(function, line):
            name = found[1]
        elif name:
            yield (architecture, name), line


def readable(name: str) -> tuple[str, str]:
    """The source file, without its suffix, and a short name: ``pointwise_kernel<half, 64, false, false>``."""
    file = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}", name)
    found = re.search(r"([a-z]+(?:_[a-z]+)*_kernel)(?:(I.*?)Ev)?", name)
    assert found is not None, name
    words = {"6__half": "half", "13__nv_bfloat16": "bfloat16", "f": "float", "Lb0E": "false", "Lb1E": "true"}
    arguments = re.findall(
        r"6__half|13__nv_bfloat16|(?<=I)f|Lb[01]E|Li\d+E|(?<=NS1_\d)[A-Z][a-z]+(?=EE)", found[2] or ""
    )
    shown = ", ".join(words.get(each, each[2:-1] if each.startswith("Li") else each) for each in arguments)
    return file[1] if file else "", found[1] + (f"<{shown}>" if shown else "")


def blocks(instructions: Instructions) -> list[Block]:
    """Basic blocks in order.

    A switch may lead to whatever nothing else leads to, up to the next switch. A call on a condition is a branch: so
    loops end on sm_80. Others return.
    """
    targets, ends = {}, set()
    for address, text in instructions:
        name = opcode(text).split(".")[0]
        branches = name == "BRA" or (name == "CALL" and text.startswith("@"))
        if branches and (found := re.findall(r"0x[0-9a-f]+", text)):
            targets[address] = int(found[-1], 16)
        if branches or name in ("BRX", "EXIT", "RET"):
            ends.add(address)
    starts = {instructions[0][0], *targets.values()}
    starts |= {b for (a, _), (b, _) in itertools.pairwise(instructions) if a in ends}
    result: list[Block] = []
    previous = 0
    for i, (address, text) in enumerate(instructions):
        if address in starts:
            if result and previous not in ends:
                result[-1].following.append(address)
            result.append(Block(address, [], []))
        result[-1].texts.append(text)
        if address in targets:
            result[-1].following.append(targets[address])
        # BRA.DIV is for warps that are not together.
        conditional = text.startswith("@") or re.search(r"BRA(\.\S+)? !?U?P\d|BRA\.DIV", text)
        if address in ends and conditional and "BRX" not in text and i + 1 < len(instructions):
            result[-1].following.append(instructions[i + 1][0])
        previous = address
    reached = {target for block in result for target in block.following}
    for i, block in enumerate(result):
        if opcode(block.texts[-1]).startswith("BRX"):
            for case in result[i + 1 :]:
                if case.address not in reached:
                    block.following.append(case.address)
                if opcode(case.texts[-1]).startswith("BRX"):
                    break
    return result
