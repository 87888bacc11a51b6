"""Writes to the memory behind a program: none is missed, and a program writes to none."""

import copy
import ctypes
import mmap
import os
import types

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels.modules.program import KEPT_ATTRIBUTE
from effnet_kernels.ops import native_cpu
from tests.guarded import death
from tests.models import randomize
from tests.programs import block, make, the_long_way, warm, x

__all__ = ["block", "x"]

pytestmark = pytest.mark.skipif(not ek.backends()["cpu"][0], reason="the native CPU library is not built")


TENSORS = (
    "conv_pw.weight", "conv_dw.weight", "conv_pwl.weight", "bn1.weight", "bn2.running_var", "se.conv_reduce.weight",
    "se.conv_expand.bias",
)  # fmt: skip


@pytest.mark.parametrize("name", TENSORS)
@torch.inference_mode()
def test_no_write_is_missed(name, block, x):
    """One element, past torch's version counter: each in its turn, and the last bit of it."""
    tensor = block.get_parameter(name) if "running" not in name else block.get_buffer(name)
    numbers = tensor.numpy() if tensor.is_inference() else tensor.detach().numpy()
    flat = numbers.reshape(-1)
    block(x)
    for i in range(0, flat.size, max(1, flat.size // 50)):
        flat.view("int32")[i] ^= 1 if i % 2 else 1 << 22
        assert torch.equal(block(x), the_long_way(block, x)), i


@torch.inference_mode()
def test_a_weight_may_turn_where_it_lies(x):
    """The same address, elements and shape, in another order."""
    block = randomize(ek.MBConv(8, 8, exp_ratio=1.0, act_layer=nn.SiLU)).eval()
    warm(block, x)
    block.conv_pw.weight.data = block.conv_pw.weight.data.transpose(0, 1)
    assert torch.equal(block(x), the_long_way(block, x))


@pytest.mark.parametrize("swap", [False, True])
def test_conversions(block, x, swap):
    """With swapped tensors, too, which torch refuses while others refer to them."""
    warm(block, x)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        block.to(torch.bfloat16)
        block.conv_pw.to(torch.float64).to(torch.bfloat16)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    with torch.inference_mode():
        assert torch.equal(block(x.bfloat16()), the_long_way(block, x.bfloat16()))


def test_what_is_kept_is_never_written_to(x, monkeypatch):
    """Constants and calls in memory that can only be read: a kernel that wrote to them would end the process."""

    def read_only(t):
        area = mmap.mmap(-1, t.numel() * t.itemsize)
        copy = torch.frombuffer(area, dtype=t.dtype).view(t.shape).copy_(t)
        address = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(area)))
        assert ctypes.CDLL(None).mprotect(address, ctypes.c_size_t(len(area)), mmap.PROT_READ) == 0
        return copy

    class Ops:
        def __getattr__(self, name):
            op = getattr(torch.ops.effnet_kernels_cpu, name).default
            keeps = name.split("_")[0] in ("pack", "keep", "digest")
            return types.SimpleNamespace(default=lambda *args: read_only(op(*args)) if keeps else op(*args))

    def calls():
        for module in (make(), ek.FusedMBConv(8, 8, act_layer=nn.SiLU).eval(), ek.SqueezeExcite(8).eval()):
            outputs = warm(module, x)
            assert torch.equal(*outputs)
        os.write(2, b"replayed\n")
        (program,) = vars(module)[KEPT_ATTRIBUTE].programs.values()
        program.calls[0].packed[0] = 1  # and this is what would happen

    monkeypatch.setattr(native_cpu, "_native", Ops())
    assert death([("calls", calls)]) == "SIGSEGV in replayed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_digests_of_writes_with_a_structure(dtype):
    """Elements swapped, doubled and halved, negated at all distances: what a sum of turned words would not see."""
    digest, generator = torch.ops.effnet_kernels_cpu.digest, torch.Generator().manual_seed(0)
    weight = torch.randn(1 << 14, generator=generator).to(dtype)
    before = digest([weight])
    assert torch.equal(digest([weight]), before)
    for distance in (*range(1, 130), 256, 512, 1024, 4096):
        for change in ("swap", "scale", "negate"):
            other = weight.clone()
            a, b = other[:-distance:2], other[distance::2]
            n = min(len(a), len(b), distance // 2 + 1)
            if change == "swap":
                a[:n], b[:n] = b[:n].clone(), a[:n].clone()
            elif change == "scale":
                a[:n], b[:n] = a[:n] * 2, b[:n] / 4
            else:
                a[:n], b[:n] = -a[:n], -b[:n]
            weight_now = weight.clone()
            weight.copy_(other)
            assert not torch.ops.effnet_kernels_cpu.unchanged(before), (change, distance)
            weight.copy_(weight_now)
    assert torch.ops.effnet_kernels_cpu.unchanged(before)


@torch.inference_mode()
def test_released_memory_is_an_error(block, x):
    for module in (block, copy.deepcopy(block)):
        warm(module, x)
    block.conv_pw.weight.untyped_storage().resize_(0)
    for module in (block, copy.copy(block)):
        with pytest.raises(RuntimeError, match="has no memory: its storage was released"):
            module(x)
