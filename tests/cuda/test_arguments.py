"""The native ops, called without the checks of the public functions, refuse what does not fit together."""

import re

import pytest
import torch
from torch.utils._pytree import tree_map

from effnet_kernels.native import _cuda_build
from effnet_kernels.ops.common import Op
from tests.cuda.tools import native_call
from tests.ops.device import DEVICE, on_device
from tests.ops.inputs import SAMPLES, each_op, sample
from tests.ops.test_native_arguments import _describe, spoiled


@pytest.mark.parametrize("name", SAMPLES)
def test_bad_arguments_are_refused(name):
    """An exception that names the argument, whatever is wrong with whichever; and the good ones still work."""
    op, args = native_call(sample(name))
    good = list(args)
    names = re.compile(rf"\b({'|'.join(a.name for a in op._schema.arguments)})\b[^,:]* (must|is no activation)")
    taken, unnamed = [], []
    for position, value in enumerate(good):
        argument = op._schema.arguments[position].name
        if name == "mbconv-separable" and argument in ("se_act", "se_gate"):
            continue  # there is no SE
        for bad in spoiled(value):
            described = f"{argument}: {_describe(bad)} instead of {_describe(value)}"
            try:
                op(*good[:position], bad, *good[position + 1 :])
            except (RuntimeError, NotImplementedError) as error:
                # An argument whose sizes are read from another may be named for it. "meta" ends in the dispatcher.
                if "meta" not in described and not names.search(str(error)):
                    unnamed.append(f"{described}: {error}")
                continue
            taken.append(described)
    assert not taken, "taken although wrong:\n" + "\n".join(taken)
    assert not unnamed, "not named:\n" + "\n".join(unnamed)
    op(*good)
    assert torch.isfinite(good[0]).all()


@each_op
def test_opcheck(name, monkeypatch):
    problem = sample(name)
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(Op, "__call__", lambda op, *args: calls.append((op.overload, args)) or torch.zeros(()))
        problem.call("cuda")
    ((overload, args),) = calls
    torch.library.opcheck(overload, on_device(tree_map(lambda leaf: leaf, args)))


@torch.no_grad()
def test_a_row_too_long_for_the_depthwise_kernel_is_refused():
    """What only the launcher knows becomes an exception, too; nothing of that size has to exist for it."""
    x = on_device(torch.zeros(1)).expand(1, 2**18, 1, 2**13).as_strided((0, 2**18, 1, 2**13), (2**31, 1, 2**31, 2**18))
    vector = on_device(torch.ones(2**18))
    weight = on_device(torch.zeros(1)).expand(2**18, 1, 3, 3).contiguous()
    out, mean = torch.empty_like(x), x.new_empty(0)
    with pytest.raises(RuntimeError, match=r"depthwise_conv_bn_act: a row of x must have fewer than 2\^31 elements"):
        torch.ops.effnet_kernels_cuda.depthwise_conv_bn_act(
            out, mean, x, weight, [vector] * 4, 1e-5, [1, 1], [1, 1, 1, 1], "relu", False
        )


def test_the_library_says_what_it_was_built_for():
    built_for, toolkit, driver = _cuda_build()
    if DEVICE == "cpu":
        assert built_for == "8.0", "of tests/emulation/build.py"
    assert re.fullmatch(r"(\d+\.\d[af]?(\+PTX)? ?)+", built_for)
    assert toolkit >= 12000
    assert DEVICE == "cpu" or driver // 1000 >= toolkit // 1000
