"""Names of torch that torch does not document: in one file, and none of them taken for granted."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import effnet_kernels
from effnet_kernels import internals
from tests.thinning import daily

PACKAGE = Path(effnet_kernels.__file__).parent
# Public names that begin with an underscore: of named tuples, and of os.
PUBLIC = {"_replace", "_asdict", "_fields", "_make", "_exit"}
# Of others than torch: Python, timm, Triton (looked up with a default); and strings of ours.
OTHERS = {
    "modules/program.py": {"_effnet_kernels_backend", "_effnet_kernels_frozen", "_effnet_kernels_kept"},
    "native.py": {"_native_cpu", "_native_cuda"},
    "patching/timm.py": {"_efficientnet_blocks", "_stage_out_idx"},
    "precompile.py": {"_active"},
}
# Undocumented although they begin with no underscore.
UNMARKED = {"next_id", "peek_interpreter_stack"}


def defined(source: str) -> set[str]:
    """Names that a file gives to something."""
    nodes = [*ast.walk(ast.parse(source))]
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def undocumented(source: str, own: set[str]) -> set[str]:
    """Names in a file's code that begin with an underscore and are not our own, or are in ``UNMARKED``."""
    found, tree = set(), ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            names = [] if of_self else [node.attr]
        elif isinstance(node, ast.ImportFrom):
            of_ours = (node.module or "").startswith("effnet_kernels")
            names = [] if of_ours else [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [part for part in node.value.split(".") if node.value.isascii() and " " not in node.value]
        else:
            continue
        for name in names:
            private = name.startswith("_") and name.isidentifier() and not name.startswith("__") and name != "_"
            if (private and name not in own and name not in PUBLIC) or name in UNMARKED:
                found.add(name)
    return found


def test_no_other_file_names_what_torch_does_not_document():
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
    del files["internals.py"]
    own = set().union(*map(defined, files.values()))
    allowed = {name: {*internals.MODULE_ENTRIES, *OTHERS.get(name, ())} for name in files}
    found = {name: undocumented(source, own) - allowed[name] for name, source in files.items()}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "line",
    [
        "torch._C._len_torch_dispatch_stack()",
        "torch._dynamo.reset()",
        "import torch._dynamo",
        "from torch import _dynamo as d",
        "from torch.utils._pytree import tree_map",
        "x = forward_ad._current_level",
        "x = RemovableHandle.next_id",
        "x = weight._version",
        'get = attrgetter("_version")',
        'stack = getattr(torch, "_C")',
        "f._dynamo_marked_constant = True",
        "module_globals._has_any_global_hook()",
    ],
)
def test_that_test_sees(line):
    assert undocumented(line, own=set())


def test_this_torch_lacks_nothing():
    assert internals.missing == {}
    assert internals.refusal is None


def test_the_mark_of_a_constant_is_that_of_torch():
    def mine() -> bool:
        return True

    def theirs() -> bool:
        return True

    torch.compiler.assume_constant_result(theirs)
    internals.constant(mine)
    assert vars(mine) == vars(theirs)
    assert vars(mine)


# What is used of torch while a patched model infers and trains, and while it is watched; each must agree with stock.
LIFE = """
import copy, sys, torch
from torch import nn

{remove}

import effnet_kernels as ek
from effnet_kernels import cli, internals
from tests.models import timm_model

assert {missing!r} in internals.missing, internals.missing
stock = timm_model("test_efficientnet", num_classes=10)
backend = "cpu" if ek.backends()["cpu"][0] else "reference"
patched = ek.patch(copy.deepcopy(stock), backend=backend)
x = torch.randn(2, 3, 33, 33)

def agree(call):
    torch.testing.assert_close(call(patched), call(stock), rtol=1e-3, atol=1e-4)

with torch.inference_mode():
    for _ in range(4):  # the last ones might be programs
        agree(lambda m: m(x))
with torch.no_grad():
    for m in (stock, patched):
        m.conv_stem.weight.mul_(2.0)
    for _ in range(4):
        agree(lambda m: m(x))
    for m in (stock, patched):
        for block in m.modules():
            if isinstance(block, nn.SiLU):
                block.register_forward_hook(lambda module, inputs, output: output * 0.5)
    agree(lambda m: m(x))

def gradients(m):
    m.train().zero_grad()
    m(x).square().mean().backward()
    return [p.grad for p in m.parameters()] + [b for b in m.buffers()]

stock, patched = (timm_model("test_efficientnet", num_classes=10) for _ in range(2))
ek.patch(patched, backend=backend)
torch.testing.assert_close(gradients(patched), gradients(stock), rtol=1e-2, atol=1e-3)
stock.eval(), patched.eval()
report = ek.report(patched)
fused = bool(report.patched)
assert fused == (internals.refusal is None)
assert fused or all({missing!r} in reason for *_, reason in report.skipped), report
cli.main(["info"])
"""

NAMES = [
    "nn.modules.module._has_any_global_hook",
    "_C._functorch.peek_interpreter_stack",
    "autograd.forward_ad._current_level",
    "_C._len_torch_dispatch_stack",
    "utils.hooks.RemovableHandle.next_id",
    *(f"nn.Module.{name}" for name in ("_forward_hooks", "_backward_pre_hooks")),
]


def without(name: str) -> str:
    """Code that takes a name from torch as far as the package looks at it: torch itself needs it."""
    entry = name.removeprefix("nn.Module.")
    if entry != name:
        return f"""
class Module(nn.Module):
    def __init__(self):
        super().__init__()
        del self.__dict__[{entry!r}]
whole, nn.Module = nn.Module, Module
import effnet_kernels.internals
nn.Module = whole
"""
    return f"""
import operator
whole = operator.attrgetter
def attrgetter(*names):
    if names == ({name!r},):
        raise AttributeError({name!r})
    return whole(*names)
operator.attrgetter = attrgetter
import effnet_kernels.internals
operator.attrgetter = whole
"""


@pytest.mark.parametrize("name", daily(NAMES, NAMES[:1]))
def test_without_a_name_results_are_those_of_stock(name):
    pytest.importorskip("timm")
    code = LIFE.format(remove=textwrap.dedent(without(name)), missing=f"torch.{name}")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"not in this torch: torch.{name}; " in done.stdout


COMPILED = """
import copy, torch
import effnet_kernels as ek
from effnet_kernels import internals
from effnet_kernels.dispatch import accelerates, serves
from tests.models import timm_model

for function in (accelerates, serves, internals.traceable):
    assert vars(function)
    vars(function).clear()
stock = timm_model("test_efficientnet", num_classes=10)
patched = ek.patch(copy.deepcopy(stock), backend="reference")
x, targets = torch.randn(2, 3, 33, 33), []

def compiler(graph, _):
    targets.extend(str(node.target) for node in graph.graph.nodes)
    return graph

for mode in (False, True):
    outputs = [torch.compile(m.train(mode), backend=compiler, fullgraph=True)(x) for m in (stock, patched)]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)
assert targets and not any("effnet_kernels" in target for target in targets)
"""


@pytest.mark.exhaustive
def test_without_the_mark_stock_is_compiled():
    pytest.importorskip("timm")
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
