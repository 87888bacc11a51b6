"""Which backend serves: the order, the reasons, and the three ways to ask for one."""

import os
import subprocess
import sys
import threading
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode

from effnet_kernels import dispatch
from effnet_kernels import functional as F
from effnet_kernels.dispatch import (
    Query,
    accelerates,
    backends,
    check_backend,
    implementation,
    place,
    requested,
    use_backend,
)
from effnet_kernels.ops import mbconv

QUERY = Query("mbconv", "cpu", torch.float32)


@pytest.fixture
def unavailable(monkeypatch):
    """The cpu backend, as if it had not been built."""
    monkeypatch.setitem(dispatch._AVAILABLE, "cpu", lambda: (False, "nobody built it"))
    dispatch._resolve.cache_clear()
    yield
    dispatch._resolve.cache_clear()


def served_by(problem: Query, name: str = "auto") -> str:
    return implementation(problem, name).__module__


def test_every_backend_explains_itself():
    table = backends()
    assert set(table) >= {"cpu", "reference"}
    assert table["reference"][0]
    for available, reason in table.values():
        assert isinstance(available, bool)
        assert reason
    with pytest.raises(TypeError):
        table["cpu"] = (True, "")


def test_auto_takes_the_first_that_can_serve(unavailable):
    assert implementation(QUERY) is mbconv.reference
    assert not accelerates("auto", *QUERY)


def test_auto_prefers_the_kernel_where_there_is_one():
    if not backends()["cpu"][0]:
        pytest.skip(backends()["cpu"][1])
    assert implementation(QUERY) is not mbconv.reference
    assert accelerates("auto", *QUERY)
    for dtype in (torch.float16, torch.bfloat16):
        assert accelerates("auto", *QUERY._replace(dtype=dtype))
    for wide_or_training in (
        QUERY._replace(dtype=torch.float64),
        Query("conv_block_train", "cpu", torch.float16),
    ):
        _, _, dtype, *_ = wide_or_training
        assert not accelerates("auto", *wide_or_training)
        with pytest.raises(RuntimeError, match=rf"'cpu' cannot serve \w+ on cpu in {dtype}: only float32"):
            implementation(wide_or_training, "cpu")
    assert implementation(QUERY._replace(dtype=torch.float64)) is mbconv.reference
    with pytest.raises(RuntimeError, match=r"'cpu' cannot serve mbconv on cuda.*the tensors are on cuda"):
        implementation(QUERY._replace(device="cuda"), "cpu")


def test_a_device_nobody_knows_is_served_by_the_reference():
    assert implementation(QUERY._replace(device="xpu")) is mbconv.reference


@pytest.mark.parametrize("order", [("triton", "cuda"), ("cuda", "triton")])
def test_auto_takes_each_op_in_its_own_order(order, monkeypatch):
    monkeypatch.setitem(dispatch._ORDER_OF_OP, ("cuda", "fused_mbconv"), (*order, "reference"))
    monkeypatch.setitem(dispatch._ORDER_OF_OP, ("cuda", "mbconv"), (*order[::-1], "reference"))
    for name in order:
        monkeypatch.setitem(dispatch._AVAILABLE, name, lambda: (True, ""))
        for op in ("fused_mbconv", "mbconv"):
            backend = types.SimpleNamespace(supports=lambda problem: (True, ""), run=name)
            monkeypatch.setitem(dispatch._KERNELS, name, (f"{name}_of_a_test.supports", f"{{op}}_{name}_of_a_test.run"))
            for module in (f"{name}_of_a_test", f"{op}_{name}_of_a_test"):
                monkeypatch.setitem(sys.modules, f"effnet_kernels.ops.{module}", backend)
    dispatch._resolve.cache_clear()
    assert implementation(Query("fused_mbconv", "cuda", torch.float16)) == order[0]
    assert implementation(Query("mbconv", "cuda:1", torch.float16)) == order[1]
    dispatch._resolve.cache_clear()


def test_a_problem_says_on_which_gpu_it_is():
    with FakeTensorMode(allow_non_fake_inputs=True):
        for device in ("cpu", "meta", "cuda:0", "cuda:1"):
            assert place(torch.empty(1, device=device)) == device
    assert QUERY._replace(device="cuda:1").device_type == "cuda"


def test_a_named_backend_is_always_worth_calling():
    assert accelerates("reference", *QUERY)
    with use_backend("reference"):
        assert accelerates("auto", *QUERY)


def test_the_argument_beats_the_context_beats_the_environment(monkeypatch):
    monkeypatch.setenv("EFFNET_KERNELS_BACKEND", "from-environment")
    assert requested() == "from-environment"
    with use_backend("reference"):
        assert requested() == "reference"
        assert requested("from-argument") == "from-argument"
        with use_backend("auto"):
            assert requested() == "from-environment"
        assert requested() == "reference"
    assert requested() == "from-environment"


def test_use_backend_ends_with_an_exception():
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert requested() == "auto"


def test_use_backend_belongs_to_its_thread():
    seen = []
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("fast", ValueError, r"backend must be one of \('auto', .*'reference'\), got 'fast'"),
        ("", ValueError, "backend must be one of .*, got ''"),
        (None, TypeError, "backend must be a string, got NoneType"),
        (3, TypeError, "backend must be a string, got int"),
    ],
)
def test_names_that_are_no_backend(name, error, message):
    with pytest.raises(error, match=message):
        check_backend(name)
    with pytest.raises(error, match=message), use_backend(name):
        pass
    assert requested() == "auto"


def test_a_backend_that_is_not_available(unavailable):
    message = "backend 'cpu' is not available: nobody built it"
    with pytest.raises(RuntimeError, match=message), use_backend("cpu"):
        pass
    with pytest.raises(RuntimeError, match=message):
        implementation(QUERY, "cpu")


def in_fresh_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
    )


def test_the_environment_variable_rules_a_process():
    code = (
        "import torch; from effnet_kernels.dispatch import *; from effnet_kernels.dispatch import Query;"
        "print(implementation(Query('mbconv', 'cpu', torch.float32)).__module__)"
    )
    result = in_fresh_process(code, EFFNET_KERNELS_BACKEND="reference")
    assert result.stdout.strip() == "effnet_kernels.ops.mbconv", result.stderr
    result = in_fresh_process(code, EFFNET_KERNELS_BACKEND="fast")
    assert "ValueError: backend must be one of" in result.stderr


def test_use_backend_decides_the_kernel_of_an_op(monkeypatch):
    """Through the public function: a kernel that answers with a marker is the one that ran."""
    monkeypatch.setattr(mbconv, "reference", lambda *args: "reference ran")
    dispatch._resolve.cache_clear()
    c = 4
    vector = torch.ones(c)
    part = F.ConvBN(torch.ones(c, 1, 3, 3), F.BatchNorm(vector, vector, vector, vector))
    project = F.ConvBN(torch.ones(c, c, 1, 1), part.bn)
    with torch.no_grad(), use_backend("reference"):
        assert F.mbconv(torch.ones(1, c, 5, 5), None, part, None, project) == "reference ran"
    dispatch._resolve.cache_clear()
