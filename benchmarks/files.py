"""The files in benchmarks/results: their names, and the measured levels inside."""

import re
from typing import Any


def file_name(device: str) -> str:
    """A device's name as the beginning of a file's."""
    return re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device.lower())).strip("-")


def levels(name: str, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Each level of a file by name, as {level, environment, cases}: one, or those of a run of ``benchmarks.gpu``."""
    if "level" in content:
        return {name: content}
    environment = content["environment"]
    return {
        f"{name}-{level}": {"level": level, "environment": environment, "cases": cases}
        for level, cases in content["levels"].items()
        if cases
    }
