"""The command line: what it prints, what it writes, and its exit status."""

import json
import subprocess
import sys

import pytest
import torch

import effnet_kernels
from effnet_kernels import cli
from effnet_kernels.benchmarking import contenders
from effnet_kernels.dispatch import automatic
from effnet_kernels.ops import native_cpu

pytest.importorskip("timm")
from effnet_kernels import dispatch

MODEL = ("--model", "efficientnet_b0", "--size", "64")


@pytest.fixture
def wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """patch() that gives a model whose logits are off by far more than rounding."""
    patch = effnet_kernels.patch

    def wrong(model, *, backend="auto", frozen=False):
        patch(model, backend=backend).register_forward_hook(lambda module, inputs, output: output * 1.01)
        return model

    monkeypatch.setattr(effnet_kernels, "patch", wrong)


def test_info_names_every_backend_with_its_reason(capsys):
    assert cli.main(["info"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in printed
    for name, (_, reason) in effnet_kernels.backends().items():
        assert name in printed
        assert reason in printed


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "effnet_kernels", "info"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "backends" in done.stdout


def test_verify_agrees(capsys):
    assert cli.main(["verify", *MODEL, "--dtype", "float32", "bfloat16", "float16"]) == 0
    printed = capsys.readouterr().out
    table = effnet_kernels.backends()
    available = [name for name in automatic("cuda" if torch.cuda.is_available() else "cpu") if table[name][0]]
    assert printed.count(" ok") == 3 * len(available)
    assert "patched and stock agree" in printed


def test_verify_says_why_a_backend_does_not_serve_a_dtype(monkeypatch, capsys):
    if not effnet_kernels.backends()["cpu"][0]:
        pytest.skip("the native CPU library is not built")
    monkeypatch.setattr(native_cpu, "DTYPES", (torch.float32,))
    dispatch._resolve.cache_clear()
    try:
        assert cli.main(["verify", *MODEL, "--device", "cpu", "--dtype", "float16", "--backend", "cpu"]) == 0
    finally:
        dispatch._resolve.cache_clear()
    assert "not served: only float32, float16 and bfloat16" in capsys.readouterr().out


def test_verify_fails_on_a_wrong_result(wrong_result, capsys):
    assert cli.main(["verify", *MODEL, "--dtype", "float32", "--backend", "reference"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_bench_writes_json_and_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file, plot = tmp_path / "bench.json", tmp_path / "bench.png"
    threads = torch.get_num_threads()
    arguments = ["bench", *MODEL, "--seconds", "0.02", "--threads", "1", "--json", str(file), "--plot", str(plot)]
    assert cli.main(arguments) == 0
    assert torch.get_num_threads() == threads
    written = json.loads(file.read_text())
    assert written["environment"]["threads"] == 1
    assert {"device", "versions", "commit", "date"} <= written["environment"].keys()
    (case,) = written["cases"]
    assert contenders.STOCK in case["contenders"]
    for result in case["contenders"].values():
        assert result["q1"] <= result["median"] <= result["q3"]
        assert len(result["samples"]) >= 5
        assert result["first"] > 0
    assert plot.stat().st_size > 0
    assert written["environment"]["device"] in capsys.readouterr().out


def test_bench_does_not_time_a_wrong_result(wrong_result, tmp_path):
    file = tmp_path / "bench.json"
    assert cli.main(["bench", *MODEL, "--seconds", "0.02", "--json", str(file)]) == 1
    results = json.loads(file.read_text())["cases"][0]["contenders"]
    assert "median" in results[contenders.STOCK]
    for name, result in results.items():
        assert name in (contenders.STOCK, contenders.CHANNELS_LAST) or ("wrong" in result and "median" not in result)


@pytest.mark.skipif(torch.cuda.is_available(), reason="peers run on a CPU")
def test_bench_says_how_to_install_missing_peers(monkeypatch, capsys):
    for name in contenders.PEERS:
        monkeypatch.setitem(sys.modules, name, None)  # makes importing it fail
    monkeypatch.setattr(contenders.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["bench", *MODEL, "--seconds", "0.02", "--peers"]) == 0
    printed = capsys.readouterr().out
    for name in contenders.PEERS:
        assert f"{name}: {name} is needed for this: pip install 'effnet-kernels[peers]'" in printed


@pytest.mark.exhaustive
def test_demo_compares_three_models_and_plots(tmp_path, capsys):
    for package in ("torchvision", "sklearn", "matplotlib", "PIL"):
        pytest.importorskip(package)
    assert cli.main(["demo", "--size", "64", "--seconds", "0.02", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("logits differ by at most") == 3
    assert printed.count("top  ") == 3
    assert printed.count("patched is ") == 3
    assert (tmp_path / "demo.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["verify", "--model", "efficientnet_b99"], "timm has no model 'efficientnet_b99'; close: efficientnet_b"),
        (["bench", "--model", "no", "--library", "torchvision"], "torchvision has no model 'no'"),
        (["verify", *MODEL, "--backend", "abacus"], "got 'abacus'"),
        (["verify", "--model", "resnet18", "--size", "32"], "--model resnet18: model must have blocks"),
        (["demo", "--image", "/no/such/photograph.jpg"], "/no/such/photograph.jpg"),
    ],
)
def test_bad_requests_are_one_line_and_status_2(arguments, named, capsys):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["bench", *MODEL, "--batch", "0"], ["verify"], ["dance"], []])
def test_bad_arguments_leave_through_argparse(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    assert "usage:" in capsys.readouterr().err
