"""Parameters of tests of which ``make test`` runs a part: the others are marked exhaustive, for ``make test-all``."""

import itertools
from collections.abc import Container, Iterable, Sequence
from typing import Any

import pytest


def label(value: Any) -> str:
    return ",".join(map(label, value)) if type(value) is tuple else getattr(value, "__name__", str(value))


def daily(values: Iterable[Any], every_day: Container[Any]) -> list[Any]:
    """The values as parameters, tuples as several; those that are not among ``every_day`` are exhaustive."""
    return [
        pytest.param(
            *(value if type(value) is tuple else [value]),
            marks=[pytest.mark.exhaustive] * (value not in every_day),
            id=label(value),
        )
        for value in values
    ]


def in_turns(names: str, *axes: Sequence[Any]) -> pytest.MarkDecorator:
    """``parametrize`` by the product of the axes: every combination of all but the shortest axis, whose values take
    turns; the others are exhaustive."""
    shortest = min(map(len, axes))
    rows = []
    for indexed in itertools.product(*map(enumerate, axes)):
        turn, values = sum(i for i, _ in indexed), [value for _, value in indexed]
        marks = [pytest.mark.exhaustive] * (turn % shortest != 0)
        rows.append(pytest.param(*values, marks=marks, id="-".join(map(label, values))))
    return pytest.mark.parametrize(names.split(", "), rows)
