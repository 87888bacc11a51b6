"""The native ops, called without the checks of the public functions, refuse what does not fit together."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from effnet_kernels.dispatch import backends
from tests.ops.device import native_call
from tests.ops.inputs import sample, sample_cells

pytestmark = pytest.mark.skipif(not backends()["cpu"][0], reason=backends()["cpu"][1])


def spoiled(value: object) -> list[object]:
    """What must not be taken where ``value`` is good."""
    match value:
        case torch.Tensor():
            others = [torch.ones(shape, device=value.device) for shape in ((1,), (), (3, 3, 3, 3))]
            candidates = [*others, value[:1], value[..., :1], value.double(), value.long(), value.to("meta")]
            return [t for t in candidates if (t.shape, t.dtype, t.device) != (value.shape, value.dtype, value.device)]
        case [torch.Tensor(), *rest]:
            each = [[*value[:i], bad, *value[i + 1 :]] for i, t in enumerate(value) for bad in spoiled(t)]
            return [rest, *each, [t.to("meta") for t in value]]
        case [int(), *rest]:
            return [rest, [0] * len(value), [-1] * len(value), [9] * len(value)]
        case str():
            return ["gelu", ""]
    return []


def assert_refused(name: str, op: torch._ops.OpOverload, good: Sequence[Any]) -> dict[str, str]:
    """An exception, never a crash, whatever is wrong with whichever argument; and the good ones still work.

    Returns what was wrong, with the words of its exception.
    """
    taken, refusals = [], {}
    for position, value in enumerate(good):
        argument = op._schema.arguments[position].name
        if name == "mbconv-separable" and argument in ("se_act", "se_gate"):
            continue  # there is no SE
        for bad in spoiled(value):
            described = f"{argument}: {_describe(bad)} instead of {_describe(value)}"
            try:
                op(*good[:position], bad, *good[position + 1 :])
            except (RuntimeError, NotImplementedError) as error:
                refusals[described] = str(error)
                continue
            taken.append(described)
    assert not taken, "taken although wrong:\n" + "\n".join(taken)
    op(*good)
    assert torch.isfinite(good[0]).all()
    return refusals


@sample_cells
def test_bad_arguments_are_refused(name, dtype):
    assert assert_refused(name, *native_call(sample(name, dtype), "cpu"))


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_describe, value)) + "]"
    return repr(value)


@sample_cells
def test_maps_and_weights_are_of_one_type(name, dtype):
    """There is one kernel for all of them; vectors and the matrices of SE may be of another."""
    op, good = native_call(sample(name, dtype), "cpu")
    of_its_own = {"bn", "expand_bn", "project_bn", "se"}
    others = [other for other in (torch.float32, torch.bfloat16, torch.float16) if other != dtype]
    for position, value in enumerate(good):
        argument = op._schema.arguments[position].name
        tensors = value if isinstance(value, list) else [value]
        if not all(isinstance(t, torch.Tensor) for t in tensors) or not tensors:
            continue
        for other in others:
            if other == tensors[0].dtype:  # gates and means are float32 beside any map
                continue
            cast = [t.to(other) for t in tensors]
            arguments = [*good[:position], cast if isinstance(value, list) else cast[0], *good[position + 1 :]]
            if argument in of_its_own:
                op(*arguments)
                assert torch.isfinite(good[0]).all()
            else:
                with pytest.raises(RuntimeError, match=r"must (have the dtype of x|be contiguous float32)"):
                    op(*arguments)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int16], ids=str)
def test_another_type_is_named_with_those_there_are(dtype):
    op, good = native_call(sample("squeeze_excite"), "cpu")
    with pytest.raises(RuntimeError, match="x must be float32, bfloat16 or float16"):
        op(good[0], good[1].to(dtype), *good[2:])


def test_no_kernel_trains_in_float16():
    raw = torch.ones(1, 8, 4, 4, dtype=torch.float16).to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="raw must be float32 or bfloat16: no kernel trains in float16"):
        torch.ops.effnet_kernels_cpu.train_statistics(torch.empty(2, 8), raw)
