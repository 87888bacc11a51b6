"""``python -m benchmarks.gpu`` on something tiny and without a GPU: every part runs, and what fails is recorded."""

import json
import sys
import time

import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_parts, gpu_record, report
from benchmarks.cases import Case, op_case
from benchmarks.gpu_record import OutOfTimeError, Record
from effnet_kernels.benchmarking.contenders import CHANNELS_LAST, STOCK, ours

REFERENCE = ours("reference")


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "gpu.json")


def case(fused=lambda module, backend: module) -> Case:
    return Case("op", "a convolution", 2, lambda: (nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)), fused, bytes=8)


def test_every_measuring_part(record):
    """In this process; the record on disk has whatever was measured."""
    pytest.importorskip("timm")
    for part in ("build", "ceilings", "flagship", "ops", "models", "training", "blocks", "order", "tune"):
        gpu.run_part(part, "cpu", record)
    content = json.loads(record.file.read_text())
    assert {name: part["status"] for name, part in content["parts"].items()} == dict.fromkeys(content["parts"], "done")
    levels = {level: sum(len(case["contenders"]) for case in of.values()) for level, of in content["levels"].items()}
    assert levels.keys() == {"model", "op", "training_model", "block"}
    for of in content["levels"].values():
        for title, measured in of.items():
            assert all("median" in found for found in measured["contenders"].values()), (title, measured)
            assert CHANNELS_LAST in measured["contenders"]
            assert REFERENCE in measured["contenders"]
    assert all(
        found["share_of_copy"] > 0 for op in content["levels"]["op"].values() for found in op["contenders"].values()
    )
    measured_at = record.file.stat().st_mtime_ns
    assert record.content["environment"]["copy_bytes_per_second"] > 0
    record.measure(op_case("efficientnet_b0", gpu_parts.SMOKE.ops[0], 1, 2, "float32", "cpu"), [STOCK], 0.01)
    assert record.file.stat().st_mtime_ns == measured_at, "what the record has is not measured again"


def test_a_run_is_one_page_and_goes_on_after_a_part_that_is_cut_off(tmp_path, capfd):
    """Each part in its own process; the tests, which are only collected here, get no time."""
    file = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--record", str(file), "--commit", "abc"]
    assert gpu.main([*arguments, "--only", "tests,order", "--budget", "1000"]) == 0
    content = json.loads(file.read_text())
    assert content["parts"]["order"]["status"] == "done"
    assert content["environment"]["commit"] == "abc"
    assert content["environment"]["copy_bytes_per_second"] > 0  # whatever was asked for
    printed = capfd.readouterr().out
    assert "part" in printed
    assert "commit abc" in printed
    gpu.main([*arguments, "--only", "order", "--budget", "1e-3"])
    assert json.loads(file.read_text())["parts"]["order"]["status"] == "no time left"
    gpu.main([*arguments[:-1], "def", "--only", "order", "--budget", "1e-3"])
    assert "tests" not in json.loads(file.read_text())["parts"], "other code begins a record of its own"


