"""How every library is made of csrc/, described for ninja: the two that are shipped, and for the tests the CPU library
with sanitizers, the CUDA kernels emulated on a CPU, and the CPU kernels with emulated instructions.

``python -m csrc.build`` builds what is shipped and puts it into effnet_kernels/; ``python -m csrc.build sanitized``
builds another of ``FAMILIES``. A file is made anew when its command, its compiler or the content of a file that it is
made from has changed, headers included, and only then. Each family has a folder in build/ with its build.ninja.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import functools
import hashlib
import importlib.metadata
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from csrc.toolchain import (
    CXX,
    CXXFLAGS,
    LDFLAGS,
    PORTABLE,
    TRAINED,
    NoCudaError,
    architecture_flags,
    asked_architectures,
    cuda_folders,
    cuda_include,
    find_nvcc,
    known_sets,
    lacks,
    list_of_builds,
    machine_flags,
    torch_flags,
)

ROOT = Path(__file__).resolve().parents[1]
CSRC, BUILD = ROOT / "csrc", ROOT / "build"
EMULATION, EMULATED_INSTRUCTIONS = ROOT / "tests" / "emulation", ROOT / "tests" / "bf16"
FAULTS = ROOT / "tests" / "sanitizers" / "faults.cpp"
SOURCES = {".c", ".h", ".cpp", ".cu", ".cuh"}
REQUIRED = os.environ.get("EFFNET_KERNELS_REQUIRE_NATIVE", "") not in ("", "0")
MAX_JOBS = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)

# ---- flags -----------------------------------------------------------------------------------------------------

# GCC 12 takes the undefined operands inside its own AVX-512 intrinsics for uninitialised variables.
WARNINGS = ["-Wall", "-Wno-psabi", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
WARNINGS += ["-Wno-unknown-warning-option"] if any("clang" in word for word in CXX) else []
LANGUAGE = ["-std=c++17", "-fPIC", "-fvisibility=hidden", f"-I{CSRC}", *WARNINGS]
ARITHMETIC = ["-ffp-contract=fast", "-fno-math-errno"]
# -fwrapv: no sum overflows (`make sanitize` tests it); but without this flag GCC makes other code than what was timed.
SHIPPED = ["-O3", "-g0", "-DNDEBUG", "-fwrapv", *LANGUAGE, *ARITHMETIC]
CUDA = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr", f"-I{CSRC}"]
SANITIZERS = ["-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"]
SANITIZED = [*SHIPPED, "-O1", "-g1", "-fno-wrapv", "-fno-omit-frame-pointer", *SANITIZERS]

# Kernels read memory through pointers of other types, as nvcc lets them.
EMULATED = ["-O1", "-g1", "-fno-strict-aliasing", "-fno-extern-tls-init", *LANGUAGE, "-Wno-unknown-pragmas"]
EMULATED += ["-Wno-class-memaccess", "-Wno-unused-function", f"-I{EMULATION / 'include'}", f"-I{EMULATION}"]
AS_CUDA = ["-x", "c++", "-DCUDA_EMULATION", "-include", "cuda_runtime.h"]
# A call before every load and store of a kernel, for cuda_emulation/accesses.h. With -O1 they are those of the source,
# not put together.
WATCHED = ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-fno-tree-sra"]
# Checks are calls, not inline code: unrolled kernels then compile in half the time.
ADDRESS = ["-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
ADDRESS += ["--param", "asan-instrumentation-with-call-threshold=0"]
# What the bindings ask of torch on a device, which tests/emulation/torch.cpp answers.
WRAPPED = (
    "dlopen",
    "dlsym",
    "torch_call_dispatcher",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
)

# As shipped, but fast to compile; without the last flag GCC contracts nothing.
FAST = ["-O1", "-g0", *LANGUAGE, *ARITHMETIC, "-fexpensive-optimizations"]
INSTRUCTIONS = ["-include", str(EMULATED_INSTRUCTIONS / "instructions.h")]
EMULATE = {"avx512": [], "avx512_bf16": ["-DEMULATE_AVX512_BF16"], "amx": ["-DEMULATE_AMX"]}

# ---- families of targets ---------------------------------------------------------------------------------------


def words(flags: Sequence[str]) -> str:
    """As the shell that ninja starts takes them."""
    return shlex.join(flags).replace("$", "$$")


class Description:
    """The build.ninja of one family, line by line; paths are relative to its folder, or absolute."""

    def __init__(self) -> None:
        from ninja.ninja_syntax import Writer  # here: whoever only asks what there is needs no ninja

        self.text = io.StringIO()
        self.ninja = Writer(self.text, width=119)  # type: ignore[arg-type]  # a stream: its annotation is wrong
        self.compilers: dict[str, str] = {}
        self.rule("cxx", f"{words([*CXX, *CXXFLAGS])} -MD -MF $out.d $flags -c $in -o $out", compiler=CXX)
        link = f"{words([*CXX, *LDFLAGS])} -shared $before $in $flags"
        self.rule("link", f"{link} -o $out")
        loads = "import sys, torch; torch.ops.load_library(sys.argv[1])"
        self.rule("load", f"{shlex.quote(sys.executable)} -c {shlex.quote(loads)} $in && touch $out")
        # Every namespace's `extern __shared__ ... shared_memory[]` is the one buffer.
        symbols = r"sed -nE 's/.* U (_Z\w*13shared_memory\w*)/-Wl,--defsym=\1=cuda_emulation_shared_memory/p'"
        self.rule("link_emulation", f"{link} $$(nm -u $in | {symbols} | sort -u) -o $out")

    def rule(self, name: str, command: str, compiler: Sequence[str] = ()) -> None:
        depfile, deps = ("$out.d", "gcc") if compiler else (None, None)
        self.ninja.rule(name, command, description=f"{name} $out", depfile=depfile, deps=deps)
        if compiler:
            version = subprocess.run([*compiler, "--version"], check=True, capture_output=True, text=True).stdout
            self.compilers[name] = f"{shutil.which(compiler[0])}\n{version}"

    def compiled(self, output: str, source: Path, flags: list[str], rule: str = "cxx") -> str:
        variables = {"flags": words(flags)}
        self.ninja.build([output], rule, [str(source)], implicit=[f"{rule}.compiler"], variables=variables)
        return output

    def linked(
        self, output: str, objects: list[str], flags: list[str], rule: str = "link", before: Sequence[str] = ()
    ) -> str:
        self.ninja.build([output], rule, objects, variables={"flags": words(flags), "before": words(before)})
        return output

    def loaded(self, library: str) -> None:
        """A target that is there once the library has been loaded: one that does not load is not built."""
        self.ninja.build([f"{library}.loaded"], "load", [library])


def cpu(
    description: Description, flags: list[str] = SHIPPED, link: Sequence[str] = (), more: Sequence[Path] = ()
) -> None:
    torch_compile, torch_link = torch_flags()
    sets = known_sets()
    trained = [isa for isa in TRAINED if isa in sets]
    objects = []
    for source in sorted(CSRC.glob("bindings_cpu*.cpp")):
        objects.append(description.compiled(f"{source.stem}.o", source, [*flags, *torch_compile]))
    for name, builds in (("kernels", sets), ("kernels_train", trained)):
        for isa in reversed(builds):
            of_set = [*flags, *machine_flags(isa), f"-DEFFNET_ISA={isa}"]
            objects.append(description.compiled(f"{name}-{isa}.o", CSRC / "cpu" / f"{name}.cpp", of_set))
    listed = [*flags, *list_of_builds(sets, trained)]
    objects.append(description.compiled("instruction_sets.o", CSRC / "cpu" / "instruction_sets.cpp", listed))
    for source in (CSRC / "cpu" / "scratch.cpp", *more):
        objects.append(description.compiled(f"{source.stem}.o", source, flags))
    description.linked("_native_cpu.so", objects, [*torch_link, "-lpthread", *link])
    if not link:  # one with sanitizers loads only where they were loaded first
        description.loaded("_native_cpu.so")


def cuda(description: Description) -> None:
    nvcc, version = find_nvcc()
    architectures = asked_architectures()
    if PORTABLE and version >= (13, 0):
        print(f"the wheel will need NVIDIA driver 580 or newer: {nvcc} is of CUDA {version[0]}.{version[1]}")
    includes, runtime = cuda_folders(nvcc, version[0])
    torch_compile, torch_link = torch_flags()
    description.rule("nvcc", f"{words([str(nvcc)])} -MD -MF $out.d $flags -c $in -o $out", compiler=[str(nvcc)])
    sources = sorted((CSRC / "cuda").glob("*.cu"), key=lambda source: -source.stat().st_size)
    flags = [*CUDA, *architecture_flags(architectures), *(f"-I{path}" for path in includes)]
    flags.append(f"--threads={max(1, int(MAX_JOBS) // len(sources))}")
    objects = [description.compiled(f"{source.stem}.o", source, flags, "nvcc") for source in sources]
    system = [word for path in includes for word in ("-isystem", path)]
    defines = [f'-DEFFNET_CUDA_ARCHITECTURES="{" ".join(architectures)}"']
    for source in sorted(CSRC.glob("bindings_cuda*.cpp")):
        objects.append(description.compiled(f"{source.stem}.o", source, [*SHIPPED, *torch_compile, *system, *defines]))
    # The static runtime: torch's may be of another CUDA version, or not be there.
    link = [str(runtime), *torch_link, "-ldl", "-lrt", "-lpthread", "-Wl,--exclude-libs,ALL"]
    description.linked("_native_cuda.so", objects, link)
    description.loaded("_native_cuda.so")


def emulation(description: Description, address: bool = False) -> None:
    """The package's CUDA kernels, and the fixtures that the emulation tests itself with, and a module for each."""
    import pybind11

    if cuda_include() is None:
        raise RuntimeError("cuda_fp16.h was found neither in CUDA_HOME nor in the wheels that torch installs")
    torch_compile, torch_link = torch_flags()
    # torch.cpp uses the ABI of this torch, not the stable one: for another it is compiled anew.
    version = f'-DTORCH="{importlib.metadata.version("torch")}"'
    flags = [*EMULATED, *([] if lacks("avx2") else machine_flags("avx2")), "-isystem", str(cuda_include())]
    python = ["-isystem", sysconfig.get_path("include"), "-isystem", pybind11.get_include()]
    checks = ADDRESS if address else []

    def compiled(source: Path, *more: str) -> str:
        instrument = checks or (WATCHED if source.suffix == ".cu" else [])
        return description.compiled(f"{source.stem}.o", source, [*flags, *more, *instrument])

    emulated = compiled(EMULATION / "emulation.cpp", *AS_CUDA, "-O2")
    kernels = [compiled(source, *AS_CUDA) for source in sorted((CSRC / "cuda").glob("*.cu"))]
    for source in sorted(CSRC.glob("bindings_cuda*.cpp")):
        kernels.append(compiled(source, *torch_compile, '-DEFFNET_CUDA_ARCHITECTURES="8.0"'))
    kernels.append(compiled(EMULATION / "torch.cpp", "-DCUDA_EMULATION", *torch_compile[:2], version))
    wrapped = [*torch_link, *(f"-Wl,--wrap={function}" for function in WRAPPED)]
    for name, objects, link, defines in (
        ("emulated_kernels", kernels, wrapped, []),
        ("emulation_fixtures", [compiled(EMULATION / "fixtures.cu", *AS_CUDA)], [], ["-DWITH_FIXTURES"]),
    ):
        flags_of_link = [f"-Wl,-soname,lib{name}.so", *link]
        library = description.linked(f"lib{name}.so", [emulated, *objects], flags_of_link, "link_emulation", checks)
        module_flags = [*flags, *python, f"-DMODULE={name}", *defines]
        module = description.compiled(f"{name}.o", EMULATION / "module.cpp", module_flags)
        description.linked(f"{name}.so", [module, library], ["-Wl,-rpath,$ORIGIN"], before=checks)


def emulated_cpu(description: Description) -> None:
    """For each instruction set that can be emulated a CPU library of it alone, without training; for itself each
    instruction as a function, made of AVX2 or of AVX-512, or, but for AMX, the processor's own."""
    torch_compile, torch_link = torch_flags()
    host = machine_flags("avx2" if lacks("avx512") else "avx512")
    common = [
        description.compiled("bindings_cpu.o", CSRC / "bindings_cpu.cpp", [*FAST, *torch_compile]),
        description.compiled("scratch.o", CSRC / "cpu" / "scratch.cpp", FAST),
    ]
    for isa, emulate in EMULATE.items():
        flags = [*FAST, *host, *INSTRUCTIONS, *emulate, f"-DEFFNET_ISA={isa}"]
        listed = [*FAST, *list_of_builds([isa], [], needs=False)]
        objects = [
            description.compiled(f"kernels-{isa}.o", CSRC / "cpu" / "kernels.cpp", flags),
            description.compiled(f"{isa}.o", CSRC / "cpu" / "instruction_sets.cpp", listed),
        ]
        description.linked(f"{isa}.so", [*common, *objects], torch_link)
    single = EMULATED_INSTRUCTIONS / "single_instructions.cpp"
    for name, flags in {
        "instructions_of_avx2": [*machine_flags("avx2"), *INSTRUCTIONS, *EMULATE["amx"]],
        "instructions_of_avx512": [*machine_flags("avx512"), *INSTRUCTIONS, *EMULATE["amx"]],
        "instructions_natively": machine_flags("avx512_bf16"),
    }.items():
        description.linked(f"{name}.so", [description.compiled(f"{name}.o", single, [*FAST, *flags])], [])
    description.ninja.default(["instructions_of_avx2.so", *(f"{isa}.so" for isa in EMULATE if lacks(isa))])


