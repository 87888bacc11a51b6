"""What a number was measured on: device, threads, versions, commit, date."""

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import effnet_kernels
from effnet_kernels import native

_PACKAGES = ("torch", "triton", "timm", "torchvision", "onnxruntime", "openvino")
_INTERESTING_FLAGS = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16")
_ROOT = Path(__file__).resolve().parents[2]


def environment(device: str = "cpu") -> dict[str, Any]:
    """A JSON-ready record of the machine and the software, for ``device`` ("cpu" or "cuda")."""
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "device_type": device,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device == "cuda":
        record["cuda"] = torch.version.cuda
        record["driver"] = _nvidia_smi("driver_version")
        record["clocks"] = _nvidia_smi("clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit")
        gpu = torch.cuda.get_device_properties()
        record["capability"] = f"{gpu.major}.{gpu.minor}"
        record["multiprocessors"] = gpu.multi_processor_count
        record["l2_bytes"], record["memory_bytes"] = gpu.L2_cache_size, gpu.total_memory
    else:
        record["cpu_flags"] = cpu_flags()
        record["instruction_set"] = native.instruction_set() if native.cpu_available()[0] else None
    return record


def describe(record: dict[str, Any]) -> str:
    """The record as one line, to stand next to numbers."""
    software = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if version)
    return f"{machine(record)}; {software}; commit {record['commit'] or 'unknown'}; {record['date']}"


def machine(record: dict[str, Any]) -> str:
    """The record's device, and on a CPU the number of threads."""
    if record["device_type"] != "cpu":
        return record["device"]
    return f"{record['device']}, {record['threads']} thread{'s' * (record['threads'] != 1)}"


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def cpu_flags() -> list[str]:
    """The vector extensions of the processor that matter here; empty where the system does not tell."""
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    present = found[1].split() if found else []
    return [flag for flag in (*_INTERESTING_FLAGS, "asimd", "sve", "bf16") if flag in present]


def versions() -> dict[str, str | None]:
    """Installed versions of the packages that take part, None for those that are missing."""
    found: dict[str, str | None] = {"effnet_kernels": effnet_kernels.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def commit() -> str | None:
    """The commit of the source tree, "-dirty" behind it when the measured code has been edited; None if unknown."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        head = _run("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD")
        edited = _run("git", "-C", str(_ROOT), "status", "--porcelain", "--", "effnet_kernels", "csrc", "setup.py")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{head}-dirty" if edited else head


def _nvidia_smi(fields: str) -> str | None:
    try:
        return _run(
            "nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", f"--id={torch.cuda.current_device()}"
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
