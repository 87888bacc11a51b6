"""The benchmarks' machinery: problems, refusal of wrong results, timing, report."""

import json

import pytest
import torch
from torch import nn

from benchmarks.files import in_same_turns
from effnet_kernels.benchmarking import contenders, tables, timing
from effnet_kernels.benchmarking.agreement import agreement
from effnet_kernels.benchmarking.models import create_model, noise

pytest.importorskip("timm")
shapes = pytest.importorskip("benchmarks.shapes")


class Scale(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.mark.parametrize(("model", "count"), [("efficientnet_b0", 16), ("tf_efficientnetv2_s", 40)])
def test_blocks_are_those_of_the_network(model, count):
    assert sum(shapes.blocks(model).values()) == count


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["avx2", "fma"], "float32"),
        (["avx2", "avx512_bf16"], "float32,bfloat16"),
        (["asimd", "bf16"], "float32,bfloat16"),
    ],
)
def test_default_dtypes_on_a_cpu(flags, expected, monkeypatch):
    conftest = pytest.importorskip("benchmarks.conftest")
    monkeypatch.setattr(conftest, "DEVICE", "cpu")
    monkeypatch.setattr(conftest, "cpu_flags", lambda: flags)
    assert conftest.default_dtypes() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_contender_under_autocast(dtype):
    """It agrees with stock layers in 16 bits, and says that there is nothing to do in 32."""
    if not contenders.effnet_kernels.backends()["cpu"][0]:
        pytest.skip("no CPU backend")
    name = contenders.ours("cpu autocast")
    assert name in contenders.contender_names("cpu", models=True, autocast=True)
    model, x = create_model("efficientnet_lite0").to(dtype), noise(1, 64, dtype=dtype)
    result = contenders.compare(model, x, [name], seconds=0.01)[name]
    if dtype == torch.float32:
        assert result == {"failed": "autocast is to 16 bits"}
    else:
        assert result["median"] > 0


def test_ops_of_v2_begin_with_dense_convolutions_alone():
    dense = [op for op in shapes.ops("tf_efficientnetv2_s", 384) if op.kind == "fused"]
    assert dense[:2] == [shapes.OpShape("fused", (24, 24), 192, 3), shapes.OpShape("fused", (24, 48), 192, 3, 2, 96)]
    assert dense[0].bytes(1, 2) == 2 * (2 * 24 * 192**2 + 24 * 24 * 9)


def test_ops_of_b0_are_those_of_the_paper():
    found = shapes.ops("efficientnet_b0")
    count = {kind: sum(n for op, n in found.items() if op.kind == kind) for kind in {op.kind for op in found}}
    assert count == {"pointwise": 15 + 16, "depthwise": 16, "squeeze_excite": 16}
    assert shapes.OpShape("depthwise", (96, 96), 112, 3, 2) in found  # MBConv6 k3x3 at the head of stage 3
    assert shapes.OpShape("depthwise", (1152, 1152), 7, 5, 1) in found


def test_bytes_count_each_map_once():
    op = shapes.OpShape("depthwise", (32, 32), 8, 3, 2)
    assert op.bytes(2, 4) == 4 * (2 * 32 * 64 + 2 * 32 * 16 + 32 * 9)


def test_bytes_of_a_network_are_those_of_its_kernels():
    """lite0 has no squeeze-and-excitation: stem, ops and head are all there is."""
    ops = shapes.ops("efficientnet_lite0", 64)
    maps = sum(n * (op.bytes(1, 2) - op._replace(size=0).bytes(1, 2)) for op, n in ops.items())
    stem, head = 2 * (3 * 64**2 + 32 * 32**2), 2 * (320 + 1280) * 2**2
    assert shapes.network_bytes("efficientnet_lite0", 64, 3, 2) == 3 * (stem + maps + head)


@pytest.mark.parametrize("model", ["efficientnet_b0", "tf_efficientnetv2_s"])
def test_every_kind_of_op_agrees_with_stock(model):
    from benchmarks.stock import OurOp, stock_op

    for op in shapes.largest(shapes.ops(model, 64), 1):
        stock, x = stock_op(op), torch.randn(1, op.channels[0], op.size, op.size)
        results = contenders.compare(
            stock,
            x,
            [contenders.STOCK, contenders.ours("auto")],
            fused=lambda s, b, op=op: OurOp(op, s, b),
            seconds=0.01,
        )
        assert all("median" in result for result in results.values()), (op, results)


def test_a_wrong_result_is_refused_and_the_others_are_timed():
    x = torch.randn(1, 8, 4, 4)
    names = [contenders.STOCK, contenders.ours("reference")]
    results = contenders.compare(Scale(2.0), x, names, fused=lambda stock, backend: Scale(2.001), seconds=0.01)
    assert "median" in results[contenders.STOCK]
    assert "median" not in results[contenders.ours("reference")]
    assert "allowed" in results[contenders.ours("reference")]["wrong"]


