"""Reading from the machine code of Triton launches what they will need; no GPU is needed for it (``precompile``).

    python -m benchmarks.ahead_of_time --models efficientnet_b0 --dtypes float16 --archs 90

prints a row per distinct launch and exits with 1 if one of them spills registers, asks for more shared memory than
there is, or lacks the instructions that it was written for.
"""

import argparse
import concurrent.futures
import functools
import linecache
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

import effnet_kernels as ek
from benchmarks import sass
from effnet_kernels.benchmarking.tables import text_table
from effnet_kernels.ops import triton_common
from effnet_kernels.ops.triton_common import cdiv
from effnet_kernels.precompile import Launch, compiled, compiling_for, distinct, record_model

MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Bytes of shared memory a block may ask for. Tiles of column 80 also run on consumer GPUs, which have 99 KiB.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Of one multiprocessor, the same for 8.0, 9.0 and 10.0: registers and warps. And shared memory, by arch.
REGISTERS, WARPS = 65536, 64
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


class Resources(NamedTuple):
    """What the machine code of one launch needs, per thread (registers, local) or per block (shared)."""

    registers: int
    local: int  # bytes of spilled registers and arrays that found no register
    shared: int
    blocks: int  # that fit on one multiprocessor
    instructions: tuple[str, ...]  # mnemonics in order, all that stand in the code
    listing: str = ""  # of the code and the lines of its source

    def count(self, pattern: str) -> int:
        """How many instructions have a mnemonic that begins with a match of this regular expression."""
        return sum(re.match(pattern, instruction) is not None for instruction in self.instructions)


# How often each loop of the kernels runs, by its file and the beginning of its line, from a launch's arguments by name.
TRIPS: dict[tuple[str, str], Callable[[dict[str, Any]], int]] = {
    ("depthwise_conv_bn_act_triton.py", "for kw in range(KW):"): lambda a: a["KW"],
    ("fused_mbconv_triton.py", "for k0 in range(0, KH * KW * C_IN, BLOCK_K):"): (
        lambda a: cdiv(a["KH"] * a["KW"] * a["C_IN"], a["BLOCK_K"])
    ),
    ("fused_mbconv_triton.py", "for step in range(KH * KW * blocks):"): (
        lambda a: a["KH"] * a["KW"] * cdiv(a["C_IN"], a["BLOCK_K"])
    ),
    ("fused_mbconv_triton.py", "for mid0 in range(0, C_MID, BLOCK_MID):"): lambda a: cdiv(a["C_MID"], a["BLOCK_MID"]),
    ("pointwise_conv_bn_act_triton.py", "for k0 in range(0, C_IN, BLOCK_K):"): lambda a: cdiv(a["C_IN"], a["BLOCK_K"]),
    ("pointwise_conv_bn_act_triton.py", "while first < map_pixels:"): lambda a: cdiv(a["map_pixels"], a["BLOCK_M"]),
    ("squeeze_excite_gate_triton.py", "for first in range(0, R, BLOCK_R):"): lambda a: cdiv(a["R"], a["BLOCK_R"]),
    ("squeeze_excite_gate_triton.py", "while first < end:"): lambda a: a["blocks"],
    ("triton_common.py", "while first < tiles:"): lambda a: max(0, cdiv(a["tiles"], a["TILES"]) - 1),
}


def trips(launch: Launch, line: sass.Line) -> int:
    """How often a launch runs through the loop in this line of the source.

    All trips are in the loop of the machine code too: Triton's pipeline fetches ahead with predicated loads, before
    the loop, and takes no product out of it.

    Raises:
        LookupError: ``TRIPS`` has no such loop.
    """
    path, number = line
    # From here: the code may have been compiled, and cached, from another copy of these files.
    here = Path(ek.__file__).parent / path.rpartition("/effnet_kernels/")[2]
    text = linecache.getline(str(here), number).strip()
    arguments = dict(zip(launch.kernel.arg_names, (*launch.tensors, *launch.sizes, *launch.constants), strict=True))
    for (file, beginning), count in TRIPS.items():
        if path.endswith(f"/{file}") and text.startswith(beginning):
            return count(arguments)
    raise LookupError(f"{__name__}.TRIPS does not say how often this loop runs: {text!r}, {path}:{number}")


