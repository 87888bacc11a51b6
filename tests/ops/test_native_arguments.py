"""The native ops, called without the checks of the public functions, refuse what does not fit together."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_kernels.backends import backends
from effnet_kernels.ops.common import Op
from tests.ops.inputs import SAMPLES, sample

pytestmark = pytest.mark.skipif(not backends()["cpu"][0], reason=backends()["cpu"][1])


class Record(TorchDispatchMode):
    """Keeps the arguments of native ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "effnet_kernels_cpu" and "out" in {a.name for a in func._schema.arguments}:
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def native_call(monkeypatch):
    """The native op and the good arguments that a sample leads to."""

    def record(name: str) -> tuple[torch._ops.OpOverload, list]:
        with monkeypatch.context() as patch, torch.no_grad(), Record() as record:
            patch.setattr(Op, "__call__", Op.run)
            sample(name).call("cpu")
        ((op, args),) = record.calls
        return op, list(args)

    return record


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


@pytest.mark.parametrize("name", SAMPLES)
def test_bad_arguments_are_refused(name, native_call):
    """An exception, never a crash, whatever is wrong with whichever argument; and the good ones still work."""
    op, good = native_call(name)
    taken = []
    for position, value in enumerate(good):
        argument = op._schema.arguments[position].name
        if name == "mbconv-separable" and argument in ("se_act", "se_gate"):
            continue  # there is no SE
        for bad in spoiled(value):
            arguments = [*good[:position], bad, *good[position + 1 :]]
            try:
                op(*arguments)
            except (RuntimeError, NotImplementedError):
                continue
            taken.append(f"{argument}: {_describe(bad)} instead of {_describe(value)}")
    assert not taken, "taken although wrong:\n" + "\n".join(taken)
    op(*good)
    assert torch.isfinite(good[0]).all()


def _describe(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} on {value.device}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_describe, value)) + "]"
    return repr(value)
