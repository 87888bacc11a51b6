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

from benchmarks import gpu, gpu_parts, gpu_scope
from benchmarks.cases import op_case
from benchmarks.gpu_record import Record
from effnet_kernels.benchmarking.contenders import AUTOTUNED, CHANNELS_LAST, COMPILED, STOCK, ours
from effnet_kernels.benchmarking.environment import cpu_model
from effnet_kernels.ops import triton_common
from tests.gpu_records import REFERENCE, contenders_of, fabricated, record

__all__ = ["record"]


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
    known = op_case("efficientnet_b0", gpu_scope.SMOKE.ops[0], 1, 2, "float32", "cpu")
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
        gpu_parts.build(record, gpu_scope.SMOKE)
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
    contenders = {*gpu_scope.GPU.eager, *map(ours, gpu_scope.GPU.whole)}
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


def test_a_part_that_fails_is_recorded(record, monkeypatch):
    def part(record, scope):
        raise ZeroDivisionError("of this part")

    monkeypatch.setitem(gpu.PARTS, "order", gpu_parts.Part(part, 1.0))
    gpu.run_part("order", "cpu", (record.file, None), float("inf"))
    found = Record(record.file).content["parts"]["order"]
    assert found["status"] == "failed"
    assert "ZeroDivisionError: of this part" in found["errors"]


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
@pytest.mark.exhaustive
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


@pytest.mark.exhaustive
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