def executed(launch: Launch, resources: Resources) -> Counter[str]:
    """How many instructions of each mnemonic a warp of this launch issues.

    Good for sm_90. ptxas gives some loops of other code the line of a statement inside, which is an error here.
    """
    issued: Counter[str] = Counter()
    for part in sass.parts(resources.listing):
        times = math.prod(trips(launch, line) for line in part.loops)
        for mnemonic in part.instructions:
            issued[mnemonic] += times
    return issued


def specialisation(launch: Launch, arch: int) -> str:
    """Triton's own key of the compiled code that a launch would look for, or compile."""
    kernel = launch.kernel
    key = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", arch, 32)))
    _, arguments, options = key(
        *launch.tensors, *launch.sizes, *launch.constants,
        num_warps=launch.config.num_warps, num_stages=launch.config.num_stages, debug=False,
    )  # fmt: skip
    return f"{launch.op} {kernel.fn.__name__} {arguments} {options}"


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compile one launch for sm_80, sm_90a or sm_100a."""
    with compiling_for(arch):
        kernel = compiled(launch)
    return _read(kernel.asm["cubin"], kernel.metadata.shared, kernel.metadata.num_warps, arch)


def _read(cubin: bytes, shared: int, warps: int, arch: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = re.sub(r"/\*.*?\*/", "", _tool("nvdisasm", "-c", "-g", file.name))
    instructions = tuple(re.findall(r"^\s*(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]+)[^:\n]*;", listing, re.MULTILINE))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, static, local = map(int, found.groups())
    shared += static
    per_warp = -(-registers * 32 // 256) * 256
    fits = [WARPS // warps, REGISTERS // per_warp // warps, SHARED[arch] // (shared + 1024)]
    return Resources(registers, stack + local, shared, min(fits), instructions, listing)


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the binary utilities that come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def complaints(launch: Launch, resources: Resources, arch: int) -> list[str]:
    """What is wrong with the machine code of a launch; nothing, if it may ship."""
    found = []
    if resources.local and not _spills_once(resources):
        found.append(f"{resources.local} bytes of local memory: registers spill")
    if resources.shared > SHARED_LIMIT[arch]:
        found.append(f"{resources.shared} bytes of shared memory, there are {SHARED_LIMIT[arch]}")
    if launch.dtype.itemsize == 2:
        wanted = matrix_instruction(launch, arch)
        if wanted and not resources.count(rf"{wanted}\b"):
            found.append(f"no {wanted}")
        if launch.op == "depthwise_conv_bn_act" and launch.kernel.fn.__name__ == "kernel":
            channels = launch.constant("C")
            if channels % 8 == 0 and not resources.count(r"LDG\S*\.128"):
                found.append("no 16-byte loads from global memory")
    return found


def _spills_once(resources: Resources) -> bool:
    """Whether all of the local memory is one value, put away before the loops and taken back behind them.

    Triton 3.8 has ptxas allocate registers with --regAllocOptLevel=2, a way around a fault of ptxas 13. That does so in
    kernels which spill nothing without it, and have a third of the registers that they may have. It costs each thread
    one store and one load.
    """
    if (resources.count(r"STL\b"), resources.count(r"LDL\b")) != (1, 1):
        return False
    try:
        return not any(re.match(r"(STL|LDL)\b", mnemonic) for mnemonic in sass.in_loops(resources.listing))
    except ValueError:
        return False


def matrix_instruction(launch: Launch, arch: int) -> str | None:
    """What a kernel with a product must contain: the generation's own instruction where its 64 rows are filled."""
    if launch.op == "pointwise_conv_bn_act":
        rows = launch.constant("BLOCK_N")
    elif launch.op == "fused_mbconv":
        rows = launch.constant("BLOCK_MID")
    else:
        return None
    return MATRIX_INSTRUCTION[arch if rows >= 64 else 80]


