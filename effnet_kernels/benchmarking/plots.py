"""Charts of measured cases. Needs matplotlib (extras ``demo`` and ``bench``)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effnet_kernels.benchmarking.contenders import OURS
from effnet_kernels.benchmarking.environment import describe
from effnet_kernels.benchmarking.models import require

_GREYS = ("#4d4d4d", "#7f7f7f", "#a6a6a6", "#c4a484", "#8fa8c8")
_OURS = ("#c0392b", "#e59866", "#f2c9a1", "#f8e3cc")


def pyplot() -> Any:
    """matplotlib.pyplot, drawing to files only."""
    require("matplotlib", "demo").use("Agg")
    return require("matplotlib.pyplot", "demo")


def draw_cases(axis: Any, cases: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Horizontal bars of the medians with their quartiles, one group per case, in ms."""
    names = list(dict.fromkeys(name for results in cases.values() for name in results if "median" in results[name]))
    ours = [name for name in names if name.startswith(OURS)]
    others = [name for name in names if name not in ours]
    colours = dict(zip(others, _GREYS, strict=False)) | dict(zip(ours, _OURS, strict=False))
    ticks, labels, position = [], [], 0.0
    for case, results in cases.items():
        timed = [name for name in names if "median" in results.get(name, {})]
        ticks.append(position + (len(timed) - 1) / 2)
        labels.append(case)
        for name in timed:
            median, q1, q3 = (results[name][key] * 1e3 for key in ("median", "q1", "q3"))
            axis.barh(position, median, color=colours[name], label=name)
            axis.errorbar(median, position, xerr=[[median - q1], [q3 - median]], color="black", linewidth=0.8)
            axis.annotate(f" {median:.3g}", (max(median, q3), position), va="center", fontsize=7)
            position += 1
        position += 1
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.invert_yaxis()
    axis.margins(x=0.12)
    axis.set_xlabel("ms per call, median and quartiles (shorter is better)")
    handles, seen = axis.get_legend_handles_labels()
    unique = dict(zip(seen, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), fontsize=7, loc="best")


def plot_cases(
    cases: Mapping[str, Mapping[str, Mapping[str, Any]]], environment: dict[str, Any], file: str | Path, title: str
) -> None:
    """Write ``draw_cases`` to a file, with what it was measured on underneath."""
    plt = pyplot()
    bars = sum(len(results) + 1 for results in cases.values())
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.22 * bars), layout="constrained")
    draw_cases(axis, cases)
    axis.set_title(title)
    caption(figure, environment)
    save(figure, file)


def caption(figure: Any, environment: dict[str, Any]) -> None:
    """What the numbers were measured on, wrapped to the figure's width."""
    parts: Sequence[str] = describe(environment).split("; ")
    figure.supxlabel("\n".join(parts), fontsize=6, color="#555555")


def save(figure: Any, file: str | Path) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)
    pyplot().close(figure)
