"""When the Triton backend serves, what it says when it does not, and what "auto" does then."""

import importlib
import importlib.util
from unittest import mock

import pytest
import torch

from effnet_kernels import dispatch
from effnet_kernels import functional as F
from effnet_kernels.dispatch import Query, backends, check_backend, implementation, use_backend
from effnet_kernels.ops import (
    mbconv,  # before the environment changes, or it is not interpreted
    triton_common,
)
from effnet_kernels.ops import mbconv_triton as triton
from tests.ops.special_values import unit_bn

CUDA = Query("mbconv", "cuda", torch.float16, (3, 3))


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """A GPU machine in the eyes of the dispatch, and nothing remembered of this one."""

    def forget():
        dispatch._triton_available.cache_clear()
        dispatch._resolve.cache_clear()

    forget()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
    yield
    forget()


def test_auto_takes_triton_for_tensors_on_a_gpu():
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert implementation(CUDA._replace(dtype=dtype), "triton") is triton.run
        assert implementation(CUDA._replace(dtype=dtype)) is not mbconv.reference
    assert implementation(CUDA._replace(dtype=torch.float64)) is mbconv.reference


def missing(monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
    )


def too_old(monkeypatch):
    monkeypatch.setattr(importlib.import_module("triton"), "__version__", "3.1.0")


def old_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))


def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def other_vendor(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (missing, "Triton is not installed"),
        (too_old, r"Triton 3\.1\.0 is older than 3\.4"),
        (old_gpu, r"no GPU here has compute capability 7\.5"),
        (no_gpu, "no NVIDIA GPU"),
        (other_vendor, "no NVIDIA GPU"),
    ],
)
def test_a_reason_by_name_and_a_fallback_under_auto(change, reason, monkeypatch):
    change(monkeypatch)
    assert not backends()["triton"][0]
    with pytest.raises(RuntimeError, match=f"'triton' is not available: {reason}"):
        check_backend("triton")
    with pytest.raises(RuntimeError, match=reason), use_backend("triton"):
        pass
    assert "triton" not in implementation(CUDA).__module__


def test_bfloat16_needs_ampere(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    problem = CUDA._replace(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"bfloat16 needs compute capability 8\.0, a GPU has less"):
        implementation(problem, "triton")
    assert "triton" not in implementation(problem).__module__  # where there is a GPU, CUDA C++ may serve
    assert implementation(CUDA, "triton") is not mbconv.reference


def test_an_old_gpu_costs_no_other_one_its_backend(monkeypatch):
    """Each is asked on its own; a problem that names none is on the current one."""
    capabilities, current = [(7, 0), (7, 5), (9, 0)], [2]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert backends()["triton"][0]
    wide = CUDA._replace(dtype=torch.bfloat16)
    for problem in (CUDA, wide, wide._replace(device="cuda:2"), CUDA._replace(device="cuda:1")):
        assert implementation(problem, "triton") is triton.run
    with pytest.raises(RuntimeError, match=r"on cuda:1 .*bfloat16 needs compute capability 8\.0, a GPU has less"):
        implementation(wide._replace(device="cuda:1"), "triton")
    with pytest.raises(RuntimeError, match=r"on cuda:0 .*Triton needs compute capability 7\.5, a GPU has less"):
        implementation(CUDA._replace(device="cuda:0"), "triton")
    current[0] = 0
    with pytest.raises(RuntimeError, match="on cuda:0 "):
        implementation(CUDA, "triton")


def test_tensors_elsewhere_are_refused_by_name():
    x, weight = torch.ones(1, 4, 3, 3), torch.ones(2, 4, 1, 1)
    with pytest.raises(RuntimeError, match=r"'triton' cannot serve pointwise_conv_bn_act on cpu.*tensors are on cpu"):
        F.pointwise_conv_bn_act(x, weight, unit_bn(2), backend="triton")
    assert F.pointwise_conv_bn_act(x, weight, unit_bn(2)).shape == (1, 2, 3, 3)


class OnGpu(torch.Tensor):
    def get_device(self) -> int:
        return 0


def test_nothing_is_compiled_during_a_capture(monkeypatch):
    """The launch raises before Triton is asked, and names the way out."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)

    class Kernel:
        fn = staticmethod(lambda: None)

        def __getitem__(self, grid):
            raise AssertionError("Triton was asked")

    x = torch.ones(4).as_subclass(OnGpu)
    with pytest.raises(RuntimeError, match="run them once before capturing a CUDA graph"):
        triton_common.launch_kernel(Kernel(), 1, (x,), (4,), (), triton_common.Config((4,), 1))


def test_where_a_variant_has_other_names_every_launch_goes_through_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_common, "_compiled", {})
    monkeypatch.setattr(triton_common.triton.runtime, "driver", mock.Mock())
    launched = []

    class Kernel:
        fn = staticmethod(lambda: None)

        def __getitem__(self, grid):
            return lambda *arguments, **options: launched.append(arguments[1:]) or mock.Mock(spec=["run"])

    kernel, x = Kernel(), torch.ones(4).as_subclass(OnGpu)
    for sizes in ((4,), (5,), (6,)):
        triton_common.launch_kernel(kernel, 1, (x,), sizes, (), triton_common.Config((4,), 1))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)  # no reason to raise
    assert launched == [(4,), (5,), (6,)]


def test_a_variant_is_compiled_for_every_size_that_needs_64_bits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton_common.triton.runtime, "driver", mock.Mock())
    compiled = []

    class Kernel:
        fn = staticmethod(lambda: None)

        def __getitem__(self, grid):
            return lambda *arguments, **options: compiled.append(arguments[1:]) or mock.Mock()

    kernel, x = Kernel(), torch.ones(4).as_subclass(OnGpu)
    for sizes in ((4, 5, 0.5), (6, 7, 0.5), (2**31, 1, 0.5), (1, 2**31, 0.5), (2**40, 8, 0.25)):
        triton_common.launch_kernel(kernel, 1, (x,), sizes, (), triton_common.Config((4,), 1))
    assert compiled == [(4, 5, 0.5), (2**31, 1, 0.5), (1, 2**31, 0.5)]


def test_hooks_are_noticed_as_triton_3_4_has_them(monkeypatch):
    """Themselves or None; ``libcuda/launches.py`` has those of this Triton."""
    runtime = triton_common.knobs.runtime
    monkeypatch.setattr(runtime, "launch_enter_hook", None)
    monkeypatch.setattr(runtime, "launch_exit_hook", None)
    assert not triton_common._listened_to()
    monkeypatch.setattr(runtime, "launch_exit_hook", lambda metadata: None)
    assert triton_common._listened_to()
