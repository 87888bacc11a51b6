"""timm's blocks, and the stem and head of its EfficientNet and MobileNetV3 models."""

import functools

import torch
from timm.layers import (
    BatchNormAct2d,
    Conv2dSame,
    DropPath,
    SelectAdaptivePool2d,
    activations,
    activations_me,
    adaptive_avgmax_pool,
)
from timm.models import _efficientnet_blocks as blocks
from timm.models.efficientnet import EfficientNet, EfficientNetFeatures
from timm.models.mobilenetv3 import MobileNetV3, MobileNetV3Features
from torch import Tensor, nn

from effnet_kernels.functional import ConvBN
from effnet_kernels.modules import depthwise_separable_conv, fused_mbconv, mbconv, reading, squeeze_excite
from effnet_kernels.modules.fusing import DepthwisePlan, FusedMBConvPlan, Plan, PointwisePlan, fuse, fuse_route
from effnet_kernels.modules.replay import Route, calls_in
from effnet_kernels.patching.classes import PatchedType
from effnet_kernels.patching.core import UNSUPPORTED, Part, register


def stem(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that ``read_stem`` replaces."""
    return _children(model, "conv_stem", "bn1", "act1")


def head(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that ``read_head`` replaces."""
    return _children(model, "conv_head", "bn2")


def pooled_head(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that ``read_pooled_head`` replaces."""
    return _children(model, "conv_head", "bn2", "global_pool")


def read_conv_bn_act(block: nn.Module) -> Plan:
    """The plan of a ConvBnAct: pointwise, depthwise or dense."""
    d = block.__dict__
    children = d["_modules"]
    conv = children["conv"]
    reading.no_op(children.get("aa"), "anti-aliasing")
    bn, act = reading.batch_norm(children["bn1"])
    shortcut, drop_path = d["has_skip"], reading.drop_path(children["drop_path"])
    if reading.is_pointwise(conv):
        return PointwisePlan(ConvBN(reading.pointwise(conv), bn), act, False, shortcut, drop_path)
    if reading.is_depthwise(conv):
        weight, geometry = reading.spatial(conv, depthwise=True)
        return DepthwisePlan(ConvBN(weight, bn), geometry, act, shortcut, drop_path)
    weight, geometry = reading.spatial(conv, depthwise=False)
    return FusedMBConvPlan(ConvBN(weight, bn), geometry, None, None, act, shortcut, drop_path)


def read_stem(model: nn.Module) -> Plan:
    """The plan of ``conv_stem, bn1`` and, where the model has it, ``act1``."""
    children = model.__dict__["_modules"]
    weight, geometry = reading.spatial(children["conv_stem"], depthwise=False)
    bn, act = reading.batch_norm(children["bn1"], children.get("act1"))
    return FusedMBConvPlan(ConvBN(weight, bn), geometry, None, None, act, False, None)


def read_head(model: nn.Module) -> PointwisePlan:
    """The plan of ``conv_head, bn2``."""
    children = model.__dict__["_modules"]
    weight = reading.pointwise(children["conv_head"])
    bn, act = reading.batch_norm(children["bn2"])
    return PointwisePlan(ConvBN(weight, bn), act)


def read_pooled_head(model: nn.Module) -> PointwisePlan:
    """The plan of ``conv_head, bn2, global_pool``; Unfusable unless it pools to [N, C] by the plain mean."""
    select = model.__dict__["_modules"]["global_pool"]
    if type(select) is not SelectAdaptivePool2d:
        raise reading.Unfusable(f"global pool {type(select).__name__}")
    children = select.__dict__["_modules"]
    pool, flatten = children["pool"], children["flatten"]
    if type(pool) is adaptive_avgmax_pool.FastAdaptiveAvgPool:
        plain = pool.flatten and tuple(pool.dim) == (2, 3) and type(flatten) is nn.Identity
    else:
        plain = type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1)) and type(flatten) is nn.Flatten
    if not plain:
        raise reading.Unfusable(f"global pool {select}")
    return read_head(model)._replace(pool=True)


def route(model: nn.Module) -> Route:
    """Stem and blocks."""
    trunk = model.__dict__["_modules"]["blocks"]
    return Route([*stem(model).values(), trunk], [(read_stem, model), *calls_in(trunk)])


def route_with_head(model: nn.Module) -> Route:
    """Stem, blocks and head."""
    modules, calls = route(model)
    return Route([*modules, *head(model).values()], [*calls, (read_head, model)])


def route_with_pooled_head(model: nn.Module) -> Route:
    """Stem, blocks, and head with its global pool."""
    modules, calls = route(model)
    return Route([*modules, *pooled_head(model).values()], [*calls, (read_pooled_head, model)])


class PatchedConvBnAct(blocks.ConvBnAct, metaclass=PatchedType):
    @functools.wraps(blocks.ConvBnAct.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(read_conv_bn_act, self, x)
        return super().forward(x) if y is None else y


class PatchedDepthwiseSeparableConv(blocks.DepthwiseSeparableConv, metaclass=PatchedType):
    @functools.wraps(blocks.DepthwiseSeparableConv.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(depthwise_separable_conv.read, self, x)
        return super().forward(x) if y is None else y


class PatchedInvertedResidual(blocks.InvertedResidual, metaclass=PatchedType):
    @functools.wraps(blocks.InvertedResidual.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(mbconv.read, self, x)
        return super().forward(x) if y is None else y


class PatchedEdgeResidual(blocks.EdgeResidual, metaclass=PatchedType):
    @functools.wraps(blocks.EdgeResidual.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = fuse(fused_mbconv.read, self, x)
        return super().forward(x) if y is None else y


class PatchedSqueezeExcite(blocks.SqueezeExcite, metaclass=PatchedType):
    @functools.wraps(blocks.SqueezeExcite.forward)
    def forward(self, x: Tensor) -> Tensor:
        y = squeeze_excite.forward(self, x)
        return super().forward(x) if y is None else y


class PatchedEfficientNet(EfficientNet, metaclass=PatchedType):
    """Stem and head fused; the head with its global pool where ``forward`` runs the whole model."""

    @functools.wraps(EfficientNet.forward_features)
    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return super().forward_features(x)
        y = fuse_route(route_with_head, self, x)
        if y is None:
            x = self.blocks(_stem(self, x))
            y = fuse(read_head, self, x, head(self).values())
        return self.bn2(self.conv_head(x)) if y is None else y

    @functools.wraps(EfficientNet.forward)
    def forward(self, x: Tensor) -> Tensor:
        d = self.__dict__
        if self.grad_checkpointing or "forward_features" in d or "forward_head" in d:
            return super().forward(x)
        y = fuse_route(route_with_pooled_head, self, x)
        if y is None:
            x = self.blocks(_stem(self, x))
            y = fuse(read_pooled_head, self, x, pooled_head(self).values())
        if y is None:
            y = fuse(read_head, self, x, head(self).values())
            return self.forward_head(self.bn2(self.conv_head(x)) if y is None else y)
        if self.drop_rate > 0.0:
            y = torch.dropout(y, self.drop_rate, self.training)
        return self.classifier(y)


class PatchedMobileNetV3(MobileNetV3, metaclass=PatchedType):
    """Stem fused; the head stands behind the pool and has nothing to gain."""

    @functools.wraps(MobileNetV3.forward_features)
    def forward_features(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing:
            return super().forward_features(x)
        y = fuse_route(route, self, x)
        return self.blocks(_stem(self, x)) if y is None else y


class PatchedEfficientNetFeatures(EfficientNetFeatures, metaclass=PatchedType):
    @functools.wraps(EfficientNetFeatures.forward)
    def forward(self, x: Tensor) -> list[Tensor]:
        features = _features(self, x)
        return super().forward(x) if features is None else features


class PatchedMobileNetV3Features(MobileNetV3Features, metaclass=PatchedType):
    @functools.wraps(MobileNetV3Features.forward)
    def forward(self, x: Tensor) -> list[Tensor]:
        features = _features(self, x)
        return super().forward(x) if features is None else features


def _children(model: nn.Module, *names: str) -> dict[str, nn.Module]:
    children = model.__dict__["_modules"]
    return {name: children[name] for name in names if name in children}


def _stem(model: EfficientNet | MobileNetV3, x: Tensor) -> Tensor:
    y = fuse(read_stem, model, x, stem(model).values())
    return model.bn1(model.conv_stem(x)) if y is None else y


def _features(model: EfficientNetFeatures | MobileNetV3Features, x: Tensor) -> list[Tensor] | None:
    """The features behind a fused stem; None where the stock forward has to run."""
    if model.grad_checkpointing or model.feature_hooks is not None:
        return None
    y = fuse(read_stem, model, x, stem(model).values())
    if y is None:
        return None
    features = [y] if 0 in model._stage_out_idx else []
    for stage, block in enumerate(model.blocks, start=1):
        y = block(y)
        if stage in model._stage_out_idx:
            features.append(y)
    return features


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

register(blocks.ConvBnAct, PatchedConvBnAct, Part(read_conv_bn_act))
register(blocks.DepthwiseSeparableConv, PatchedDepthwiseSeparableConv, Part(depthwise_separable_conv.read))
register(blocks.InvertedResidual, PatchedInvertedResidual, Part(mbconv.read))
register(blocks.EdgeResidual, PatchedEdgeResidual, Part(fused_mbconv.read))
register(blocks.SqueezeExcite, PatchedSqueezeExcite, Part(squeeze_excite.read))
register(EfficientNet, PatchedEfficientNet, Part(read_stem, stem), Part(read_pooled_head, pooled_head))
register(MobileNetV3, PatchedMobileNetV3, Part(read_stem, stem))
register(EfficientNetFeatures, PatchedEfficientNetFeatures, Part(read_stem, stem))
register(MobileNetV3Features, PatchedMobileNetV3Features, Part(read_stem, stem))
UNSUPPORTED[blocks.CondConvResidual] = "there is no op for CondConv"
UNSUPPORTED[blocks.UniversalInvertedResidual] = "there is no op for the universal inverted residual"
UNSUPPORTED[blocks.MobileAttention] = "there is no op for attention"
