"""How often instructions run, read from machine code: from listings written by hand, and from compiled kernels."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("timm")

from benchmarks import ahead_of_time as aot
from benchmarks import sass
from effnet_kernels import precompile

# Two loops, one in the other. The inner one's first loads are fetched ahead, before it, and its last step follows it.
LISTING = """
	.section	.text.kernel,"ax",@progbits
kernel:
.text.kernel:
	//## File "/ops/kernel.py", line 5
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_9) ;
.L_x_0:
	//## File "/ops/kernel.py", line 8
        /*0020*/                   LDGSTS.E [R2], desc[UR4][R4.64] ;
        /*0030*/                   IMAD R9, R9, R9, RZ ;
.L_x_1:
	//## File "/ops/kernel.py", line 9
        /*0040*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ;
        /*0050*/               @P1 LDGSTS.E [R2], desc[UR4][R4.64] ;
	//## File "/ops/kernel.py", line 7
        /*0060*/               @P2 BRA `(.L_x_1) ;
	//## File "/ops/kernel.py", line 9
        /*0070*/                   HGMMA.64x128x16.F32 R24, gdesc[UR8], R24 ;
        /*0080*/                   MUFU.RSQ R3, R4 ;
        /*0090*/                   BSSY B0, `(.L_x_4) ;
        /*00a0*/              @!P2 BRA `(.L_x_2) ;
        /*00b0*/                   MOV R5, R4 ;
        /*00c0*/                   CALL.REL.NOINC `($__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath) ;
        /*00d0*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*00e0*/                   FFMA R3, R3, R4, R5 ;
.L_x_3:
        /*00f0*/                   BSYNC B0 ;
.L_x_4:
        /*0100*/                   BRA.DIV UR4, `(.L_x_8) ;
	//## File "/ops/kernel.py", line 6
        /*0110*/                   BRA.U !UP1, `(.L_x_0) ;
.L_x_9:
	//## File "/ops/kernel.py", line 12
        /*0120*/               @P3 EXIT ;
        /*0130*/                   STG.E desc[UR4][R6.64], R3 ;
        /*0140*/                   EXIT ;
.L_x_8:
        /*0150*/                   WARPSYNC.COLLECTIVE R5, `(.L_x_9) ;
        /*0160*/                   BRA `(.L_x_4) ;
$__internal_0_$__cuda_sm20_sqrt_rn_f32_slowpath:
        /*0170*/                   FADD R3, R3, R3 ;
        /*0180*/                   RET.REL.NODEC R40 `(kernel) ;
.L_x_10:
        /*0190*/                   BRA `(.L_x_10);
        /*01a0*/                   NOP ;
"""
OUTER, INNER = ("/ops/kernel.py", 6), ("/ops/kernel.py", 7)


def test_parts_of_nested_loops_without_the_slow_path():
    assert {part.loops: part.instructions for part in sass.parts(LISTING)} == {
        (): ("MOV", "BRA", "EXIT", "STG.E", "EXIT"),
        (OUTER,): (
            *("LDGSTS.E", "IMAD", "HGMMA.64x128x16.F32", "MUFU.RSQ", "BSSY", "BRA", "FFMA"),
            *("BSYNC", "BRA.DIV", "BRA.U"),
        ),
        (OUTER, INNER): ("HGMMA.64x128x16.F32", "LDGSTS.E", "BRA"),
    }


def test_a_call_of_a_label_is_a_branch():
    """So a loop is left on sm_80."""
    branch, call = "/*0010*/              @!P0 BRA `(.L_x_9)", "/*0010*/     @!P0 CALL.REL.NOINC `(.L_x_9)"
    assert branch in LISTING
    before, after = sass.parts(LISTING), sass.parts(LISTING.replace(branch, call))
    assert [part.loops for part in after] == [part.loops for part in before]
    assert after[0].instructions == ("MOV", "CALL.REL.NOINC", "EXIT", "STG.E", "EXIT")


def test_an_instruction_runs_once_per_trip_of_the_loops_around_it(monkeypatch):
    monkeypatch.setattr(aot, "trips", lambda launch, line: {OUTER: 3, INNER: 5}[line])
    resources = aot.Resources(32, 0, 0, 8, (), LISTING)
    issued = aot.executed(None, resources)  # type: ignore[arg-type]
    assert issued["HGMMA.64x128x16.F32"] == 3 * (5 + 1)
    assert issued["CALL.REL.NOINC"] == issued["FADD"] == issued["NOP"] == 0
    assert issued.total() == 5 + 3 * 10 + 3 * 5 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"line 7\n": "line 6\n"}, "made 2 loops"),
        ({'//## File "': "// "}, "no line"),
        ({"@!P0 BRA `(.L_x_9)": "@!P0 BRA `(.L_x_2)"}, "two places"),
        ({"@!P2 BRA `(.L_x_2)": "NOP"}, "through a loop is without a call"),
        ({"@!P2 BRA `(.L_x_2)": "NOP", "@!P0 BRA `(.L_x_9)": "NOP"}, "through the kernel is without a call"),
        ({"@!P0 BRA `(.L_x_9)": "BRX R2 -0x10"}, "jumps"),
    ],
)
def test_what_cannot_be_told_is_an_error(changes, message):
    listing = LISTING
    for old, new in changes.items():
        assert old in listing
        listing = listing.replace(old, new)
    with pytest.raises(ValueError, match=message):
        sass.parts(listing)


def test_a_loop_of_unknown_trips_is_an_error():
    launch = precompile.record_model("efficientnet_b0", 64, 1, torch.float16, 90)[0]
    with pytest.raises(LookupError, match="does not say how often"):
        aot.trips(launch, (aot.__file__, 1))


COMPILE = """
import json, torch
from effnet_kernels import functional as F, precompile
from benchmarks import ahead_of_time as aot