def test_a_contender_that_cannot_run_is_reported():
    def broken(stock, backend):
        raise RuntimeError("no such kernel")

    results = contenders.compare(Scale(2.0), torch.randn(1, 8, 4, 4), [contenders.ours("cpu")], fused=broken)
    assert results == {contenders.ours("cpu"): {"failed": "RuntimeError: no such kernel"}}


@pytest.mark.parametrize("peer", contenders.PEERS)
def test_peers_compute_the_same_network(peer):
    pytest.importorskip(peer)
    pytest.importorskip("onnx")
    torch.manual_seed(0)
    stock = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.SiLU()).eval()
    results = contenders.compare(stock, torch.randn(2, 3, 16, 16), [peer], seconds=0.01)
    assert "median" in results[peer], results


def test_agreement_is_twice_stocks_error_and_never_nan():
    exact = torch.ones(4, dtype=torch.float64)
    stock = torch.full((4,), 1.0 + 1e-3)
    assert agreement(torch.full((4,), 1.0 + 1.9e-3), stock, exact).ok
    assert not agreement(torch.full((4,), 1.0 + 2.1e-3), stock, exact).ok
    assert not agreement(torch.full((4,), float("nan")), stock, exact).ok
    assert not agreement(torch.ones(3), stock, exact).ok


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_agreement_with_stock_that_is_not_finite_is_a_few_units(value):
    exact, stock = torch.ones(4, dtype=torch.float64), torch.tensor([1.0, value, 1.0, 1.0])
    eps = torch.finfo(torch.float32).eps
    assert agreement(torch.full((4,), 1.0 + 4 * eps), stock, exact).ok
    assert not agreement(torch.full((4,), 1.0 + 5 * eps), stock, exact).ok
    assert not agreement(stock, stock, exact).ok


def test_turns_are_shared_out_evenly():
    calls = {"a": 0, "b": 0}

    def count(name):
        calls[name] += 1

    samples = timing.interleaved({name: lambda name=name: count(name) for name in calls}, seconds=0.2)
    assert len(samples["a"]) == len(samples["b"]) >= timing.MIN_ROUNDS
    assert all(calls.values())


