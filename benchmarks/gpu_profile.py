"""What each launch takes, and what it waits for: torch's profiler over whole models, Nsight Compute over their kernels.

``python -m benchmarks.gpu_profile`` is what Nsight Compute runs: every counted case once on each backend.
"""

import csv
import io
import itertools
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Nsight Compute's sections, and what a summary has of them.
SECTIONS = (
    "SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "InstructionStats", "MemoryWorkloadAnalysis",
    "SourceCounters",
)  # fmt: skip
SUMMARY = {
    "gpu__time_duration.sum": "time",
    "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed": "DRAM %",
    "lts__throughput.avg.pct_of_peak_sustained_elapsed": "L2 %",
    "l1tex__throughput.avg.pct_of_peak_sustained_active": "L1 %",
    "smsp__issue_active.avg.per_cycle_active": "issued per cycle",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "warps %",
    "launch__registers_per_thread": "registers",
    "launch__grid_size": "blocks",
    "launch__block_size": "threads",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")
MARKER = "spin_kernel"  # torch.cuda._sleep: stands between two calls


def launches(call: Callable[[], Any]) -> list[str]:
    """Every kernel that a call launches, in order: "12.3 us name grid 4x1x1"; none where there is no GPU.

    The first calls, which compile, are left out.
    """
    for _ in range(3):
        call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    found = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    return [f"{e['dur']:.1f} us {short(e['name'])} grid {'x'.join(map(str, e['args']['grid']))}" for e in found]


def short(kernel: str) -> str:
    """A kernel's name without namespaces and parameters."""
    name = re.sub(r"^void |(\w+|\(anonymous namespace\))::", "", kernel)
    return name.split("(")[0]


def command(tool: str, report: Path, until: float) -> list[str]:
    """Counts the kernels of ``main`` into a report until then (``time.time()``). Clocks stay as they are."""
    sections = itertools.chain(*(("--section", section) for section in SECTIONS))
    options = ["--profile-from-start", "off", "--clock-control", "none", "--force-overwrite", "--export", str(report)]
    return [tool, *options, *sections, sys.executable, "-m", "benchmarks.gpu_profile", str(until)]


def reading(tool: str, report: Path, page: str) -> list[str]:
    """Prints a page of the report, ``raw`` or ``source``, as CSV."""
    return [tool, "--import", str(report), "--csv", "--page", page]


def summary(raw: str, titles: list[str]) -> dict[str, list[str]]:
    """One line per launch, by case, from the page ``raw``: what ``SUMMARY`` names and the three longest stalls."""
    begin = raw.find('"ID"')
    rows = list(csv.DictReader(io.StringIO(raw[max(begin, 0) :])))
    units, rows = (rows[0], rows[1:]) if rows and not rows[0]["ID"] else ({}, rows)
    found: dict[str, list[str]] = {}
    remaining = iter(titles)
    title = ""
    for row in rows:
        if MARKER in row["Kernel Name"]:
            title = next(remaining, "")
            continue
        known = [_entry(label, row[name], units.get(name, "")) for name, label in SUMMARY.items() if row.get(name)]
        stalls = {
            match[1]: float(text.replace(",", ""))
            for name, text in row.items()
            if text and (match := STALL.fullmatch(name))
        }
        longest = sorted(stalls, key=lambda name: -stalls[name])[:3]
        known += [f"stalled {name} {stalls[name]:.1f}" for name in longest]
        found.setdefault(title, []).append(f"{short(row['Kernel Name'])}: {', '.join(known)}")
    return found


def _entry(label: str, value: str, unit: str) -> str:
    return f"{label} {value} {unit}" if unit.endswith("s") else f"{label} {value}"  # of times alone


@torch.inference_mode()
def main() -> None:
    """The second call of each case on each backend, until then; titles are printed, "counted: ...", as they go."""
    from benchmarks.gpu_parts import available
    from benchmarks.gpu_scope import GPU

    until = float(sys.argv[1])
    for case in GPU.counted_cases():
        if time.time() > until:
            return
        stock, x = (thing.to(memory_format=torch.channels_last) for thing in case.make())
        for backend in available(GPU.backends):
            module = case.fused(stock, backend)
            module(x)
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            module(x)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            print(f"counted: {case.title} {backend}", flush=True)


if __name__ == "__main__":
    main()
