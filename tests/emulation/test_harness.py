"""The emulation of CUDA: kernels that are right give the right numbers in every order of threads."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from tests.emulation import build
from tests.emulation.fixtures import SEEDS, THREADS, emulation, integers, launch, product, wrong

__all__ = ["emulation"]

pytestmark = pytest.mark.skipif(build.unavailable() is not None, reason=str(build.unavailable()))


# ---- order -----------------------------------------------------------------------------------------------------


def test_threads_and_blocks_run_in_an_order_that_the_seed_decides(emulation):
    size, how = 4 * 64, {"blocks": 4, "threads": 64}
    orders = [launch(emulation, "order", [0], size, seed=seed, **how) for seed in SEEDS]
    for order in orders:
        assert sorted(order) == list(range(size))
    assert len({order.tobytes() for order in orders}) == len(SEEDS)
    assert len({tuple(np.argsort(order[::64])) for order in orders}) > 2, "blocks"
    assert np.array_equal(orders[3], launch(emulation, "order", [0], size, seed=3, **how))


def test_a_launch_of_the_same_kernel_takes_another_order(emulation):
    first = launch(emulation, "order", [0], 64, threads=64)
    second = np.empty_like(first)
    emulation.run("order", np.zeros(1, np.float32), second, threads=64)
    assert not np.array_equal(first, second)
    assert emulation.launches() == 2


# ---- barriers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["block_sum", "warp_sum"])
def test_block_reductions(emulation, name):
    values = integers(3, THREADS)
    assert wrong(emulation, name, values, values.sum(1), blocks=3, threads=THREADS, dynamic_shared=4 * THREADS) == 0


def test_the_last_block_sees_what_the_others_wrote(emulation):
    values = integers(40)
    assert wrong(emulation, "grid_sum", values, values.sum(keepdims=True), blocks=40, threads=32) == 0


def test_exchange_within_a_warp(emulation):
    values = integers(8, 32)
    expected = values[:, ::-1]
    assert wrong(emulation, "warp_reverse", values, expected) == 0


def test_votes(emulation):
    values = integers(8, 32)
    negative = values < 0
    before = np.cumsum(negative, 1) - negative
    expected = np.append(before.ravel(), negative.sum() + 10000).astype(np.float32)
    assert wrong(emulation, "votes", values, expected) == 0
    expected = np.append(np.tile(np.arange(32), 8), 256 + 110000).astype(np.float32)
    assert wrong(emulation, "votes", np.full(256, -1), expected) == 0


def test_barriers_of_some_warps(emulation):
    values = integers(2, 64)
    assert wrong(emulation, "teams", values, 3 * values[:, ::-1], threads=128, dynamic_shared=512) == 0
    values = integers(32)
    assert wrong(emulation, "relay", values, values, threads=128, dynamic_shared=128) == 0


# ---- tensor cores, asynchronous copies, approximations ---------------------------------------------------------


@pytest.mark.parametrize("name", ["matrix_product_fp16", "matrix_product_bf16"])
def test_matrix_fragments_hold_what_ptx_says(emulation, name):
    a, b = integers(16, 32), integers(32, 16, seed=1)
    for seed in SEEDS:
        assert np.array_equal(product(emulation, name, a, b, seed), a @ b)


def test_matrix_products_are_rounded_toward_zero(emulation):
    """Sums of fp16 products, which are exact, lose what does not fit into fp32: never half a unit upwards."""
    rng = np.random.default_rng(0)
    a, b = (rng.uniform(0, 1, shape).astype(np.float16).astype(np.float64) for shape in ((16, 32), (32, 16)))
    exact = a @ b
    error = (product(emulation, "matrix_product_fp16", a, b) - exact) / exact
    assert -4 * 2**-23 < error.min() < 0
    assert error.max() <= 0


def test_fp16_extremes_in_matrix_products(emulation):
    a, b = np.zeros((16, 32)), np.zeros((32, 16))
    b[0] = 1
    a[:5, 0] = [np.inf, -np.inf, np.nan, 2.0**-24, 65504]
    result = product(emulation, "matrix_product_fp16", a, b)
    assert np.array_equal(result[:, 0], a[:, 0].astype(np.float32), equal_nan=True)


def double_buffer(emulation, name: str) -> int:
    values = integers(5, 128)
    arrived = values.copy()
    arrived[4].reshape(32, 4)[:, 2:] = 0  # of the last tile only 8 of 16 bytes are copied
    return wrong(emulation, name, values, arrived.sum(0), threads=32, dynamic_shared=2 * 4 * 128)


def test_asynchronous_copies(emulation):
    assert double_buffer(emulation, "double_buffer") == 0


def test_approximations_have_the_error_that_the_hardware_may_have(emulation):
    x = np.random.default_rng(0).uniform(-4, 4, 20000).astype(np.float32)
    result = launch(emulation, "approximations", x, 3 * x.size).reshape(3, -1).astype(np.float64)
    exact_x = x.astype(np.float64)
    exact = np.stack([np.exp2(exact_x), 1 / exact_x, np.exp(exact_x)])
    ulp = 2.0**-23
    of_exp = (2 + np.floor(1.173 * abs(exact_x))) * ulp
    allowed = np.stack([np.full(x.size, 2 * ulp), np.full(x.size, ulp), of_exp])
    error = abs(result / exact - 1) / (allowed + ulp / 2)
    assert (error.max(1) <= 1).all()
    assert (error.max(1) > 0.6).all(), "an exact result would hide a kernel's reliance on it"


# ---- streams ---------------------------------------------------------------------------------------------------


@pytest.fixture
def deferred(emulation):
    emulation.defer(True)
    yield
    emulation.defer(False)


def through_temporary(emulation, name: str, seed: int) -> np.ndarray:
    out = launch(emulation, name, np.arange(64), 64, seed=seed)
    assert np.isnan(out).all() == emulation.deferred()
    assert emulation.waiting() == ({(3, 0), (3, 1)} if name == "temporary_on_another_stream" else {(3, 0)})
    emulation.synchronize()
    return out


@pytest.mark.usefixtures("deferred")
def test_deferred_launches_run_when_somebody_waits(emulation):
    for seed in SEEDS:
        assert np.array_equal(through_temporary(emulation, "temporary", seed), np.arange(64))


@pytest.mark.usefixtures("deferred")
def test_an_error_ends_what_waits(emulation):
    launch(emulation, "warp_reverse_without_barrier", np.ones(64), 64, threads=64)
    launch(emulation, "copy", np.ones(64), 64, threads=64)
    with pytest.raises(RuntimeError, match="without a barrier"):
        emulation.defer(False)
    assert not emulation.deferred()
    assert emulation.waiting() == set()


@pytest.mark.usefixtures("deferred")
def test_a_temporary_that_is_freed_before_its_last_launch(emulation):
    for seed in SEEDS:
        assert np.isnan(through_temporary(emulation, "temporary_freed_too_early", seed)).all()


@pytest.mark.usefixtures("deferred")
def test_a_launch_on_another_stream_than_what_it_reads(emulation):
    right = [
        np.array_equal(through_temporary(emulation, "temporary_on_another_stream", s), np.arange(64)) for s in SEEDS
    ]
    assert not all(right)


# ---- devices ---------------------------------------------------------------------------------------------------


def test_contexts_are_on_the_devices_in_use(emulation):
    emulation.forget_contexts()
    launch(emulation, "copy", [0], 1, threads=1)
    assert emulation.contexts() == {emulation.current_device()}
    emulation.forget_contexts()
    emulation.set_device(86)
    emulation.set_device(90)
    assert len(emulation.contexts()) == 2


def test_a_stream_of_another_device_is_refused(emulation):
    emulation.set_device(86)
    with pytest.raises(RuntimeError, match="invalid resource handle"):
        launch(emulation, "temporary", np.arange(64), 64)
    emulation.set_device(90)
    assert np.array_equal(launch(emulation, "temporary", np.arange(64), 64), np.arange(64))


def test_a_limit_that_another_thread_lowers(emulation):
    """The fixtures ask for what each launch needs. By turns that is enough."""

    def run(kilobytes: int) -> None:
        emulation.set_device(90)
        values = np.zeros(1, np.float32)
        try:
            emulation.run("bounded", values, values.copy(), threads=1, dynamic_shared=kilobytes * 1024)
        except RuntimeError as error:
            errors.append(str(error))

    for pause in (0, 0.4):
        errors: list[str] = []
        emulation.set_pause(pause)
        try:
            first, second = (threading.Thread(target=run, args=(kilobytes,)) for kilobytes in (200, 64))
            first.start()
            if pause:  # the second sets its limit while the first one rests before its launch
                time.sleep(pause / 2)
            else:
                first.join()
            second.start()
            first.join()
            second.join()
        finally:
            emulation.set_pause(0)
        assert errors == ["invalid argument"] * (pause > 0)


# ---- costs -----------------------------------------------------------------------------------------------------


def costs(emulation, name: str) -> dict[tuple[bool, str], float]:
    """Wavefronts or sectors of a request, by whether it is to shared memory, and the line."""
    emulation.count(True)
    launch(emulation, name, np.arange(1024), 1024, threads=1024 if "transpose" in name else 256)
    found = emulation.costs()
    emulation.count(False)
    assert all(kernel.startswith("void fixtures::" if "transpose" in name else "fixtures::") for kernel, *_ in found)
    return {(shared, line): moved / requests for _, line, shared, requests, moved, _ in found}


def test_conflicts_of_banks_are_counted(emulation):
    for name, wavefronts in (("transpose", 1), ("transpose_with_conflicts", 32)):
        assert [each for (shared, _), each in costs(emulation, name).items() if shared] == [wavefronts] * 2
    assert [each for (shared, _), each in costs(emulation, "copy_vectors").items() if shared] == [4, 4]


def test_what_the_lanes_of_a_warp_read_together_is_counted_once(emulation):
    """By ldmatrix: of 16 rows of 64 bytes, and of 32 of 32 bytes; every eight lanes read eight rows of 16 bytes."""
    emulation.count(True)
    product(emulation, "matrix_product_fp16", np.ones((16, 32)), np.ones((32, 16)))
    reads = [(requests, moved) for _, _, shared, requests, moved, _ in emulation.costs() if shared and moved > requests]
    emulation.count(False)
    assert sorted(reads) == [(2, 16), (2, 32)]


def test_sectors_are_counted(emulation):
    assert sorted(each for (shared, _), each in costs(emulation, "transpose").items() if not shared) == [4, 32]
    assert [each for (shared, _), each in costs(emulation, "copy_vectors").items() if not shared] == [16, 16]


# ---- launches that CUDA refuses --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"blocks": 0}, {"threads": 0}, {"threads": 1025}])
def test_impossible_grids(emulation, how):
    with pytest.raises(RuntimeError, match="invalid configuration argument"):
        launch(emulation, "copy", [0], 1, **how)


def test_launch_bounds(emulation):
    assert np.array_equal(launch(emulation, "bounded", np.arange(64), 64, threads=64), np.arange(64))
    with pytest.raises(RuntimeError, match="invalid argument"):
        launch(emulation, "bounded", np.arange(96), 96, threads=96)
    launch(emulation, "odd_bounds", np.arange(128), 128, threads=100)
    with pytest.raises(RuntimeError, match="invalid argument"):
        launch(emulation, "odd_bounds", np.arange(128), 128, threads=101)


def test_limits_of_dynamic_shared_memory(emulation):
    """48 KB unless the kernel asks for more, as the fixtures do from 64 KB; then what the device has."""

    def fits(kilobytes: float) -> bool:
        try:
            launch(emulation, "copy", [0], 1, threads=1, dynamic_shared=int(kilobytes * 1024))
        except RuntimeError as error:
            if str(error) != "invalid argument":
                raise
            return False
        return True

    assert [fits(size) for size in (48, 49, 64, 227, 227.5)] == [True, False, True, True, False]
    emulation.set_device(86)
    assert [fits(size) for size in (48, 64, 99, 99.5)] == [True, True, True, False]
    with pytest.raises(ValueError, match="device"):
        emulation.set_device(10)