def describe(launch: Launch) -> str:
    """Op, channels and options of a launch in a few words."""
    names = launch.kernel.arg_names[-len(launch.constants) :]
    values = dict(zip(names, launch.constants, strict=True))
    channels = [values[name] for name in ("C_IN", "C", "C_MID", "C_OUT", "R") if values.get(name)]
    text = f"{launch.op} {'-'.join(map(str, channels))}"
    if launch.op == "squeeze_excite_gate" and launch.kernel.fn.__name__ != "whole_kernel":
        text += f" {launch.kernel.fn.__name__.removesuffix('_kernel')}"
    if "KH" in values:
        text += f" k{values['KH']} s{values['SH']}"
    options = ("GATE", "RESIDUAL", "POOL", "SUMS") if launch.op != "squeeze_excite_gate" else ()
    return text + "".join(f" {name.lower()}" for name in options if values.get(name))


# Between them these have every tile of all models below.
TILED_MODELS = (
    "efficientnet_b1", "efficientnet_el", "mobilenetv3_large_100", "efficientnet_b4", "tf_efficientnetv2_m",
    "efficientnet_es",
)  # fmt: skip
# One size serves: nothing is specialised on it.
MODELS = (
    *(f"efficientnet_b{i}" for i in range(8)),
    *(f"tf_efficientnetv2_{size}" for size in "sml"),
    "efficientnet_lite0", "efficientnet_es", "efficientnet_el",
    "mnasnet_100", "mobilenetv2_100", "mobilenetv3_large_100",
)  # fmt: skip
SIZE = 224


@functools.cache
def _variants(model: str, dtype: str, arch: int) -> list[Launch]:
    return distinct(record_model(model, SIZE, 1, getattr(torch, dtype), arch))


def _row(task: tuple[str, str, int, int]) -> tuple[str, list[str], list[str]]:
    """Compile launch number ``index`` of a model: runs in a worker, to which no kernel can be sent."""
    model, dtype, arch, index = task
    launch = _variants(model, dtype, arch)[index]
    resources = compile_launch(launch, arch)
    columns = (resources.registers, resources.local, resources.shared, resources.blocks)
    row = [describe(launch), dtype, f"sm_{arch}", str(launch.config), *map(str, columns)]
    return f"{row[0]} {dtype} sm_{arch}", row, complaints(launch, resources, arch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16", "float32"])
    parser.add_argument("--archs", nargs="+", type=int, default=[80, 90, 100])
    parser.add_argument("--tiles", action="store_true", help="one launch for each tile, not one for each kernel")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if triton_common.INTERPRETED:
        parser.error("unset TRITON_INTERPRET: the interpreter compiles nothing")
    tasks = []
    seen = set()
    for model in options.models:
        for dtype in options.dtypes:
            for arch in options.archs:
                for index, launch in enumerate(_variants(model, dtype, arch)):
                    key = (arch, launch.tile() if options.tiles else launch.variant())
                    if key not in seen:
                        seen.add(key)
                        tasks.append((model, dtype, arch, index))
    rows, bad = [], []
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        for done, (name, row, found) in enumerate(pool.map(_row, tasks), 1):
            rows.append(row)
            bad += [f"{name}: {complaint}" for complaint in found]
            print(f"\r{done}/{len(tasks)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    header = ("launch", "dtype", "GPU", "tile", "registers", "local", "shared", "blocks/SM")
    print(text_table(header, rows))
    print(
        "\n".join(bad) if bad else f"{len(rows)} launches: no spills, shared memory and instructions as they should be"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
