"""torchvision's blocks, and the head of its EfficientNet."""

import functools
from typing import Any

import torch  # noqa: F401 (TorchScript looks here for what the stock forwards name)
from torch import Tensor, nn
from torchvision.models import efficientnet
from torchvision.ops import Conv2dNormActivation, SqueezeExcitation, StochasticDepth

from effnet_kernels.functional import ConvBN
from effnet_kernels.modules import reading, squeeze_excite
from effnet_kernels.modules.fusing import (
    FusedMBConvPlan,
    MBConvPlan,
    Part,
    Plan,
    PointwisePlan,
    fuse,
    fuse_all,
    plan_of_conv,
)
from effnet_kernels.modules.guards import as_written, is_observed, may_fuse
from effnet_kernels.modules.wrapped import own_class
from effnet_kernels.patching.classes import PatchedType
from effnet_kernels.patching.core import StandIn, register


def read_conv_norm_activation(module: nn.Module) -> Plan:
    """The plan of a Conv2dNormActivation: pointwise, depthwise or dense."""
    conv, bn, act, norm = _conv_bn_act(module)
    return plan_of_conv(conv, bn, act, False, None, norm)


def read_mbconv(block: nn.Module) -> MBConvPlan:
    """The plan of an MBConv: expand (or not), depthwise, squeeze-and-excitation, project."""
    layers = _sequence(block.__dict__["_modules"]["block"], nn.Sequential)
    if len(layers) not in (3, 4):
        raise reading.Unfusable(f"{len(layers)} layers in an MBConv")
    expand, expand_act, norms = None, None, []
    if len(layers) == 4:
        expand_conv, expand_bn, expand_act, norm = _conv_bn_act(layers[0])
        expand = ConvBN(reading.pointwise(expand_conv), expand_bn)
        norms.append(norm)
    conv, bn, act, norm = _conv_bn_act(layers[-3])
    if expand_act not in (None, act):
        raise reading.Unfusable(f"two different activations, {expand_act} and {act}")
    weight, geometry = reading.spatial(conv, depthwise=True)
    se = reading.squeeze_excite(layers[-2])
    project_conv, project_bn, project_act, last = _conv_bn_act(layers[-1])
    return MBConvPlan(
        expand,
        ConvBN(weight, bn),
        geometry,
        se,
        ConvBN(reading.pointwise(project_conv), project_bn),
        act,
        project_act,
        *_shortcut(block),
        [*norms, norm, last],
    )


def read_fused_mbconv(block: nn.Module) -> FusedMBConvPlan:
    """The plan of a FusedMBConv: dense convolution and, unless its expansion is 1, the projection."""
    layers = _sequence(block.__dict__["_modules"]["block"], nn.Sequential)
    if len(layers) not in (1, 2):
        raise reading.Unfusable(f"{len(layers)} layers in a FusedMBConv")
    conv, bn, act, norm = _conv_bn_act(layers[0])
    weight, geometry = reading.spatial(conv, depthwise=False)
    project, norms = None, [norm]
    if len(layers) == 2:
        project_conv, project_bn, project_act, norm = _conv_bn_act(layers[1])
        norms.append(norm)
        if project_act != "identity":
            raise reading.Unfusable(f"activation {project_act} after the projection")
        project = ConvBN(reading.pointwise(project_conv), project_bn)
    return FusedMBConvPlan(ConvBN(weight, bn), geometry, None, project, act, *_shortcut(block), norms)


