"""The record of a run of ``benchmarks.gpu``: one JSON, written after every contender, so that a run that is cut off
has lost nothing, and one that is started again goes on where it was.
"""

import contextlib
import gc
import json
import os
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import Case, put
from effnet_kernels.benchmarking.contenders import OURS

LOST = 70  # exit status of a process whose GPU context a kernel has destroyed
NO_TIME = "no time is left"  # in what a contender fails with that is not to blame for it
LIMIT = 120.0  # seconds that a contender may take to compile and to prove itself
TAIL = 1500  # characters of a traceback or of a tool's output


class OutOfTimeError(Exception):
    """The part's time is over; what is left of it is not measured."""


class Record:
    """What has been measured.

    Args:
        file: the JSON.
        keep: a second place for it. The one is read that can be and has more in it; both are written.
        until: ``time.time()`` at which the part ends that is being measured.
        part: its name.

    Raises:
        ValueError: there is a file, and none is a record.
    """

    def __init__(self, file: Path, keep: Path | None = None, until: float = float("inf"), part: str = "") -> None:
        self.file, self.files = file, [file] if keep is None else [file, keep]
        self.until, self.name = until, part
        empty: dict[str, Any] = {"environment": {}, "parts": {}, "levels": {}}
        texts = [place.read_bytes() for place in self.files if place.is_file()]
        found = [content for content in map(_parsed, texts) if content is not None]
        if not found and any(text.strip() for text in texts):
            raise ValueError(f"{file} is no record")
        self.content: dict[str, Any] = max(found, key=_measured, default=empty)

    def save(self) -> None:
        """Write everything; readers see the old file or the new one."""
        text = json.dumps(self.content, indent=1) + "\n"
        for file in self.files:
            with contextlib.nullcontext() if file is self.file else contextlib.suppress(OSError):  # as far as it can
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(".partial")
                partial.write_text(text)
                partial.replace(file)

    def part(self, name: str, **entries: Any) -> dict[str, Any]:
        """What is known of a part, these entries added."""
        part = self.content["parts"].setdefault(name, {})
        part.update(entries)
        self.save()
        return part

    def left(self) -> float:
        """Seconds."""
        return self.until - time.time()

    def measure(self, case: Case, names: Sequence[str], seconds: float) -> None:
        """Measure the contenders of the case that the record does not have; a failure is recorded.

        One that joins others measured before takes turns with the fastest among them, if possible of ours, whose time
        is recorded with it (``beside``, empty if that one failed): a ratio between times of different minutes would
        be one of clocks, too.

        Raises:
            OutOfTimeError: there is no time for it.
        """
        cases = self.content["levels"].setdefault(case.level, {})
        entry = cases.get(case.title) or case.entry()
        results: dict[str, dict[str, Any]] = entry["contenders"]
        wanted = [name for name in names if name not in results or "alone" in results[name]]
        if not wanted or "failed" in entry:
            return
        times = {
            name: result["median"] for name, result in results.items() if name not in wanted and "median" in result
        }
        pace = min(times, key=lambda name: (not name.startswith(OURS), times[name]), default=None)
        racing = [*wanted, *([pace] if pace else [])]
        if self.left() < seconds * len(racing):
            raise OutOfTimeError
        cases[case.title] = entry
        began = time.time()
        bandwidth = self.content["environment"].get("copy_bytes_per_second")

        def keep(name: str, result: dict[str, Any]) -> None:
            if name in wanted and NO_TIME not in result.get("failed", ""):
                failed = {"part": self.name} if "failed" in result else {}
                put(entry, name, result | failed, bandwidth)
                self._doing(case)

        self._doing(case)
        try:
            guard = self._guard(case, 2 * seconds * len(racing))
            measured = case.measure(racing, seconds, guard, keep)
            for name in wanted:
                if "median" in measured[name]:
                    then = {pace: measured[pace]["median"]} if pace and "median" in measured[pace] else {}
                    put(entry, name, measured[name] | ({"beside": then} if pace else {}), bandwidth)
            entry["clocks"] = clocks()
        except Exception:  # whatever it was, the next case may work
            entry |= {"failed": traceback.format_exc()[-TAIL:], "part": self.name}
            exit_if_lost()
        entry["seconds"] = round(entry.get("seconds", 0.0) + time.time() - began, 1)
        self._doing(None)
        print(f"  {case.level}: {case.title} ({time.time() - began:.1f} s)", flush=True)
        if torch.cuda.is_initialized():
            gc.collect()  # modules and their graphs refer to each other
            torch.cuda.empty_cache()

    def blame(self, reason: str, died: bool) -> bool:
        """Leave out of later attempts what a process that has ended was doing: what it died of, or hung in.

        Returns whether there was something.
        """
        doing = self.content.pop("doing", None)
        found = bool(doing) and (died or (doing["until"] is not None and time.time() >= doing["until"]))
        if found:
            entry = self.content["levels"][doing["level"]][doing["case"]]
            contender, failed = doing["contender"], {"failed": reason, "part": self.name}
            if contender is None or "median" in entry["contenders"].get(contender, {}):  # it only set the pace
                entry |= failed
            else:
                entry["contenders"][contender] = failed
        self.save()
        return found

    def forget_failures(self) -> None:
        """Let what failed in this part before be tried again; what was measured stays."""
        for cases in self.content["levels"].values():
            for entry in cases.values():
                for result in (entry, *entry["contenders"].values()):
                    if result.get("part") == self.name:
                        result.pop("failed", None)
                        result.pop("part", None)
                entry["contenders"] = {name: result for name, result in entry["contenders"].items() if result}

    def _doing(self, case: Case | None, contender: str | None = None, limit: float | None = None) -> None:
        """Note what is running, and for how many seconds it may: what does not even answer to an alarm hangs."""
        doing = {"contender": contender, "until": limit and time.time() + limit}
        self.content["doing"] = case and {"level": case.level, "case": case.title, **doing}
        self.save()

    def _guard(self, case: Case, reserve: float) -> Any:
        """A ``contenders.Guard``: knows what is running, and leaves ``reserve`` seconds to time it."""

        @contextlib.contextmanager
        def guard(contender: str) -> Iterator[None]:
            limit = max(1.0, min(LIMIT, self.left() - reserve))
            self._doing(case, contender, limit)

            def expired(*_: Any) -> None:
                why = "" if limit == LIMIT else f", and {NO_TIME}"
                raise TimeoutError(f"not ready after {limit:.0f} s{why}")

            before = signal.signal(signal.SIGALRM, expired)
            signal.setitimer(signal.ITIMER_REAL, limit, 5.0)  # again, should a destructor have swallowed it
            try:
                yield
            except Exception:
                exit_if_lost()
                raise
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                signal.signal(signal.SIGALRM, before)
            self._doing(case)

        return guard


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(content, dict) and all(
        isinstance(content.get(key), dict) for key in ("environment", "parts", "levels")
    )
    return content if whole else None


def _measured(content: dict[str, Any]) -> int:
    return sum(len(case["contenders"]) for cases in content["levels"].values() for case in cases.values())


def exit_if_lost() -> None:
    """End the process, for another one to go on, if the GPU cannot be used by this one any more."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            traceback.print_exc()
            os._exit(LOST)


def clocks() -> dict[str, int] | None:
    """What the GPU runs at just now: MHz of its multiprocessors, milliwatts; None where NVML cannot be asked."""
    if not torch.cuda.is_initialized():
        return None
    try:
        return {"sm_mhz": torch.cuda.clock_rate(), "milliwatts": torch.cuda.power_draw()}
    except (ImportError, RuntimeError):  # nvidia-ml-py is not installed, or there is no library under it
        return None
