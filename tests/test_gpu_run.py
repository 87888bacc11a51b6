"""``python -m benchmarks.gpu`` on something tiny and without a GPU: every part runs, and what fails is recorded."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_kernels, gpu_parts, gpu_profile, gpu_record, report
from benchmarks.cases import Case, op_case
from benchmarks.gpu_record import OutOfTimeError, Record
from effnet_kernels import native
from effnet_kernels.benchmarking import timing
from effnet_kernels.benchmarking.contenders import AUTOTUNED, CHANNELS_LAST, COMPILED, STOCK, ours
from effnet_kernels.benchmarking.environment import cpu_model
from effnet_kernels.ops import triton_common

REFERENCE = ours("reference")


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "gpu.json", part="ops")


def case(fused=lambda module, backend: module) -> Case:
    def make():
        return nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)

    return Case("op", "a convolution", 2, make, fused, traffic=lambda: 8)


def contenders_of(record: Record, title: str = "a convolution") -> dict:
    return record.content["levels"]["op"][title]["contenders"]


def test_every_measuring_part(record):
    """In this process; the record on disk has whatever was measured."""
    pytest.importorskip("timm")
    for part in ("build", "ceilings", "flagship", "blocks", "ops", "order", "launches", "models", "training", "tune"):
        gpu.run_part(part, "cpu", (record.file, None), float("inf"))
    content = json.loads(record.file.read_text())
    assert {name: part["status"] for name, part in content["parts"].items()} == dict.fromkeys(content["parts"], "done")
    levels = {level: sum(len(case["contenders"]) for case in of.values()) for level, of in content["levels"].items()}
    assert levels.keys() == {"model", "op", "training_model", "block"}
    for of in content["levels"].values():
        for title, measured in of.items():
            for found in measured["contenders"].values():
                assert {"median", "q1", "q3", "error", "samples"} <= found.keys(), (title, measured)
                assert "alone" not in found
            assert CHANNELS_LAST in measured["contenders"]
            assert REFERENCE in measured["contenders"]
    for level in ("op", "block", "model", "training_model"):
        for measured in content["levels"][level].values():
            assert measured["bytes"] > 0
            assert all(found["share_of_copy"] > 0 for found in measured["contenders"].values())
    assert content["environment"]["copy_bytes_per_second"] > 0
    record = Record(record.file)
    measured_at = record.file.stat().st_mtime_ns
    known = op_case("efficientnet_b0", gpu_parts.SMOKE.ops[0], 1, 2, "float32", "cpu")
    record.measure(known, [CHANNELS_LAST], 0.01)
    assert record.file.stat().st_mtime_ns == measured_at, "what the record has is not measured again"
    record.measure(known, [STOCK], 0.01)
    (pace,) = contenders_of(record, known.title)[STOCK]["beside"]
    assert pace in (ours("cpu"), REFERENCE), "who comes later takes turns with the fastest of ours"
    assert (
        contenders_of(record, known.title)[REFERENCE] == content["levels"]["op"][known.title]["contenders"][REFERENCE]
    )


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
    assert (tmp_path / "gpu.tests.log").exists(), "what a tool printed is there while it runs"
    gpu.main([*arguments, "--only", "order", "--budget", "1e-3"])
    assert json.loads(file.read_text())["parts"]["order"]["status"] == "no time left"


def test_what_was_measured_elsewhere_is_neither_mixed_nor_lost(tmp_path, capsys, monkeypatch):
    file = tmp_path / "gpu.json"
    known = {"environment": {"device": "another GPU", "commit": "abc"}, "parts": {}, "levels": {"op": {}}}
    arguments = ["--device", "cpu", "--record", str(file), "--only", "order", "--budget", "1e-3"]
    mine = {"device": cpu_model()}
    for change, wanted in (
        ({}, "device another GPU"),
        (mine | {"commit": "def"}, "commit def"),
        (mine | {"versions": {"torch": "1.0"}}, "torch 1.0"),
        (mine | {"versions": {"triton": "1.0"}}, "triton 1.0"),
        (mine | {"versions": {"timm": "0.1"}}, "timm 0.1"),
    ):
        before = json.dumps(known | {"environment": known["environment"] | change})
        file.write_text(before)
        with pytest.raises(SystemExit):
            gpu.main([*arguments, "--commit", "abc"])
        assert f"is of {wanted}, this is " in capsys.readouterr().err
        assert file.read_text() == before
    monkeypatch.setattr(gpu, "commit", lambda: None)  # no .git
    with pytest.raises(SystemExit):
        gpu.main(arguments)
    assert "--commit" in capsys.readouterr().err
    assert file.read_text() == before
    gpu.main([*arguments, "--commit", "abc", "--fresh"])
    content = json.loads(file.read_text())
    assert content["environment"]["commit"] == "abc"
    assert "op" not in content["levels"]


def test_a_damaged_record_is_read_from_its_other_place_or_left_as_it_is(tmp_path):
    file, keep = tmp_path / "gpu.json", tmp_path / "kept" / "gpu.json"
    record = Record(file, keep, part="ops")
    record.measure(case(), [STOCK], 0.01)
    whole = file.read_text()
    empty = '{"environment": {}, "parts": {}, "levels": {}}'
    for damaged in (
        None,
        b"",
        whole[:100].encode(),
        b"[]",
        b"{}",
        b"5",
        b"\xff\xfe",
        empty.encode(),
        b'{"levels": null}',
    ):
        file.unlink()
        if damaged is not None:
            file.write_bytes(damaged)
        assert Record(file, keep).content == json.loads(whole)
        Record(file, keep).save()
        assert file.read_text() == keep.read_text() == whole
    keep.unlink()
    file.write_text(whole[:100])
    with pytest.raises(ValueError, match="is no record"):
        Record(file, keep)
    with pytest.raises(SystemExit):
        gpu.main(["first", "--device", "cpu", "--commit", "a", "--record", str(file)])
    assert file.read_text() == whole[:100]


def test_a_second_place_that_cannot_be_written_costs_nothing(tmp_path):
    record = Record(tmp_path / "gpu.json", Path("/dev/null/gpu.json"), part="ops")
    record.measure(case(), [STOCK], 0.01)
    assert "median" in contenders_of(Record(record.file))[STOCK]


def test_two_runs_at_a_time_do_not_write_one_record(tmp_path, capsys):
    arguments = ["--device", "cpu", "--commit", "a", "--record", str(tmp_path / "a.json"), "--only", "order"]
    with gpu._alone(tmp_path) as alone:
        assert alone
        with pytest.raises(SystemExit):
            gpu.main([*arguments, "--budget", "1e-3"])
    assert f"another run is writing in {tmp_path}" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    assert gpu.main([*arguments, "--budget", "1e-3"]) == 0


def test_the_page_of_a_record_that_a_killed_run_has_left(record):
    record.part("build", packed="5 kernels")
    assert "killed" in gpu.summary(record.content | {"environment": fabricated()["environment"]})


def test_tritons_cache_stays_where_it_is(tmp_path, monkeypatch):
    """Inductor moves it otherwise, away from what was unpacked."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "as it was")
    arguments = ["--device", "cpu", "--commit", "a", "--record", str(tmp_path / "a.json"), "--only", "order"]
    for before, after in ((str(tmp_path / "mine"), str(tmp_path / "mine")), (None, f"{Path.home()}/.triton/cache")):
        monkeypatch.delenv("TRITON_CACHE_DIR")
        if before:
            monkeypatch.setenv("TRITON_CACHE_DIR", before)
        gpu.main([*arguments, "--budget", "1e-3"])
        assert os.environ["TRITON_CACHE_DIR"] == after


