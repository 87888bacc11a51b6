"""Triton kernels as machine code, on any machine: no spills, shared memory within limits, the instructions meant.

The suite compiles one kernel for each tile; ``make kernels`` compiles every kernel of the models that it names.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("timm")

from benchmarks import ahead_of_time as aot
from effnet_kernels import precompile

FLOAT16 = torch.float16
CLEAN = aot.Resources(168, 0, 64 * 1024, 3, ("LDG.E.128", "HMMA.16816.F32", "HGMMA.64x64x16.F32", "UTCHMMA", "EXIT"))


def uninterpreted() -> dict[str, str]:
    """An environment in which Triton compiles."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@pytest.mark.parametrize("arch", ["80", "90", "100"])
@pytest.mark.exhaustive
def test_every_tile_compiles_to_what_was_meant(arch):
    """A process of its own: under the interpreter, which serves the other tests, nothing can be compiled."""
    command = [sys.executable, "-m", "benchmarks.ahead_of_time", "--tiles", "--jobs", "1"]
    command += ["--models", *aot.TILED_MODELS, "--dtypes", "float16", "float32", "--archs", arch]
    result = subprocess.run(command, env=uninterpreted(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    for op in ("depthwise_conv_bn_act", "pointwise_conv_bn_act", "fused_mbconv", "squeeze_excite_gate"):
        assert f"\n{op} " in result.stdout, f"no {op} for sm_{arch}"


@pytest.mark.exhaustive
def test_a_bfloat16_model_compiles_to_what_was_meant():
    command = [sys.executable, "-m", "benchmarks.ahead_of_time", "--tiles", "--jobs", "1"]
    command += ["--models", "tf_efficientnetv2_s", "--dtypes", "bfloat16", "--archs", "90"]
    result = subprocess.run(command, env=uninterpreted(), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "\npointwise_conv_bn_act " in result.stdout


@pytest.fixture(scope="module")
def launches() -> list[precompile.Launch]:
    return precompile.record_model("tf_efficientnetv2_s", 64, 2, FLOAT16, 90)


def launch_of(launches: list[precompile.Launch], op: str, **constants: object) -> precompile.Launch:
    return next(
        launch
        for launch in launches
        if launch.op == op and all(launch.constant(name) == value for name, value in constants.items())
    )


def test_a_whole_model_is_recorded(launches):
    """V2-S: a stem, 10 fused blocks, 30 MBConv blocks of four launches each, 14 of them of five, a head."""
    count = {op: sum(launch.op == op for launch in launches) for op in precompile.OPS}
    assert count == {
        "depthwise_conv_bn_act": 30,
        "fused_mbconv": 11,
        "mbconv": 0,
        "pointwise_conv_bn_act": 61,
        "squeeze_excite": 0,
        "squeeze_excite_gate": 44,
    }


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize(
    ("op", "constants"),
    [("pointwise_conv_bn_act", {"C_OUT": 256}), ("fused_mbconv", {"C_MID": 192}), ("depthwise_conv_bn_act", {})],
)
def test_each_complaint_is_made(launches, op, constants, arch):
    launch = launch_of(launches, op, **constants)
    assert aot.complaints(launch, CLEAN, arch) == []
    assert "spill" in aot.complaints(launch, CLEAN._replace(local=8), arch)[0]
    assert "shared memory" in aot.complaints(launch, CLEAN._replace(shared=228 * 1024), arch)[0]
    without = CLEAN._replace(instructions=("LDG.E.64", "FFMA", "EXIT"))
    assert len(aot.complaints(launch, without, arch)) == 1


SPILLED = """
.text.kernel:
{before}
.L_x_0:
    FFMA R3, R3, R4, R5 ;
    {inside}
    @P0 BRA `(.L_x_0) ;
{behind}
    EXIT ;
{unreached}
"""
STORE, LOAD = "    STL [R1], R4 ;", "    LDL.LU R36, [R1] ;"


@pytest.mark.parametrize(
    ("before", "inside", "behind", "unreached", "complaints"),
    [
        (STORE, "", LOAD, "", 0),
        (STORE, "", LOAD, ".L_x_1:\n    BRA `(.L_x_1) ;", 0),
        (STORE, LOAD, "", "", 1),
        ("", STORE, LOAD, "", 1),
        (STORE, "", f"{LOAD}\n{LOAD}", "", 1),
        (f"{STORE}\n{STORE}", "", LOAD, "", 1),
        (STORE, "    BRX R2 ;", LOAD, "", 1),
        ("", "", "", "", 1),
    ],
)
def test_only_a_spill_of_one_value_around_all_loops_is_no_complaint(
    launches, before, inside, behind, unreached, complaints
):
    listing = SPILLED.format(before=before, inside=inside, behind=behind, unreached=unreached)
    instructions = tuple(line.split()[0] for line in listing.splitlines() if line.endswith(";"))
    resources = CLEAN._replace(local=8, listing=listing, instructions=(*CLEAN.instructions, *instructions))
    found = aot.complaints(launch_of(launches, "squeeze_excite_gate"), resources, 100)
    assert len(found) == complaints


COUNT_LOADS = """
import torch
from effnet_kernels import precompile
from benchmarks import ahead_of_time as aot

for arch in (80, 90, 100):
    stem = precompile.record_model("tf_efficientnetv2_s", 64, 2, torch.float16, arch)[0]
    print(stem.op, *stem.config.block[:2], aot.compile_launch(stem, arch).count(r"LDG"))
"""


@pytest.mark.exhaustive
def test_a_lane_of_a_stem_knows_its_taps():
    """It loads 27 elements for each of two pixels, up to 32 of weights and 8 of vectors: with lanes along the window's
    axis it could not know which of its 32 elements are none, and would compare and address each of them."""
    result = subprocess.run([sys.executable, "-c", COUNT_LOADS], env=uninterpreted(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[:3] for row in rows] == [["fused_mbconv", "64", "32"]] * 3
    assert all(2 * 27 < int(row[3]) <= 2 * 27 + 32 + 8 for row in rows), rows


COUNT_COPIES = r"""
import torch
from effnet_kernels import precompile
from benchmarks import ahead_of_time as aot

for launch in precompile.record_model("tf_efficientnetv2_s", 64, 2, torch.float16, 90):
    if launch.op == "fused_mbconv" and launch.constant("BLOCK_MID") == 256:
        found = aot.compile_launch(launch, 90)
        near, past = found.count(r"LDGSTS\S*\.64"), found.count(r"LDGSTS\S*BYPASS\S*\.128")
        print(launch.constant("C_MID"), near > 0, past > 0, near + past == found.count("LDGSTS"))
        break
"""


@pytest.mark.exhaustive
def test_dense_windows_are_copied_through_the_l1():
    """By 8 bytes, and weights past it, by 16."""
    result = subprocess.run([sys.executable, "-c", COUNT_COPIES], env=uninterpreted(), capture_output=True, text=True)
    assert result.stdout.split() == ["192", "True", "True", "True"], result.stdout + result.stderr


COUNT_VARIANTS = """
import torch
from effnet_kernels import precompile
from benchmarks import ahead_of_time as aot

def variants(size, batch):
    launches = precompile.record_model("efficientnet_b0", size, batch, torch.float16, 90)
    return {aot.specialisation(launch, 90) for launch in launches}

first = variants(224, 1)
print(len(first), *[len(variants(*other) - first) for other in ((224, 128), (192, 8), (225, 3), (64, 1), (1, 1))])
"""


@pytest.mark.exhaustive
def test_a_new_size_or_batch_compiles_nothing():
    """By Triton's own key of what it has compiled, on B0: 65 launches are of 39 kernels, at any size."""
    result = subprocess.run([sys.executable, "-c", COUNT_VARIANTS], env=uninterpreted(), capture_output=True, text=True)
    assert result.stdout.split() == ["39", "0", "0", "0", "0", "0"], result.stdout + result.stderr


def test_the_recorded_variants_are_those_that_triton_tells_apart():
    """``distinct``, by which the gate leaves out repetitions, has as many."""
    launches = precompile.record_model("efficientnet_b0", 224, 1, FLOAT16, 90)
    assert (len(launches), len(precompile.distinct(launches))) == (65, 39)


TRAINING_STEP = """
import torch
from effnet_kernels import precompile
from benchmarks import ahead_of_time as aot
from effnet_kernels.ops.common import empty_nhwc
from effnet_kernels.ops import conv_block_train_triton as triton
from effnet_kernels.ops import train_block as block
from effnet_kernels.arguments import SqueezeExciteWeights
from effnet_kernels.ops.train_block import Layer, NeedsInputGrad

def step(dtype, kernel, stride, size=28, batch=2):
    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    def layer(shape, act, stride=1, padding=0):
        vectors = [empty(shape[0]) for _ in range(4)]
        return Layer(empty(*shape, dtype=dtype), *vectors, 1e-3, False, act, (stride,) * 2, (padding,) * 4)

    layers = [
        layer((144, 24, 1, 1), "silu"),
        layer((144, 1, kernel, kernel), "silu", stride, kernel // 2),
        layer((24, 144, 1, 1), "identity"),
    ]
    se = SqueezeExciteWeights(empty(6, 144, 1, 1), empty(6), empty(144, 6, 1, 1), empty(144))
    x = empty_nhwc(empty(batch, dtype=dtype), 24, size, size)
    residual = empty_nhwc(x, 24, (size - 1) // stride + 1, (size - 1) // stride + 1)
    y, raws, statistics, squeezed = block.forward(triton.run, x, layers, se, residual, False)
    needs = NeedsInputGrad(True, [True] * 3, [True] * 3, [True] * 3, [True] * 4)
    kept = block.Saved(x, raws, statistics, squeezed)
    block.backward(triton.run, y, kept, layers, se, False, list(x.shape), needs)
"""

COMPILE_TRAINING = (
    TRAINING_STEP
    + """
for arch in (80, 90, 100):
    seen = set()
    for dtype, kernel, stride in ((torch.float16, 3, 2), (torch.float32, 5, 1)):
        launches = precompile.distinct(precompile.record(lambda: step(dtype, kernel, stride), arch))
        for launch in launches:
            name = launch.kernel.fn.__name__
            if "depthwise" in launch.kernel.fn.__module__ or name not in seen:
                seen.add(name)
                resources = aot.compile_launch(launch, arch)
                print(arch, name, dtype, *aot.complaints(launch, resources, arch), sep="\\t")
"""
)


@pytest.mark.exhaustive
def test_the_kernels_of_training_compile_without_spills():
    command = [sys.executable, "-c", COMPILE_TRAINING]
    result = subprocess.run(command, env=uninterpreted(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = [line.split("\t") for line in result.stdout.splitlines()]
    assert [row for row in rows if len(row) > 3] == []
    names = {name for arch, name, *_ in rows if arch == "100"}
    passes = ("statistics", "pool", "apply", "gradient", "gate_moments", "merge", "add")
    assert names == {f"{name}_kernel" for name in (*passes, "forward", "input_gradient", "weight_gradient")}


COUNT_TRAINING = (
    TRAINING_STEP
    + """
def variants(size, batch, kernel, stride):
    launches = precompile.record(lambda: step(torch.float16, kernel, stride, size, batch), 90)
    return {aot.specialisation(launch, 90) for launch in launches}

for window in ((3, 1), (5, 2)):
    first = variants(28, 2, *window)
    others = ((28, 128), (224, 128), (33, 3), (7, 1), (2, 1))
    print(len(first), *[len(variants(*other, *window) - first) for other in others])
"""
)


@pytest.mark.exhaustive
def test_training_at_a_new_size_or_batch_compiles_nothing():
    """Progressive learning, by Triton's own key; the larger maps have their sums put together in several levels."""
    result = subprocess.run([sys.executable, "-c", COUNT_TRAINING], env=uninterpreted(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for line in result.stdout.splitlines():
        first, *new = map(int, line.split())
        assert first > 10
        assert new == [0] * 5
