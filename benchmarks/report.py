"""Turn ``benchmarks/results/*.json`` into the documentation's tables and plots: ``python -m benchmarks.report``.

Text between ``<!-- benchmark:LEVEL -->`` and ``<!-- /benchmark -->`` in the given files is replaced by one table
per machine, losses included. A level that nobody measured leaves its block empty.
"""

import argparse
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effnet_kernels.benchmarking import plots, tables
from effnet_kernels.benchmarking.contenders import CHANNELS_LAST, OURS
from effnet_kernels.benchmarking.environment import describe

ROOT = Path(__file__).resolve().parents[1]
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
    documents = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("performance", "training"))]
    parser.add_argument("documents", type=Path, nargs="*", default=[file for file in documents if file.exists()])
    options = parser.parse_args(arguments)
    results = {file.stem: json.loads(file.read_text()) for file in sorted(options.results.glob("*.json"))}
    for name, result in results.items():
        cases = {case: measured["contenders"] for case, measured in result["cases"].items()}
        file = options.plots / f"benchmark-{name}.png"
        plots.plot_cases(cases, result["environment"], file, TITLES[result["level"]])
        print(file)
    for document in options.documents:
        document.write_text(render(document.read_text(), results, options.plots, document.parent))
        print(document)


def render(text: str, results: Mapping[str, dict[str, Any]], plots_folder: Path, base: Path) -> str:
    """``text`` with every marked block filled from the results of its level."""

    def block(found: re.Match[str]) -> str:
        parts = []
        for name, result in results.items():
            if result["level"] == found[2]:
                plot = os.path.relpath(plots_folder / f"benchmark-{name}.png", base)
                parts.append(f"{table(result)}\n\n![{name}]({Path(plot).as_posix()})\n")
        return found[1] + "\n".join(parts) + found[3]

    return MARKER.sub(block, text)


def table(result: dict[str, Any]) -> str:
    """One machine's cases as Markdown: medians, and our best backend against the two strongest baselines."""
    cases = result["cases"]
    names = list(dict.fromkeys(name for case in cases.values() for name in case["contenders"]))
    bandwidth = "copy_bytes_per_second" in result["environment"]
    header = ["", *names, f"ours over {CHANNELS_LAST}", "ours over the best other"]
    header += ["GB/s", "share of copy"] if bandwidth else []
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    for case, measured in cases.items():
        contenders = measured["contenders"]
        timed = {name: r["median"] for name, r in contenders.items() if "median" in r}
        best = min((name for name in timed if name.startswith(OURS)), key=timed.__getitem__, default=None)
        other = min((name for name in timed if not name.startswith(OURS)), key=timed.__getitem__, default=None)
        row = [case, *(_cell(contenders.get(name, {})) for name in names)]
        for over in (CHANNELS_LAST, other):
            ratio = tables.speedup(contenders, best, over) if best and over else None
            row.append(f"{ratio:.2f}x" if ratio else "")
        if bandwidth:
            ours = contenders.get(best or "", {})
            known = "share_of_copy" in ours
            row += [f"{ours['bytes_per_second'] / 1e9:.0f}", f"{ours['share_of_copy']:.0%}"] if known else ["", ""]
        lines.append("| " + " | ".join(row) + " |")
    note = f"Medians of interleaved calls. Above one: ours is faster. Measured on {describe(result['environment'])}."
    return "\n".join((*lines, "", note))


def _cell(result: Mapping[str, Any]) -> str:
    if "median" in result:
        saved = f", {result['saved'] / 1e6:.1f} MB" if "saved" in result else ""
        return tables.seconds(result["median"]) + saved
    return "wrong" if "wrong" in result else ""


if __name__ == "__main__":
    main()
