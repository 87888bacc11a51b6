"""timm's blocks, and the stem and head of its EfficientNet and MobileNetV3 models."""

import functools
from collections import OrderedDict  # noqa: F401 (TorchScript looks here for what the stock forwards name)
from typing import Any

import torch  # noqa: F401 (the same)
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath, activations, activations_me
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models import _efficientnet_blocks as blocks
from timm.models.efficientnet import EfficientNet, EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3, MobileNetV3Features
from torch import Tensor, nn

from effnet_kernels.functional import ConvBN
from effnet_kernels.modules import depthwise_separable_conv, fused_mbconv, mbconv, reading, squeeze_excite
from effnet_kernels.modules.fusing import FusedMBConvPlan, Part, Plan, PointwisePlan, fuse, fuse_all, plan_of_conv
from effnet_kernels.modules.guards import as_written
from effnet_kernels.patching.classes import PatchedType
from effnet_kernels.patching.core import UNSUPPORTED, StandIn, register


def stem(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that ``read_stem`` replaces."""
    return _children(model, "conv_stem", "bn1", "act1")


def head(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that ``read_head`` replaces."""
    return _children(model, "conv_head", "bn2")


def read_conv_bn_act(block: nn.Module) -> Plan:
    """The plan of a ConvBnAct: pointwise, depthwise or dense."""
    d = block.__dict__
    children = d["_modules"]
    reading.no_op(children.get("aa"), "anti-aliasing")
    bn, act = reading.batch_norm(children["bn1"])
    drop_path = reading.drop_path(children["drop_path"])
    return plan_of_conv(children["conv"], bn, act, d["has_skip"], drop_path, children["bn1"])


def read_stem(model: nn.Module) -> Plan:
    """The plan of ``conv_stem, bn1`` and, where the model has it, ``act1``."""
    children = model.__dict__["_modules"]
    weight, geometry = reading.spatial(children["conv_stem"], depthwise=False)
    bn, act = reading.batch_norm(children["bn1"], children.get("act1"))
    return FusedMBConvPlan(ConvBN(weight, bn), geometry, None, None, act, False, None, [children["bn1"]])


def read_head(model: nn.Module) -> PointwisePlan:
    """The plan of ``conv_head, bn2``."""
    children = model.__dict__["_modules"]
    weight = reading.pointwise(children["conv_head"])
    bn, act = reading.batch_norm(children["bn2"])
    return PointwisePlan(ConvBN(weight, bn), act, False, None, [children["bn2"]])


CONV_BN_ACT, STEM, HEAD = Part(read_conv_bn_act), Part(read_stem, stem), Part(read_head, head)


def trunk(model: nn.Module) -> list[nn.Module]:
    """Stem and blocks."""
    return [*_children(model, "conv_stem", "bn1", "act1", "blocks").values()]


def trunk_and_head(model: nn.Module) -> list[nn.Module]:
    """Stem, blocks and head."""
    return [*trunk(model), *head(model).values()]


class PatchedConvBnAct(blocks.ConvBnAct, metaclass=PatchedType):
    @functools.wraps(blocks.ConvBnAct.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(CONV_BN_ACT, self, x)
        return super().forward(x) if y is None else y


class PatchedDepthwiseSeparableConv(blocks.DepthwiseSeparableConv, metaclass=PatchedType):
    @functools.wraps(blocks.DepthwiseSeparableConv.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(depthwise_separable_conv.WHOLE, self, x)
        return super().forward(x) if y is None else y


class PatchedInvertedResidual(blocks.InvertedResidual, metaclass=PatchedType):
    @functools.wraps(blocks.InvertedResidual.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(mbconv.WHOLE, self, x)
        return super().forward(x) if y is None else y


class PatchedEdgeResidual(blocks.EdgeResidual, metaclass=PatchedType):
    @functools.wraps(blocks.EdgeResidual.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(fused_mbconv.WHOLE, self, x)
        return super().forward(x) if y is None else y


class PatchedSqueezeExcite(blocks.SqueezeExcite, metaclass=PatchedType):
    @functools.wraps(blocks.SqueezeExcite.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = squeeze_excite.forward(self, x)
        return super().forward(x) if y is None else y


class PatchedEfficientNet(EfficientNet, metaclass=PatchedType):
    @functools.wraps(EfficientNet.forward_features)
    def forward_features(self, x: Tensor) -> Tensor:
        return fuse_all(trunk_and_head, self, x, lambda x: EfficientNet.forward_features(_inside(self), x))

    @functools.wraps(EfficientNet.forward_intermediates)
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return EfficientNet.forward_intermediates(_inside(self), x, *args, **kwargs)


class PatchedMobileNetV3(MobileNetV3, metaclass=PatchedType):
    """The head stands behind the pool and has nothing to gain."""

    @functools.wraps(MobileNetV3.forward_features)
    def forward_features(self, x: Tensor) -> Tensor:
        return fuse_all(trunk, self, x, lambda x: MobileNetV3.forward_features(_inside(self), x))

    @functools.wraps(MobileNetV3.forward_intermediates)
    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return MobileNetV3.forward_intermediates(_inside(self), x, *args, **kwargs)


class PatchedEfficientNetFeatures(EfficientNetFeatures, metaclass=PatchedType):
    @functools.wraps(EfficientNetFeatures.forward)
    def forward(self, x: Tensor) -> list[Tensor]:
        return EfficientNetFeatures.forward(_inside(self), x)


class PatchedMobileNetV3Features(MobileNetV3Features, metaclass=PatchedType):
    @functools.wraps(MobileNetV3Features.forward)
    def forward(self, x: Tensor) -> list[Tensor]:
        return MobileNetV3Features.forward(_inside(self), x)


class PatchedFeatureDictNet(FeatureDictNet, metaclass=PatchedType):
    """What features_only with a ``feature_cls`` makes of a model: its children, called one after the other."""

    @functools.wraps(FeatureDictNet._collect)
    def _collect(self, x: Tensor) -> dict[str, Tensor]:
        return FeatureDictNet._collect(_inside(self), x)


class PatchedFeatureListNet(FeatureListNet, metaclass=PatchedType):
    @functools.wraps(FeatureListNet._collect)
    def _collect(self, x: Tensor) -> dict[str, Tensor]:
        return FeatureListNet._collect(_inside(self), x)


class PatchedFeatureHookNet(FeatureHookNet, metaclass=PatchedType):
    @functools.wraps(FeatureHookNet.forward)
    def forward(self, x: Tensor) -> Any:
        return FeatureHookNet.forward(_inside(self), x)


def starts_with_stem(net: nn.Module) -> bool:
    """Whether a net of features begins with a stem of which nothing but the result is asked for."""
    names = list(stem(net))
    inner = set(names[:-1])
    return bool(inner) and [*net._modules][: len(names)] == names and not inner & {*getattr(net, "return_layers", ())}


def _children(model: nn.Module, *names: str) -> dict[str, nn.Module]:
    children = model.__dict__["_modules"]
    return {name: children[name] for name in names if name in children}


def _inside(model: nn.Module) -> Any:
    """The model as timm's own forward methods see it, whichever they are: with stem and head as one call each."""
    if not as_written(type(model)) or (isinstance(model, nn.ModuleDict) and not starts_with_stem(model)):
        return model
    modules = _as_one(model, STEM)
    if isinstance(model, EfficientNet):
        modules.update(_as_one(model, HEAD))
    return StandIn(model, modules)


def _as_one(model: nn.Module, part: Part) -> dict[str, Any]:
    """The first module of a part as a call of all of them, the others as nothing."""
    modules = part.replaced(model)

    def call(x: Tensor) -> Tensor:
        y = fuse(part, model, x)
        if y is None:
            y = x
            for module in modules.values():
                y = module(y)
        return y

    return {name: call if i == 0 else _nothing for i, name in enumerate(modules)}


def _nothing(x: Tensor) -> Tensor:
    return x


reading.CONVOLUTIONS[Conv2dSame] = True
reading.BATCH_NORMS[BatchNormAct2d] = True
reading.ACTIVATIONS.update(
    {
        activations.Swish: "silu",
        activations_me.SwishMe: "silu",
        activations.HardSwish: "hardswish",
        activations_me.HardSwishMe: "hardswish",
    }
)
reading.GATES.update(
    {
        activations.Sigmoid: "sigmoid",
        activations.HardSigmoid: "hardsigmoid",
        activations_me.HardSigmoidMe: "hardsigmoid",
    }
)
reading.DROP_PATHS[DropPath] = "drop_prob"
for _se in (blocks.SqueezeExcite, PatchedSqueezeExcite):
    reading.SQUEEZE_EXCITES[_se] = ("conv_reduce", "act1", "conv_expand", "gate")

register(blocks.ConvBnAct, PatchedConvBnAct, CONV_BN_ACT)
register(blocks.DepthwiseSeparableConv, PatchedDepthwiseSeparableConv, depthwise_separable_conv.WHOLE)
register(blocks.InvertedResidual, PatchedInvertedResidual, mbconv.WHOLE)
register(blocks.EdgeResidual, PatchedEdgeResidual, fused_mbconv.WHOLE)
register(blocks.SqueezeExcite, PatchedSqueezeExcite, squeeze_excite.WHOLE)
register(EfficientNet, PatchedEfficientNet, STEM, HEAD)
register(MobileNetV3, PatchedMobileNetV3, STEM)
register(EfficientNetFeatures, PatchedEfficientNetFeatures, STEM)
register(MobileNetV3Features, PatchedMobileNetV3Features, STEM)
register(FeatureDictNet, PatchedFeatureDictNet, STEM, meant=starts_with_stem)
register(FeatureListNet, PatchedFeatureListNet, STEM, meant=starts_with_stem)
register(FeatureHookNet, PatchedFeatureHookNet, STEM, meant=starts_with_stem)
UNSUPPORTED[blocks.CondConvResidual] = "there is no op for CondConv"
UNSUPPORTED[blocks.UniversalInvertedResidual] = "there is no op for the universal inverted residual"
UNSUPPORTED[blocks.MobileAttention] = "there is no op for attention"
