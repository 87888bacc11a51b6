"""Bad arguments: the type of the error, and a message with the argument, what came and what was expected."""

import pytest
import torch

from effnet_kernels import functional as F
from effnet_kernels.functional import BatchNorm, ConvBN, SqueezeExciteWeights

C, R, D = 6, 2, 4  # channels, reduced, out

X = torch.ones(2, C, 5, 5)
W1 = torch.ones(D, C, 1, 1)  # pointwise
DW = torch.ones(C, 1, 3, 3)
W3 = torch.ones(D, C, 3, 3)


def bn(c: int, **changes: object) -> BatchNorm:
    return BatchNorm(torch.ones(c), torch.zeros(c), torch.zeros(c), torch.ones(c))._replace(**changes)


def se(**changes: object) -> SqueezeExciteWeights:
    weights = (torch.ones(R, C, 1, 1), torch.ones(R), torch.ones(C, R, 1, 1), torch.ones(C))
    return SqueezeExciteWeights(*weights)._replace(**changes)


def pointwise(x=X, weight=W1, norm=None, act="silu", **kwargs):
    return F.pointwise_conv_bn_act(x, weight, bn(D) if norm is None else norm, act, **kwargs)


def depthwise(x=X, weight=DW, norm=None, act="silu", **kwargs):
    return F.depthwise_conv_bn_act(x, weight, bn(C) if norm is None else norm, act, **kwargs)


def gate(mean=X[:, :, 0, 0], weights=None, **kwargs):
    return F.squeeze_excite_gate(mean, se() if weights is None else weights, **kwargs)


def squeeze(x=X, weights=None, **kwargs):
    return F.squeeze_excite(x, se() if weights is None else weights, **kwargs)


def fused(x=X, expand=None, project=None, act="silu", **kwargs):
    return F.fused_mbconv(x, ConvBN(W3, bn(D)) if expand is None else expand, project, act, **kwargs)


def mbconv(x=X, expand=None, depthwise=None, squeeze=None, project=None, act="silu", **kwargs):
    depthwise = ConvBN(DW, bn(C)) if depthwise is None else depthwise
    return F.mbconv(x, expand, depthwise, squeeze, project or ConvBN(W1, bn(D)), act, **kwargs)


META = {"device": "meta"}
MAP_OPS = (pointwise, depthwise, squeeze, fused, mbconv)
WINDOW_OPS = (depthwise, fused, mbconv)
ALL_OPS = (*MAP_OPS, gate)

