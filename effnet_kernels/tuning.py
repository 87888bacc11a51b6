"""Tile configurations measured on the user's GPU: where they are stored, and how they are found.

Nothing is tuned at run time: without the file that ``effnet-kernels tune`` writes, every kernel takes the tile that
the rule in its op's file gives. One file per kind of GPU, ``tune-<name>.json`` under ``~/.cache/effnet_kernels`` (or
``$XDG_CACHE_HOME/effnet_kernels``), holds ``{op: {problem class: [block, num_warps, num_stages]}}``.
"""

import functools
import json
import os
import re
from pathlib import Path
from typing import Any


def cache_file(device_name: str) -> Path:
    """Where the tiles for GPUs of this name are stored."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "effnet_kernels" / f"tune-{re.sub(r'[^A-Za-z0-9]+', '-', device_name)}.json"


def class_name(problem_class: tuple[Any, ...]) -> str:
    """A problem class as a key of the file: ("float16", 3, 1) is "float16 3 1"."""
    return " ".join(str(item).removeprefix("torch.") for item in problem_class)


@functools.cache
def load(device_name: str) -> dict[str, dict[str, tuple[tuple[int, ...], int, int]]]:
    """What was tuned for this GPU, by op and problem class; empty where nothing was.

    Raises:
        ValueError: the file is not what ``save`` writes.
    """
    file = cache_file(device_name)
    if not file.exists():
        return {}
    try:
        stored = json.loads(file.read_text())
        return {
            op: {name: (tuple(map(int, block)), int(warps), int(stages)) for name, (block, warps, stages) in of.items()}
            for op, of in stored.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is damaged, delete it or run `effnet-kernels tune` again: {error}") from error


def save(device_name: str, tuned: dict[str, dict[str, Any]]) -> Path:
    """Write what was tuned, replacing the classes it names; later calls of ``load`` see it."""
    file = cache_file(device_name)
    merged = {op: {**load(device_name).get(op, {}), **tuned.get(op, {})} for op in {*load(device_name), *tuned}}
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps(merged, indent=1, sort_keys=True) + "\n")
    partial.replace(file)  # readers see the old file or the new one
    load.cache_clear()
    return file