FAMILIES: dict[str, Callable[[Description], None]] = {
    "cpu": cpu,
    "cuda": cuda,
    "sanitized": functools.partial(cpu, flags=SANITIZED, link=SANITIZERS, more=[FAULTS]),
    "emulation": emulation,
    "emulation_with_asan": functools.partial(emulation, address=True),
    "emulated_cpu": emulated_cpu,
}

# ---- building --------------------------------------------------------------------------------------------------


def notice_contents(record: Path) -> None:
    """Ninja goes by times. A file that has changed since the last build gets the present time if its own is older."""
    known, ended = (json.loads(record.read_text()), record.stat().st_mtime_ns) if record.exists() else ({}, 0)
    files = [path for folder in (CSRC, ROOT / "tests") for path in folder.rglob("*") if path.suffix in SOURCES]
    contents = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()}
    for path, content in contents.items():
        if content != known.get(path) and os.stat(path).st_mtime_ns <= ended:
            os.utime(path)
    record.write_text(json.dumps(contents))


def write(path: Path, text: str) -> None:
    """Leaves the file and its time as they are where it has that text."""
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def ninja() -> str:
    import ninja

    return os.path.join(ninja.BIN_DIR, "ninja")


def build(family: str, *targets: str, starts: Callable[[], None] = lambda: None, quiet: bool = True) -> Path:
    """Bring targets of a family up to date, or all of it; ``starts`` is called first if there is anything to do.

    Returns:
        The folder that they are in.

    Raises:
        NoCudaError, RuntimeError: it cannot be built, and why; with ``quiet`` what the compiler says is part of it.
    """
    folder = BUILD / family
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):  # test processes that run side by side must not all compile
        description = Description()
        FAMILIES[family](description)
        for rule, compiler in description.compilers.items():
            write(folder / f"{rule}.compiler", compiler)
        write(folder / "build.ninja", description.text.getvalue())
        notice_contents(folder / "contents.json")
        command = [ninja(), "-C", str(folder), f"-j{MAX_JOBS}", *targets]
        planned = subprocess.run([*command, "-n"], capture_output=True, text=True, check=False)
        if "no work to do" not in planned.stdout:
            starts()
            done = subprocess.run(command, capture_output=quiet, text=True, check=False)
            os.utime(folder / "contents.json")
            if done.returncode != 0:
                raise RuntimeError(f"ninja: {family} does not build\n{done.stdout or ''}"[-8000:].strip())
    return folder


