"""What patching keeps of classes: their names everywhere, the classes themselves where nothing is to be gained."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import effnet_kernels as ek
from effnet_kernels.patching.classes import PatchedType
from effnet_kernels.patching.core import ADAPTERS
from tests.criterion import assert_same_function
from tests.models import BACKENDS, images, randomize, timm_model, torchvision_model
from tests.patching.conftest import NAMES, build

_NAMES = ("__name__", "__qualname__", "__module__", "__doc__")


def patched_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that have another class than before."""
    return {name: m for name, m in model.named_modules() if isinstance(type(m), PatchedType)}


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def test_names_are_those_of_stock(model):
    stock = copy.deepcopy(model)
    ek.patch(model)
    assert patched_modules(model)
    for before, after in zip(stock.modules(), model.modules(), strict=True):
        assert [getattr(type(after), name) for name in _NAMES] == [getattr(type(before), name) for name in _NAMES]
        assert repr(type(after)) == repr(type(before))
    assert repr(model) == repr(stock)


def test_source_is_that_of_stock():
    block = ek.patch(timm_model("test_efficientnet", num_classes=10).blocks[4][0])
    assert inspect.getsource(type(block)) == inspect.getsource(ADAPTERS[type(block)].stock)


def test_stock_and_patched_stay_apart_in_dictionaries(model):
    """torch keeps classes made for others in dictionaries by class; equal classes would get each other's."""
    ek.patch(model)
    for m in patched_modules(model).values():
        cls, stock = type(m), ADAPTERS[type(m)].stock
        assert len({cls: "patched", stock: "stock"}) == 2
        assert cls.__mro__.index(stock) == 1


@pytest.mark.parametrize("protocol", [0, 2, pickle.HIGHEST_PROTOCOL])
def test_pickles_name_the_stock_class(protocol):
    for name in NAMES:
        model = ek.patch(build(name), backend="reference")
        for m in patched_modules(model).values():
            cls = type(m)
            assert pickle.loads(pickle.dumps(cls, protocol)) is cls
            assert pickle.loads(pickle.dumps(ADAPTERS[cls].stock, protocol)) is ADAPTERS[cls].stock
        data = pickle.dumps(model, protocol)
        assert b"Patched" not in data
        twin = pickle.loads(data)
        assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]
        assert str(ek.report(twin)) == str(ek.report(model))


def test_a_class_of_ones_own_below_a_patched_one(x):
    """A subclass of a patched class, as another tool may make: pickled by its own name."""
    cls = type(ek.patch(build("test_efficientnet")).blocks[4][0])
    mine = type("Mine", (cls,), {"__module__": __name__})
    globals()["Mine"] = mine
    try:
        assert pickle.loads(pickle.dumps(mine)) is mine
        assert type(pickle.loads(pickle.dumps(mine.__new__(mine)))) is mine
    finally:
        del globals()["Mine"]


def test_only_what_is_fused_by_itself_is_patched():
    """Parts of a block that runs as a whole keep their class."""
    model = ek.patch(torchvision_model("efficientnet_b0"))
    names = set(patched_modules(model))
    blocks = {f"features.{i}.{j}" for i in range(1, 8) for j in range(len(model.features[i]))}
    assert names == {"", "features.0", "features.8", *blocks}
    assert {type(m).__name__ for m in patched_modules(ek.patch(timm_model("efficientnet_b0"))).values()} == {
        "EfficientNet", "DepthwiseSeparableConv", "InvertedResidual"
    }  # fmt: skip


def test_parts_of_a_block_that_is_not_fused_are_patched(x, backend):
    """Where a block cannot be read, or somebody watches a part of it, its other parts run fused by themselves."""
    for change in (
        lambda block: setattr(block[0], "2", nn.GELU()),
        lambda block: block[1].register_forward_hook(lambda *_: None),
    ):
        model = build("torchvision")
        change(model.features[2][0].block)
        stock = copy.deepcopy(model)
        ek.patch(model, backend=backend)
        block = {name for name in patched_modules(model) if name.startswith("features.2.0.block.")}
        assert {"features.2.0.block.2", "features.2.0.block.3"} <= block  # squeeze-and-excitation, projection
        with torch.no_grad():
            assert_same_function(model(x), stock(x))


def test_patching_again_follows_the_model():
    """A part gets a class of its own once its block has to call it, and loses it when the block is whole again."""
    model = ek.patch(build("torchvision"))
    block = model.features[2][0].block
    handle = block[1].register_forward_hook(lambda *_: None)
    rows = {name: reason for name, _, reason in ek.report(model).skipped}
    assert rows["features.2.0.block.3"].startswith("not patched")
    ek.patch(model)
    assert isinstance(type(block[3]), PatchedType)
    handle.remove()
    assert "features.2.0" in {name for name, *_ in ek.report(ek.patch(model)).patched}
    assert not isinstance(type(block[3]), PatchedType)


