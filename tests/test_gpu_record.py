"""The record of ``python -m benchmarks.gpu``: what is measured is kept, whatever fails, hangs or kills its process."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_parts, gpu_record, gpu_scope
from benchmarks.gpu_record import OutOfTimeError, Record
from effnet_kernels.benchmarking import timing
from effnet_kernels.benchmarking.contenders import STOCK, ours
from tests.gpu_records import REFERENCE, case, contenders_of, fabricated, record

__all__ = ["record"]


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
        gpu_parts.ceilings(record, gpu_scope.SMOKE)
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


@pytest.mark.exhaustive
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
