"""What benchmarks.machine_code counts, on machine code written and counted by hand.

tests/test_cuda_cubins.py has what it says of the library.
"""

from pathlib import Path

import pytest

from benchmarks import cubins, machine_code
from benchmarks.machine_code import Code

NAME = (
    "_ZN6effnet4cuda57_GLOBAL__N__0a1b2c3d_14_toy_product_cu_45678901"
    "11toy_kernelI6__halfNS0_9BlockTileILi32EEELb1EEEvNS1_4ArgsE"
)
RESOURCES = f"""
Fatbin elf code:
================
arch = sm_90a
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:0
 Function {NAME}:
  REG:40 STACK:8 SHARED:3072 LOCAL:16 CONSTANT[0]:736 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
ELF = f"""
Fatbin elf code:
================
arch = sm_90a
	Attribute:	EIATTR_MAX_THREADS
	Value:	0x1 0x1 0x1
.nv.info.{NAME}
	Attribute:	EIATTR_CUDA_API_VERSION
	Format:	EIFMT_SVAL
	Value:	0x82
	<0x2>
	Attribute:	EIATTR_MAX_THREADS
	Format:	EIFMT_SVAL
	Value:	0x80 0x2 0x1
	<0x3>
	Attribute:	EIATTR_OTHER
	Format:	EIFMT_SVAL
	Value:	0x1 0x1 0x1
