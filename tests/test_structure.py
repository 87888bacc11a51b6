"""The way down that docs/design.md draws: which file a call passes, and what each room may touch."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels.ops import activations
from tests.models import images, timm_model

PACKAGE = Path(ek.__file__).parent
ROOT = PACKAGE.parent


def passed(function):
    """The files of the package that a call passes, in the order in which it comes to them."""
    files = []

    def note(frame, event, arg):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            files.append(str(path.relative_to(PACKAGE)))

    sys.setprofile(note)
    try:
        with torch.inference_mode():
            function()
    finally:
        sys.setprofile(None)
    return [*dict.fromkeys(files)]


def test_the_way_down():
    if not ek.backends()["cpu"][0]:
        pytest.skip("the native CPU library is not built")
    pytest.importorskip("timm")
    model, x = ek.patch(timm_model("test_efficientnet")), images(1, 37)
    passed(lambda: model(images(1, 33)))  # imports
    down = [
        "patching/timm.py", "modules/fusing.py", "modules/guards.py", "modules/program.py", "modules/reading.py",
        "functional.py", "ops/native_cpu.py",
    ]  # fmt: skip
    files = passed(lambda: model(x))
    assert [name for name in files if name in down] == down
    assert passed(lambda: model(x)) == [
        "patching/timm.py", "modules/fusing.py", "modules/guards.py", "internals.py", "modules/program.py",
        "ops/common.py", "dispatch.py", "ops/native_cpu.py", "ops/recording.py",
    ]  # fmt: skip
    ek.patch(model, frozen=True)
    passed(lambda: model(x))
    assert "dispatch.py" not in passed(lambda: model(x))


def sources(*rooms):
    return {path: ast.parse(path.read_text()) for room in rooms for path in sorted(PACKAGE.glob(room))}


def test_ops_know_no_module():
    for path, tree in sources(
        "ops/**/*.py", "arguments.py", "functional.py", "training.py", "dispatch.py", "native.py"
    ).items():
        imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert not [name for name in imported if re.match(r"effnet_kernels\.(modules|patching)", name)], path


def test_only_modules_and_patching_look_into_dictionaries():
    for path, tree in sources(
        "ops/**/*.py", "arguments.py", "functional.py", "training.py", "dispatch.py", "native.py"
    ).items():
        names = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        names += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
        assert not {"__dict__", "vars"} & {*names}, path


def test_one_file_keeps_things_across_calls():
    """After models have run, no module of the package holds a tensor or a module, but for one empty table."""
    pytest.importorskip("timm")
    model = ek.patch(timm_model("test_efficientnet"))
    with torch.inference_mode():
        for _ in range(3):
            model(images(1, 37))

    def held(value, depth=0):
        if isinstance(value, torch.Tensor | nn.Module):
            yield value
        elif isinstance(value, dict | list | tuple | set | frozenset) and depth < 4:
            for item in (*value.items(),) if isinstance(value, dict) else value:
                yield from held(item, depth + 1)

    found = {
        (name, attribute)
        for name, module in [*sys.modules.items()]
        if name.startswith("effnet_kernels")
        for attribute, value in [*vars(module).items()]
        if not attribute.startswith("__") and any(t.numel() > 0 for t in held(value) if isinstance(t, torch.Tensor))
    }
    assert not found
    keeping = [path.name for path, tree in sources("**/*.py").items() if "_effnet_kernels_kept" in ast.dump(tree)]
    assert keeping == ["program.py"]


def test_activations_are_one_list():
    """The C++ sources have the codes and names of Python."""
    text = (ROOT / "csrc" / "types.h").read_text()
    enum, names = (
        re.search(pattern, text, re.DOTALL)[1]
        for pattern in (r"enum Act : int \{(.*?)\}", r"kActNames\[\] = \{(.*?)\}")
    )
    assert [name.lower() for name in re.findall(r"\bk(\w+)", enum)] == list(activations.CODES)
    assert re.findall(r'"(\w+)"', names) == list(activations.CODES)
    assert list(activations.CODES.values()) == list(range(len(activations.CODES)))


def test_kernels_see_constants_alone():
    """What they are given of weights, norms and SE points to what is constant."""
    text = (ROOT / "csrc" / "cpu" / "common.h").read_text()
    for struct in ("Weight", "Affine", "Matrix"):
        body = re.search(rf"^struct {struct} \{{(.*?)^\}};", text, re.MULTILINE | re.DOTALL)[1]
        pointers = [line.strip() for line in body.splitlines() if "*" in line.split("//")[0]]
        assert pointers
        assert all(line.startswith("const ") for line in pointers), struct
    for path in (ROOT / "csrc" / "cpu").glob("*.h"):
        if "train" not in path.name:
            assert "const_cast" not in path.read_text(), path
