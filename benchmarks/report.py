"""Turn ``benchmarks/results/*.json`` into the documentation's tables and plots: ``python -m benchmarks.report``.

Text between ``<!-- benchmark:LEVEL -->`` and ``<!-- /benchmark -->`` in the given files is replaced by one table
and plot per machine, of the last measurement, losses included; of a sweep over batch sizes and resolutions by the plot
alone. A level that nobody measured leaves its block empty. ``benchmark:predicted`` sets times measured on a GPU beside
the document's own predictions.
"""

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.files import in_same_turns, levels
from benchmarks.sweep_plot import plot_sweep
from effnet_kernels.benchmarking import plots, tables
from effnet_kernels.benchmarking.contenders import CHANNELS_LAST, OURS
from effnet_kernels.benchmarking.environment import describe

ROOT = Path(__file__).resolve().parents[1]
# Triton, batch 128, float16.
PREDICTED = (
    "| | predicted for the kernels of today, per image | measured | measured over predicted | on, at commit |",
    "|---|---:|---:|---:|---|",
)
MARKER = re.compile(r"(<!-- benchmark:(\w+) -->\n).*?(<!-- /benchmark -->)", re.DOTALL)
TITLES = {"op": "Ops", "block": "Blocks", "model": "Whole models, one forward pass"}
TITLES |= {
    "training_op": "Training steps of ops",
    "training_block": "Training steps of blocks",
    "training_model": "Training steps of whole models",
}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs")
    documents = [ROOT / "docs" / f"{name}.md" for name in ("performance", "training")]
    parser.add_argument("documents", type=Path, nargs="*", default=[file for file in documents if file.exists()])
    options = parser.parse_args(arguments)
    results: dict[str, dict[str, Any]] = {}
    for file in sorted(options.results.glob("*.json")):
        results |= levels(file.stem, json.loads(file.read_text()))
    results = newest(results)
    for name, result in results.items():
        file = options.plots / f"benchmark-{name}.png"
        if result["level"] == "sweep":
            plot_sweep(result["cases"], result["environment"], file)
        else:
            cases = {case: in_same_turns(of["contenders"]) for case, of in result["cases"].items()}
            plots.plot_cases(cases, result["environment"], file, TITLES[result["level"]])
        print(file)
    for document in options.documents:
        document.write_text(render(document.read_text(), results, options.plots, document.parent))
        print(document)


def newest(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each machine the last measurement of each level: a file that was begun anew keeps what it did not repeat."""
    machines: dict[tuple[Any, ...], str] = {}
    for name in sorted(results, key=lambda name: results[name]["environment"]["date"]):
        where = results[name]["environment"]
        machines[results[name]["level"], where["device"], where.get("threads")] = name
    return {name: result for name, result in results.items() if name in machines.values()}


def render(text: str, results: Mapping[str, dict[str, Any]], plots_folder: Path, base: Path) -> str:
    """``text`` with every marked block filled from the results of its level."""
    predictions = predicted(text)

    def block(found: re.Match[str]) -> str:
        parts = []
        if found[2] == "predicted":
            rows = [row for result in results.values() for row in beside(predictions, result)]
            return found[1] + ("\n".join((*PREDICTED, *rows, "")) if rows else "") + found[3]
        for name, result in results.items():
            if result["level"] == found[2]:
                plot = os.path.relpath(plots_folder / f"benchmark-{name}.png", base)
                lines = "" if result["level"] == "sweep" else f"{table(result)}\n\n"  # too many for a table
                parts.append(f"{lines}![{name}]({Path(plot).as_posix()})\n")
        return found[1] + "\n".join(parts) + found[3]

    return MARKER.sub(block, text)


def predicted(text: str) -> dict[str, float]:
    """Seconds per image by "model @size", from the table that benchmarks/gpu_prediction.py writes; in float16."""
    rows = re.findall(r"^\| (\w+ @\d+) \| \d+ \| ([\d.]+) us \|", text, re.MULTILINE)
    return {model: float(microseconds) * 1e-6 for model, microseconds in rows}


def beside(predictions: Mapping[str, float], result: dict[str, Any]) -> list[str]:
    """The Triton backend's time in one result, where it was predicted, as rows under ``PREDICTED``."""
    rows = []
    for case, measured in result["cases"].items():
        model, _, how = case.partition(", ")
        found = measured["contenders"].get(f"{OURS} triton", {})
        if result["level"] == "model" and how == "batch 128, float16" and model in predictions and "median" in found:
            each = found["median"] / measured["batch"]
            cells = (
                model,
                tables.seconds(predictions[model]),
                tables.seconds(each),
                f"{each / predictions[model]:.2f}x",
                f"{result['environment']['device']}, {(result['environment'].get('commit') or 'unknown')[:7]}",
            )
            rows.append(f"| {' | '.join(cells)} |")
    return rows


def table(result: dict[str, Any]) -> str:
    """One machine's cases as Markdown: medians, and our best backend against the two strongest baselines."""
    cases = result["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case["contenders"]))
    bandwidth = any("share_of_copy" in found for case in cases.values() for found in case["contenders"].values())
    header = ["", *names, f"ours over {CHANNELS_LAST}", "ours over the best other"]
    header += ["GB/s", "share of copy"] if bandwidth else []
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for case, measured in cases.items():
        contenders = in_same_turns(measured["contenders"])
        timed = {name: r["median"] for name, r in contenders.items() if "median" in r}
        best = min((name for name in timed if name.startswith(OURS)), key=timed.__getitem__, default=None)
        other = min((name for name in timed if not name.startswith(OURS)), key=timed.__getitem__, default=None)
        row = [case + " (failed)" * ("failed" in measured), *(_cell(contenders.get(name, {})) for name in names)]
        for over in (CHANNELS_LAST, other):
            ratio = tables.speedup(contenders, best, over) if best and over else None
            row.append("" if ratio is None else f"{ratio:.2f}x" if ratio >= 1 else f"**{ratio:.2f}x**")
        if bandwidth:
            ours = contenders.get(best or "", {})
            known = "share_of_copy" in ours
            row += [f"{ours['bytes_per_second'] / 1e9:.0f}", f"{ours['share_of_copy']:.0%}"] if known else ["", ""]
        lines.append("| " + " | ".join(row) + " |")
    note = "Medians of interleaved calls. Above one: ours is faster; below, in bold: a loss. "
    note += f"Measured on {describe(result['environment'])}."
    if bandwidth:
        copied = result["environment"]["copy_bytes_per_second"]
        note = f"Shares are of what a copy reached in the same run, {copied / 1e9:.0f} GB/s. {note}"
    if any("beside" in r for case in cases.values() for r in case["contenders"].values()):
        note = f"Who joined later is set against ours by its time in the same turns. {note}"
    if any("alone" in r for case in cases.values() for r in case["contenders"].values()):
        note = f"~: a single call, cut off before the contenders could take turns. {note}"
    if any("saved" in r for case in cases.values() for r in case["contenders"].values()):
        note = f"MB: kept for backward / peak of a step. {note}"
    return "\n".join((*lines, "", note))


def _cell(result: Mapping[str, Any]) -> str:
    if "median" in result:
        memory = ""
        if "saved" in result:
            peak = "" if result["peak"] is None else f" / {result['peak'] / 1e6:.0f}"
            memory = f", {result['saved'] / 1e6:.1f}{peak} MB"
        return tables.seconds(result["median"]) + memory
    if "alone" in result:
        return f"~{tables.seconds(result['alone'])}"
    return next((word for word in ("wrong", "failed") if word in result), "")


if __name__ == "__main__":
    main()
