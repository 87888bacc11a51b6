"""Results as text: aligned tables for a terminal, and the record of one measured case."""

from collections.abc import Mapping, Sequence
from typing import Any

from effnet_kernels.benchmarking.contenders import CHANNELS_LAST


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned with spaces: the first and those without a heading to the left, the others to the right."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = []
    for row in (header, ["-" * width for width in widths], *rows):
        cells = [
            cell.rjust(width) if column and header[column] else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def seconds(value: float) -> str:
    """A duration in ms, or in us below one."""
    return f"{value * 1e3:.2f} ms" if value >= 1e-3 else f"{value * 1e6:.1f} us"


def speedup(results: Mapping[str, Mapping[str, Any]], name: str, over: str = CHANNELS_LAST) -> float | None:
    """How many times faster ``name`` is than ``over``; None when either was not timed."""
    if "median" not in results.get(name, {}) or "median" not in results.get(over, {}):
        return None
    return results[over]["median"] / results[name]["median"]


def comparison_table(results: Mapping[str, Mapping[str, Any]], batch: int) -> str:
    """One row per contender of ``contenders.compare``."""
    header = ("contender", "median", "quartiles", "first call", "images/s", f"over {CHANNELS_LAST}", "max error")
    rows = []
    for name, result in results.items():
        if "median" not in result:
            reason = "WRONG RESULT" if "wrong" in result else "cannot run"
            rows.append((name, reason, *[""] * (len(header) - 2)))
            continue
        ratio = speedup(results, name)
        rows.append(
            (
                name,
                seconds(result["median"]),
                f"{seconds(result['q1'])} .. {seconds(result['q3'])}",
                seconds(result["first"]) if "first" in result else "",
                f"{batch / result['median']:.1f}",
                f"{ratio:.2f}x" if ratio else "",
                f"{result['error']:.2e}",
            )
        )
    notes = [f"{name}: {r.get('wrong') or r.get('failed')}" for name, r in results.items() if "median" not in r]
    return "\n".join((text_table(header, rows), *notes))
