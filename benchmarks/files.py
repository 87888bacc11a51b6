"""The files in benchmarks/results: their names, and the measured levels inside."""

import re
from collections.abc import Mapping
from typing import Any

# What turns that are slower make larger, and what smaller.
SCALED = {"median": 1, "q1": 1, "q3": 1, "bytes_per_second": -1, "share_of_copy": -1}


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


def in_same_turns(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Results whose times can be compared.

    Those of one that joined later are scaled by the time that another one took in the same turns (``beside``) and takes
    in those of the others; if there is none, it has no time.
    """

    def slower(name: str) -> float | None:
        """How many times slower the turns were that this one joined in."""
        for pace, then in results[name].get("beside", {}).items():
            before = slower(pace) if "median" in results.get(pace, {}) else None
            return before and before * then / results[pace]["median"]
        return None if "beside" in results[name] else 1.0

    found = {}
    for name, result in results.items():
        factor = slower(name) if "median" in result else 1.0
        rest = {key: value for key, value in result.items() if key not in SCALED}
        scaled = {key: result[key] / factor ** SCALED[key] for key in SCALED if key in result} if factor else {}
        found[name] = rest | scaled
    return found