def test_parts_that_nobody_knows(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--only", "ops,everything"])
    assert "got everything" in capsys.readouterr().err


def test_a_contender_that_takes_too_long_is_given_up(record, monkeypatch):
    monkeypatch.setattr(gpu_record, "LIMIT", 1.0)
    record.measure(case(lambda module, backend: time.sleep(60)), [STOCK, REFERENCE], 0.01)
    (measured,) = record.content["levels"]["op"].values()
    assert measured["contenders"][REFERENCE] == {"failed": "TimeoutError: not ready after 1 s"}
    assert "median" in measured["contenders"][STOCK]
    record.measure(case()._replace(title="another"), [STOCK], 0.01)
    record.forget_failures()
    assert list(record.content["levels"]["op"]) == ["another"], "the next run tries again"


def test_a_case_that_fails_does_not_end_the_part(record):
    def make():
        raise RuntimeError("no such layer")

    record.measure(case()._replace(make=make), [STOCK], 0.01)
    (measured,) = record.content["levels"]["op"].values()
    assert "RuntimeError: no such layer" in measured["failed"]


def test_a_part_that_fails_is_recorded(record, monkeypatch):
    def part(record, scope):
        raise ZeroDivisionError("of this part")

    monkeypatch.setitem(gpu.PARTS, "order", (part, 1.0))
    gpu.run_part("order", "cpu", record)
    assert record.content["parts"]["order"]["status"] == "failed"
    assert "ZeroDivisionError: of this part" in record.content["parts"]["order"]["errors"]


def test_no_case_is_begun_without_time_for_it(record):
    record.until = time.time() - 1
    with pytest.raises(OutOfTimeError):
        record.measure(case(), [STOCK], 0.01)
    gpu.run_part("ops", "cpu", record)
    assert record.content["parts"]["ops"]["status"] == "out of time"


DEADLY = """
import os, pathlib, signal
from benchmarks.gpu_record import Record
from tests.test_gpu_run import REFERENCE, STOCK, case
record = Record(pathlib.Path({file!r}))
record.measure(case(lambda module, backend: os.kill(os.getpid(), signal.SIGKILL)), [STOCK, REFERENCE], 0.01)
"""


def test_a_contender_that_kills_its_process_is_left_out(record):
    command = [sys.executable, "-c", DEADLY.format(file=str(record.file))]
    status, _, died = gpu.attempt(command, time.time() + 100)
    assert (status, died) == ("died with status -9", True)
    assert Record(record.file).blame(status)
    assert gpu.attempt(command, time.time() + 100) == ("done", "", False)
    (measured,) = Record(record.file).content["levels"]["op"].values()
    assert measured["contenders"][REFERENCE] == {"failed": "died with status -9"}
    assert "median" in measured["contenders"][STOCK]


def test_a_process_that_hangs_is_ended():
    status, _, died = gpu.attempt([sys.executable, "-c", "import time; time.sleep(60)"], time.time())
    assert (status, died) == ("cut off", False)


def test_without_timm_ops_are_measured_and_models_say_what_they_need(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for part in ("ops", "models", "blocks"):
        gpu.run_part(part, "cpu", record)
    assert all("failed" not in measured for measured in record.content["levels"]["op"].values())
    assert all("timm is needed" in measured["failed"] for measured in record.content["levels"]["model"].values())
    assert record.content["parts"]["blocks"]["status"] == "failed"


PYTEST = """
tests/gpu/test_gpu.py::test_opcheck[mbconv-cuda] PASSED    [ 25%]
tests/gpu/test_gpu.py::test_autocast[cuda] FAILED          [ 50%]
tests/cuda/test_mbconv.py::test_windows[3] SKIPPED (why)   [ 75%]
"""
XDIST = """
[gw1] [ 25%] PASSED tests/gpu/test_gpu.py::test_opcheck[mbconv-cuda]
[gw0] [ 50%] FAILED tests/gpu/test_gpu.py::test_autocast[cuda]
[gw1] [ 75%] SKIPPED tests/cuda/test_mbconv.py::test_windows[3]
"""
SUMMARY = """
==== short test summary info ====
SKIPPED [1] tests/cuda/test_mbconv.py:3: why
FAILED tests/gpu/test_gpu.py::test_autocast[cuda] - AssertionError: no
==== 1 failed, 1 passed, 1 skipped in 2.00s ====
"""


@pytest.mark.parametrize("lines", [PYTEST, XDIST], ids=["pytest", "xdist"])
@pytest.mark.parametrize(("end", "reason"), [("", ""), (SUMMARY, " - AssertionError: no")], ids=["cut off", "whole"])
def test_what_pytest_says_is_counted(lines, end, reason):
    found = gpu_parts.outcome(lines + end)
    assert {kind: found[kind] for kind in ("passed", "failed", "error", "skipped")} == {
        "passed": 1, "failed": 1, "error": 0, "skipped": 1,
    }  # fmt: skip
    assert found["failures"] == ["tests/gpu/test_gpu.py::test_autocast[cuda]" + reason]


def fabricated() -> dict:
    """The record of a whole run, every number made up."""
    scope = gpu_parts.GPU
    timed = {"median": 1e-3, "q1": 1e-3, "q3": 1e-3, "error": 0.0, "samples": 9, "share_of_copy": 0.5,
             "bytes_per_second": 1e12}  # fmt: skip
    names = [*scope.eager, *map(ours, scope.backends), *scope.compiled]
    measured = {"batch": 128, "count": 1, "bytes": 8, "contenders": {name: dict(timed) for name in names}}
    models = [f"{model} @{size}, batch {batch}, float16" for model, size, batch in (scope.flagship, *scope.models)]
    training = [f"{model} @{size}, batch {batch}, AMP float16" for model, size, batch in scope.training]
    titles = {"model": models, "training_model": training, "block": models[:8]}
    titles["op"] = [f"efficientnet_b0 {op}, batch 128, float16" for op in scope.ops]
    environment = {
        "device": "a GPU", "device_type": "cuda", "versions": {"torch": "9.9"}, "commit": "c0ffee", "date": "today",
        "copy_bytes_per_second": 3e12, "matrix_flops_per_second": 8e14,
    }  # fmt: skip
    part = {"status": "failed", "seconds": 99.9, "errors": "x" * 2000}
    return {
        "environment": environment,
        "parts": dict.fromkeys(gpu.PARTS, part),
        "levels": {level: dict.fromkeys(of, measured) for level, of in titles.items()},
        "lost": [],
    }


def test_the_page_fits_where_only_the_end_of_the_output_is_kept():
    assert len(gpu.summary(fabricated())) < 12_000


def test_tables_plots_and_predictions_from_a_record(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "a-gpu.json").write_text(json.dumps(fabricated()))
    document = tmp_path / "performance.md"
    document.write_text(
        "<!-- benchmark:model -->\n<!-- /benchmark -->\n<!-- benchmark:predicted -->\n<!-- /benchmark -->\n"
        "| efficientnet_b0 @224 | 65 | 12.6 us | 13.8 us | 9.1 us | DRAM 41% |\n"
        "| efficientnet_b4 @380 | 128 | 98.1 us | 107.0 us | 68.0 us | DRAM 39% |\n"
    )
    for _ in range(2):
        report.main(["--results", str(tmp_path), "--plots", str(tmp_path), str(document)])
    text = document.read_text()
    assert text.count("| efficientnet_b0 @224 | 12.6 us | 7.8 us | 0.62x | a GPU |") == 1
    assert "efficientnet_b0 @224, batch 128, float16 | 1.00 ms" in text
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"benchmark-a-gpu-{level}.png" for level in ("model", "op", "block", "training_model")
    }