def test_report_fills_the_marked_block_with_losses_and_machine(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import report

    def timed(median):
        return {"median": median, "q1": median, "q3": median, "error": 0.0, "samples": 5}

    environment = {
        "device": "Abacus 3000", "device_type": "cpu", "threads": 2, "versions": {"torch": "9.9"},
        "commit": "c0ffee", "date": "today",
    }  # fmt: skip
    results = {
        contenders.STOCK: timed(4e-3),
        contenders.CHANNELS_LAST: timed(2e-3),
        "onnxruntime": {"wrong": "error 1, allowed 0"},
        contenders.ours("cpu"): timed(5e-3),
    }
    content = {"level": "model", "environment": environment, "cases": {"B0": {"contenders": results}}}
    (tmp_path / "abacus-model.json").write_text(json.dumps(content))
    document = tmp_path / "README.md"
    document.write_text(
        "before\n<!-- benchmark:model -->\nstale\n<!-- /benchmark -->\n<!-- benchmark:op -->\n<!-- /benchmark -->\n"
    )
    for _ in range(2):  # filling twice is filling once
        report.main(["--results", str(tmp_path), "--plots", str(tmp_path), str(document)])
    text = document.read_text()
    assert text.startswith("before\n")
    assert "stale" not in text
    assert text.count("| B0 | 4.00 ms | 2.00 ms | wrong | 5.00 ms | **0.40x** | **0.40x** |") == 1
    assert "Abacus 3000, 2 threads; torch 9.9; commit c0ffee; today" in text
    assert text.endswith("<!-- benchmark:op -->\n<!-- /benchmark -->\n")
    assert (tmp_path / "benchmark-abacus-model.png").stat().st_size > 0


def test_times_of_other_turns_are_compared_by_who_was_in_both():
    """The machine was half as fast when ours and torch.compile joined; nobody is blamed for it."""
    ours, compiled, stock = contenders.ours("cuda"), contenders.COMPILED, contenders.CHANNELS_LAST
    results = {
        stock: {"median": 1.0},
        contenders.ours("triton"): {"median": 0.8},
        ours: {"median": 1.0, "beside": {contenders.ours("triton"): 1.6}},
        compiled: {"median": 3.0, "beside": {ours: 2.0}},
        "failed": {"failed": "no", "beside": {ours: 1.0}},
    }
    found = in_same_turns(results)
    times = {name: result["median"] for name, result in found.items() if "median" in result}
    assert times == {stock: 1.0, contenders.ours("triton"): 0.8, ours: 0.5, compiled: 0.75}
    assert tables.speedup(found, ours, stock) == 2.0
    assert tables.speedup(found, ours, compiled) == 1.5
    assert tables.speedup(found, ours, "failed") is None
    results[compiled]["beside"] = {}  # who set the pace has failed: there is nothing to compare it by
    assert "median" not in in_same_turns(results)[compiled]


def test_the_order_of_gpu_backends_follows_the_measurements(tmp_path):
    from benchmarks import dispatch

    def contender(**medians):
        return {"contenders": {contenders.ours(name): {"median": median} for name, median in medians.items()}}

    environment = {"device_type": "cuda", "device": "a GPU", "versions": {}, "commit": "abc", "date": "today"}
    cases = {
        "efficientnet_b0 depthwise 96-96 @112 k3 s2, batch 8": contender(cuda=1.0, triton=4.0),
        "efficientnet_b0 depthwise 40-40 @28 k5 s1, batch 8": contender(cuda=3.0, triton=1.0),
        "efficientnet_b0 pointwise 40-240 @28 k1 s1, batch 8": contender(cuda=1.0, triton=2.0),
        "efficientnet_b0 squeeze_excite 40-10 @28 k1 s1, batch 8": contender(cuda=2.0, triton=1.0),
        "efficientnet_b0 fused 24-96-24 @28 k3 s1, batch 8": contender(triton=1.0),
        "efficientnet_b0 blocks.1.0 mbconv 16-24 @112 k3 s2, batch 8": contender(triton=1.0, mixed=2.0, cuda=3.0),
        "efficientnet_b0 blocks.2.0 mbconv 24-40 @56 k5 s2, batch 8": contender(triton=1.0, cuda=0.1),
    }
    results, table = tmp_path / "op.json", tmp_path / "dispatch.json"
    results.write_text(json.dumps({"environment": environment, "levels": {"op": cases}}))
    table.write_text(dispatch.TABLE.read_text())
    before = json.loads(table.read_text())
    dispatch.main([str(results), "--table", str(table)])
    after = json.loads(table.read_text())
    assert "a GPU" in after["measured"]
    assert after["order"] == before["order"] | {
        "depthwise_conv_bn_act": ["cuda", "triton"],  # 3 against 4
        "mbconv": ["triton", "mixed", "cuda"],  # by the one case that all three ran
        "pointwise_conv_bn_act": ["cuda", "triton"],
        "squeeze_excite": ["triton", "cuda"],
        "squeeze_excite_gate": ["triton", "cuda"],
    }
    environment["device_type"] = "cpu"
    results.write_text(json.dumps({"environment": environment, "levels": {"op": cases}}))
    with pytest.raises(SystemExit):
        dispatch.main([str(results), "--table", str(table)])
    assert json.loads(table.read_text()) == after


def test_the_shipped_order_names_every_op_and_is_as_the_script_writes_it():
    from benchmarks import dispatch

    table = json.loads(dispatch.TABLE.read_text())
    assert set(table["order"]) == {op for ops in dispatch.OPS.values() for op in ops}
    for op, order in table["order"].items():
        assert sorted(order) == sorted(dispatch.OF_BLOCKS.get(op, dispatch.BACKENDS))


def test_report_draws_a_sweep(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import report

    environment = {"device": "Abacus", "device_type": "cpu", "threads": 2, "versions": {}, "commit": "", "date": ""}
    cases = {}
    for size, batch in ((96, 1), (96, 2), (96, 4), (128, 1), (131, 1)):
        seconds = batch * size**2 * 1e-7
        timed = {"median": seconds, "q1": seconds, "q3": seconds}
        cases[f"B0 @{size}, batch {batch}"] = {
            "model": "B0", "dtype": "float32", "size": size, "batch": batch,
            "contenders": {contenders.CHANNELS_LAST: timed, "openvino": {"failed": "is not installed"},
                           contenders.ours("cpu"): timed},
        }  # fmt: skip
    content = {"level": "sweep", "environment": environment, "cases": cases}
    (tmp_path / "abacus-sweep.json").write_text(json.dumps(content))
    document = tmp_path / "README.md"
    document.write_text("<!-- benchmark:sweep -->\n<!-- /benchmark -->\n")
    report.main(["--results", str(tmp_path), "--plots", str(tmp_path), str(document)])
    picture = "![abacus-sweep](benchmark-abacus-sweep.png)"
    assert document.read_text() == f"<!-- benchmark:sweep -->\n{picture}\n<!-- /benchmark -->\n"
    assert (tmp_path / "benchmark-abacus-sweep.png").stat().st_size > 0
