"""What the bindings do with devices, threads, streams and temporaries: those of a GPU, on an emulated runtime."""

import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map_only

from tests.cuda.test_training import TILED
from tests.emulation.build import as_cuda
from tests.ops.cases import Fused, MBConv
from tests.ops.device import native, native_call
from tests.ops.inputs import SAMPLES, build, sample
from tests.training import blocks

H100 = 90
# Every op in each of its forms.
FORMS = {"mbconv-in-one": MBConv(2, (7, 7), cin=16, mid=64, cout=16)}
TRAINING = ("train_depthwise", "train_depthwise_backward")
OPS = [*SAMPLES, "depthwise_conv_bn_act-alone", *FORMS, *TRAINING]


def recorded(name: str) -> tuple[Any, tuple]:
    """A native op and arguments for it, with the outputs that belong to them."""
    if name == "depthwise_conv_bn_act-alone":
        op, (out, mean, *rest, _) = recorded("depthwise_conv_bn_act")
        return op, (out, mean.new_empty(0), *rest, False)
    if name not in TRAINING:
        return native_call(build(FORMS[name], torch.float32) if name in FORMS else sample(name), "cuda")
    calls: list[tuple] = []
    packet = getattr(torch.ops.effnet_kernels_cuda, name)
    with pytest.MonkeyPatch.context() as patch:
        op = packet.default
        patch.setattr(packet, "default", lambda *args: calls.append(args) or op(*args))
        blocks.build(TILED[2], torch.float32).to(torch.float32, torch.float32).run("cuda")
    return op, tree_map_only(torch.Tensor, torch.Tensor.detach, calls[0])


@pytest.fixture
def runtime(emulation: ModuleType | None) -> Iterator[ModuleType]:
    """The emulation, with nothing in use."""
    if emulation is None:
        pytest.skip("a GPU has its own runtime")
    emulation.forget_contexts()
    yield emulation
    emulation.set_device(H100)


def in_thread(function: Callable[[], Any]) -> Any:
    """What the function returns or raises in a thread of its own."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


@torch.no_grad()
def call_on(device: int, op: Any, args: tuple) -> list[torch.Tensor]:
    """What the op writes, called with the arguments on that device."""
    args = tree_map_only(torch.Tensor, torch.Tensor.clone, args)
    op(*as_cuda(args, device))
    return outputs(op, args)


def outputs(op: Any, args: tuple) -> list[torch.Tensor]:
    """Those of the arguments that it writes."""
    written = zip(args, op._schema.arguments, strict=True)
    return [x for x, argument in written if argument.is_write and x is not None]


def test_asking_what_there_is_code_for_uses_no_device(runtime):
    ops = torch.ops.effnet_kernels_cuda
    assert in_thread(lambda: (ops.built_for(), ops.toolkit() > 0, ops.driver() > 0)) == ("8.0", True, True)
    assert runtime.contexts() == set()


@pytest.mark.parametrize("name", OPS)
def test_a_call_uses_the_device_of_its_tensors_alone(name, runtime):
    """In a thread that never chose a device, which is to be on device 0 still, as torch sees it."""
    op, args = recorded(name)
    runtime.forget_contexts()
    results, device = in_thread(lambda: (call_on(1, op, args), runtime.torch_device()))
    assert runtime.contexts() == {1}
    assert device == 0
    assert all(map(torch.equal, results, outputs(op, args)))


def test_the_device_that_a_thread_was_on_is_current_again(runtime):
    op, args = native_call(sample("mbconv"), "cuda")

    def run() -> tuple[int, int]:
        runtime.set_device(80)
        call_on(4, op, args)
        return runtime.current_device(), runtime.torch_device()

    assert in_thread(run) == (0, 0)
    assert runtime.contexts() >= {0, 4}


def test_a_call_that_is_refused_leaves_the_device_as_it_was(runtime):
    op, args = native_call(sample("pointwise_conv_bn_act"), "cuda")

    def run() -> int:
        runtime.set_device(80)
        with pytest.raises(RuntimeError, match="weight must"):
            call_on(1, op, (*args[:2], args[1], *args[3:]))  # a map for a weight
        return runtime.current_device()

    assert in_thread(run) == 0


def test_a_thread_in_which_no_context_is_current(runtime):
    """Another library has put it away: torch and this library have numbers of their own to go by."""
    op, args = native_call(sample("pointwise_conv_bn_act"), "cuda")

    def run() -> list[torch.Tensor]:
        runtime.set_torch_device(1)
        runtime.pop_context()
        return call_on(1, op, args)

    assert all(map(torch.equal, in_thread(run), outputs(op, args)))


# The same kernel; both take more than 48 KB of shared memory, the first more than the second.
LARGE, SMALL = (native(build(Fused(1, (8, 8), cin=cin, mid=64, cout=64), torch.float32)) for cin in (64, 16))


def test_threads_do_not_take_shared_memory_from_each_other(emulation):
    """A kernel's limit holds for all threads. Emulated, each rests between raising it and its launch."""

    def run(problem: Any) -> None:
        if emulation is not None:
            emulation.set_device(120)  # where no other test has raised a limit yet
        try:
            with torch.no_grad():
                for _ in range(4):
                    problem.call("cuda")
        except Exception as error:
            errors.append(error)

    errors: list[Exception] = []
    threads = [threading.Thread(target=run, args=(problem,)) for problem in (LARGE, SMALL) * 2]
    if emulation is not None:
        emulation.set_pause(0.02)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if emulation is not None:
        emulation.set_pause(0)
    assert not errors


@torch.no_grad()
def test_every_device_has_limits_of_its_own(runtime):
    expected = LARGE.call("cuda")
    for capability in (100, 90, 100):
        runtime.set_device(capability)
        assert all(map(torch.equal, LARGE.call("cuda"), expected))


@pytest.mark.parametrize("name", OPS)
def test_launches_wait_in_torchs_stream_until_after_the_call(name, runtime):
    """Its temporaries are freed by then."""
    op, args = recorded(name)
    expected = [x.clone() for x in outputs(op, args)]
    for stream in (0, 1):
        runtime.set_torch_stream(3, stream)
        runtime.defer(True)
        try:
            for out in outputs(op, args):
                out.fill_(-1)
            op(*args)
            assert runtime.waiting() == {(3, stream)}
            runtime.synchronize()
        finally:
            runtime.defer(False)
            runtime.set_torch_stream(3, 0)
        assert all(map(torch.equal, outputs(op, args), expected))
