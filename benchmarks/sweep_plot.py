"""A chart of a sweep over batch sizes and resolutions."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from effnet_kernels.benchmarking.contenders import CHANNELS_LAST, COMPILED, OURS
from effnet_kernels.benchmarking.environment import machine
from effnet_kernels.benchmarking.plots import caption, pyplot, save

# Colours that stay apart for every kind of colour vision (Okabe and Ito), and a marker of its own for each.
_LINES = {
    CHANNELS_LAST: ("#666666", "s"),
    "onnxruntime": ("#0072B2", "^"),
    "openvino": ("#009E73", "D"),
    COMPILED: ("#CC79A7", "v"),
    OURS: ("#D55E00", "o"),
}
_LABEL_HEIGHT = 0.045  # of a chart


def plot_sweep(cases: Mapping[str, Mapping[str, Any]], environment: dict[str, Any], file: str | Path) -> None:
    """Write the time per image over batch sizes and over resolutions, two charts for each model and dtype.

    Args:
        cases: records with ``model``, ``dtype``, ``size``, ``batch`` and ``contenders``. Batch sizes are drawn at the
            size that a model has most cases of, resolutions at batch 1.
        environment: what they were measured on.
        file: where the picture goes.
    """
    plt = pyplot()
    models = list(dict.fromkeys((case["model"], case["dtype"]) for case in cases.values()))
    figsize = (11, 1.1 + 3.7 * len(models))
    figure, rows = plt.subplots(len(models), 2, figsize=figsize, layout="constrained", squeeze=False, sharey="row")
    for (model, dtype), (over_batches, over_sizes) in zip(models, rows, strict=True):
        of_model = [case for case in cases.values() if (case["model"], case["dtype"]) == (model, dtype)]
        size = statistics.mode(case["size"] for case in of_model)
        charts = [(over_batches, _draw_lines(over_batches, "batch", [c for c in of_model if c["size"] == size]))]
        charts.append((over_sizes, _draw_lines(over_sizes, "size", [c for c in of_model if c["batch"] == 1])))
        for axis, ends in charts:  # once the limits, which the two share, are known
            _label_ends(axis, ends)
        over_batches.set_title(f"{model}, {dtype}, {size} x {size} pixels", fontsize=10, loc="left")
        over_sizes.set_title(f"{model}, {dtype}, batch 1", fontsize=10, loc="left")
        over_batches.set_xlabel("images in a batch")
        over_sizes.set_xlabel("pixels, height = width")
        over_batches.set_ylabel("ms per image (lower is faster)")
    figure.suptitle(f"Time per image, one forward pass, {machine(environment)}", fontsize=12)
    caption(figure, environment)
    save(figure, file)


def _draw_lines(axis: Any, key: str, cases: Sequence[Mapping[str, Any]]) -> list[tuple[float, str]]:
    """ms per image of every contender over ``key``; where each line ends, and its name.

    Both axes are logarithmic, so that equal factors are equal distances.
    """
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    cases = sorted(cases, key=lambda case: case[key])
    names = dict.fromkeys(name for case in cases for name in case["contenders"])
    ends = []
    for name in sorted(names, key=lambda name: name.startswith(OURS)):  # ours last, on top
        timed = [case for case in cases if "median" in case["contenders"][name]]
        if not timed:
            continue
        x = [case[key] for case in timed]
        q1, y, q3 = (
            [case["contenders"][name][q] * 1e3 / case["batch"] for case in timed] for q in ("q1", "median", "q3")
        )
        colour, marker = _line(name)
        axis.fill_between(x, q1, q3, color=colour, alpha=0.18, linewidth=0)
        axis.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=2.4 if name.startswith(OURS) else 1.4)
        ends.append((y[-1], name))
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks: list[int] = []
    for case in cases:
        if not ticks or case[key] > 1.08 * ticks[-1]:  # else the numbers touch
            ticks.append(case[key])
    axis.set_xticks(ticks)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_formatter(ScalarFormatter())
        each.set_minor_locator(NullLocator())
    axis.tick_params(which="both", labelsize=8)
    axis.grid(which="both", color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return ends


def _line(name: str) -> tuple[str, str]:
    """Colour and marker of a contender."""
    return _LINES.get(OURS if name.startswith(OURS) else name, ("black", "x"))


def _label_ends(axis: Any, ends: Sequence[tuple[float, str]]) -> None:
    """Each line's name at its right end; names that would touch move apart, both by as much."""
    ends = sorted(ends)
    to_fraction = axis.transData + axis.transAxes.inverted()
    at = [to_fraction.transform((1, end))[1] for end, _ in ends]
    for _ in range(20):
        for i in range(1, len(at)):
            overlap = max(0.0, _LABEL_HEIGHT - (at[i] - at[i - 1]))
            at[i - 1], at[i] = at[i - 1] - overlap / 2, at[i] + overlap / 2
    for y, (_, name) in zip(at, ends, strict=True):
        weight = "bold" if name.startswith(OURS) else "normal"
        style = {"color": _line(name)[0], "fontsize": 8, "fontweight": weight, "va": "center"}
        axis.annotate(name, (1.0, y), xytext=(5, 0), xycoords="axes fraction", textcoords="offset points", **style)