TABLE = [
    # every op that takes a map
    *((op, {"x": X[0]}, ValueError, r"^x must have shape \[N, C, H, W\], got shape \(6, 5, 5\)") for op in MAP_OPS),
    *((op, {"x": X.long()}, TypeError, r"^x must be a floating-point tensor, got torch.int64") for op in MAP_OPS),
    *((op, {"x": [[1.0]]}, TypeError, r"^x must be a tensor, got list") for op in MAP_OPS),
    *((op, {"act": "gelu"}, ValueError, r"^act must be one of .*'silu'.*, got 'gelu'")
      for op in (pointwise, depthwise, fused, mbconv)),
    *((op, {"backend": "fast"}, ValueError, r"^backend must be one of .*'reference'.*, got 'fast'") for op in ALL_OPS),
    *((op, {"backend": 3}, (TypeError, RuntimeError),
       r"^backend must be a string, got int|of type 'str' for argument 'backend'") for op in ALL_OPS),
    # geometry
    *((op, {"stride": 0}, ValueError, r"^stride must be a positive int or two of them, got \[0, 0\]")
      for op in WINDOW_OPS),
    *((op, {"stride": (1, -2)}, ValueError, r"^stride must be .*, got \[1, -2\]") for op in WINDOW_OPS),
    *((op, {"stride": (1, 1, 1)}, ValueError, r"^stride must be .*, got \[1, 1, 1\]") for op in WINDOW_OPS),
    *((op, {"padding": -1}, ValueError, r"^padding must be one, two or four ints >= 0, got \[-1, -1, -1, -1\]")
      for op in WINDOW_OPS),
    *((op, {"padding": (1, 1, 1)}, ValueError, r"^padding must be .*, got \[1, 1, 1\]") for op in WINDOW_OPS),
    *((op, {"x": X[:, :, :2], "padding": 0}, ValueError, r"^the 3x3 kernel does not fit x of shape \(2, 6, 2, 5\)")
      for op in WINDOW_OPS),
    # pointwise
    (pointwise, {"weight": torch.ones(D, C + 1, 1, 1)}, ValueError,
     r"^weight must have shape \[\*, 6, 1, 1\], got shape \(4, 7, 1, 1\)"),
    (pointwise, {"weight": W1[:, :, 0, 0]}, ValueError, r"^weight must have shape .*, got shape \(4, 6\)"),
    (pointwise, {"weight": W1.double()}, TypeError,
     r"^weight must have the dtype of x, torch.float32, got torch.float64"),
    (pointwise, {"weight": W1.to(**META)}, ValueError, r"^weight must be on the device of x, cpu, got meta"),
    (pointwise, {"weight": None}, TypeError, r"^weight must be a tensor, got NoneType"),
    (pointwise, {"norm": bn(D + 1)}, ValueError, r"^bn.gamma must have shape \[4\], got shape \(5,\)"),
    (pointwise, {"norm": bn(D, beta=torch.ones(D + 1))}, ValueError, r"^bn.beta must have shape \[4\], got"),
    (pointwise, {"norm": bn(D, running_mean=None)}, TypeError, r"^bn.running_mean must be a tensor, got NoneType"),
    (pointwise, {"norm": bn(D, running_var=torch.ones(D, **META))}, ValueError,
     r"^bn.running_var must be on the device of x, cpu, got meta"),
    (pointwise, {"norm": bn(D, gamma=torch.ones(D).half())}, TypeError,
     r"^bn.gamma must be float32, got torch.float16"),
    (pointwise, {"norm": tuple(bn(D))}, TypeError, r"^bn must be a BatchNorm, got tuple"),
    (pointwise, {"gate": torch.ones(2, C + 1)}, ValueError, r"^gate must have shape \[2, 6\], got shape \(2, 7\)"),
    (pointwise, {"gate": torch.ones(2, C).long()}, TypeError, r"^gate must be float32, got torch.int64"),
    (pointwise, {"residual": X}, ValueError, r"^residual must have shape \[2, 4, 5, 5\], got shape \(2, 6, 5, 5\)"),
    (pointwise, {"residual": X[:, :D].half()}, TypeError, r"^residual must have the dtype of x.*got torch.float16"),
    (pointwise, {"x": X[:, :, :0], "pool": True}, ValueError, r"^x must have at least one pixel to pool, got"),
    # depthwise
    (depthwise, {"weight": W3}, ValueError, r"^weight must have shape \[6, 1, \*, \*\], got shape \(4, 6, 3, 3\)"),
    (depthwise, {"norm": bn(D)}, ValueError, r"^bn.gamma must have shape \[6\], got shape \(4,\)"),
    # squeeze and excitation
    (gate, {"mean": X}, ValueError, r"^mean must be a tensor of shape \[N, C\], got shape \(2, 6, 5, 5\)"),
    (gate, {"mean": None}, (TypeError, ValueError), r"^mean must be a tensor .*, got NoneType"),
    (gate, {"mean": X[:, :, 0, 0].bfloat16()}, TypeError, r"^mean must be float32 or float64, got torch.bfloat16"),
    (squeeze, {"x": X[:, :, :0]}, ValueError, r"^x must have at least one pixel, got shape \(2, 6, 0, 5\)"),
    *((op, {"weights": se(w_reduce=torch.ones(R, C + 1, 1, 1))}, ValueError,
       r"^se.w_reduce must have shape \[2, 6, 1, 1\], got shape \(2, 7, 1, 1\)") for op in (gate, squeeze)),
    *((op, {"weights": se(w_reduce=torch.ones(R, C))}, ValueError,
       r"^se.w_reduce must have shape \[2, 6, 1, 1\], got shape \(2, 6\)") for op in (gate, squeeze)),
    *((op, {"weights": se(w_expand=torch.ones(R, C, 1, 1))}, ValueError,
       r"^se.w_expand must have shape \[6, 2, 1, 1\], got shape \(2, 6, 1, 1\)") for op in (gate, squeeze)),
    *((op, {"weights": se(b_reduce=None)}, TypeError, r"^se.b_reduce must be a tensor, got NoneType")
      for op in (gate, squeeze)),
    *((op, {"weights": se(w_reduce=None)}, TypeError, r"^se.w_reduce must be a tensor, got NoneType")
      for op in (gate, squeeze)),
    *((op, {"weights": se(w_reduce=torch.tensor(1.0))}, ValueError, r"^se.w_reduce must have shape .*, got shape \(\)")
      for op in (gate, squeeze)),
    *((op, {"weights": se(b_expand=torch.ones(C, **META))}, ValueError,
       r"^se.b_expand must be on the device of .*, cpu, got meta") for op in (gate, squeeze)),
    *((op, {"weights": se(act="gelu")}, ValueError, r"^se.act must be one of .*, got 'gelu'")
      for op in (gate, squeeze)),
    *((op, {"weights": se(gate="tanh")}, ValueError, r"^se.gate must be one of .*'hardsigmoid'.*, got 'tanh'")
      for op in (gate, squeeze)),
    *((op, {"weights": tuple(se())}, TypeError, r"^se must be SqueezeExciteWeights, got tuple")
      for op in (gate, squeeze)),
    # blocks
    (fused, {"expand": ConvBN(DW, bn(C))}, ValueError, r"^expand.weight must have shape \[\*, 6, \*, \*\], got"),
    (fused, {"expand": ConvBN(W3, bn(C))}, ValueError, r"^expand.bn.gamma must have shape \[4\], got shape \(6,\)"),
    (fused, {"project": ConvBN(W1, bn(D))}, ValueError,
     r"^project.weight must have shape \[\*, 4, 1, 1\], got shape \(4, 6, 1, 1\)"),
    (fused, {"residual": True}, ValueError, r"^residual needs an output of x's shape \(2, 6, 5, 5\), got 4 channels"),
    (mbconv, {"expand": ConvBN(torch.ones(8, C, 1, 1), bn(8))}, ValueError,
     r"^depthwise.weight must have shape \[8, 1, \*, \*\], got shape \(6, 1, 3, 3\)"),
    (mbconv, {"expand": ConvBN(torch.ones(C, C, 1, 1), bn(8))}, ValueError,
     r"^expand.bn.gamma must have shape \[6\], got shape \(8,\)"),
    (mbconv, {"depthwise": ConvBN(DW, bn(D))}, ValueError, r"^depthwise.bn.gamma must have shape \[6\], got"),
    (mbconv, {"project": ConvBN(torch.ones(D, 8, 1, 1), bn(D))}, ValueError,
     r"^project.weight must have shape \[\*, 6, 1, 1\], got shape \(4, 8, 1, 1\)"),
    (mbconv, {"project": ConvBN(W1.bfloat16(), bn(D))}, TypeError,
     r"^project.weight must have the dtype of x, torch.float32, got torch.bfloat16"),
    (mbconv, {"squeeze": se(b_reduce=torch.ones(3))}, ValueError, r"^se.b_reduce must have shape \[2\], got"),
    (mbconv, {"project_act": "gelu"}, ValueError, r"^project_act must be one of .*, got 'gelu'"),
    (mbconv, {"residual": True}, ValueError, r"^residual needs an output of x's shape \(2, 6, 5, 5\), got 4 channels"),
    (mbconv, {"project": ConvBN(torch.ones(C, C, 1, 1), bn(C)), "residual": True, "stride": 2}, ValueError,
     r"^residual needs .*stride \[2, 2\]"),
    (mbconv, {"project": ConvBN(torch.ones(C, C, 1, 1), bn(C)), "residual": True, "padding": 0}, ValueError,
     r"^residual needs .*padding \[0, 0, 0, 0\]"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("op", "arguments", "error", "message"),
    TABLE,
    ids=[f"{i}-{op.__name__}-{'-'.join(arguments)}" for i, (op, arguments, *_) in enumerate(TABLE)],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad], ids=["no_grad", "grad"])
def test_message(op, arguments, error, message, mode):
    """Python's own kind of error, and torch's: callers who catch RuntimeError of stock layers catch these."""
    with mode(), pytest.raises(error, match=message) as raised:
        op(**arguments)
    assert isinstance(raised.value, RuntimeError) or "backend" in arguments


@pytest.mark.parametrize("op", ALL_OPS, ids=lambda op: op.__name__)
def test_the_arguments_of_the_table_are_otherwise_good(op):
    result = op()
    assert torch.isfinite(result[0]).all()


@pytest.mark.parametrize("op", MAP_OPS, ids=lambda op: op.__name__)
def test_mixed_dtypes(op):
    """A bfloat16 map with float32 convolution weights; SE weights may be float32."""
    if op is squeeze:
        assert op(x=X.bfloat16()).dtype == torch.bfloat16
    else:
        with pytest.raises(TypeError, match=r"weight must have the dtype of x, torch.bfloat16, got torch.float32"):
            op(x=X.bfloat16())