"""
# Loads: of R3, that the next instruction but a load names; of R8, named 7 others later, behind an exit; of R11, named 8
# later; in the loop, in a part that runs rarely. The loop begins at 00e0, and has one of copies inside.
PRODUCT = """
0000 S2R R0, SR_TID.X
0010 LDG.E.64 R2, desc[UR4][R4.64]
0020 LDG.E R8, desc[UR4][R6.64]
0030 HADD2.F32 R9, -RZ, R3.H0_H0
0040 @P5 LDG.E.U16 R11, desc[UR4][R4.64]
0050 @P0 EXIT
0060 IMAD R12, R9, R9, RZ
0070 IMAD R13, R9, R9, RZ
0080 IMAD R14, R9, R9, RZ
0090 IMAD R15, R9, R9, RZ
00a0 IMAD R17, R9, R9, RZ
00b0 FADD R16, R8, R9
00c0 IMAD R18, R9, R9, RZ
00d0 FADD R20, R9, R11
00e0 LDGDEPBAR
00f0 @!P1 BRA 0x150
0100 LDGSTS.E.BYPASS.LTC128B.128 [R21], desc[UR4][R22.64], P4
0110 IADD3 R21, R21, 0x1000, RZ
0120 ISETP.GE.AND P2, PT, R21, R24, PT
0130 @!P2 BRA 0x100
0140 IADD3 R25, R25, 0x1, RZ
0150 LDSM.16.M88.4 R28, [R26]
0160 HMMA.16816.F32 R32, R28, R30, R32
0170 HMMA.16816.F32 R36, R28, R31, R36
0180 @P3 BRA 0x1d0
0190 HMMA.16816.F32 R40, R28, R31, R40
01a0 ISETP.GE.AND P4, PT, R25, R24, PT
01b0 @!P4 BRA 0xe0
01c0 BRA 0x220
01d0 MUFU.EX2 R50, R50
01e0 LDG.E R51, desc[UR4][R52.64]
01f0 HMMA.16816.F32 R44, R28, R31, R44
0200 FADD R50, R51, R50
0210 BRA 0x190
0220 STG.E desc[UR4][R60.64], R32
0230 EXIT
0240 BRA 0x240
0250 NOP
"""


def instructions(listing: str) -> cubins.Instructions:
    return tuple((int(line[:4], 16), line[5:]) for line in listing.strip().splitlines())


def parsed() -> list[cubins.Kernel]:
    """The kernel as cuobjdump lists it: two lines an instruction, the second with the rest of the code's bits.

    Every other one as for newer GPUs, with what it waits for.
    """
    waits = ("", "  &req={1} &wr=0x2   ?WAIT4_END_GROUP")
    listed = [(address, text + waits[address % 32 // 16]) for address, text in instructions(PRODUCT)]
    lines = [f"        /*{a:04x}*/    {text} ;    /* 0x0000001000027824 */\n      /* 0x000fe2 */" for a, text in listed]
    code = "\n".join(["arch = sm_90a", "code for sm_90", f"\t\tFunction : {NAME}", '.headerflags @"EF"', *lines])
    return cubins.parse(RESOURCES, ELF, code)


def test_a_kernel_is_read_from_what_cuobjdump_prints():
    (kernel,) = parsed()
    assert kernel[:6] == ("sm_90a", NAME, 40, 24, 3072, 256)
    assert kernel.instructions == instructions(PRODUCT)
    assert kernel.has(r"LDSM\.16")
    assert not kernel.has("LDL")
    assert cubins.readable(NAME) == ("toy_product", "toy_kernel<half, 32, true>")
    assert cubins.readable("_ZN12_GLOBAL__N_19my_kernelIfLi2EEEvi")[1] == "my_kernel<float, 2>"


def test_a_kernel_without_a_bound_may_have_as_many_threads_as_any():
    code = f"arch = sm_90a\nFunction : {NAME}\n /*0000*/  EXIT ; /* 0x0 */"
    (kernel,) = cubins.parse(RESOURCES, "arch = sm_90a\n", code)
    assert kernel.threads == 1024


def test_costs_of_a_product_counted_by_hand():
    """Round the loop at 00e0 with copies: 2 instructions, 1 behind the copies, 4, 3, with 3 HMMA: 7 others for 3.

    Without copies 6 would be for 3, and with the rare part 11 for 4.
    """
    (kernel,) = parsed()
    shown = dict(zip(machine_code.HEADER, machine_code.row_of(kernel), strict=True))
    assert shown == {
        "file": "toy_product",
        "kernel": "`toy_kernel<half, 32, true>`",
        "registers": "40",
        "shared": "3072",
        "threads": "256",
        "blocks": "6",  # 12 warps in each quarter
        "instructions": "38",
        "per HMMA": "2.3",
        "per cp.async": "4",
        "per output": "",
        "exposed loads": "3 of 4",
        "waits, in loops": "3, 1",
    }
    code = Code(kernel.instructions)
    assert [code.blocks[loop.head].address for loop in code.loops] == [0xE0, 0x100]
    assert code.ways(code.loops[0], lambda number: (code.count([number], "HMMA"),)) == {(3,): 9, (4,): 14}
    assert [address_of(code, place) for pair in code.exposed_loads() for place in pair] == [
        *(0x10, 0x30, 0x20, 0xB0, 0x1E0, 0x200),
    ]


def address_of(code: Code, place: machine_code.Place) -> int:
    return code.blocks[place[0]].address + 16 * place[1]


def test_loads_of_one_wait_and_a_load_that_a_loop_takes_round():
    code = Code(
        instructions(
            """
0000 LDG.E R2, desc[UR4][R4.64]
0010 LDG.E.128.CONSTANT R8, desc[UR4][R6.64]
0020 FADD R20, R11, R20
0030 FADD R20, R2, R20
0040 LDG.E R2, desc[UR4][R4.64]
0050 LDG.E R7, desc[UR4][R12.64]
0060 @P0 BRA 0x20
0070 STG.E desc[UR4][R6.64], R20
0080 EXIT
"""
        )
    )
    pairs = [tuple(address_of(code, place) for place in pair) for pair in code.exposed_loads()]
    assert pairs == [(0x00, 0x30), (0x10, 0x20), (0x40, 0x30), (0x50, 0x70)]


def test_a_way_that_stores_is_taken_before_a_cheaper_one():
    listing = """
0000 MOV R1, R2
0010 HMMA.16816.F32 R32, R28, R30, R32
0020 @P0 BRA 0x50
0030 STG.E.64 desc[UR4][R60.64], R32
0040 IADD3 R60, R60, 0x8, RZ
0050 @P1 BRA 0x10
0060 EXIT
"""
    code = Code(instructions(listing))
    assert code.cheapest(code.with_most("HMMA"), "HMMA") == 5
    assert code.with_most("LDGSTS") is None
    without = Code(instructions(listing.replace("STG.E.64", "STS.64")))
    assert without.cheapest(without.with_most("HMMA"), "HMMA") == 3


def test_a_switch_leads_to_its_cases_and_branches_of_warps_to_both_sides():
    listing = """
0000 BRX R2 -0x10
0010 FADD R3, R3, R3
0020 BRA 0x50
0030 FMUL R3, R3, R3
0040 BRA.DIV UR4, 0x70
0050 BRX R4 -0x60
0060 BRA.U !UP1, 0x50
0070 BRA P5, 0x50
0080 CALL.REL.NOINC 0xc0
0090 @P4 CALL.REL.NOINC 0xb0
00a0 BRA 0x80
00b0 RET.REL.NODEC R40 0x0
"""
    assert {block.address: block.following for block in cubins.blocks(instructions(listing))} == {
        0x00: [0x10, 0x30],
        0x10: [0x50],
        0x30: [0x70, 0x50],
        0x50: [0x60],
        0x60: [0x50, 0x70],
        0x70: [0x50, 0x80],
        0x80: [0xB0, 0xA0],
        0xA0: [0x80],
        0xB0: [],
    }


def test_instructions_per_output_of_products_counted_by_hand():
    """Rows: 2 + 3 for the copy, 2, then 4 with the stores and 4 with sums, 2. A place: 2 before its rows, 2 behind."""
    code = Code(
        instructions(
            """
0000 MOV R1, R2
0010 IMAD R3, R3, R3, RZ
0020 LDGSTS.E.BYPASS.LTC128B.128 [R21], desc[UR4][R22.64]
0030 DEPBAR.LE SB0, 0x2
0040 @P1 BRA 0x80
0050 LDGSTS.E.BYPASS.LTC128B.128 [R21], desc[UR4][R22.64]
0060 IADD3 R22, R22, 0x8, RZ
0070 BRA 0x90
0080 LDG.E.128.CONSTANT R4, desc[UR4][R22.64]
0090 HMMA.16816.F32 R32, R28, R30, R32
00a0 @P0 BRA 0x130
00b0 MUFU.RCP R32, R32
00c0 STG.E.64 desc[UR4][R60.64], R32
00d0 STG.E.64 desc[UR4][R60.64+0x8], R32
00e0 @P2 BRA 0x130
00f0 SHFL.BFLY PT, R40, R40, 0x10, 0x1f
0100 STG.E desc[UR4][R62.64], R40
0110 FADD R40, R40, R40
0120 FADD R40, R40, R40
0130 IADD3 R60, R60, 0x8, RZ
0140 @P3 BRA 0x30
0150 ISETP.GE.AND P4, PT, R25, R24, PT
0160 @!P4 BRA 0x10
0170 EXIT
"""
        )
    )
    assert machine_code.with_products(code) == (13, 9, 4, 4)
    places, rows = code.loops
    assert sum(map(sum, code.counts(places, "HMMA", "STG").values())) == 0
    assert sum(map(sum, code.counts(rows, "HMMA", "STG").values())) == 4
    # 7 rows and the sums of one tile. Then bands of 32 and of 8 rows, 4 tiles and 1, 5 segments of 8 columns.
    maps = [(4 + 2 * 9 + 7 * 13 + 4) / 49, (2 * (4 + 2 * 9) + 40 * 13 + 5 * 4) * 5 / 1600]
    assert [machine_code.of_map(side, 2, 13, 9, 4, 4) for side in (7, 40)] == maps
    shown = machine_code.per_output(code, "depthwise_mma_kernel<half, 3, 1, true, true, 4>")
    assert (shown[0], shown[3]) == (13 / 8, maps[0])
    assert not machine_code.per_output(code, "depthwise_mma_kernel<half, 3, 1, false, true, 4>")


def test_instructions_per_output_of_fmas_counted_by_hand():
    """Three loads, a store; with the reciprocal and its multiplication 9 instructions, without them 7."""
    code = Code(
        instructions(
            """
