"""Kernels compiled in one process and found by another one, whose cache is empty and whose Triton has other keys."""

import json
import os
import subprocess
import sys
import zipfile

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("timm")

import triton

from benchmarks import gpu_kernels, gpu_scope
from effnet_kernels import MBConv, cli, precompile
from effnet_kernels.ops import fused_mbconv_triton as fused_mbconv
from effnet_kernels.ops import triton_common
from tests.test_ahead_of_time import uninterpreted

LAUNCHES = """
import json, sys, torch
from pathlib import Path
from effnet_kernels import precompile
from triton import knobs
from triton.runtime import cache
launches = precompile.record_model("efficientnet_b0", 64, 2, torch.float16, 90)[:5]
variants = precompile.distinct(launches)
compiled = []
knobs.compilation.listener = lambda cache_hit, **_: compiled.append(not cache_hit)
"""
PACK = LAUNCHES + 'print(precompile.pack(Path("kernels.zip"), launches, 90), len(variants), sum(compiled))'
# Another build of Triton: one for another Python, say.
UNPACK = (
    LAUNCHES
    + """
cache.triton_key = lambda: "another build"
print(precompile.unpack(Path("kernels.zip")), precompile.unpack(Path("kernels.zip")))
with precompile.compiling_for(90):
    found = [precompile.compiled(launch) for launch in variants]
print(sum(compiled), all(kernel.metadata.hash == kernel.hash for kernel in found))
print(json.dumps([[kernel.name, kernel.metadata.shared, len(kernel.asm["cubin"])] for kernel in found]))
"""
)


def run(code: str, folder, cache: str) -> str:
    environment = uninterpreted() | {"TRITON_CACHE_DIR": str(folder / cache), "PYTHONPATH": os.getcwd()}
    result = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(autouse=True)
def compiling(monkeypatch):
    """The tests that compile nothing themselves run in a process with the interpreter."""
    monkeypatch.setattr(triton_common, "INTERPRETED", False)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with kernels.zip."""
    folder = tmp_path_factory.mktemp("packed")
    count, variants, compiled = map(int, run(PACK, folder, "first").split())
    assert count == variants == compiled > 3
    return folder


@pytest.mark.exhaustive
def test_nothing_is_compiled_where_kernels_were_unpacked(packed):
    counted, found, kernels = run(UNPACK, packed, "second").splitlines()
    assert len(set(counted.split())) == 1
    assert found == "0 True"
    with zipfile.ZipFile(packed / "kernels.zip") as archive:
        manifest = json.loads(archive.read("manifest.json"))
        sizes = [
            [kernel["name"], kernel["metadata"]["shared"], archive.getinfo(kernel["cubin"]).file_size]
            for kernel in manifest["kernels"]
        ]
    assert json.loads(kernels) == sizes
    assert len(sizes) == int(counted.split()[0])


MOVED = """
import os, pathlib
from effnet_kernels import precompile
print(precompile.unpack(pathlib.Path("kernels.zip")))
os.rename(os.environ["TRITON_CACHE_DIR"], "moved")
for damaged in [*pathlib.Path("moved").glob("*/*.cubin")][:2] + [*pathlib.Path("moved").glob("*/__grp__*")][:2]:
    damaged.write_bytes(b"")
os.environ["TRITON_CACHE_DIR"] = os.path.abspath("moved")
print(precompile.unpack(pathlib.Path("kernels.zip")))
pathlib.Path("file").touch()
os.environ["TRITON_CACHE_DIR"] = os.path.abspath("file")
try:
    precompile.unpack(pathlib.Path("kernels.zip"))
except ValueError as error:
    print(error)
