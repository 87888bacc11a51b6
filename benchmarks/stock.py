"""Each op as a stock PyTorch module, and the same weights through our op."""

import copy

import torch
from torch import Tensor, nn

from benchmarks.shapes import OpShape
from effnet_kernels import functional, training


class StockSqueezeExcite(nn.Module):
    """Pool, reduce, SiLU, expand, sigmoid, scale."""

    def __init__(self, channels: int, reduced: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, reduced, 1)
        self.expand = nn.Conv2d(reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = nn.functional.silu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * self.expand(squeezed).sigmoid()


def stock_op(op: OpShape) -> nn.Module:
    """The op as the stock networks compute it, seeded, in eval mode."""
    torch.manual_seed(0)
    c_in, c_out = op.channels
    if op.kind == "squeeze_excite":
        return StockSqueezeExcite(c_in, c_out).eval()
    if op.kind == "pointwise":
        layers = [nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out), nn.SiLU()]
    elif op.kind == "depthwise":
        conv = nn.Conv2d(c_in, c_in, op.kernel, op.stride, op.kernel // 2, groups=c_in, bias=False)
        layers = [conv, nn.BatchNorm2d(c_in), nn.SiLU()]
    elif not op.mid:
        conv = nn.Conv2d(c_in, c_out, op.kernel, op.stride, op.kernel // 2, bias=False)
        layers = [conv, nn.BatchNorm2d(c_out), nn.SiLU()]
    else:
        conv = nn.Conv2d(c_in, op.mid, op.kernel, op.stride, op.kernel // 2, bias=False)
        project = nn.Conv2d(op.mid, c_out, 1, bias=False)
        layers = [conv, nn.BatchNorm2d(op.mid), nn.SiLU(), project, nn.BatchNorm2d(c_out)]
    module = nn.Sequential(*layers)
    for norm in module:
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(0.0, 0.5)
            norm.running_var.uniform_(0.5, 2.0)
    return module.eval()


class OurOp(nn.Module):
    """The same weights through ``effnet_kernels.functional``, on one backend."""

    def __init__(self, op: OpShape, stock: nn.Module, backend: str) -> None:
        super().__init__()
        self.op, self.stock, self.backend = op, stock, backend

    def forward(self, x: Tensor) -> Tensor:
        op, stock, backend = self.op, self.stock, self.backend
        if op.kind == "squeeze_excite":
            reduce, expand = stock.reduce, stock.expand
            weights = functional.SqueezeExciteWeights(reduce.weight, reduce.bias, expand.weight, expand.bias)
            return functional.squeeze_excite(x, weights, backend=backend)
        first = functional.ConvBN(stock[0].weight, _batch_norm(stock[1]))
        if op.kind == "pointwise":
            return functional.pointwise_conv_bn_act(x, *first, backend=backend)
        if op.kind == "depthwise":
            return functional.depthwise_conv_bn_act(x, *first, stride=op.stride, backend=backend)[0]
        project = functional.ConvBN(stock[3].weight, _batch_norm(stock[4])) if op.mid else None
        return functional.fused_mbconv(x, first, project, stride=op.stride, backend=backend)


class OurTrainingOp(nn.Module):
    """A stock convolution, BatchNorm and SiLU through ``effnet_kernels.training``, on one backend."""

    def __init__(self, stock: nn.Module, backend: str) -> None:
        super().__init__()
        self.stock, self.backend = copy.deepcopy(stock), backend

    def forward(self, x: Tensor) -> Tensor:
        conv, norm, _ = self.stock
        layer = training.ConvBNAct(conv.weight, _batch_norm(norm), "silu", conv.stride, conv.padding)
        y, (statistics,) = training.conv_block(x, [layer], backend=self.backend)
        training.update_running_statistics(norm, statistics, y.numel() // y.shape[1])
        return y


def _batch_norm(norm: nn.BatchNorm2d) -> functional.BatchNorm:
    return functional.BatchNorm(norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.eps)
