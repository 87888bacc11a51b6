"""float16 on its way into the kernels and out of them: every number, and every place where rounding decides."""

import pytest
import torch
from torch import Tensor

from effnet_kernels import functional as F
from effnet_kernels.functional import ConvBN, SqueezeExciteWeights
from tests.ops.special_values import unit_bn


def numbers() -> Tensor:
    """All 65536 of them: zeros, subnormals, infinities and NaN of both signs too."""
    return torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)


def ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float16)


def of_a_map(channels: int, backend: str) -> Tensor:
    side = int((2**16 // channels) ** 0.5)
    x = numbers().view(1, side, side, channels).permute(0, 3, 1, 2)
    y, _ = F.depthwise_conv_bn_act(x, ones(channels, 1, 1, 1), unit_bn(channels), "identity", backend=backend)
    return y.permute(0, 2, 3, 1)


def of_a_plane(backend: str) -> Tensor:
    """A map whose channels lie apart, as in an image."""
    conv = ConvBN(ones(1, 1, 1, 1), unit_bn(1))
    return F.fused_mbconv(numbers().view(1, 1, 256, 256), conv, None, "identity", backend=backend)


def of_a_weight(backend: str) -> Tensor:
    return F.pointwise_conv_bn_act(
        ones(1, 1, 1, 1), numbers().view(-1, 1, 1, 1), unit_bn(2**16), "identity", backend=backend
    )


def of_a_vector(backend: str) -> Tensor:
    bn = unit_bn(2**16)._replace(beta=numbers())
    return F.pointwise_conv_bn_act(0 * ones(1, 1, 1, 1), ones(2**16, 1, 1, 1), bn, "identity", backend=backend)


WAYS = {
    "map": lambda backend: of_a_map(64, backend),
    "map of one channel": lambda backend: of_a_map(1, backend),
    "plane": of_a_plane,
    "weight": of_a_weight,
    "vector": of_a_vector,
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_number_is_kept(way, backend):
    """Those that are equal have the same bits, but for the sign of zero, which a sum that begins with 0 has not."""
    x, y = numbers(), WAYS[way](backend).flatten()
    assert y.dtype == torch.float16
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[~x.isnan()], x[~x.isnan()])


@torch.no_grad()
def test_a_gate_of_one_keeps_the_sign_of_zero(backend):
    x = numbers()
    x = torch.where(x.isfinite(), x, 0).view(1, 64, 32, 32)
    zero, three = torch.zeros(2, 64, 1, 1), torch.full((64,), 3.0)
    se = SqueezeExciteWeights(zero, torch.zeros(2), zero.view(64, 2, 1, 1), three, "relu", "hardsigmoid")
    y = F.squeeze_excite(x, se, backend=backend)
    assert torch.equal(y.view(torch.int16), x.view(torch.int16))


def sums() -> Tensor:
    """float32 numbers around which float16 changes: each number of it, each midpoint, and the next on either side."""
    kept = numbers()
    kept = kept[kept.isfinite() & ~kept.signbit()].float().sort().values
    ends = torch.cat([kept, torch.tensor([2.0**16])])  # where the next one would be
    places = torch.cat([ends, (ends[1:] + ends[:-1]) / 2])
    infinity = torch.tensor(torch.inf)
    around = torch.cat([places, places.nextafter(infinity), places.nextafter(-infinity)])
    far = torch.tensor([torch.inf, torch.nan, torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny])
    around = torch.cat([around, far])
    return torch.cat([around, -around])


def test_the_sums_reach_every_rounding():
    x = sums()
    assert {65519.99609375, 65520.0, 65536.0, 2.0**-25, 3 * 2.0**-25} <= set(x.tolist())
    rounded = x.half()
    assert rounded[x == 65520].isinf().all()
    assert (rounded[x == 65519.99609375] == 65504).all()
    assert (rounded[x == 2.0**-25] == 0).all()
    assert (rounded[x == 3 * 2.0**-25] == 2.0**-23).all()
    assert len(rounded[rounded.isfinite()].unique()) == 2**16 - 2 * 2**10 - 1  # all that are finite, one zero


@torch.no_grad()
def test_sums_round_to_nearest_even(backend):
    """As bias of a product that is zero."""
    x = sums()
    bn = unit_bn(len(x))._replace(beta=x)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float16)
    weight = torch.zeros(len(x), 1, 1, 1, dtype=torch.float16)
    y, expected = F.pointwise_conv_bn_act(zero, weight, bn, "identity", backend=backend).flatten(), x.half()
    wrong = (y != expected) & ~(y.isnan() & expected.isnan())
    assert not wrong.any(), f"{x[wrong][0]} became {y[wrong][0]}, not {expected[wrong][0]}; {wrong.sum()} are wrong"
