"""Triton kernels as machine code, on any machine: no spills, shared memory within limits, the instructions meant.

The suite compiles a sample; ``python -m effnet_kernels.benchmarking.ahead_of_time`` compiles all that ships.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("timm")

from effnet_kernels.benchmarking import ahead_of_time as aot

FLOAT16 = torch.float16
CLEAN = aot.Resources(168, 0, 64 * 1024, 3, ("LDG.E.128", "HMMA.16816.F32", "HGMMA.64x64x16.F32", "UTCHMMA", "EXIT"))


def uninterpreted() -> dict[str, str]:
    """An environment in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.parametrize(
    ("model", "dtype", "generations"),
    [
        ("efficientnet_b0", "float16", ("80", "90", "100")),
        ("tf_efficientnetv2_s", "bfloat16", ("80", "90", "100")),
        ("tf_efficientnetv2_s", "float32", ("80",)),
    ],
)
@pytest.mark.slow
def test_a_sample_of_the_kernels_compiles_to_what_was_meant(model, dtype, generations):
    """A process of its own: under the interpreter, which serves the other tests, nothing can be compiled."""
    command = [sys.executable, "-m", "effnet_kernels.benchmarking.ahead_of_time", "--sample", "--jobs", "1"]
    command += ["--models", model, "--dtypes", dtype, "--generations", *generations]
    result = subprocess.run(command, env=uninterpreted(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for generation in generations:
        for op in ("depthwise_conv_bn_act", "pointwise_conv_bn_act", "fused_mbconv"):
            rows = [line for line in result.stdout.splitlines() if op in line and f"sm_{generation} " in line]
            assert rows, f"no {op} for sm_{generation}"


@pytest.fixture(scope="module")
def launches() -> list[aot.Launch]:
    return aot.record_model("tf_efficientnetv2_s", 64, 2, FLOAT16, 90)


def launch_of(launches: list[aot.Launch], op: str, **constants: object) -> aot.Launch:
    return next(
        launch
        for launch in launches
        if launch.op == op and all(launch.constant(name) == value for name, value in constants.items())
    )


def test_a_whole_model_is_recorded(launches):
    """V2-S: a stem, 10 fused blocks, 30 MBConv blocks of four launches each, a head."""
    count = {op: sum(launch.op == op for launch in launches) for op in aot.OPS}
    assert count == {
        "depthwise_conv_bn_act": 30,
        "fused_mbconv": 11,
        "mbconv": 0,
        "pointwise_conv_bn_act": 61,
        "squeeze_excite": 0,
        "squeeze_excite_gate": 30,
    }


@pytest.mark.parametrize("generation", [80, 90, 100])
@pytest.mark.parametrize(
    ("op", "constants"),
    [("pointwise_conv_bn_act", {"C_OUT": 256}), ("fused_mbconv", {"C_MID": 192}), ("depthwise_conv_bn_act", {})],
)
def test_each_complaint_is_made(launches, op, constants, generation):
    launch = launch_of(launches, op, **constants)
    assert aot.complaints(launch, CLEAN, generation) == []
    assert "spill" in aot.complaints(launch, CLEAN._replace(local=8), generation)[0]
    assert "shared memory" in aot.complaints(launch, CLEAN._replace(shared=228 * 1024), generation)[0]
    without = CLEAN._replace(instructions=("LDG.E.64", "FFMA", "EXIT"))
    assert len(aot.complaints(launch, without, generation)) == 1


COUNT_VARIANTS = """
import torch
from effnet_kernels.benchmarking import ahead_of_time as aot

def variants(size, batch):
    launches = aot.record_model("efficientnet_b0", size, batch, torch.float16, 90)
    return {aot.specialisation(launch, 90) for launch in launches}

first = variants(224, 1)
print(len(first), *[len(variants(*other) - first) for other in ((224, 128), (192, 8), (225, 3), (64, 1), (1, 1))])
"""


def test_a_new_size_or_batch_compiles_nothing():
    """By Triton's own key of what it has compiled, on B0: 65 launches are of 39 kernels, at any size."""
    result = subprocess.run([sys.executable, "-c", COUNT_VARIANTS], env=uninterpreted(), capture_output=True, text=True)
    assert result.stdout.split() == ["39", "0", "0", "0", "0", "0"], result.stdout + result.stderr


def test_the_recorded_variants_are_those_that_triton_tells_apart():
    """``distinct``, by which the gate leaves out repetitions, has as many."""
    launches = aot.record_model("efficientnet_b0", 224, 1, FLOAT16, 90)
    assert (len(launches), len(aot.distinct(launches))) == (65, 39)
