"""The tuner's search, on a clock of the test's own; on a GPU also with the real one."""

import pytest
import torch
from torch import nn

from effnet_kernels import FusedMBConv, MBConv, SqueezeExcite, cli, tuning, use_backend
from effnet_kernels.benchmarking import tuner
from effnet_kernels.ops import triton_common
from effnet_kernels.ops.triton_common import Config
from tests.models import images, randomize
from tests.ops.device import DEVICE


@pytest.fixture
def model():
    """Every op that has tiles, as small as can be."""
    blocks = [
        FusedMBConv(3, 8, 3, exp_ratio=2.0),
        MBConv(8, 8, 3, exp_ratio=2.0, se_layer=SqueezeExcite),
        SqueezeExcite(8),
    ]
    with use_backend("triton"):
        yield randomize(nn.Sequential(*blocks)).eval().to(DEVICE)


@pytest.fixture(autouse=True)
def own_tiles(monkeypatch, tmp_path):
    """No tile found here outlives the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(triton_common, "chosen", {})
    tuning.load.cache_clear()
    yield
    tuning.load.cache_clear()


def few_warps(calls):
    """A clock by which a tile is the slower the more warps it has, whatever else."""
    next(iter(calls.values()))()  # the interpreter takes long
    return {config: float(config.num_warps) for config in calls}


def test_every_launch_of_a_forward_belongs_to_a_class(model):
    with torch.inference_mode():
        classes = tuner.record(model, images(1, 6).to(DEVICE))
    launches = [launch for found in classes.values() for launch in found]
    ops = {key[0] for key in classes}
    assert ops == set(tuner.LAUNCHERS)
    assert len(launches) == 7  # expansion and projection, and a gate of each SE
    for launch in launches:
        before = [t.clone() for t in launch()]
        assert all(torch.equal(a, b) for a, b in zip(before, launch(), strict=True))


@pytest.mark.exhaustive
def test_it_goes_downhill_and_stores_what_is_better(model):
    x = images(1, 6).to(DEVICE)
    with torch.inference_mode():
        expected = model(x)
    tuned = list(tuner.tune(model, x, measure=few_warps))
    assert len({(each.op, each.problem_class) for each in tuned}) == len(tuned) > 4
    for each in tuned:
        assert each.after.num_warps == 1
        assert each.seconds_after <= each.seconds_before
        tuner.save("a GPU", each)
    stored = tuning.load("a GPU")
    for each in tuned:
        found = stored.get(each.op, {}).get(tuning.class_name(each.problem_class))
        assert found == (None if each.before == each.after else tuple(each.after))
    with torch.inference_mode():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_no_more_steps_than_asked_for(model):
    tuned = list(tuner.tune(model, images(1, 6).to(DEVICE), measure=few_warps, rounds=1))
    assert any(each.before.num_warps > 2 for each in tuned)
    assert all(each.after.num_warps == max(1, each.before.num_warps // 2) for each in tuned)


@pytest.mark.exhaustive
def test_a_tile_with_a_wrong_result_is_not_taken(model, monkeypatch):
    """One warp is fastest, and here it breaks the depthwise convolution."""
    from effnet_kernels.ops import depthwise_conv_bn_act_triton as depthwise

    launch = depthwise.launch_kernel

    def breaks(kernel, programs, tensors, sizes, constants, config):
        launch(kernel, programs, tensors, sizes, constants, config)
        if config.num_warps == 1 and kernel is depthwise.kernel:
            tensors[0].mul_(1.01)

    monkeypatch.setattr(depthwise, "launch_kernel", breaks)
    x = images(1, 6).to(DEVICE)
    monkeypatch.setattr(depthwise, "default_config", lambda *_: Config((4, 8, 16), 4, 1))
    for each in tuner.tune(model, x, measure=few_warps):
        assert each.after.num_warps == (2 if each.op == "depthwise_conv_bn_act" else 1)


def test_no_class_is_begun_after_the_time(model):
    said = []
    assert not list(tuner.tune(model, images(1, 6).to(DEVICE), minutes=-1, measure=few_warps, progress=said.append))
    assert "out of time" in said[0]


@pytest.mark.parametrize("config", [Config((1, 16), 1, 1), Config((64, 128, 32), 8, 3)], ids=str)
def test_neighbours_are_one_step_away(config):
    found = tuner.neighbours(config)
    assert len(set(found)) == len(found)
    for other in found:
        ratios = [a / b for a, b in zip(other.block, config.block, strict=True) if a != b]
        warps = other.num_warps / config.num_warps
        together = not ratios or warps in (1, *ratios)  # a side and its warps, in one direction
        assert len(ratios) + (other.num_stages != config.num_stages) + (warps != 1 and not ratios) == 1
        assert together
        assert min(*other.block, *other[1:]) >= 1


def test_a_valley_that_only_two_numbers_together_reach():
    """A clock for which more rows are faster, but only if there are as many warps to them as at the start."""

    def by_shape(calls):
        return {config: (1.0 if config.block[0] == 2 * config.num_warps else 9.0) / config.block[0] for config in calls}

    key, start = ("op", (), None), Config((2, 16), 1, 1)
    triton_common.chosen[key] = start
    tuned = tuner._tune_class(key, [], by_shape)
    assert (tuned.before, tuned.after) == (start, Config((2 * tuner.MAX_WARPS, 16), tuner.MAX_WARPS, 1))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_the_command_needs_a_gpu(capsys):
    assert cli.main(["tune", "--model", "efficientnet_b0"]) == 2
    assert "no GPU" in capsys.readouterr().err


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU to measure on")
def test_the_command(capsys):
    assert cli.main(["tune", "--model", "test_efficientnet", "--size", "64", "--minutes", "0.5"]) == 0
    assert "tiles stored in" in capsys.readouterr().out
