"""Compiling the Triton kernels of a model for GPUs that are not here, and taking them to where the GPUs are.

A patched model runs on meta tensors with the enqueueing replaced by a list, so what is compiled is what would have
been launched: the same tiles, flags and constants, through Triton's own path. It works on any machine, but not under
TRITON_INTERPRET.

Triton finds a compiled kernel in its cache by a key that contains a hash of its own files, which differ from one
version of Python to the next, and its cache names its files by absolute paths. So a cache that is copied to another
machine serves nothing there. ``pack`` keeps of every kernel what the machines have in common; ``unpack`` lets the
Triton that is there compute the key.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor, nn
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.cache import get_cache_manager

import effnet_kernels as ek
from effnet_kernels.benchmarking.models import check_name, library_model
from effnet_kernels.dispatch import assume
from effnet_kernels.ops import triton_common

OPS = (
    "depthwise_conv_bn_act",
    "fused_mbconv",
    "mbconv",
    "pointwise_conv_bn_act",
    "squeeze_excite",
    "squeeze_excite_gate",
)


class Launch(NamedTuple):
    """One kernel launch, as ``triton_common.launch_kernel`` was asked for it."""

    kernel: Any
    programs: int
    tensors: tuple[Tensor | None, ...]
    sizes: tuple[int | float, ...]
    constants: tuple[Any, ...]
    config: triton_common.Config

    @property
    def op(self) -> str:
        op = self.kernel.fn.__module__.rpartition(".")[2].rpartition("_")[0]
        return op if op in OPS else "conv_block_train"

    @property
    def dtype(self) -> torch.dtype:
        """Of the map, where there is one."""
        return min((t.dtype for t in self.tensors if t is not None), key=lambda dtype: dtype.itemsize)

    def constant(self, name: str) -> Any:
        return self.constants[self.kernel.arg_names.index(name) - len(self.tensors) - len(self.sizes)]

    def tile(self) -> tuple[Any, ...]:
        """What a row of the tables of configurations stands for; the gate has nothing to do with the dtype of maps."""
        dtype = None if self.op == "squeeze_excite_gate" else self.dtype
        return self.op, self.kernel.fn.__name__, dtype, self.config

    def with_tile(self, config: triton_common.Config) -> "Launch":
        """The same with another tile; of kernels whose last constants are those of the tile."""
        sides = len(config.block)
        assert self.constants[-sides:] == self.config.block
        return self._replace(constants=(*self.constants[:-sides], *config.block), config=config)

    def variant(self) -> tuple[Any, ...]:
        """What the compiled code depends on."""
        types = tuple(None if t is None else (t.dtype, t.data_ptr() % 16) for t in self.tensors)
        return self.op, self.kernel.fn.__name__, types, self.constants, self.config


def record(call: Callable[[], Any], arch: int) -> list[Launch]:
    """The launches of ``call``, an op's ``launch`` on meta tensors, for GPUs of this ``triton_common.arch``."""
    launches: list[Launch] = []

    def enqueue(kernel: Any, programs: int, tensors: Any, sizes: Any, constants: Any, config: Any) -> None:
        launches.append(Launch(kernel, programs, tuple(tensors), tuple(sizes), tuple(constants), config))

    with triton_common.recording(enqueue, arch):
        call()
    return launches


def record_model(
    model: str,
    size: int,
    batch: int,
    dtype: torch.dtype,
    arch: int,
    *,
    library: str = "timm",
    training: bool = False,
) -> list[Launch]:
    """The launches of a patched model, channels-last: of a forward, or of a training step under autocast to ``dtype``.

    Raises:
        UserError: the library is not installed or has no such model.
    """
    check_name(model, library)
    with torch.device("meta"):
        network = library_model(model, library)
        for module in network.modules():
            # What autocast casts. Squeeze-and-excitation's convolutions, the only ones with a bias, go into our ops.
            if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.bias is None):
                module.to(dtype)
        network.train(training).to(None if training else dtype)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = torch.empty(batch, 3, size, size, dtype=dtype)
    return record_module(ek.patch(network), images, arch)


