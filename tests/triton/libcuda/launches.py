"""What arrives at the driver when the package launches its kernels; run by ``tests/triton/test_launches.py``.

In a pytest of its own, for nothing can be compiled under the interpreter, which serves the other tests. The driver is
``driver.c``, the tensors are on the CPU: Triton's own launcher is all that is in between. The tests build on each
other: what one has compiled the next one finds.
"""

import contextlib
import ctypes
import gc
import json
import mmap
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton import knobs

from effnet_kernels.ops import depthwise_conv_bn_act_triton as depthwise
from effnet_kernels.ops import fused_mbconv_triton as fused
from effnet_kernels.ops import pointwise_conv_bn_act_triton as pointwise
from effnet_kernels.ops import squeeze_excite_gate_triton as gate
from effnet_kernels.ops.triton_common import Config, launch_kernel

driver = ctypes.CDLL("libcuda.so.1")
driver.stub_journal.restype = ctypes.c_char_p
driver.stub_allocate.argtypes = [ctypes.c_uint64, ctypes.c_size_t]

now = SimpleNamespace(device=0, streams=[0, 0], capturing=False)


@contextlib.contextmanager
def on(device: int) -> Iterator[None]:
    before, now.device = now.device, device
    yield
    now.device = before


# What Triton and the package ask torch about GPUs.
torch.cuda.is_available = lambda: True
torch.cuda.current_device = lambda: now.device
torch.cuda.device = on
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_name = lambda device=None: "none"
torch.cuda.is_current_stream_capturing = lambda: now.capturing
torch._C._cuda_getCurrentRawStream = lambda device: now.streams[device]
Tensor.get_device = lambda tensor: getattr(tensor, "home", now.device)

EPS = 1e-3
HOST = torch.frombuffer(mmap.mmap(-1, 2048), dtype=torch.float32).view(2, 4, 64)  # in no page of the others

compiled: list[bool] = []  # for each variant that Triton was asked for, whether its cache had it
shared: list[int] = []  # and how much shared memory it needs
record: list[Any] = []


def compilation(metadata: dict[str, Any], cache_hit: bool, **_: Any) -> None:
    compiled.append(cache_hit)
    shared.append(metadata["shared"])


knobs.compilation.listener = compilation


class OnDevice(TorchDispatchMode):
    """Whatever torch allocates is device memory in the eyes of the driver."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **kwargs or {})
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                assert driver.stub_allocate(storage.data_ptr(), storage.nbytes())
        return result


@pytest.fixture(autouse=True)
def gpu():
    with OnDevice():
        yield
    now.streams, now.capturing = [0, 0], False


class DriverLaunch(NamedTuple):
    name: str
    function: int
    grid: str
    block: str
    shared: int
    stream: int
    parameters: list[str]


def journal() -> tuple[list[str], list[DriverLaunch]]:
    """Since the last time: the kernels loaded, and the launches."""
    loads, launches = [], []
    for line in driver.stub_journal().decode().splitlines():
        what, *fields = line.split()
        assert what in ("load", "launch"), line
        if what == "load":
            loads.append(fields[0])
        else:
            name, function, grid, block, dynamic, stream, parameters = fields
            launch = DriverLaunch(name, int(function), grid, block, int(dynamic), int(stream), parameters.split(","))
            launches.append(launch)
    record.append([loads, [(*launch[:1], *launch[2:6], len(launch.parameters)) for launch in launches]])
    return loads, launches


def in_memory(value: Tensor | int | float) -> str:
    if isinstance(value, Tensor):
        return struct.pack("<Q", value.data_ptr()).hex()
    if isinstance(value, float):
        return struct.pack("<f", value).hex()
    return struct.pack("<i" if value < 2**31 else "<q", value).hex()


def check(
    launch: DriverLaunch, kernel: Any, programs: int, warps: int, **arguments: Tensor | int | float | None
) -> None:
    """Arguments by name, to be found in the order of the kernel's signature. None is compiled in like a constant."""
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    assert sorted(names) == sorted(arguments)
    values = [in_memory(arguments[name]) for name in names if arguments[name] is not None]
    assert launch.parameters[: len(values)] == values
    # Triton adds pointers to scratch memory, which no kernel here has.
    assert {*launch.parameters[len(values) :]} <= {bytes(8).hex()}
    assert launch.name == kernel.fn.__name__
    assert (launch.grid, launch.block) == (f"{programs},1,1", f"{32 * warps},1,1")
    assert launch.stream == now.streams[now.device]