"""


@pytest.mark.exhaustive
def test_a_cache_that_was_moved_or_cannot_be_written(packed):
    """Of a moved one the files are there, under paths that are no more."""
    count, again, refused = run(MOVED, packed, "third").splitlines()
    assert "cache cannot be written" in refused
    groups = list((packed / "moved").glob("*/__grp__*"))
    assert len(groups) == int(count) == int(again)
    for group in groups:
        for path in json.loads(group.read_text())["child_paths"].values():
            assert os.path.getsize(path)


@pytest.mark.exhaustive
def test_kernels_are_small(packed):
    """Those of B0, B4, V2-S and lite0 are 137, and may take 8 MiB together."""
    with zipfile.ZipFile(packed / "kernels.zip") as archive:
        assert (packed / "kernels.zip").stat().st_size < (len(archive.namelist()) - 1) * (8 << 20) / 137


def rewritten(packed, target, **changes) -> None:
    """kernels.zip with another manifest."""
    with zipfile.ZipFile(packed / "kernels.zip") as source, zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            content = source.read(name)
            if name == "manifest.json":
                content = json.dumps(json.loads(content) | changes)
            archive.writestr(name, content)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"triton": "3.4.9"}, rf"packed with Triton 3\.4\.9, here is {triton.__version__}: pack it anew"),
        ({"backend": "ptxas 1.2-90"}, r"packed with ptxas and architecture ptxas 1\.2-90, here is"),
        ({"architecture": 80}, "packed with ptxas and architecture"),
        ({"format": 99}, "not a file of packed kernels: its format is 99"),
        ({"kernels": [{}]}, "not a file of packed kernels"),
        ({"kernels": 5}, "not a file of packed kernels"),
        ({"architecture": "ninety"}, "not a file of packed kernels"),
    ],
)
@pytest.mark.exhaustive
def test_what_another_version_packed_is_refused(packed, tmp_path, monkeypatch, changes, said):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    rewritten(packed, tmp_path / "other.zip", **changes)
    with pytest.raises(ValueError, match=said):
        precompile.unpack(tmp_path / "other.zip")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("code", "0" * 64, r"packed with another effnet_kernels\.ops\.\w+_triton\.\w+ than is here: pack it anew"),
        ("module", "effnet_kernels.ops.mbconv_triton", r"packed with another effnet_kernels\.ops\.mbconv"),
        ("name", "../../kernel", "not a file of packed kernels"),
        ("cubin", "../cubin", "not a file of packed kernels"),
        ("module", "os", "not a file of packed kernels"),
        ("module", "effnet_kernels.ops.of_another_version", "packed with another effnet_kernels"),
        ("metadata", [], "not a file of packed kernels"),
        ("name", 5, "not a file of packed kernels"),
    ],
)
@pytest.mark.exhaustive
def test_kernels_of_other_code_are_refused(packed, tmp_path, monkeypatch, entry, value, said):
    """They would never be found, and nobody would know."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    with zipfile.ZipFile(packed / "kernels.zip") as archive:
        kernels = json.loads(archive.read("manifest.json"))["kernels"]
    for kernel in kernels:
        kernel[entry] = value
    rewritten(packed, tmp_path / "other.zip", kernels=kernels)
    with pytest.raises(ValueError, match=said):
        precompile.unpack(tmp_path / "other.zip")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", [None, b"", b"not a zip", "zip without manifest", "{", "[]"], ids=str)
def test_what_is_no_file_of_kernels_is_refused(tmp_path, capsys, content):
    file = tmp_path / "kernels.zip"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("other.json" if content.startswith("zip") else "manifest.json", content)
    assert cli.main(["unpack", str(file)]) == 2
    said = capsys.readouterr().err
    assert f"{file} is not a file of packed kernels" in said
    assert len(said.splitlines()) == 1


@pytest.mark.exhaustive
def test_a_file_that_is_damaged_is_refused(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    whole = (packed / "kernels.zip").read_bytes()
    flipped = bytes(byte ^ 255 for byte in whole[400:440])
    for damaged in (whole[: len(whole) // 2], whole[:-1], whole[:400] + flipped + whole[440:]):
        (tmp_path / "short.zip").write_bytes(damaged)
        with pytest.raises(ValueError, match="not a file of packed kernels"):
            precompile.unpack(tmp_path / "short.zip")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("capability", ["9", "6.0", "8.4", "sm_90"])
def test_what_is_no_compute_capability(capability, capsys):
    with pytest.raises(SystemExit):
        cli.main(["pack", "--model", "efficientnet_b0", "--out", "x", "--capability", capability])
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "resnet18"], "model must have blocks"),
        (["--model", "efficientnet_b99"], "timm has no model"),
        (["--model", "efficientnet_b0", "--out", "/"], "is a folder"),
        (["--model", "efficientnet_b0", "--dtype", "bfloat16", "--capability", "7.5"], "needs compute capability 8.0"),
    ],
)
def test_what_cannot_be_packed_is_said_in_one_line(arguments, said, tmp_path, capsys):
    assert cli.main(["pack", "--out", str(tmp_path / "kernels.zip"), *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not list(tmp_path.iterdir())


@pytest.mark.exhaustive
def test_the_command(tmp_path, packed):
    file = tmp_path / "kernels.zip"
    command = [sys.executable, "-m", "effnet_kernels", "pack", "--model", "efficientnet_b0", "--out", str(file)]
    refused = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "unset TRITON_INTERPRET" in refused.stderr
    command[3:] = ["unpack", str(packed / "kernels.zip")]
    done = subprocess.run(
        command, env=uninterpreted() | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.splitlines()
    assert said == f"{len(list(tmp_path.iterdir()))} kernels unpacked"


KEYS = """
import importlib, json, sys
from effnet_kernels import precompile
names = [f"{op}_triton" for op in precompile.OPS if op != "mbconv"]
names += [f"train_{part}_triton" for part in ("maps", "depthwise", "parts")]
keys = {}
for name in names[:: int(sys.argv[1])]:
    module = importlib.import_module(f"effnet_kernels.ops.{name}")
    for kernel in [*vars(module).values()][:: int(sys.argv[1])]:
        if hasattr(kernel, "cache_key"):
            keys[f"{kernel.fn.__module__}.{kernel.fn.__name__}"] = kernel.cache_key
print(json.dumps(dict(sorted(keys.items()))))
"""


@pytest.mark.exhaustive
def test_no_key_depends_on_what_was_launched_before():
    """Or kernels would be compiled again, wherever another one comes first."""
    found = [
        subprocess.run([sys.executable, "-c", KEYS, step], env=uninterpreted(), capture_output=True, text=True)
        for step in ("1", "-1")
    ]
    assert found[0].stdout == found[1].stdout, [result.stderr for result in found]
    assert len(json.loads(found[0].stdout)) > 25


@pytest.mark.parametrize(
    ("library", "model", "widened"),
    [
        ("timm", "efficientnet_b0", True),
        ("torchvision", "efficientnet_b0", True),
        ("timm", "efficientnet_lite0", False),
    ],
)
def test_a_training_step_is_recorded(library, model, widened):
    """Forward and backward, in the dtypes that autocast gives: maps and weights in 16 bits, all else in float32."""
    pytest.importorskip(library)
    launches = precompile.record_model(model, 64, 2, torch.float16, 90, library=library, training=True)
    names = {launch.kernel.fn.__name__ for launch in launches}
    assert {"forward_kernel", "input_gradient_kernel", "weight_gradient_kernel", "statistics_kernel"} <= names
    assert ("gate_moments_kernel" in names) == widened
    for launch in launches:
        dtypes = {t.dtype for t in launch.tensors if t is not None}
        assert dtypes <= {torch.float16, torch.float32}
    assert any(torch.float16 in {t.dtype for t in launch.tensors if t is not None} for launch in launches)
    sizes = precompile.record_model(model, 97, 3, torch.float16, 90, library=library, training=True)
    variants = {launch.variant() for launch in launches}
    assert {launch.variant() for launch in sizes} == variants, "any size and batch has the same kernels"


def test_kernels_differ_by_the_alignment_of_what_they_get():
    """As Triton's own do: a view that begins anywhere is another variant."""
    launch = precompile.record_model("efficientnet_b0", 64, 2, torch.float16, 90)[0]
    view = torch.empty(launch.tensors[0].numel() + 1, dtype=torch.float16, device="meta")[1:]
    other = launch._replace(tensors=(view, *launch.tensors[1:]))
    assert len(precompile.distinct([launch, other, launch])) == 2


def test_a_module_of_ours():
    with torch.device("meta"):
        block = MBConv(16, 16, 3, exp_ratio=4.0).half().eval()
        x = torch.empty(1, 16, 8, 8, dtype=torch.float16)
    launches = precompile.record_module(block, x, 90)
    ops = ["pointwise_conv_bn_act", "depthwise_conv_bn_act", "pointwise_conv_bn_act"]
    assert [launch.op for launch in launches] == ops


def test_a_tile_that_does_not_compile_is_left_out_if_it_is_optional(tmp_path, monkeypatch):
    def compiled(launch):
        raise ValueError("too small for an instruction")

    monkeypatch.setattr(precompile, "compiled", compiled)
    launch = precompile.record_model("efficientnet_b0", 64, 2, torch.float16, 90)[0]
    assert precompile.pack(tmp_path / "kernels.zip", [], 90, optional=[launch]) == 0
    with pytest.raises(ValueError, match="too small"):
        precompile.pack(tmp_path / "kernels.zip", [launch], 90, optional=[launch])


def test_an_optional_tile_fails_behind_others_of_the_same_kernel_and_grid(tmp_path, monkeypatch):
    """Launches hold tensors, which cannot be compared."""
    needed, other = (precompile.record_model("efficientnet_b0", 64, 2, torch.float16, 90)[0] for _ in range(2))
    other = other.with_tile(other.config._replace(num_warps=16))

    def compiled(launch):
        if launch is other:
            raise ValueError("too small for an instruction")

    monkeypatch.setattr(precompile, "compiled", compiled)
    with pytest.raises(AttributeError, match="src"):  # of None, the needed one's: all is compiled by then
        precompile.pack(tmp_path / "kernels.zip", [needed], 90, optional=[other])


def record(model: str, size: int) -> list[precompile.Launch]:
    return precompile.record_model(model, size, 2, torch.float16, 90)


def test_the_tiles_that_are_tried_first(monkeypatch):
    """Those next to the chosen ones of the largest launches: as their launches would be with other tiles."""
    scope = gpu_scope.GPU._replace(models=())
    found = list(gpu_kernels.neighbours(scope, 90))
    assert len({launch.variant() for launch in found}) == len(found) > 3 * gpu_kernels.CLASSES
    chosen = {launch.variant() for launch in record("efficientnet_b0", 64)}
    assert not chosen & {launch.variant() for launch in found}
    depthwise = next(launch for launch in found if launch.op == "depthwise_conv_bn_act")
    assert tuple(map(depthwise.constant, ("ROWS", "COLUMNS", "BLOCK_C"))) == depthwise.config.block
    assert {launch.op for launch in found} <= {"depthwise_conv_bn_act", "pointwise_conv_bn_act", "fused_mbconv"}
    # A tile of 256 expanded channels has x copied another way, which no constant but the tile may say.
    model = "tf_efficientnetv2_s"
    dense = [launch for launch in record(model, 64) if launch.op == "fused_mbconv" and launch.constant("C_MID") == 96]
    wider = dense[0].with_tile(triton_common.Config((128, 256, 64, 32), 16, 3))
    monkeypatch.setattr(fused_mbconv, "default_config", lambda *_: wider.config)
    assert wider.variant() in {launch.variant() for launch in record(model, 64)}
