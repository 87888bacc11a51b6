"""``effnet-kernels info | verify | bench | tune | pack | unpack | demo``, also ``python -m effnet_kernels``."""

import argparse
import copy
import importlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

import effnet_kernels
from effnet_kernels import internals, tuning
from effnet_kernels.benchmarking import UserError, contenders, plots, tables
from effnet_kernels.benchmarking.agreement import agreement, exact_output
from effnet_kernels.benchmarking.environment import describe, environment
from effnet_kernels.benchmarking.models import LIBRARIES, create_model, image_size, noise, require
from effnet_kernels.dispatch import Query, automatic, implementation, order_measured, place

CAPABILITIES = ("7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 1 for a wrong result, 2 for a request that cannot be served."""
    options = _parser().parse_args(arguments)
    threads = torch.get_num_threads()
    try:
        if getattr(options, "threads", None):
            torch.set_num_threads(options.threads)
        return options.run(options)
    except UserError as error:
        print(f"effnet-kernels: {error}", file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)


def info(options: argparse.Namespace) -> int:
    """What this machine and this installation have."""
    device = _device("auto")
    record = environment(device)
    print(f"effnet_kernels  {effnet_kernels.__version__}, commit {record['commit'] or 'unknown'}")
    print(f"device          {record['device']}")
    print(f"threads         {record['threads']} of {record['cores']} cores")
    if device == "cuda":
        print(f"cuda            {record['cuda']}")
    else:
        print(f"vector flags    {' '.join(record['cpu_flags']) or 'unknown'}")
    for package, version in record["versions"].items():
        if package != "effnet_kernels":
            print(f"{package:<15} {version or 'not installed'}")
    print("\nbackends")
    for name, (available, reason) in effnet_kernels.backends().items():
        print(f"  {name:<13} {'available' if available else 'missing':<10} {reason}")
    print(f"order on a GPU: {order_measured() or 'expected, not measured'}")
    for name, without in internals.missing.items():
        print(f"not in this torch: {name}; {without}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Compare patched with stock, both against float64, for every backend and dtype asked for."""
    device = _device(options.device)
    size = options.size or image_size(options.model, options.library)
    stock = create_model(options.model, options.library, seed=options.seed).to(device)
    try:
        report = effnet_kernels.report(effnet_kernels.patch(copy.deepcopy(stock)))
    except ValueError as error:
        raise UserError(f"--model {options.model}: {error}") from error
    print(f"{options.library} {options.model}, {options.batch} x 3 x {size} x {size} on {device}")
    print(f"{len(report.patched)} modules patched, {len(report.skipped)} left as they are")
    header = ("backend", "dtype", "max error", "stock's", "ratio", "allowed", "")
    rows, failures = [], 0
    for name in options.dtype or DTYPES:
        dtype = DTYPES[name]
        rounded = copy.deepcopy(stock).to(dtype)
        x = noise(options.batch, size, dtype=dtype, device=device, seed=options.seed + 1)
        exact = exact_output(rounded, x)
        with torch.inference_mode():
            stock_output = rounded(x)
        for backend in _backends(options.backend, device):
            try:
                implementation(Query("mbconv", place(x), dtype, (3, 3)), backend)
            except RuntimeError as error:
                rows.append((backend, name, "", "", "", "", f"not served: {str(error).partition(': ')[2]}"))
                continue
            with torch.inference_mode():
                output = effnet_kernels.patch(copy.deepcopy(rounded), backend=backend)(x)
            found = agreement(output, stock_output, exact)
            failures += not found.ok
            numbers = (f"{found.error:.3e}", f"{found.stock_error:.3e}", f"{found.ratio:.2f}", f"{found.bound:.3e}")
            rows.append((backend, name, *numbers, "ok" if found.ok else "WRONG"))
    print(tables.text_table(header, rows))
    print(f"{failures} disagreements" if failures else "patched and stock agree")
    return 1 if failures else 0


def bench(options: argparse.Namespace) -> int:
    """Time one model: stock in both layouts, each of our backends, and on request torch.compile and other runtimes."""
    device = _device(options.device)
    if options.peers and device != "cpu":
        raise UserError("--peers run on the CPU: add --device cpu")
    size = options.size or image_size(options.model, options.library)
    dtype = DTYPES[options.dtype]
    stock = create_model(options.model, options.library).to(device, dtype)
    x = noise(options.batch, size, dtype=dtype, device=device)
    names = contenders.contender_names(
        device, compiled=options.compile, with_peers=options.peers, models=True, autocast=dtype != torch.float32
    )
    if options.peers:  # one that is not installed says how to
        names += [name for name in contenders.PEERS if name not in names]
    case = f"{options.library} {options.model} @{size}, batch {options.batch}, {options.dtype}"
    print(case)
    results = contenders.compare(stock, x, names, seconds=options.seconds, progress=_progress)
    record = environment(device)
    print(tables.comparison_table(results, options.batch))
    print(f"measured on {describe(record)}")
    if options.json:
        _write_json(options.json, {"environment": record, "cases": [{"case": case, "contenders": results}]})
    if options.plot:
        plots.plot_cases({case: results}, record, options.plot, "one forward pass")
    return 1 if any("wrong" in result for result in results.values()) else 0


def tune(options: argparse.Namespace) -> int:
    """Find the fastest tiles of the Triton kernels on this GPU, and store them for all later runs."""
    device = _device("cuda")
    available, reason = effnet_kernels.backends()["triton"]
    if not available:
        raise UserError(f"nothing to tune: {reason}")
    from effnet_kernels.benchmarking import tuner

    size = options.size or image_size(options.model, options.library)
    dtype = DTYPES[options.dtype]
    stock = create_model(options.model, options.library).to(device, dtype)
    x = noise(options.batch, size, dtype=dtype, device=device).to(memory_format=torch.channels_last)
    name = torch.cuda.get_device_name(device)
    rows = []
    model = effnet_kernels.patch(stock, backend="triton")
    for tuned in tuner.tune(model, x, minutes=options.minutes, progress=_progress):
        tuner.save(name, tuned)
        if tuned.after != tuned.before:
            gain = f"{tuned.seconds_before / tuned.seconds_after:.2f}x"
            rows.append((tuned.op, tuning.class_name(tuned.problem_class), str(tuned.before), str(tuned.after), gain))
    print(tables.text_table(("op", "problem class", "tile before", "tile now", "faster"), rows))
    print(f"{len(rows)} tiles stored in {tuning.cache_file(name)}; delete it to return to the defaults")
    return 0


def pack(options: argparse.Namespace) -> int:
    """Compile the Triton kernels of models into one file, for a GPU that need not be here."""
    precompile = _precompile()
    major, _, minor = options.capability.partition(".")
    architecture, arch = int(major) * 10 + int(minor), precompile.triton_common.arch_of(int(major))
    if options.dtype == "bfloat16" and architecture < 80:
        raise UserError(f"--dtype bfloat16 needs compute capability 8.0, got {options.capability}")
    launches, file = [], Path(options.out)
    try:
        for model in options.model:
            size = image_size(model, options.library)
            for training in (False, True) if options.training else (False,):
                launches += precompile.record_model(
                    model, size, 2, DTYPES[options.dtype], arch, library=options.library, training=training
                )
        count = precompile.pack(file, launches, architecture, options.jobs, _progress)
    except (OSError, ValueError) as error:
        raise UserError(str(error)) from error
    print(f"{count} kernels for compute capability {options.capability}: {file}, {file.stat().st_size >> 10} KiB")
    return 0


def unpack(options: argparse.Namespace) -> int:
    """Put packed kernels into Triton's cache, where the first call finds them: it compiles none."""
    try:
        count = _precompile().unpack(Path(options.file))
    except ValueError as error:
        raise UserError(str(error)) from error
    print(f"{count} kernels unpacked")
    return 0


def _precompile() -> ModuleType:
    require("triton", "triton")
    module = importlib.import_module("effnet_kernels.precompile")
    if module.triton_common.INTERPRETED:
        raise UserError("unset TRITON_INTERPRET: the interpreter compiles nothing")
    return module


def demo(options: argparse.Namespace) -> int:
    """Stock and patched models on a photograph."""
    from effnet_kernels.benchmarking.demo import run

    return run(
        out=Path(options.out),
        pretrained=options.pretrained,
        image=options.image,
        size=options.size,
        seconds=options.seconds,
        device=_device(options.device),
        progress=_progress,
    )


def _progress(line: str) -> None:
    print(f"  .. {line}", flush=True)


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU that torch can use")
    return name


def _backends(asked: list[str] | None, device: str) -> list[str]:
    known = effnet_kernels.backends()
    for name in asked or ():
        if name not in known:
            raise UserError(f"--backend must be one of {', '.join(known)}, got {name!r}")
        if not known[name][0]:
            raise UserError(f"--backend {name} is not available: {known[name][1]}")
    return asked or [name for name in automatic(device) if known[name][0]]


def _write_json(file: str, content: dict[str, Any]) -> None:
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be positive, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("--model", required=True, help="the model's name in its library")
    model.add_argument("--library", choices=LIBRARIES, default="timm")
    model.add_argument("--batch", type=_positive, default=1)
    machine = argparse.ArgumentParser(add_help=False)
    machine.add_argument("--size", type=_positive, help="side of the square input; default: the model's own")
    machine.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    machine.add_argument("--threads", type=_positive, help="CPU threads; default: torch's")
    time = argparse.ArgumentParser(add_help=False)
    time.add_argument("--seconds", type=_positive_float, default=3.0, help="time for each contender")

    parser = argparse.ArgumentParser(prog="effnet-kernels", description="Fused kernels for EfficientNet.")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run: Callable[..., int], *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__, help=run.__doc__, description=run.__doc__, parents=parents)
        added.set_defaults(run=run)
        return added

    command(info)
    added = command(verify, model, machine)
    added.add_argument("--dtype", choices=DTYPES, nargs="+", help="default: all")
    added.add_argument("--backend", nargs="+", help="default: all that serve the device")
    added.add_argument("--seed", type=int, default=0, help="of weights and input")
    added = command(bench, model, machine, time)
    added.add_argument("--dtype", choices=DTYPES, default="float32")
    added.add_argument("--compile", action="store_true", help="also torch.compile")
    added.add_argument("--peers", action="store_true", help="also ONNX Runtime and OpenVINO, on a CPU")
    added.add_argument("--json", metavar="FILE", help="save what was measured")
    added.add_argument("--plot", metavar="FILE", help="save a bar chart")
    added = command(tune, model)
    added.add_argument("--size", type=_positive, help="side of the square input; default: the model's own")
    added.add_argument("--dtype", choices=DTYPES, default="float16")
    added.add_argument("--minutes", type=_positive_float, default=10.0, help="no kernel is begun after so long")
    added = command(pack)
    added.add_argument("--model", required=True, nargs="+", help="names in their library")
    added.add_argument("--library", choices=LIBRARIES, default="timm")
    added.add_argument("--dtype", choices=DTYPES, default="float16")
    added.add_argument("--training", action="store_true", help="also the kernels of a training step under autocast")
    added.add_argument("--capability", choices=CAPABILITIES, default="9.0", help="of the GPU (%(default)s)")
    added.add_argument("--jobs", type=_positive, default=os.cpu_count(), help="kernels compiled at a time")
    added.add_argument("--out", metavar="FILE", required=True)
    added = command(unpack)
    added.add_argument("file")
    added = command(demo, machine, time)
    added.add_argument("--pretrained", action="store_true", help="fetch weights; without, they are seeded")
    added.add_argument("--image", metavar="FILE", help="a photograph of your own")
    added.add_argument("--out", metavar="DIR", default="out", help="where the plot goes")
    return parser
