"""The models of the property, and the same three times: stock, patched, and stock in float64."""

import copy
import functools
from typing import Any

import pytest
from torch import Tensor, nn

import effnet_kernels as ek
from tests.models import calibrate, images, randomize
from tests.patching.conftest import NAMES as WHOLE
from tests.patching.conftest import build

blocks = pytest.importorskip("timm.models._efficientnet_blocks")


class Wrapped(nn.Module):
    """Another model with one inside, under the name that torch's wrappers give it."""

    def __init__(self, model: nn.Module, name: str = "inner") -> None:
        super().__init__()
        self.add_module(name, model)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__["_modules"]
        return getattr(modules["_orig_mod"], name) if "_orig_mod" in modules else super().__getattr__(name)

    def forward(self, x: Tensor) -> Tensor:
        (model,) = self.__dict__["_modules"].values()
        return model(x)


def _blocks(of: Any) -> nn.Sequential:
    """One block of each kind, by the classes of timm or of this package."""
    se = functools.partial(of.SqueezeExcite, rd_ratio=0.25)
    edge, inverted = ("FusedMBConv", "MBConv") if of is ek else ("EdgeResidual", "InvertedResidual")
    rest = [] if of is ek else [blocks.ConvBnAct(12, 12, 1, skip=True, drop_path_rate=0.2), blocks.SqueezeExcite(12)]
    first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8))
    return nn.Sequential(
        first,
        getattr(of, inverted)(8, 8, exp_ratio=2.0, se_layer=se, act_layer=nn.SiLU, drop_path_rate=0.2),
        getattr(of, inverted)(8, 8, exp_ratio=2.0, se_layer=se, act_layer=nn.SiLU),
        getattr(of, edge)(8, 12, 3, 2, pad_type="same", exp_ratio=2.0, act_layer=nn.ReLU6),
        of.DepthwiseSeparableConv(12, 12, 5, act_layer=nn.Hardswish, se_layer=se),
        getattr(of, inverted)(12, 12, 5, 2, pad_type="same", exp_ratio=2.0, act_layer=nn.ReLU),
        *rest,
    )


@functools.cache
def _stock(name: str) -> nn.Module:
    if name in ("blocks", "ours"):
        model = _blocks(blocks)
        if name == "ours":
            del model[6:]
        return calibrate(randomize(model), images(4, 37, seed=2))
    if name == "wrapped":
        return Wrapped(build("test_efficientnet"))
    return build(name, **({} if name == "torchvision" else {"drop_path_rate": 0.2}))


def three(name: str) -> dict[str, nn.Module]:
    """The models by role; "ours" are this package's own modules beside timm's."""
    stock = copy.deepcopy(_stock(name))
    if name == "ours":
        patched: nn.Module = _blocks(ek).eval()
        patched.load_state_dict(stock.state_dict())
    else:
        patched = ek.patch(copy.deepcopy(stock))
    return {"stock": stock, "patched": patched, "exact": copy.deepcopy(stock).double()}


NAMES = ["blocks", "ours", "wrapped", *WHOLE]
