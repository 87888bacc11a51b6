"""Compiling Triton launches for GPUs that are not here, and reading from the machine code what they will need.

An op's ``launch`` runs on meta tensors with the enqueueing replaced by a list, so what is compiled is what would have
been launched: the same tiles, flags and constants. This works on any machine, but not under TRITON_INTERPRET.
"""

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effnet_kernels.ops import triton_common

OPS = (
    "depthwise_conv_bn_act",
    "fused_mbconv",
    "mbconv",
    "pointwise_conv_bn_act",
    "squeeze_excite",
    "squeeze_excite_gate",
)
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
MATRIX_INSTRUCTION = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
# Bytes of shared memory a block may ask for. Tiles of column 80 also run on consumer GPUs, which have 99 KiB.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
# Of one multiprocessor, the same for 8.0, 9.0 and 10.0: registers and warps. And shared memory, by generation.
REGISTERS, WARPS = 65536, 64
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


class Launch(NamedTuple):
    """One kernel launch, as ``triton_common.launch_kernel`` was asked for it."""

    kernel: Any
    programs: int
    tensors: tuple[Tensor | None, ...]
    sizes: tuple[int | float, ...]
    constants: tuple[Any, ...]
    config: triton_common.Config

    def constant(self, name: str) -> Any:
        return self.constants[self.kernel.arg_names.index(name) - len(self.tensors) - len(self.sizes)]


class Resources(NamedTuple):
    """What the machine code of one launch needs, per thread (registers, local) or per block (shared)."""

    registers: int
    local: int  # bytes of spilled registers and arrays that found no register
    shared: int
    blocks: int  # that fit on one multiprocessor
    sass: str

    def count(self, instruction: str) -> int:
        """How many instructions of the code have a mnemonic beginning like this."""
        return len(re.findall(rf"^\s*(?:@!?U?P\w+\s+)?{re.escape(instruction)}\b", self.sass, re.MULTILINE))


def record(call: Callable[[], Any], generation: int) -> list[Launch]:
    """The launches of ``call``, an op's ``launch`` on meta tensors, on a GPU of this generation (80, 90, 100)."""
    launches: list[Launch] = []

    def enqueue(kernel: Any, programs: int, tensors: Any, sizes: Any, constants: Any, config: Any) -> None:
        launches.append(Launch(kernel, programs, tuple(tensors), tuple(sizes), tuple(constants), config))

    replacements = {
        triton_common.launch_kernel: enqueue,
        triton_common.config: lambda op, default, problem_class, device: default(*problem_class, generation),
        triton_common.generation: lambda device: generation,
    }
    with _replaced(replacements):
        call()
    return launches


@contextlib.contextmanager
def _replaced(replacements: dict[Any, Any]) -> Iterator[None]:
    """Put one function for another wherever the ops' modules name it."""
    modules = [triton_common, *(importlib.import_module(f"effnet_kernels.ops.{op}.triton") for op in OPS)]
    with contextlib.ExitStack() as stack:
        for module in modules:
            for name, value in list(vars(module).items()):
                if callable(value) and getattr(value, "__hash__", None) and value in replacements:
                    stack.enter_context(mock.patch.object(module, name, replacements[value]))
        yield


def compile_launch(launch: Launch, generation: int) -> Resources:
    """Compile one launch for sm_80, sm_90a or sm_100a."""
    arguments = (*launch.tensors, *launch.sizes, *launch.constants)
    names = launch.kernel.arg_names
    assert len(arguments) == len(names), f"{launch.kernel}: {len(arguments)} arguments for {names}"
    signature, constants, attributes = {}, {}, {}
    for i, (name, value) in enumerate(zip(names, arguments, strict=True)):
        if i < len(launch.tensors) and value is not None:
            signature[name] = TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif len(launch.tensors) <= i < len(launch.tensors) + len(launch.sizes):
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        else:
            signature[name] = "constexpr"
            constants[(i,)] = value
    compiled = triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget("cuda", generation, 32),
        options={"num_warps": launch.config.num_warps, "num_stages": launch.config.num_stages},
    )
    return _read(compiled.asm["cubin"], compiled.metadata.shared, compiled.metadata.num_warps, generation)


def _read(cubin: bytes, shared: int, warps: int, generation: int) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        sass = re.sub(r"/\*.*?\*/", "", _tool("nvdisasm", "-c", file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, static, local = map(int, found.groups())
    shared += static
    per_warp = -(-registers * 32 // 256) * 256
    fits = [WARPS // warps, REGISTERS // per_warp // warps, SHARED[generation] // (shared + 1024)]
    return Resources(registers, stack + local, shared, min(fits), sass)


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the binary utilities that come with Triton."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout
