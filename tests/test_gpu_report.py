"""What becomes of a record of ``python -m benchmarks.gpu``, and of what its tools have printed."""

import json

import pytest

from benchmarks import gpu, gpu_parts, gpu_profile, report
from effnet_kernels.benchmarking.contenders import COMPILED, STOCK, ours
from tests.gpu_records import fabricated, record

__all__ = ["record"]


PYTEST = """
tests/gpu/test_gpu.py::test_opcheck[mbconv-cuda] PASSED    [ 25%]
tests/gpu/test_gpu.py::test_autocast[cuda] FAILED          [ 50%]
tests/cuda/test_mbconv.py::test_windows[3] SKIPPED (why)   [ 75%]
"""
XDIST = """
[gw1] [ 25%] PASSED tests/gpu/test_gpu.py::test_opcheck[mbconv-cuda]
[gw0] [ 50%] FAILED tests/gpu/test_gpu.py::test_autocast[cuda]
[gw1] [ 75%] SKIPPED tests/cuda/test_mbconv.py::test_windows[3]
"""
SUMMARY = """
==== short test summary info ====
SKIPPED [1] tests/cuda/test_mbconv.py:3: why
FAILED tests/gpu/test_gpu.py::test_autocast[cuda] - AssertionError: no
==== 1 failed, 1 passed, 1 skipped in 2.00s ====
"""


@pytest.mark.parametrize("lines", [PYTEST, XDIST], ids=["pytest", "xdist"])
@pytest.mark.parametrize(("end", "reason"), [("", ""), (SUMMARY, " - AssertionError: no")], ids=["cut off", "whole"])
def test_what_pytest_says_is_counted(lines, end, reason):
    found = gpu_parts.outcome(lines + end)
    assert {kind: found[kind] for kind in ("passed", "failed", "error", "skipped")} == {
        "passed": 1, "failed": 1, "error": 0, "skipped": 1,
    }  # fmt: skip
    assert found["failures"] == ["tests/gpu/test_gpu.py::test_autocast[cuda]" + reason]


def test_the_page_fits_where_only_the_end_of_the_output_is_kept():
    assert len(gpu.summary(fabricated())) < 12_000


def test_tables_plots_and_predictions_from_a_record(tmp_path):
    """Losses and failures are in the table; a ratio is one of times from the same turns."""
    pytest.importorskip("matplotlib")
    content = fabricated()
    models = content["levels"]["model"]
    first, second, third, *_ = models
    for title in (first, second, third):
        models[title] = json.loads(json.dumps(models[title]))
    models[first]["contenders"][COMPILED] |= {"q1": 0.9e-3, "median": 0.9e-3, "beside": {ours("triton"): 1.8e-3}}
    models[second]["contenders"][COMPILED] |= {"q1": 0.5e-3, "median": 0.5e-3}
    models[third]["contenders"] |= {COMPILED: {"failed": "no memory", "part": "compiled"}, STOCK: {"alone": 2e-3}}
    models[third]["failed"] = "no memory"
    (tmp_path / "a-gpu.json").write_text(json.dumps(content))
    document = tmp_path / "performance.md"
    document.write_text(
        "<!-- benchmark:model -->\n<!-- /benchmark -->\n<!-- benchmark:predicted -->\n<!-- /benchmark -->\n"
        "| efficientnet_b0 @224 | 65 | 12.6 us | 13.8 us | 9.1 us | DRAM 41% |\n"
        "| efficientnet_b4 @380 | 128 | 98.1 us | 107.0 us | 68.0 us | DRAM 39% |\n"
    )
    for _ in range(2):
        report.main(["--results", str(tmp_path), "--plots", str(tmp_path), str(document)])
    text = document.read_text()
    assert text.count("| efficientnet_b0 @224 | 12.6 us | 7.8 us | 0.62x | a GPU, c0ffee |") == 1
    one = "1.00 ms |"
    assert f"| {first} | {one} {one} {one} 500.0 us |  | 1.00x | **0.50x** | 1000 | 50% |" in text
    assert "Who joined later is set against ours by its time in the same turns." in text
    assert f"| {second} | {one} {one} {one} 500.0 us |  | 1.00x | **0.50x** | 1000 | 50% |" in text
    assert f"| {third} (failed) | {one} {one} {one} failed | ~2.00 ms | 1.00x | 1.00x | 1000 | 50% |" in text
    assert "Shares are of what a copy reached in the same run, 3000 GB/s." in text
    assert {file.name for file in tmp_path.glob("*.png")} == {
        f"benchmark-a-gpu-{level}.png" for level in ("model", "op", "block", "training_model")
    }


def test_a_page_of_counters_becomes_lines_by_case():
    """Nsight Compute's CSV: names, units, one row per launch; markers stand between the cases."""
    stalls = [f"smsp__average_warps_issue_stalled_{why}_per_issue_active.ratio" for why in ("wait", "barrier")]
    header = ["ID", "Kernel Name", "gpu__time_duration.sum", "launch__registers_per_thread", *stalls]
    rows = [
        header,
        ["", "", "us", "register/thread", "inst", "inst"],
        ["0", "spin_kernel(long)", "1", "8", "0", "0"],
        [
            "1",
            "void effnet::cuda::(anonymous namespace)::pointwise_kernel<__half, 64>(Args)",
            "12.5",
            "92",
            "0.5",
            "1,000.25",
        ],
        ["2", "kernel", "3", "40", "2", ""],
        ["3", "spin_kernel(long)", "1", "8", "0", "0"],
        ["4", "kernel", "4", "40", "", ""],
    ]
    page = "==PROF== read\n" + "\n".join(",".join(f'"{cell}"' for cell in row) for row in rows)
    assert gpu_profile.summary(page, ["a", "b"]) == {
        "a": [
            "pointwise_kernel<__half, 64>: time 12.5 us, registers 92, stalled barrier 1000.2, stalled wait 0.5",
            "kernel: time 3 us, registers 40, stalled wait 2.0",
        ],
        "b": ["kernel: time 4 us, registers 40"],
    }