def test_packed_kernels_that_are_of_no_use_do_not_fail_the_part(record, tmp_path, monkeypatch):
    monkeypatch.setattr(triton_common, "INTERPRETED", False)
    (tmp_path / "kernels.zip").write_bytes(b"damaged")
    for packed, reason in ((tmp_path / "kernels.zip", "not a file of packed"), (tmp_path / "none", "No such file")):
        record.content["environment"]["packed_kernels"] = str(packed)
        gpu_parts.build(record, gpu_parts.SMOKE)
        assert reason in record.content["parts"]["build"]["packed"]
        assert "native" in record.content["parts"]["build"]["reason"]


def test_parts_that_nobody_knows(capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--device", "cpu", "--only", "ops,everything"])
    assert "got everything" in capsys.readouterr().err


def test_what_each_call_does():
    """Two calls do all there is, but for what has to be asked for; the second one ends what the headline lacks."""
    assert {"build", "flagship"} == {*gpu_parts.FIRST} & {*gpu_parts.SECOND}
    on_demand = {"racecheck", "tune", "ceilings"}
    assert {*gpu_parts.FIRST, *gpu_parts.SECOND} | on_demand == set(gpu_parts.PARTS)
    for parts in (gpu_parts.FIRST, gpu_parts.SECOND):
        assert list(parts) == [name for name in gpu_parts.PARTS if name in parts], "in order of worth"
    assert sum(seconds for _, seconds in gpu.CALLS.values()) <= 590
    assert gpu_parts.PARTS["autotuned"].least == 150
    contenders = {*gpu_parts.GPU.eager, *map(ours, gpu_parts.GPU.whole)}
    assert not contenders & {ours("auto"), COMPILED, AUTOTUNED}


def test_what_is_done_once(tmp_path, monkeypatch):
    """Tests that are done take no time from a call that is made again; those that had no time are run, or asked for."""
    ran = []
    monkeypatch.setattr(gpu.Run, "supervise", lambda run, name: ran.append(name))
    file = tmp_path / "gpu.json"
    arguments = ["first", "--device", "cpu", "--commit", "a", "--record", str(file)]
    for status, extra, wanted in (("done", [], False), ("out of time", [], True), ("done", ["--only", "tests"], True)):
        parts = {"tests": {"status": status}, "ops": {"status": "done"}}
        ceilings = {"copy_bytes_per_second": 1.0, "matrix_flops_per_second": 1.0}
        known = {"environment": ceilings, "parts": parts, "levels": {}}
        file.write_text(json.dumps(known))
        ran.clear()
        gpu.main([*arguments, *extra])
        assert ("tests" in ran) == wanted
        assert ("ops" in ran) == (not extra)


@pytest.mark.parametrize("compiled", list(gpu.COMPILED))
def test_which_torch_compile(compiled, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(gpu.Run, "supervise", lambda run, name: ran.append(name))
    gpu.main(["second", "--device", "cpu", "--commit", "a", "--record", str(tmp_path / "a"), "--compiled", compiled])
    assert {"compiled", "autotuned"} & set(ran) == set(gpu.COMPILED[compiled])
    assert "models" in ran
    assert "blocks" not in ran


def test_a_contender_for_which_no_time_is_left_has_not_failed(record):
    record.until = time.time() + 2
    record.measure(case(lambda module, backend: time.sleep(60)), [STOCK, REFERENCE], 0.01)
    assert contenders_of(record).keys() == {STOCK}


def test_a_contender_that_takes_too_long_is_given_up(record, monkeypatch):
    monkeypatch.setattr(gpu_record, "LIMIT", 1.0)
    record.measure(case(lambda module, backend: time.sleep(60)), [STOCK, REFERENCE], 0.01)
    failed = {"failed": "TimeoutError: not ready after 1 s", "part": "ops"}
    assert contenders_of(record)[REFERENCE] == failed
    valid = dict(contenders_of(record)[STOCK])
    assert "median" in valid

    for part, wanted in (("models", failed), ("ops", None)):
        again = Record(record.file, part=part)
        again.forget_failures()
        assert contenders_of(again).get(REFERENCE) == wanted, "only the part that it failed in tries it again"
        assert contenders_of(again)[STOCK] == valid
    again.measure(case(), [STOCK, REFERENCE], 0.01)
    assert "median" in contenders_of(again)[REFERENCE]
    assert contenders_of(again)[STOCK] == valid


def test_each_contender_is_saved_before_the_next_one_begins(record):
    """Two are proven, the third one hangs, and the process is killed: on disk are the two."""
    on_disk = {}

    def fused(module, backend):
        if backend == "slow":
            on_disk.update(json.loads(record.file.read_text()))
        return module

    record.measure(case(fused), [STOCK, REFERENCE, ours("slow")], 0.01)
    found = on_disk["levels"]["op"]["a convolution"]["contenders"]
    assert found.keys() == {STOCK, REFERENCE}
    assert all(result["alone"] > 0 for result in found.values())
    shown = fabricated() | {"levels": on_disk["levels"]}
    assert "~" in gpu.summary(shown)
    assert (on_disk["doing"]["contender"], on_disk["doing"]["level"]) == (ours("slow"), "op")

    record.file.write_text(json.dumps(on_disk))  # as the killed process left it
    again = Record(record.file, part="ops")
    again.measure(case(), [STOCK, REFERENCE, ours("slow")], 0.01)
    assert all("alone" not in result and "median" in result for result in contenders_of(again).values())


def test_a_case_that_fails_does_not_end_the_part(record):
    def make():
        raise RuntimeError("no such layer")

    record.measure(case()._replace(make=make), [STOCK], 0.01)
    (measured,) = record.content["levels"]["op"].values()
    assert "RuntimeError: no such layer" in measured["failed"]
    record.forget_failures()
    record.measure(case(), [STOCK], 0.01)
    assert "median" in contenders_of(record)[STOCK]


def test_times_that_cannot_be_taken_leave_those_of_single_calls(record, monkeypatch):
    monkeypatch.setattr(timing, "interleaved", lambda *_, **__: 1 / 0)
    record.measure(case(), [STOCK], 0.01)
    assert "ZeroDivisionError" in record.content["levels"]["op"]["a convolution"]["failed"]
    assert contenders_of(record)[STOCK]["alone"]


def test_a_part_that_fails_is_recorded(record, monkeypatch):
    def part(record, scope):
        raise ZeroDivisionError("of this part")

    monkeypatch.setitem(gpu.PARTS, "order", gpu_parts.Part(part, 1.0))
    gpu.run_part("order", "cpu", (record.file, None), float("inf"))
    found = Record(record.file).content["parts"]["order"]
    assert found["status"] == "failed"
    assert "ZeroDivisionError: of this part" in found["errors"]


def test_no_case_is_begun_without_time_for_it(record):
    record.until = time.time() - 1
    with pytest.raises(OutOfTimeError):
        record.measure(case(), [STOCK], 0.01)
    assert record.content["levels"]["op"] == {}, "no empty row in the tables"
    gpu.run_part("ops", "cpu", (record.file, None), record.until)
    assert Record(record.file).content["parts"]["ops"]["status"] == "out of time"


def deadly(file: Path) -> None:
    """A part whose second contender takes its process with it."""

    def fused(module, backend):
        os.kill(os.getpid(), signal.SIGKILL)

    Record(file, part="ops").measure(case(fused), [STOCK, REFERENCE], 0.01)


def test_a_contender_that_kills_its_process_is_left_out(record):
    status, _, died = gpu.attempt(deadly, (record.file,), time.time() + 100)
    assert (status, died) == ("died with status -9", True)
    assert Record(record.file, part="ops").blame(status, died)
    assert gpu.attempt(deadly, (record.file,), time.time() + 100) == ("done", "", False)
    found = contenders_of(Record(record.file))
    assert found[REFERENCE] == {"failed": "died with status -9", "part": "ops"}
    assert "median" in found[STOCK]


def test_who_only_sets_the_pace_keeps_its_time(record):
    """It dies beside one that joins later: the case is given up, and not tried for ever."""
    record.measure(case(), [REFERENCE], 0.01)
    valid = dict(contenders_of(record)[REFERENCE])
    record.content["doing"] = {"level": "op", "case": "a convolution", "contender": REFERENCE, "until": None}
    assert record.blame("died", died=True)
    assert contenders_of(record) == {REFERENCE: valid}
    record.measure(case(), [STOCK], 0.01)
    assert contenders_of(record) == {REFERENCE: valid}
    record.forget_failures()  # in the next call
    record.measure(case(), [STOCK], 0.01)
    assert contenders_of(record)[STOCK]["beside"].keys() == {REFERENCE}


def test_ours_that_is_tried_again_is_compared_with_who_was_there(record):
    record.measure(case(), [STOCK], 0.01)
    record.measure(case(), [REFERENCE], 0.01)
    assert contenders_of(record)[REFERENCE]["beside"].keys() == {STOCK}


def test_shares_are_those_of_the_last_ceilings(record):
    """Also of what was measured before there were any."""
    record.measure(case(), [STOCK], 0.01)
    assert "share_of_copy" not in contenders_of(record)[STOCK]
    for _ in range(2):
        gpu_parts.ceilings(record, gpu_parts.SMOKE)
        found, copied = contenders_of(record)[STOCK], record.content["environment"]["copy_bytes_per_second"]
        assert found["share_of_copy"] == 8 / found["median"] / copied
        assert found["samples"] > 0


def hangs(file: Path) -> None:
    """A part whose second contender hears no alarm."""

    def fused(module, backend):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
        time.sleep(60)

    Record(file, until=time.time() + 2, part="ops").measure(case(fused), [STOCK, REFERENCE], 0.01)


def test_a_contender_that_hangs_is_left_out_and_one_that_was_cut_off_is_not(record):
    status, _, died = gpu.attempt(hangs, (record.file,), time.time() + 3)
    assert (status, died) == ("cut off", False)
    cut_off = Record(record.file, part="ops")
    cut_off.content["doing"]["until"] += 60
    assert not cut_off.blame(status, died)
    assert REFERENCE not in contenders_of(cut_off)
    cut_off.content["doing"] = {"level": "op", "case": "a convolution", "contender": REFERENCE, "until": time.time()}
    assert cut_off.blame(status, died)
    assert contenders_of(cut_off)[REFERENCE] == {"failed": "cut off", "part": "ops"}
    assert contenders_of(cut_off)[STOCK]["alone"]


def test_a_process_that_hangs_is_ended_and_says_what_it_said():
    began = time.time()
    assert gpu.attempt(time.sleep, (60,), began) == ("cut off", "", False)
    assert time.time() - began < 50
    status, errors, died = gpu.attempt(int, ("a",), time.time() + 60)
    assert (status, died) == ("died with status 1", False)
    assert "ValueError" in errors


def test_tests_that_are_cut_off_say_what_failed_until_then(record, tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import time\ndef test_one(): assert 1 + 1 == 3\ndef test_two(): pass\ndef test_three(): time.sleep(60)\n"
    )
    record.until = time.time() + 22
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line", "-v", str(tmp_path)]
    output = gpu_parts._run(record, command, COLUMNS="300")
    assert record.left() > 3
    found = gpu_parts.outcome(output)
    assert (found["passed"], found["failed"], found["last_line"]) == (1, 1, "cut off: out of time")
    (failure,) = found["failures"]
    assert failure.endswith("test_some.py::test_one - assert (1 + 1) == 3")
    assert (tmp_path / "gpu.ops.log").read_text() == output


DRIVER = """
#include <stdio.h>
#include <stdlib.h>
static int called(void) { fclose(fopen(getenv("CALLED"), "w")); return 999; }
int cuInit(unsigned flags) { return called(); }
int cuDriverGetVersion(int* version) { return called(); }
int cuGetProcAddress_v2(const char* name, void** f, int version, unsigned long flags, void* found) { return called(); }
"""
IMPORTED = """
import importlib, os, torch
from benchmarks.gpu import MODULES
for name in MODULES:
    importlib.import_module(name)
print(os.path.exists(os.environ["CALLED"]))
torch.cuda.is_available()
print(os.path.exists(os.environ["CALLED"]))
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.skipif(torch.version.cuda is None, reason="this torch calls no CUDA driver")
def test_what_parts_are_forked_from_has_called_no_driver(tmp_path):
    """CUDA does not survive a fork. The driver here only tells whether anybody has called it."""
    pytest.importorskip("timm")
    (tmp_path / "driver.c").write_text(DRIVER)
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "driver.c", "-o", "libcuda.so.1"]
    subprocess.run(command, cwd=tmp_path, check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "CALLED": str(tmp_path / "called")}
    result = subprocess.run([sys.executable, "-c", IMPORTED], env=environment, capture_output=True, text=True)
    assert result.stdout.split() == ["False", "True"], result.stderr


def test_without_timm_ops_are_measured_and_models_say_what_they_need(record, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    for part in ("ops", "models", "blocks"):
        gpu.run_part(part, "cpu", (record.file, None), float("inf"))
    content = Record(record.file).content
    assert all("failed" not in measured for measured in content["levels"]["op"].values())
    assert "timm is needed" in content["parts"]["models"]["errors"]
    assert content["parts"]["blocks"]["status"] == "failed"


# ---- both calls, as they are made on a machine that is rented -----------------------------------------------


def alive(out: Path) -> list[str]:
    """The command lines of the processes that have this $OUT; the last of them may take a moment to end."""
    deadline = time.time() + 5
    while (found := _alive(out)) and time.time() < deadline:
        time.sleep(0.1)
    return found


def _alive(out: Path) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"OUT={out}\0".encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue  # it has just ended, or is somebody else's
    return found


def values(content: dict) -> dict:
    """Every time that was measured by contenders taking turns."""
    return {
        (level, title, name): result["median"]
        for level, cases in content["levels"].items()
        for title, case in cases.items()
        for name, result in case["contenders"].items()
        if "median" in result
    }


def sleeps(begun: Path) -> None:
    """A part, and what it has started."""
    subprocess.Popen(["sleep", "60"])
    begun.touch()
    time.sleep(60)


ENDLESS = """
import pathlib, sys, time
from benchmarks import gpu
from tests.test_gpu_run import sleeps
gpu.attempt(sleeps, (pathlib.Path(sys.argv[1]),), time.time() + 60, sys.argv[2])
"""


@pytest.mark.parametrize(
    ("start", "number", "early"),
    [
        ("forkserver", signal.SIGKILL, False),
        ("spawn", signal.SIGTERM, True),
    ],
)
def test_parts_end_with_the_command(start, number, early, tmp_path):
    """Whatever ends it, and also while the part's process is only being made."""
    begun, environment = tmp_path / "begun", os.environ | {"OUT": str(tmp_path)}
    command = [sys.executable, "-c", ENDLESS, str(begun), start]
    process = subprocess.Popen(command, cwd=gpu_parts.ROOT, env=environment, start_new_session=True)
    while not (any("read end" in line for line in _alive(tmp_path)) if early else begun.exists()):
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.wait()
    assert alive(tmp_path) == []


INTERRUPTIBLE = """
import subprocess, sys, time
from benchmarks import gpu
ask = "import signal; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
gpu.attempt(subprocess.call, ([sys.executable, "-c", ask],), time.time() + 60)
"""


def test_what_a_part_starts_can_be_interrupted():
    """Also in a run that was started in the background, where shells have SIGINT ignored."""
    command = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", sys.executable, "-c", INTERRUPTIBLE]
    result = subprocess.run(command, cwd=gpu_parts.ROOT, capture_output=True, text=True)
    assert result.stdout == "True\n", result.stderr


@pytest.mark.exhaustive
def test_rehearsal(tmp_path):
    """Without git, and with a first call that is killed in the middle of a part."""
    pytest.importorskip("timm")
    pytest.importorskip("triton")
    tree, out = tmp_path / "tree", tmp_path / "out"
    hidden = shutil.ignore_patterns(".*", "build", "dist", "out", "__pycache__", "*.egg-info")
    shutil.copytree(gpu_parts.ROOT, tree, ignore=hidden)
    pack = "from effnet_kernels import precompile; precompile.pack(precompile.Path('build/gpu-kernels.zip'), [], 90)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OUT": str(out), "HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}
    environment |= {"TORCHDYNAMO_DISABLE": "1"}  # torch.compile takes half a minute for its first line
    subprocess.run([sys.executable, "-c", pack], cwd=tree, env=environment, check=True)

    def call(which: str) -> subprocess.Popen:
        shutil.rmtree(out, ignore_errors=True)  # the machine empties it
        command = gpu.COMMAND.format(call=which, commit="abc").replace("python3", sys.executable)
        command = command.replace("/var/tmp", str(tmp_path)) + " --device cpu"
        return subprocess.Popen(["bash", "-c", command], cwd=tree, env=environment, start_new_session=True)

    def ended(process: subprocess.Popen, budget: float) -> dict:
        began = time.time()
        assert process.wait(budget) == 0
        assert time.time() - began < budget - 10
        assert alive(out) == []
        return json.loads((out / "gpu.json").read_text())

    first = call("first")
    middle: dict = {}
    while not (middle.get("doing") and middle["levels"].get("block") and len(values(middle)) > 3):
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
        middle = json.loads((out / "gpu.json").read_text()) if (out / "gpu.json").exists() else {}
    assert len(_alive(out)) > 2
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert alive(out) == [], "the parts end with the command"
    left = (out / "gpu.json").read_text()
    before = values(json.loads(left))
    assert before.items() >= values(middle).items()

    again = ended(call("first"), gpu.CALLS["first"][1])
    assert values(again).items() > before.items()
    assert [file.name for file in out.iterdir()] == ["gpu.json"], "tests that are done are not run again"
    assert {name: part["status"] for name, part in again["parts"].items()} == dict.fromkeys(
        ("ceilings", *gpu_parts.FIRST), "done"
    )
    assert "0 kernels unpacked" in again["parts"]["build"]["packed"]
    second = ended(call("second"), gpu.CALLS["second"][1])
    assert values(second).items() > values(again).items()
    assert {name: second["parts"][name]["status"] for name in gpu_parts.SECOND} == dict.fromkeys(
        gpu_parts.SECOND, "done"
    )
    compiled = [op["contenders"] for op in second["levels"]["op"].values() if COMPILED in op["contenders"]]
    assert len(compiled) == 1
    assert all(compiled[0][name]["beside"] for name in (COMPILED, AUTOTUNED))
    assert second["environment"]["commit"] == "abc"
    assert [file.name for file in out.iterdir()] == ["gpu.json"]


def test_the_two_calls_are_in_the_documents():
    text = (gpu_parts.ROOT / "docs" / "gpu.md").read_text()
    for which in gpu.CALLS:
        assert f"    {gpu.COMMAND.format(call=which, commit='COMMIT')}\n" in text
    for carried in (native._CUDA_LIBRARY, native._CPU_LIBRARY, gpu_kernels.FILE):
        assert f"`{carried.relative_to(gpu_parts.ROOT)}`" in text


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
    names = [*scope.eager, *map(ours, scope.backends), COMPILED]
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
    }


def test_the_page_fits_where_only_the_end_of_the_output_is_kept():
    assert len(gpu.summary(fabricated())) < 12_000


def test_tables_plots_and_predictions_from_a_record(tmp_path):
    """Losses and failures are in the table; a ratio is one of times from the same turns."""
    pytest.importorskip("matplotlib")
    content = fabricated()
    models = content["levels"]["model"]
    first, second, third, *_ = models
    for title in (first, second, third):
        models[title] = json.loads(json.dumps(models[title]))
    models[first]["contenders"][COMPILED] |= {"q1": 0.9e-3, "median": 0.9e-3, "beside": {ours("triton"): 1.8e-3}}
    models[second]["contenders"][COMPILED] |= {"q1": 0.5e-3, "median": 0.5e-3}
    models[third]["contenders"] |= {COMPILED: {"failed": "no memory", "part": "compiled"}, STOCK: {"alone": 2e-3}}
    models[third]["failed"] = "no memory"
    (tmp_path / "a-gpu.json").write_text(json.dumps(content))
    document = tmp_path / "performance.md"
    document.write_text(
        "<!-- benchmark:model -->\n<!-- /benchmark -->\n<!-- benchmark:predicted -->\n<!-- /benchmark -->\n"
        "| efficientnet_b0 @224 | 65 | 12.6 us | 13.8 us | 9.1 us | DRAM 41% |\n"
        "| efficientnet_b4 @380 | 128 | 98.1 us | 107.0 us | 68.0 us | DRAM 39% |\n"
    )
    for _ in range(2):
        report.main(["--results", str(tmp_path), "--plots", str(tmp_path), str(document)])
    text = document.read_text()
    assert text.count("| efficientnet_b0 @224 | 12.6 us | 7.8 us | 0.62x | a GPU, c0ffee |") == 1
    one = "1.00 ms |"
    assert f"| {first} | {one} {one} {one} 500.0 us |  | 1.00x | **0.50x** | 1000 | 50% |" in text
    assert "Who joined later is set against ours by its time in the same turns." in text
    assert f"| {second} | {one} {one} {one} 500.0 us |  | 1.00x | **0.50x** | 1000 | 50% |" in text
    assert f"| {third} (failed) | {one} {one} {one} failed | ~2.00 ms | 1.00x | 1.00x | 1000 | 50% |" in text
    assert "Shares are of what a copy reached in the same run, 3000 GB/s." in text
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"benchmark-a-gpu-{level}.png" for level in ("model", "op", "block", "training_model")
    }