def one(call: Callable[..., Any], *arguments: Any, first: bool) -> tuple[Any, DriverLaunch]:
    """The call's result and its only launch, for which nothing but the first call loads anything."""
    result, (launch,) = some(call, *arguments, first=[first])
    return result, launch


def some(call: Callable[..., Any], *arguments: Any, first: Sequence[bool]) -> tuple[Any, list[DriverLaunch]]:
    """The call's result and its launches, and which of them load a kernel."""
    variants = len(compiled)
    result = call(*arguments)
    loads, launches = journal()
    new = [launch for launch, loaded in zip(launches, first, strict=True) if loaded]
    assert (loads, len(compiled) - variants) == ([launch.name for launch in new], len(new))
    assert [launch.shared for launch in new] == shared[variants:]
    return result, launches


def half(*shape: int) -> Tensor:
    x = torch.empty(shape, dtype=torch.float16)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def vectors(channels: int) -> tuple[Tensor, ...]:
    return tuple(torch.empty(channels) for _ in range(4))


def named(names: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return dict(zip(names, values, strict=True))


BN = ("gamma_ptr", "beta_ptr", "mean_ptr", "var_ptr")
PROJECT_BN = tuple(f"project_{name}" for name in BN)


def same_variant(launches: Sequence[DriverLaunch]) -> None:
    assert len({(launch.function, launch.shared, launch.block) for launch in launches}) == 1


def test_depthwise_conv_bn_act():
    launches = []
    for stream, shape, programs in ((0, (2, 32, 12, 10), 8), (77, (3, 32, 9, 21), 18), (2**40, (1, 32, 4, 16), 2)):
        now.streams[0] = stream
        x, weight, bn = half(*shape), torch.empty((32, 1, 3, 3), dtype=torch.float16), vectors(32)
        (y, _), launch = one(depthwise.run, x, weight, bn, EPS, (1, 1), (1, 1, 1, 1), "silu", False, first=not launches)
        sizes = {"h": shape[2], "w": shape[3], "oh": shape[2], "ow": shape[3], "top": 1, "left": 1, "eps": EPS}
        tensors = {"y_ptr": y, "sums_ptr": None, "x_ptr": x, "weight_ptr": weight, **named(BN, bn)}
        check(launch, depthwise.kernel, programs, 1, **tensors, **sizes)
        launches.append(launch)
    same_variant(launches)


def test_pointwise_conv_bn_act_with_more_shared_memory_than_goes_without_asking():
    launches = []
    for stream, shape, programs in ((5, (2, 192, 5, 7), 2), (6, (1, 192, 16, 16), 4)):
        now.streams[0] = stream
        x, weight, bn, residual = half(*shape), half(128, 192, 1, 1), vectors(128), half(shape[0], 128, *shape[2:])
        y, launch = one(pointwise.run, x, weight, bn, EPS, "silu", None, residual, False, first=not launches)
        tensors = {"y_ptr": y, "x_ptr": x, "weight_ptr": weight, "gate_ptr": None, "residual_ptr": residual}
        pixels = shape[0] * shape[2] * shape[3]
        check(launch, pointwise.kernel, programs, 4, **tensors, **named(BN, bn), map_pixels=pixels, eps=EPS)
        assert launch.shared > 48 * 1024
        launches.append(launch)
    same_variant(launches)


GATE_LAYERS = ("w_reduce_ptr", "b_reduce_ptr", "w_expand_ptr", "b_expand_ptr")


def gate_arguments(images: int, channels: int, reduced: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    layers = half(reduced, channels, 1, 1), half(reduced), half(channels, reduced, 1, 1), half(channels)
    return torch.empty(images, channels), layers


def test_squeeze_excite_gate_in_one_launch():
    launches = []
    for images, parts, blocks in ((3, 2, 1), (100, 1, 2)):
        mean, se = gate_arguments(images, 264, 8)
        y, launch = one(gate.run, mean, se, "silu", "sigmoid", first=not launches)
        sizes = {"tiles": 1, "pixels": 1, "parts": parts, "blocks": blocks}
        tensors = {"gate_ptr": y, "sums_ptr": mean, **named(GATE_LAYERS, se)}
        check(launch, gate.whole_kernel, images * parts, 8, **tensors, **sizes)
        launches.append(launch)
    same_variant(launches)


def check_gate(launches: Sequence[DriverLaunch], y: Tensor, sums: Tensor, se: Sequence[Tensor], pixels: int) -> None:
    """Both kernels, and that the second one reads what the first one fills."""
    hidden, last = launches
    parts = int.from_bytes(bytes.fromhex(hidden.parameters[0]), "little")
    images = len(y)
    check(
        hidden, gate.hidden_kernel, -(-images // 4), 4,
        parts_ptr=parts, sums_ptr=sums, weight_ptr=se[0], images=images, tiles=1, pixels=pixels,
    )  # fmt: skip
    check(
        last, gate.gate_kernel, -(-images // 4), 4,
        gate_ptr=y, parts_ptr=parts, b_reduce_ptr=se[1], weight_ptr=se[2], b_expand_ptr=se[3], images=images,
    )  # fmt: skip


def test_squeeze_excite_gate_in_two_launches():
    found = []
    for images in (3, 5):
        mean, se = gate_arguments(images, 64, 72)
        y, launches = some(gate.run, mean, se, "silu", "sigmoid", first=[not found] * 2)
        check_gate(launches, y, mean, se, 1)
        found.append(launches)
    for same in zip(*found, strict=True):
        same_variant(same)
    for pixels in (2**31 + 3, 2**40):  # 64 bits for the one, 32 for the other
        mean, se = gate_arguments(2, 64, 72)
        y, sums = torch.empty_like(mean), mean[:, None]
        _, launches = some(gate.launch_sums, y, sums, pixels, se, "silu", "sigmoid", first=[pixels < 2**40, False])
        check_gate(launches, y, sums, se, pixels)
        assert launches[0].function != found[0][0].function
        assert launches[1].function == found[0][1].function


def test_fused_mbconv():
    for project, strides in ((False, (243, 81, 9, 1)), (True, (2**31 + 8, 81, 9, 1))):
        launches = []
        for stream in (8, 9):
            now.streams[0] = stream
            x, weight, bn = half(1, 3, 9, 9).as_strided((1, 3, 9, 9), strides), half(16, 3, 3, 3), vectors(16)
            second, second_bn = (half(24, 16, 1, 1), vectors(24)) if project else (None, ())
            arguments = (x, weight, bn, EPS, (2, 2), (1, 1, 1, 1), "silu", second, second_bn, 2 * EPS, False)
            y, launch = one(fused.run, *arguments, first=not launches)
            tensors = {"y_ptr": y, "x_ptr": x, "weight_ptr": weight, **named(BN, bn), "project_ptr": second}
            tensors |= named(PROJECT_BN, second_bn or (None,) * 4)
            sizes = {"pixels": 25, "height": 9, "width": 9, "out_height": 5, "out_width": 5, "top": 1, "left": 1}
            sizes |= named(("stride_n", "stride_c", "stride_h", "stride_w"), strides)
            check(launch, fused.kernel, 1, 4, **tensors, **sizes, eps=EPS, project_eps=2 * EPS)
            launches.append(launch)
        same_variant(launches)


def means(sums: Tensor, rows: int = 32, warps: int = 4, stages: int = 2, **home: int) -> Callable[[], Tensor]:
    """A launch of the smallest kernel."""
    out = torch.empty(sums.shape[0], 64)
    out.__dict__.update(home)

    def call() -> Tensor:
        config = Config((64, rows), warps, stages)
        launch_kernel(depthwise.mean_kernel, 2, (out, sums), (4, 9), (64, 64, rows), config)
        return out

    return call


def check_means(launch: DriverLaunch, out: Tensor, sums: Tensor, warps: int = 4) -> None:
    check(launch, depthwise.mean_kernel, 2, warps, mean_ptr=out, sums_ptr=sums, tiles=4, pixels=9)


def test_triton_is_not_asked_again(monkeypatch):
    sums = torch.empty(2, 4, 64)
    one(means(sums), first=True)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("Triton was asked")

    monkeypatch.setattr(type(depthwise.mean_kernel), "run", refuse)
    out, launch = one(means(sums), first=False)
    check_means(launch, out, sums)


def test_whatever_a_variant_depends_on_tells_launches_apart():
    aligned, unaligned = torch.empty(2, 4, 64), torch.empty(513)[1:].view(2, 4, 64)
    variants = [(sums, 32, 4, 2) for sums in (unaligned, aligned.half())]
    variants += [(aligned, *how) for how in ((16, 4, 2), (32, 2, 2), (32, 4, 3))]
    functions = {one(means(aligned), first=False)[1].function}
    for first in (True, False):
        for sums, rows, *how in variants:
            out, launch = one(means(sums, rows, *how), first=first)
            check_means(launch, out, sums, warps=how[0])
            functions.add(launch.function)
    assert len(functions) == 6


def test_another_device_has_functions_and_a_stream_of_its_own():
    sums = torch.empty(2, 4, 64)
    now.streams[:] = 11, 12
    functions = []
    for device, first in ((0, False), (1, True), (1, False), (0, False)):
        out, launch = one(means(sums, home=device), first=first)
        with on(device):
            check_means(launch, out, sums)
        functions.append(launch.function)
    assert functions[0] == functions[3] != functions[1] == functions[2]
    assert now.device == 0


def test_hooks_on_launches_are_called():
    sums, calls = torch.empty(2, 4, 64), []

    def enter(metadata: Any) -> None:
        calls.append(("enter", metadata.get()["name"], metadata.get()["stream"]))

    def leave(metadata: Any) -> None:
        calls.append(("leave", metadata.get()["name"], metadata.get()["stream"]))

    _, without = one(means(sums), first=False)
    for chain, hook in ((knobs.runtime.launch_enter_hook, enter), (knobs.runtime.launch_exit_hook, leave)):
        now.streams[0] += 1
        chain.add(hook)
        out, launch = one(means(sums), first=False)
        chain.remove(hook)
        check_means(launch, out, sums)
        assert launch.function == without.function
    assert calls == [("enter", "mean_kernel", 1), ("leave", "mean_kernel", 2)]
    one(means(sums), first=False)
    assert len(calls) == 2


def test_nothing_is_compiled_during_a_capture():
    sums, now.capturing = torch.empty(2, 4, 64), True
    one(means(sums), first=False)
    with pytest.raises(RuntimeError, match="run them once before capturing a CUDA graph"):
        means(sums, 8)()
    assert journal() == ([], [])


def test_what_a_hook_on_compilation_declines_is_not_remembered():
    sums = torch.empty(2, 4, 64)
    knobs.runtime.jit_cache_hook = lambda **_: True
    means(sums, 8)()
    knobs.runtime.jit_cache_hook = None
    assert journal() == ([], [])
    one(means(sums, 8), first=True)
    one(means(sums, 8), first=False)


def test_no_programs_no_launch():
    launch_kernel(depthwise.mean_kernel, 0, (), (), (), Config((64, 32), 4))
    assert journal() == ([], [])


def test_the_driver_refuses_what_a_driver_would():
    with pytest.raises(ValueError, match="cannot be accessed from Triton"):
        means(HOST)()
    arguments = (torch.empty(2, 64), torch.empty(2, 4, 64), 4, 9, 64, 64, 32)
    variant = depthwise.mean_kernel[(2,)](*arguments, num_warps=4, num_stages=2)
    journal()
    for programs, warps, ctas, dynamic in ((2, 8, 1, 0), (2, 4, 1, 48 * 1024 + 1), (-1, 4, 1, 0), (2, 4, 2, 0)):
        grid, metadata = (programs, 1, 1 if programs > 0 else -1), (warps, ctas, dynamic)
        with pytest.raises(RuntimeError, match="invalid argument"):
            variant.run(*grid, 0, variant.function, metadata, None, None, None, *arguments)
    assert journal() == ([], [])


def test_a_module_stays_loaded_when_triton_forgets_it():
    sums = torch.empty(2, 4, 64)
    depthwise.mean_kernel.device_caches.clear()
    gc.collect()  # since Triton 3.8 a variant takes its module with it
    out, launch = one(means(sums), first=False)
    check_means(launch, out, sums)


def test_record():
    """Last: what another process with the same cache has to repeat."""
    Path(os.environ["LAUNCHES_RECORD"]).write_text(json.dumps([compiled, record]))
