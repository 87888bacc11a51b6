"""Options, and the one way everything here is measured.

All contenders of a case take turns (``effnet_kernels.benchmarking.timing``); the case's first test measures
them all. Each contender then has a test of its own, in which pytest-benchmark's clock replays that
contender's samples, so its tables, groups and options work on interleaved numbers.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cases import Case, put
from benchmarks.ceilings import copy_bandwidth
from benchmarks.files import file_name
from benchmarks.shapes import DEFAULT_MODELS, MODELS
from effnet_kernels.benchmarking import contenders
from effnet_kernels.benchmarking.environment import cpu_flags, environment

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RESULTS = Path(__file__).with_name("results")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effnet_kernels")
    group.addoption("--models", default=",".join(DEFAULT_MODELS), help=f"comma-separated, of {', '.join(MODELS)}")
    group.addoption("--batches", default=None, help="comma-separated; default 1,8 for models, 1 below (GPU: 128)")
    group.addoption("--dtypes", default=default_dtypes(), help="comma-separated; default: %(default)s")
    group.addoption("--size", type=int, default=None, help="side of the image instead of each model's own")
    group.addoption("--limit", type=int, default=3, help="op and block level: so many of each kind; 0: all")
    group.addoption("--seconds", type=float, default=2.0, help="time for each contender of each case")
    group.addoption("--threads", type=int, default=None, help="CPU threads; default: torch's")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    group.addoption("--results", type=Path, default=RESULTS, help="where the JSON goes")


def default_dtypes() -> str:
    """float16 on a GPU; float32 on a CPU, and bfloat16 if it has instructions for it."""
    if DEVICE == "cuda":
        return "float16"
    return "float32,bfloat16" if {"avx512_bf16", "amx_bf16", "bf16"} & {*cpu_flags()} else "float32"


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--threads"):
        torch.set_num_threads(config.getoption("--threads"))
    config.stash[_SUITE] = Suite(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "contender" in metafunc.fixturenames:
        models = metafunc.function.__name__ == "test_model"
        metafunc.parametrize("contender", fielded(metafunc.config, models=models))


def pytest_sessionfinish(session: pytest.Session) -> None:
    session.config.stash[_SUITE].write()


@pytest.fixture(scope="session")
def suite(request: pytest.FixtureRequest) -> "Suite":
    return request.config.stash[_SUITE]


def models(config: pytest.Config) -> list[str]:
    """The models asked for."""
    names = config.getoption("--models").split(",")
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise pytest.UsageError(f"--models must be of {', '.join(MODELS)}, got {', '.join(unknown)}")
    return names


def batches(config: pytest.Config, on_cpu: str, on_gpu: str) -> list[int]:
    """The batch sizes asked for, or a level's own default."""
    return [
        int(batch) for batch in (config.getoption("--batches") or (on_gpu if DEVICE == "cuda" else on_cpu)).split(",")
    ]


def dtypes(config: pytest.Config) -> list[str]:
    """The dtypes asked for, by name."""
    return config.getoption("--dtypes").split(",")


def fielded(config: pytest.Config, *, models: bool, with_peers: bool = True) -> list[str]:
    """The contenders of cases of the dtypes asked for; of whole models there are more."""
    return contenders.contender_names(
        DEVICE,
        compiled=not config.getoption("--no-compile"),
        with_peers=with_peers,
        models=models,
        autocast=any(dtype != "float32" for dtype in dtypes(config)),
    )


class ReplayClock:
    """A clock for pytest-benchmark that moves only when ``advance`` plays the next sample."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def advance(self, samples: Any) -> None:
        self.now += next(samples)


CLOCK = ReplayClock()


class Suite:
    """Measures each case once and keeps what was measured until the session's end."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.levels: dict[str, dict[str, dict[str, Any]]] = {}
        self.samples: dict[tuple[str, str], list[float]] = {}
        self.bandwidth: float | None = None

    def run(self, benchmark: Any, contender: str, case: Case, names: list[str] | None = None) -> None:
        """Measure the case unless that is done, then report ``contender`` through pytest-benchmark.

        Fails on a wrong result and skips a contender that cannot run. ``names`` are the contenders of the case, all of
        them by default.
        """
        cases = self.levels.setdefault(case.level, {})
        if case.title not in cases:
            names = names or fielded(self.config, models=case.level == "model", with_peers=not case.trains)
            results = case.measure(names, self.config.getoption("--seconds"))
            self.samples |= {(case.title, name): r["samples"] for name, r in results.items() if "samples" in r}
            if DEVICE == "cuda":
                # Caches flatter a CPU at these sizes; on a GPU the graph rotates past them (timing.Graph).
                self.bandwidth = self.bandwidth or copy_bandwidth()
            cases[case.title] = case.entry()
            for name, result in results.items():
                put(cases[case.title], name, result, self.bandwidth)
        result = cases[case.title]["contenders"][contender]
        assert "wrong" not in result, f"{case.title}: {contender} is wrong and was not timed: {result['wrong']}"
        if "failed" in result:
            pytest.skip(result["failed"])
        benchmark.group = case.title
        benchmark.extra_info.update({key: value for key, value in result.items() if key != "samples"})
        samples = self.samples[case.title, contender]
        benchmark.pedantic(CLOCK.advance, args=(iter(samples),), rounds=len(samples), iterations=1)

    def write(self) -> None:
        """One file per level, ``<device>-<threads>t-<level>.json``; cases measured before at this commit stay in it."""
        folder: Path = self.config.getoption("--results")
        for level, cases in self.levels.items():
            record = environment(DEVICE)
            if self.bandwidth:
                record["copy_bytes_per_second"] = self.bandwidth
            threads = f"-{record['threads']}t" if DEVICE == "cpu" else ""
            name = file_name(record["device"])
            folder.mkdir(parents=True, exist_ok=True)
            file = folder / f"{name}{threads}-{level}.json"
            earlier = json.loads(file.read_text()) if file.exists() else {}
            if earlier.get("environment", {}).get("commit") == record["commit"]:
                cases = {**earlier["cases"], **cases}
            content = {"level": level, "environment": record, "cases": cases}
            file.write_text(json.dumps(content, indent=1) + "\n")


_SUITE = pytest.StashKey[Suite]()