def test_a_page_of_counters_becomes_lines_by_case():
    """Nsight Compute's CSV: names, units, one row per launch; markers stand between the cases."""
    stalls = [f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio" for why in ("wait", "barrier")]
    header = ["ID", "Kernel Name", "gpu__time_duration.sum", "launch__registers_per_thread", *stalls]
    rows = [
        header,
        ["", "", "us", "register/thread", "inst", "inst"],
        ["0", "spin_kernel(long)", "1", "8", "0", "0"],
        [
            "1",
            "void effnet::cuda::(anonymous namespace)::pointwise_kernel<__half, 64>(Args)",
            "12.5",
            "92",
            "0.5",
            "1,000.25",
        ],
        ["2", "kernel", "3", "40", "2", ""],
        ["3", "spin_kernel(long)", "1", "8", "0", "0"],
        ["4", "kernel", "4", "40", "", ""],
    ]
    page = "==PROF== read\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    assert gpu_profile.summary(page, ["a", "b"]) == {
        "a": [
            "pointwise_kernel<__half, 64>: time 12.5 us, registers 92, stalled barrier 1000.2, stalled wait 0.5",
            "kernel: time 3 us, registers 40, stalled wait 2.0",
        ],
        "b": ["kernel: time 4 us, registers 40"],
    }
