"""Launches of the kernels of fixtures.cu, by which the emulation tests itself."""

from __future__ import annotations

import numpy as np
import pytest

from tests.emulation import build

SEEDS = range(8)
THREADS = 256


@pytest.fixture(scope="module")
def emulation():
    module = build.load_fixtures()
    yield module
    module.set_device(90)
    module.set_patience(30)


def launch(module, name: str, values, size: int, *, seed: int = 0, **how) -> np.ndarray:
    """Runs a kernel of fixtures.cu; what it does not write is NaN."""
    values = np.asarray(values, np.float32).ravel()
    copy, out = aligned(values.size), aligned(size)
    copy[:], out[:] = values, np.nan
    module.set_seed(seed)
    module.run(name, copy, out, **how)
    return out


def aligned(size: int) -> np.ndarray:
    """Memory that begins at a sector, as a GPU's does."""
    memory = np.empty(size + 16, np.float32)
    first = -memory.ctypes.data // 4 % 16
    return memory[first : first + size]


def integers(*shape: int, seed: int = 0) -> np.ndarray:
    """Values whose sums are exact in every order."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def wrong(module, name: str, values, expected: np.ndarray, **how) -> int:
    """For how many of the seeds the result is not the expected one."""
    results = [launch(module, name, values, expected.size, seed=seed, **how) for seed in SEEDS]
    return sum(not np.array_equal(result, expected.ravel()) for result in results)


def product(emulation, name: str, a: np.ndarray, b: np.ndarray, seed: int = 0) -> np.ndarray:
    return launch(emulation, name, np.append(a, b), 256, seed=seed, threads=32).reshape(16, 16)