def ship(folder: Path) -> list[str]:
    """Build what is shipped and put it into a folder. No library of an earlier build stays, here or beside the sources.

    Returns:
        The backends whose library is there now.

    Raises:
        RuntimeError: one is required, and does not build.
    """
    places = {backend: folder / f"_native_{backend}.so" for backend in ("cpu", "cuda")}

    def forget(*backends: str) -> None:
        for backend in backends:
            for path in (places[backend], ROOT / "effnet_kernels" / places[backend].name):
                path.unlink(missing_ok=True)

    built = []
    for backend, place in places.items():
        try:
            starts = functools.partial(place.unlink, missing_ok=True)
            library = build(backend, starts=starts, quiet=False) / place.name
        except Exception as error:  # the package works without its compiled backends
            forget(backend)
            if REQUIRED and not isinstance(error, NoCudaError):
                forget(*places)
                raise
            print(f"effnet_kernels: {place.name} was not built, its backend will be missing: {error}", file=sys.stderr)
            continue
        if not place.exists() or not filecmp.cmp(library, place, shallow=False):
            place.parent.mkdir(parents=True, exist_ok=True)
            new = place.with_suffix(f".{os.getpid()}")  # a process may have the old one loaded
            with locked(BUILD / backend):
                shutil.copy(library, new)
            new.replace(place)
        built.append(backend)
    return built


def compile_commands() -> None:
    """For editors, which look for it in build/."""
    commands = []
    for family in ("cpu", "cuda"):
        if (BUILD / family / "build.ninja").exists():
            tool = [ninja(), "-C", str(BUILD / family), "-t", "compdb", "cxx", "nvcc"]
            text = subprocess.run(tool, capture_output=True, text=True, check=True).stdout
            commands += json.loads(text[text.index("[") :])
    write(BUILD / "compile_commands.json", json.dumps(commands, indent=1))


def main(families: list[str]) -> None:
    for family in families:
        print(build(family, quiet=False))
    if not families:
        ship(ROOT / "effnet_kernels")
        compile_commands()


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}")