launches = precompile.record_model("efficientnet_b0", 224, 1, torch.float16, 90)

class PooledHead(torch.nn.Module):
    def forward(self, x):
        weight, vector = x.new_empty(1280, 320, 1, 1), x.new_empty(1280)
        return F.pointwise_conv_bn_act(x, weight, F.BatchNorm(vector, vector, vector, vector), pool=True)

x = torch.empty(1, 320, 7, 7, dtype=torch.float16, device="meta")
launches += precompile.record_module(PooledHead().eval(), x, 90)

def launch(op, **wanted):
    return next(l for l in launches if l.op == op and all(l.constant(name) == v for name, v in wanted.items()))

def changed(launch, **new):
    values = dict(zip(launch.kernel.arg_names, (*launch.tensors, *launch.sizes, *launch.constants), strict=True))
    values = (*(values | new).values(),)
    sizes, constants = len(launch.tensors), len(launch.tensors) + len(launch.sizes)
    return launch._replace(sizes=values[sizes:constants], constants=values[constants:])

def counts(launches, resources=None):
    found = []
    for launch in launches:
        read = resources or aot.compile_launch(launch, 90)
        found.append((len(read.instructions), aot.executed(launch, read)))
    return found

depthwise = launch("depthwise_conv_bn_act", C=144, KH=3)
pointwise = launch("pointwise_conv_bn_act", C_IN=1152, GATE=True)
pool = launch("pointwise_conv_bn_act", POOL=True)
gate = launch("squeeze_excite_gate", C=1152)
print(json.dumps({
    "depthwise": counts([changed(depthwise, KW=kw) for kw in (3, 5)]),
    "pointwise": counts([changed(pointwise, C_IN=c_in) for c_in in (640, 1280)]),
    "pool": counts([changed(pool, map_pixels=pixels) for pixels in (49, 129)], aot.compile_launch(pool, 90)),
    "gate": counts([changed(gate, tiles=tiles) for tiles in (4, 5)], aot.compile_launch(gate, 90)),
    "shares": counts([changed(gate, blocks=blocks) for blocks in (1, 2)], aot.compile_launch(gate, 90)),
}))
"""


def test_compiled_kernels_run_their_loops_as_often_as_the_launch_says():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)

    # The code is of one size. Two more columns of a 3x3 window are 2 x 3 products for each output of the tile,
    # 7 rows of 8 columns and 32 channels on 32 lanes.
    (size, three), (other, five) = found["depthwise"]
    assert abs(size - other) < 0.05 * size
    assert five["FFMA"] - three["FFMA"] == 2 * 3 * 7 * 8 * 32 // 32
    assert sum(five.values()) - sum(three.values()) > 1.5 * (five["FFMA"] - three["FFMA"])

    # 64 output channels are the rows of an instruction, 16 input channels its depth.
    (size, narrow), (other, wide) = found["pointwise"]
    assert abs(size - other) < 0.05 * size
    assert narrow["HGMMA.64x64x16.F32"] == 640 // 16
    assert wide["HGMMA.64x64x16.F32"] == 1280 // 16
    assert sum(wide.values()) > 1.5 * sum(narrow.values())

    # A second tile of pixels, and a second round of sums: of 4 tiles and 2048 channels on 256 lanes. A second block of
    # 256 channels, by 64 hidden units on as many lanes.
    (_, one), (_, two) = found["pool"]
    assert (one["HGMMA.64x128x16.F32"], two["HGMMA.64x128x16.F32"]) == (320 // 16, 2 * 320 // 16)
    (_, one), (_, two) = found["gate"]
    assert two["LDG.E.128"] - one["LDG.E.128"] == 4 * 2048 // (4 * 256)
    (_, one), (_, two) = found["shares"]
    assert two["LDG.E.128"] - one["LDG.E.128"] == 64 * 256 // (8 * 256)
