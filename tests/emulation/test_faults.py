"""The emulation of CUDA catches each planted bug, and names the thread and the line."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from tests.emulation import build
from tests.emulation.fixtures import SEEDS, THREADS, emulation, integers, launch, wrong

__all__ = ["emulation"]

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


# ---- races ----------------------------------------------------------------------------------------------------

ACCESS = r"thread \(\d+, 0, 0\) (reads|writes) shared memory at fixtures\.cu:\d+"


@pytest.fixture(params=["natural order", *SEEDS])
def order(request, emulation):
    emulation.set_natural_order(request.param == "natural order")
    yield request.param if request.param in SEEDS else 0
    emulation.set_natural_order(False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("block_sum_without_barrier", rf"{ACCESS}.* that .* (read|wrote) at fixtures\.cu:\d+, without a barrier"),
        (
            "warp_reverse_without_barrier",
            rf"{ACCESS}.* that thread .* (read|wrote) at .*, without a barrier in between",
        ),
        ("teams_without_the_first_barrier", rf"{ACCESS}.* that .*threads? .* (read|wrote)"),
        ("teams_without_the_second_barrier", rf"{ACCESS}.* that .*threads? .* (read|wrote)"),
        ("teams_of_one_warp", rf"{ACCESS}.* that thread .* (read|wrote)"),
        ("relay_without_the_last", rf"{ACCESS}.* that thread .* (read|wrote)"),
        ("double_buffer_waits_for_too_little", r"accesses shared memory at .* to which a cp.async is under way"),
        ("double_buffer_without_barrier", r"without a barrier in between|a cp.async is under way"),
        ("halves_twice", rf"{ACCESS}.* that thread .* wrote"),
        ("reverse_bytes_without_barrier", rf"{ACCESS}.* that thread .* (read|wrote)"),
        ("reverse_zeros_without_barrier", rf"{ACCESS}.* that thread .* (read|wrote)"),
        ("a_lane_that_returned_is_read", r"reads shared memory at .* that thread \(31, 0, 0\) wrote|writes .* read"),
        ("read_then_write_without_barrier", rf"{ACCESS}.* that .*threads? .* (read|wrote)"),
    ],
)
def test_a_race_is_found_whatever_the_order(emulation, name, message, order):
    threads = 128 if "team" in name or "relay" in name else 32 if "double_buffer" in name or "lane" in name else 64
    with pytest.raises(RuntimeError, match=message):
        launch(emulation, name, np.ones(640), 128, seed=order, threads=threads, dynamic_shared=1024)


def test_what_is_no_race(emulation, order):
    values = integers(64)
    halves = launch(emulation, "halves", values, 64, seed=order, threads=64)
    assert np.array_equal(halves, values.reshape(32, 2)[:, ::-1].ravel())
    assert (launch(emulation, "read_then_write", values, 64, seed=order, threads=64) == values[0]).all()
    assert np.array_equal(launch(emulation, "reverse_bytes", values, 64, seed=order, threads=64), values[::-1])
    launch(emulation, "halves_of_a_warp_meet", values, 32, seed=order, threads=32)
    sums = launch(emulation, "readers", values, 96, seed=order, threads=96, dynamic_shared=128)
    assert np.array_equal(sums, np.repeat([0, 1, 2], 32))


# ---- uninitialised and foreign memory --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_shared_memory_starts_as_nan(emulation, kind):
    """Also in the second launch, which finds what the first one left."""
    values = integers(2 * 64)
    how = {"threads": 64, "dynamic_shared": 4 * 64}
    for seed in (0, 1):
        result = launch(emulation, f"read_before_write_{kind}", values, 64, seed=seed, **how)
        assert np.flatnonzero(np.isnan(result)).tolist() == [5]


def test_shuffle_from_a_lane_outside_of_the_mask_gives_nan(emulation):
    values = integers(32)
    result = launch(emulation, "shuffle_from_nowhere", values, 8, threads=32)
    assert np.array_equal(result[:7], values[1:8])
    assert np.isnan(result[7])


ASAN_SCRIPT = """
import sys
import numpy as np
from tests.emulation import build
name, (size, threads, dynamic_shared) = sys.argv[1], map(int, sys.argv[2:])
values, out = np.ones(4096, np.float32), np.zeros(size, np.float32)
build.load_fixtures(asan=True).run(name, values, out, threads=threads, dynamic_shared=dynamic_shared)
print("ran to its end")
"""


def under_asan(name: str, size: int, threads: int, dynamic_shared: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ASAN_SCRIPT, name, *map(str, (size, threads, dynamic_shared))],
        cwd=build.ROOT,
        env={**os.environ, **build.asan_environment()},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "size", "threads", "dynamic_shared", "report"),
    [
        # numpy keeps small arrays in its own pool; these are not small
        ("write_outside_global", 1024, 1024, 0, "heap-buffer-overflow"),
        ("write_outside_dynamic_shared", 1024, 1024, 4096, "use-after-poison"),
        ("write_outside_static_shared", 1024, 64, 0, "out of bounds for type 'float [32]'"),
    ],
)
def test_sanitizers_report_accesses_that_the_gpu_does_not_have(name, size, threads, dynamic_shared, report):
    result = under_asan(name, size, threads, dynamic_shared)
    assert result.returncode != 0
    assert "ran to its end" not in result.stdout
    assert report in result.stderr
    assert "fixtures.cu" in result.stderr, "the line of the access"
    if "AddressSanitizer" in result.stderr:
        assert re.search(r"block \(0, 0, 0\), thread \(1023, 0, 0\)", result.stderr)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("name", "size", "threads", "dynamic_shared"),
    [
        ("block_sum", 1, 1024, 4096),
        ("warp_sum", 1, 1024, 0),
        ("write_outside_static_shared", 1024, 32, 0),
        ("double_buffer", 128, 32, 1024),
    ],
)
def test_address_sanitizer_is_content_with_what_is_right(name, size, threads, dynamic_shared):
    """Its knowledge of stacks survives the fibers."""
    result = under_asan(name, size, threads, dynamic_shared)
    assert result.returncode == 0, result.stderr
    assert "ran to its end" in result.stdout


# ---- errors that stop a kernel ---------------------------------------------------------------------------------

HERE = r"block \(0, 0, 0\), thread \(\d+, 0, 0\)"
CALL = r"at \S*fixtures\.cu:\d+"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("barrier_without_some", rf"{HERE} (returned while|waits in __syncthreads {CALL}, but) thread \(\d+, 0, 0\)"),
        ("barrier_in_two_places", rf"{HERE} waits in __syncthreads {CALL} while thread \(\d+, 0, 0\) waits in"),
        (
            "barrier_against_warp",
            rf"block \(0, 0, 0\): deadlock.*thread \(0, 0, 0\) waits in __syncthreads {CALL}",
        ),
        ("barrier_against_warp", rf"deadlock.*thread \(16, 0, 0\) waits in __syncwarp {CALL}, with 127 others"),
        (
            "teams_of_one_number",
            rf"{HERE} waits in bar_sync {CALL}(, barrier 1, in which other warps| with a part of a)",
        ),
        (
            "team_of_two_sizes",
            rf"{HERE} waits in bar_sync {CALL}( with \d+ threads while|, barrier 1, in which other warps)",
        ),
        ("lane_returned", r"__shfl_xor_sync.*thread \(37, 0, 0\) has returned|\(37, 0, 0\) returned while thread"),
        ("mask_without_caller", r"calls __shfl_xor_sync .*whose mask 0x7fffffff lacks this lane, 31"),
        ("masks_differ", rf"{HERE} calls __shfl_xor_sync .*with the mask 0x\w+ while thread"),
        ("ask_until_answered", r"thread \(7, 0, 0\) waits for a value that no thread changes"),
        ("misaligned_load", rf"{HERE} accesses 0x\w+, which is not aligned to 16 bytes"),
        ("misaligned_vector", rf"{HERE} accesses 0x\w+, which is not aligned to 16 bytes"),
        ("misaligned_struct", rf"{HERE} accesses (memory that is not there, or is not aligned|0x\w+, which is not)"),
        ("beyond_dynamic_shared", rf"{HERE} accesses shared memory at fixtures.cu:\d+ beyond the 1020 bytes"),
        ("copy_to_global", rf"{HERE} calls cp.async with 0x\w+, which is not in shared memory"),
    ],
)
def test_threads_that_cannot_go_on_are_named(emulation, name, message):
    shared = {"dynamic_shared": 4 * THREADS - 4} if name == "beyond_dynamic_shared" else {}
    for seed in SEEDS:
        with pytest.raises(RuntimeError, match=message):
            launch(emulation, name, np.zeros(16 * THREADS), 16 * THREADS, seed=seed, threads=THREADS, **shared)


def test_an_endless_loop_is_not_endless(emulation):
    emulation.set_patience(0.3)
    with pytest.raises(RuntimeError, match=r"thread \(3, 0, 0\) runs on and on"):
        launch(emulation, "loop_on_a_plain_variable", [0], 64, threads=64)
    emulation.set_patience(30)
    values = integers(THREADS)
    assert launch(emulation, "warp_sum", values, 1)[0] == values.sum()


def test_tensor_cores_need_a_whole_warp(emulation):
    with pytest.raises(RuntimeError, match=r"mma_m16n8k16 .* in a warp of fewer than 32 threads"):
        launch(emulation, "half_a_warp_multiplies", [0], 16, threads=16)


def test_a_thread_may_wait_for_another_by_asking(emulation):
    assert wrong(emulation, "ask_until_answered", [1], np.array([3], np.float32), threads=64) == 0


def test_the_next_launch_is_not_affected_by_a_failed_one(emulation):
    values = integers(THREADS)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="deadlock"):
            launch(emulation, "barrier_against_warp", [0], THREADS)
        assert launch(emulation, "warp_sum", values, 1)[0] == values.sum()
