"""The record of a run of ``benchmarks.gpu``: one JSON, written after every measurement, so that a run that is cut
off has lost nothing, and one that is started again goes on where it was.
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

from benchmarks.cases import Case

LOST = 70  # exit status of a process whose GPU context a kernel has destroyed
LIMIT = 240.0  # seconds that a contender may take to compile and to prove itself
TAIL = 1500  # characters of a traceback or of a tool's output


class OutOfTimeError(Exception):
    """The part's time is over; what is left of it is not measured."""


class Record:
    """What has been measured. ``until`` (time.time()) ends the part that is being measured."""

    def __init__(self, file: Path, until: float = float("inf")) -> None:
        self.file, self.until = file, until
        empty: dict[str, Any] = {"environment": {}, "parts": {}, "levels": {}, "lost": []}
        self.content: dict[str, Any] = json.loads(file.read_text()) if file.exists() else empty

    def save(self) -> None:
        """Write everything; readers see the old file or the new one."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1) + "\n")
        partial.replace(self.file)

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
        """Measure the case unless the record has it; its failure is recorded, and the next case is measured.

        Raises:
            OutOfTimeError: there is no time for it.
        """
        cases = self.content["levels"].setdefault(case.level, {})
        if case.title in cases:
            return
        if self.left() < seconds * len(names):
            raise OutOfTimeError
        lost = {entry["contender"]: entry["reason"] for entry in self.content["lost"] if entry["case"] == case.title}
        self._doing(case.title, None)
        began = time.time()
        if None in lost:
            cases[case.title] = {**case.record({}, None), "failed": lost[None]}
        else:
            try:
                guard = self._guard(case.title, 2 * seconds * len(names))
                results = case.measure([name for name in names if name not in lost], seconds, guard)
                results |= {name: {"failed": reason} for name, reason in lost.items() if name in names}
                cases[case.title] = case.record(results, self.content["environment"].get("copy_bytes_per_second"))
            except Exception:  # whatever it was, the next case may work
                cases[case.title] = {**case.record({}, None), "failed": traceback.format_exc()[-TAIL:]}
                exit_if_lost()
        cases[case.title]["seconds"] = round(time.time() - began, 1)
        self._doing(None, None)
        print(f"  {case.level}: {case.title} ({cases[case.title]['seconds']} s)", flush=True)
        if torch.cuda.is_initialized():
            gc.collect()  # modules and their graphs refer to each other
            torch.cuda.empty_cache()

    def blame(self, reason: str, after: float = 0.0) -> bool:
        """Leave out of later attempts what a process that has ended was doing, for ``after`` seconds at least.

        Returns whether there was something.
        """
        doing = self.content.pop("doing", None)
        found = bool(doing) and time.time() - doing["since"] >= after
        if found:
            self.content["lost"].append({**doing, "reason": reason})
        self.save()
        return found

    def forget_failures(self) -> None:
        """Drop the cases that were not measured with all their contenders."""
        self.content["lost"] = []
        for cases in self.content["levels"].values():
            for title, case in list(cases.items()):
                if any("failed" in result for result in (case, *case["contenders"].values())):
                    del cases[title]

    def _doing(self, case: str | None, contender: str | None) -> None:
        self.content["doing"] = {"case": case, "contender": contender, "since": time.time()} if case else None
        self.save()

    def _guard(self, case: str, reserve: float) -> Any:
        """A ``contenders.Guard``: knows what is running, and leaves ``reserve`` seconds to time it."""

        @contextlib.contextmanager
        def guard(contender: str) -> Iterator[None]:
            self._doing(case, contender)
            limit = max(1.0, min(LIMIT, self.left() - reserve))

            def expired(*_: Any) -> None:
                raise TimeoutError(f"not ready after {limit:.0f} s")

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
            self._doing(case, None)

        return guard


def exit_if_lost() -> None:
    """End the process, for another one to go on, if the GPU cannot be used by this one any more."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            traceback.print_exc()
            os._exit(LOST)