0000 MOV R1, R2
0010 LDG.E.128 R4, desc[UR4][R22.64]
0020 LDG.E.128 R8, desc[UR4][R22.64+0x10]
0030 LDG.E.128 R12, desc[UR4][R22.64+0x20]
0040 FFMA R16, R4, R8, R12
0050 @P0 BRA 0x80
0060 MUFU.RCP R17, R16
0070 FMUL R16, R16, R17
0080 STG.E.128 desc[UR4][R60.64], R16
0090 @P1 BRA 0x10
00a0 EXIT
"""
        )
    )
    assert machine_code.with_fmas(code, kernel=3, stride=1, width=1) == (9, 2)
    assert machine_code.per_output(code, "depthwise_kernel<float, 3, 1, 4, 1, 4>") == [9 / 4]


@pytest.mark.parametrize(
    ("architecture", "registers", "threads", "blocks"),
    [
        ("sm_90a", 168, 128, 3),  # 5376 of a warp: 3 in a quarter, 12 warps
        ("sm_90a", 128, 256, 2),
        ("sm_90a", 160, 256, 1),  # 12 warps, of which one block takes 8
        ("sm_80", 32, 256, 8),
        ("sm_86", 32, 256, 6),
        ("sm_120a", 16, 32, 24),
        ("sm_100a", 16, 32, 32),
    ],
)
def test_blocks_of_a_multiprocessor(architecture, registers, threads, blocks):
    assert machine_code.blocks_of_multiprocessor(architecture, registers, threads) == blocks


def test_the_command_prints_lists_waits_and_fills_the_marked_section(tmp_path, monkeypatch, capsys):
    library = tmp_path / "library.so"
    library.write_bytes(b"\x7fELF Cuda compilation tools, release 13.0, V13.0.88\0")
    monkeypatch.setattr(machine_code, "kernels", lambda path: parsed() if path == library else [])
    monkeypatch.setattr(machine_code, "cuobjdump", lambda: Path("cuobjdump"))
    arguments = ["--library", str(library)]
    machine_code.main([*arguments, "--waits"])
    printed = capsys.readouterr().out
    row = "| toy_product | `toy_kernel<half, 32, true>` | 40 | 3072 | 256 | 6 | 38 | 2.3 | 4 |  | 3 of 4 | 3, 1 |"
    assert row in printed.splitlines()
    assert "  0010 LDG.E.64 R2, desc[UR4][R4.64] -> 0030 HADD2.F32 R9, -RZ, R3.H0_H0" in printed.splitlines()

    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- machine-code -->\nstale\n<!-- /machine-code -->\nafter\n")
    for _ in range(2):  # filling twice is filling once
        machine_code.main([*arguments, "--write", str(document)])
    text = document.read_text()
    assert text.startswith("before\n<!-- machine-code -->\n| file | kernel |")
    assert text.endswith("\n<!-- /machine-code -->\nafter\n")
    assert "stale" not in text
    assert text.count(row) == 1
    assert "\nsm_90a, float16, CUDA release 13.0.\n\n* *registers*" in text

    for wrong in (
        ["--architecture", "sm_80"],
        ["--dtype", "float32"],
        ["--kernel", "other"],
        ["--library", "absent.so"],
    ):
        with pytest.raises(SystemExit):
            machine_code.main([*arguments, *wrong])
        assert "no such kernel" in (printed := capsys.readouterr().err) or "there is no absent.so" in printed