def head(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that ``read_head`` replaces."""
    children = model.__dict__["_modules"]
    inner = getattr(children.get("features"), "_modules", {})
    last = {f"features.{name}": module for name, module in [*inner.items()][-1:]}
    return last | ({"avgpool": children["avgpool"]} if "avgpool" in children else {})


def read_head(model: nn.Module) -> PointwisePlan:
    """The plan of an EfficientNet's last 1x1 convolution and global average pool."""
    children = model.__dict__["_modules"]
    reading.check_mean(children["avgpool"])
    layers = _sequence(children["features"], nn.Sequential)
    if not layers:
        raise reading.Unfusable("there are no features")
    conv, bn, act, norm = _conv_bn_act(layers[-1])
    return PointwisePlan(ConvBN(reading.pointwise(conv), bn), act, False, None, [norm], pool=True)


CONV_NORM_ACTIVATION, HEAD = Part(read_conv_norm_activation), Part(read_head, head)
MBCONV, FUSED_MBCONV = Part(read_mbconv), Part(read_fused_mbconv)


def features_and_pool(model: nn.Module) -> list[nn.Module | None]:
    """All that leads to the classifier."""
    children = model.__dict__["_modules"]
    return [children["features"], children.get("avgpool")]


def _sequence(module: nn.Module, cls: type) -> list[nn.Module]:
    if type(module) is not cls:
        raise reading.Unfusable(f"{type(module).__name__} is not {cls.__name__}")
    return list(module.__dict__["_modules"].values())


def _conv_bn_act(module: nn.Module):  # type: ignore[no-untyped-def]
    """The convolution, BatchNorm, activation and BatchNorm module of a Conv2dNormActivation, patched or not."""
    if type(module) not in _CONV_NORM_ACTIVATIONS and own_class(module) not in _CONV_NORM_ACTIVATIONS:
        raise reading.Unfusable(f"{type(module).__name__} is not Conv2dNormActivation")
    layers = list(module.__dict__["_modules"].values())
    if len(layers) not in (2, 3):
        raise reading.Unfusable(f"{len(layers)} layers in a Conv2dNormActivation")
    bn, act = reading.batch_norm(layers[1], layers[2] if len(layers) == 3 else None)
    return layers[0], bn, act, layers[1]


def _shortcut(block: nn.Module) -> tuple[bool, nn.Module | None]:
    d = block.__dict__
    return d["use_res_connect"], reading.drop_path(d["_modules"]["stochastic_depth"])


class PatchedConv2dNormActivation(Conv2dNormActivation, metaclass=PatchedType):
    @functools.wraps(Conv2dNormActivation.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(CONV_NORM_ACTIVATION, self, x)
        return super().forward(x) if y is None else y


class PatchedMBConv(efficientnet.MBConv, metaclass=PatchedType):
    @functools.wraps(efficientnet.MBConv.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(MBCONV, self, x)
        return super().forward(x) if y is None else y


class PatchedFusedMBConv(efficientnet.FusedMBConv, metaclass=PatchedType):
    @functools.wraps(efficientnet.FusedMBConv.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(FUSED_MBCONV, self, x)
        return super().forward(x) if y is None else y


class PatchedSqueezeExcitation(SqueezeExcitation, metaclass=PatchedType):
    @functools.wraps(SqueezeExcitation.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = squeeze_excite.forward(self, x)
        return super().forward(x) if y is None else y


class PatchedEfficientNet(efficientnet.EfficientNet, metaclass=PatchedType):
    """The last convolution runs together with the global pool."""

    @functools.wraps(efficientnet.EfficientNet._forward_impl)
    def _forward_impl(self, x: Tensor) -> Tensor:
        return efficientnet.EfficientNet._forward_impl(_inside(self), x)


def _inside(model: Any) -> Any:
    """The model as torchvision's own forward sees it: features give what is pooled where both are one call."""
    features = model.features
    plain = type(features) is nn.Sequential and as_written(nn.Sequential) and not is_observed(features)
    if not plain or len(features) == 0 or not as_written(type(model)):
        return model

    def pooled(x: Tensor) -> Tensor:
        *trunk, last = features
        for module in trunk:
            x = module(x)
        y = fuse(HEAD, model, x)
        return last(x) if y is None else y

    def all_of_it(x: Tensor) -> Tensor:
        return fuse_all(features_and_pool, model, x, pooled) if may_fuse(x) else features(x)

    return StandIn(model, {"features": all_of_it, "avgpool": lambda x: x if x.dim() == 2 else model.avgpool(x)})


_CONV_NORM_ACTIVATIONS = (Conv2dNormActivation, PatchedConv2dNormActivation)
reading.DROP_PATHS[StochasticDepth] = "p"
for _se in (SqueezeExcitation, PatchedSqueezeExcitation):
    reading.SQUEEZE_EXCITES[_se] = ("fc1", "activation", "fc2", "scale_activation", "avgpool")

register(Conv2dNormActivation, PatchedConv2dNormActivation, CONV_NORM_ACTIVATION)
register(efficientnet.MBConv, PatchedMBConv, MBCONV)
register(efficientnet.FusedMBConv, PatchedFusedMBConv, FUSED_MBCONV)
register(SqueezeExcitation, PatchedSqueezeExcitation, squeeze_excite.WHOLE)
register(efficientnet.EfficientNet, PatchedEfficientNet, HEAD)