def test_a_part_by_itself(x, backend):
    """What is handed to ``patch`` alone is run alone; with the rest, it is part of its block again."""
    model = build("torchvision")
    conv = model.features[2][0].block[0]
    y = torch.randn(2, 16, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stock = conv(y)
        ek.patch(conv, backend=backend)
        assert [row[:2] for row in ek.report(conv).patched] == [("", "Conv2dNormActivation")]
        assert_same_function(conv(y), stock)
    ek.patch(model.features[2][0].block)
    assert isinstance(type(conv), PatchedType)
    ek.patch(model)
    assert not isinstance(type(conv), PatchedType)
    assert not [name for name in conv.__dict__ if "effnet" in name]


def test_plain_mobilenets_and_feature_getters(x, backend):
    """No block of them is known: their convolutions are fused one by one, also in another container."""
    from torchvision.models._utils import IntermediateLayerGetter

    for name in ("mobilenet_v2", "efficientnet_b0"):
        stock = torchvision_model(name)
        getter = IntermediateLayerGetter(stock.features, {"1": "low", "3": "high"})
        patched = ek.patch(copy.deepcopy(getter), backend=backend)
        assert isinstance(type(patched["0"]), PatchedType)
        with torch.no_grad():
            for key, y in patched(x).items():
                assert_same_function(y, getter(x)[key])
    assert len(ek.report(ek.patch(torchvision_model("mobilenet_v2"))).patched) == 35


QUANTIZABLE = ["mobilenet_v2", "mobilenet_v3_large"]


def quantizable(name: str) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    make = getattr(torchvision.models.quantization, name)
    return randomize(make(weights=None, quantize=False, num_classes=10)).eval()


@pytest.mark.parametrize("is_qat", [None, False, True])
@pytest.mark.parametrize("name", QUANTIZABLE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_fuse_model_finds_every_batch_norm(name, is_qat):
    stock = quantizable(name).train(is_qat is True)
    patched = copy.deepcopy(stock)
    assert ek.patch(patched) is patched
    assert all("fuse_model" in reason for *_, reason in ek.report(patched).skipped)
    for m in (stock, patched):
        m.fuse_model(is_qat=is_qat)
    assert norms(patched) == norms(stock)
    if not is_qat:
        assert norms(patched) == 0
    assert [type(m) for m in patched.modules()] == [type(m) for m in stock.modules()]
    x = images(2, 33)
    for change in (lambda m: m, ek.patch, ek.unpatch):
        change(patched)
        ek.report(patched)
        with torch.no_grad():
            assert torch.equal(patched.eval()(x), stock.eval()(x))


def test_fuse_model_of_ones_own(x):
    """The rule is about the method, wherever the blocks below are from; neighbours are patched."""

    class Quantizable(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = build("test_efficientnet")

        def fuse_model(self) -> None: ...

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    both = ek.patch(nn.ModuleDict({"a": Quantizable(), "b": build("torchvision")}))
    assert {name.split(".")[0] for name in patched_modules(both)} == {"b"}
    rows = ek.report(both)
    assert {name.split(".")[0] for name, *_ in rows.skipped} == {"a"}
    assert all(reason == "left to Quantizable.fuse_model()" for *_, reason in rows.skipped)
    ek.patch(both["a"].inner)  # asked for by itself
    assert any(name.startswith("a.") for name, *_ in ek.report(both).patched)
    ek.unpatch(both)
    assert not patched_modules(both)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("patched_before", [False, True])
def test_parametrized_block(patched_before):
    """torch gives the block a class of its own with a property in it; ours goes below that one."""
    block = timm_model("efficientnet_b0").blocks[1][1]
    block.register_parameter("factor", nn.Parameter(torch.ones(1)))
    stock = type(block)
    if patched_before:
        ek.patch(block)
    parametrize.register_parametrization(block, "factor", Twice())
    name = type(block).__name__
    ek.patch(block, backend=BACKENDS[-1])
    assert [row[:2] for row in ek.report(block).patched] == [("", "InvertedResidual")]
    assert block.factor.item() == 2
    assert type(block).__name__ == name == "ParametrizedInvertedResidual"
    copied = copy.deepcopy(block)
    ek.unpatch(block)
    assert not ek.report(block).patched
    assert len(ek.report(copied).patched) == 1
    assert type(block).__bases__ == (stock,)
    assert (block.factor.item(), type(block).__name__) == (2, name)
    parametrize.remove_parametrizations(block, "factor")
    assert type(block) is stock
    parametrize.remove_parametrizations(copied, "factor")
    assert isinstance(type(copied), PatchedType)


def test_a_pickled_module_does_not_hold_its_class():
    """cloudpickle, of which this is the way in, would pickle that by value: another class wherever it is loaded."""

    class Pickler(pickle.Pickler):
        def reducer_override(self, thing):
            assert not isinstance(thing, PatchedType)
            return NotImplemented

    file = io.BytesIO()
    Pickler(file).dump(ek.patch(build("test_efficientnet")))
    assert ek.report(pickle.loads(file.getvalue())).patched