def record_module(module: nn.Module, x: Tensor, arch: int) -> list[Launch]:
    """The launches of a module of ours on the meta device: of one forward, in training mode of backward, too."""
    x = x.to(memory_format=torch.channels_last)

    def call() -> None:
        y = module(x)
        if module.training:
            y.backward(torch.empty_like(y))

    with torch.inference_mode(not module.training), assume("triton"):
        return record(call, arch)


def distinct(launches: Sequence[Launch]) -> list[Launch]:
    """One launch of each compiled variant, in order of appearance."""
    return list({launch.variant(): launch for launch in reversed(launches)}.values())[::-1]


class _Elsewhere:
    """What compiling asks of a Triton driver, for a GPU that is not here."""

    def __init__(self, architecture: int) -> None:
        self.target = GPUTarget("cuda", architecture, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"sm_{self.target.arch}"  # kernels keep their variants by device: these are none of a real one's

    def get_current_stream(self, device: str) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(architecture: int) -> Iterator[None]:
    """Let Triton compile for GPUs of compute capability ``architecture`` / 10, whatever is here."""
    driver = triton.runtime.driver
    before = getattr(driver, "_active", None)  # its public name would look for a GPU
    driver.set_active(_Elsewhere(architecture))
    try:
        yield
    finally:
        driver.set_active(before)  # nor ``reset_active``: None is what there is before the first look


def compiled(launch: Launch) -> Any:
    """Triton's compiled kernel, from its cache or compiled now; within ``compiling_for``."""
    arguments = (*launch.tensors, *launch.sizes, *launch.constants)
    return launch.kernel.warmup(
        *arguments, grid=(1,), num_warps=launch.config.num_warps, num_stages=launch.config.num_stages
    )


# ---- one file of compiled kernels ----

FORMAT = 1


class Packed(NamedTuple):
    """A kernel in the manifest."""

    name: str  # of its function
    module: str  # that the function is in
    code: str  # a hash of the function and what it calls
    source: str  # a hash of that and of what it is specialised on
    options: str  # a hash of warps, stages and so on
    cubin: str  # the file with the machine code
    metadata: dict[str, Any]  # Triton's own


def pack(
    file: Path,
    launches: Sequence[Launch],
    architecture: int,
    jobs: int = 1,
    progress: Callable[[str], None] = lambda line: None,
    optional: Sequence[Launch] = (),
) -> int:
    """Compile every variant among ``launches`` and write them to ``file``, a zip archive; returns how many.

    Args:
        architecture: ten times the compute capability: 90 for H100 and H200.
        jobs: so many threads compile.
        progress: told what is being done.
        optional: more of them, left out where they do not compile.

    Raises:
        ValueError: this version of Triton computes its keys in another way.
        OSError: the file or Triton's cache cannot be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.is_dir():
        raise IsADirectoryError(f"{file} is a folder")
    backend = make_backend(GPUTarget("cuda", architecture, 32))
    with compiling_for(architecture), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        needed = distinct(launches)
        every = distinct([*needed, *optional])
        wanted = []
        for i, (launch, future) in enumerate([(launch, pool.submit(compiled, launch)) for launch in every]):
            try:
                wanted.append((launch, future.result()))
            except Exception:  # a tile that is too small for an instruction, or too large: Triton has many errors
                if i < len(needed):
                    raise
            if len(wanted) % 20 == 0:
                progress(f"{len(wanted)} of {len(every)} kernels")
    kernels, cubins = [], {}
    for launch, kernel in wanted:
        options = backend.parse_options(
            {
                "num_warps": launch.config.num_warps,
                "num_stages": launch.config.num_stages,
                "debug": knobs.runtime.debug,
                "instrumentation_mode": knobs.compilation.instrumentation_mode,
            }
        )
        source, hashed = kernel.src.hash(), options.hash()
        if _key(source, hashed, backend) != kernel.hash:
            raise ValueError(f"Triton {triton.__version__} has other keys than those that can be packed")
        (metadata,) = (Path(path) for name, path in kernel.metadata_group.items() if name.endswith(".json"))
        cubins[f"{kernel.hash}.cubin"] = kernel.asm["cubin"]
        function = launch.kernel
        kernels.append(
            Packed(
                name=metadata.stem,
                module=function.fn.__module__,
                code=function.cache_key,
                source=source,
                options=hashed,
                cubin=f"{kernel.hash}.cubin",
                metadata=json.loads(metadata.read_text()),
            )._asdict()
        )
    manifest = {
        "format": FORMAT,
        "triton": triton.__version__,
        "backend": backend.hash(),
        "architecture": architecture,
        "kernels": kernels,
    }
    partial = file.with_name(f"{file.name}.{os.getpid()}")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", json.dumps(manifest))
        for name, cubin in cubins.items():
            archive.writestr(name, cubin)
    partial.replace(file)
    return len(kernels)


def unpack(file: Path) -> int:
    """Put the kernels of a packed ``file`` into Triton's cache (TRITON_CACHE_DIR); returns how many there are.

    Raises:
        ValueError: it is no such file, it was packed by another version of Triton, of ptxas or of this package, or
            the cache cannot be written; or the interpreter is on, which needs none.
    """
    if triton_common.INTERPRETED:
        raise ValueError("unset TRITON_INTERPRET: the interpreter takes no compiled kernels")
    try:
        with zipfile.ZipFile(file) as archive:
            manifest = json.loads(archive.read("manifest.json"))
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']}, here {FORMAT} is known")
            kernels = [Packed(**kernel) for kernel in manifest["kernels"]]
            cubins = {kernel.cubin: archive.read(kernel.cubin) for kernel in kernels}
            backend = make_backend(GPUTarget("cuda", int(manifest["architecture"]), 32))
            versions = {"Triton": manifest["triton"], "ptxas and architecture": manifest["backend"]}
        for kernel in kernels:
            inside = kernel.module.startswith(f"{ek.__name__}.ops.") and kernel.name.isidentifier()
            if not inside or not isinstance(kernel.metadata, dict):  # its name is one of files, too
                raise ValueError(f"{kernel.module}.{kernel.name} is no kernel")
    except Exception as error:  # a damaged archive has many kinds of them
        raise ValueError(f"{file} is not a file of packed kernels: {error}") from error
    for (what, there), here in zip(versions.items(), (triton.__version__, backend.hash()), strict=True):
        if there != here:
            raise ValueError(f"{file} was packed with {what} {there}, here is {here}: pack it anew")
    for module, name, code in {(kernel.module, kernel.name, kernel.code) for kernel in kernels}:
        known = importlib.import_module(module) if importlib.util.find_spec(module) else None
        if getattr(getattr(known, name, None), "cache_key", None) != code:
            raise ValueError(f"{file} was packed with another {module}.{name} than is here: pack it anew")
    for kernel in kernels:
        key = _key(kernel.source, kernel.options, backend)
        metadata = f"{kernel.name}.json"
        files = {metadata: json.dumps(kernel.metadata | {"hash": key}), f"{kernel.name}.cubin": cubins[kernel.cubin]}
        try:
            cache = get_cache_manager(key)  # written also where it has them: it may have been moved or damaged
            cache.put_group(metadata, {name: cache.put(content, name) for name, content in files.items()})
        except OSError as error:
            raise ValueError(f"Triton's cache cannot be written: {error}") from error
    return len(kernels)


def _key(source: str, options: str, backend: Any) -> str:
    """The name of a compiled kernel in the cache of the Triton that is here, from the hashes of its parts."""
    from triton.compiler.compiler import get_cache_invalidating_env_vars

    try:
        from triton.runtime.cache import get_cache_key
    except ImportError as error:
        raise ValueError(f"packing needs Triton 3.5, here is {triton.__version__}") from error
    parts = [SimpleNamespace(hash=functools.partial(str, hashed)) for hashed in (source, options)]
    key = get_cache_key(parts[0], backend, parts[1], get_cache_invalidating_env_vars())
    return hashlib.sha256(key.encode()).hexdigest()
