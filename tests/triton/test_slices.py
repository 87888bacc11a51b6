"""Micro-batches of ``mbconv``: as many images as fit the L2, and the same bits; and so those of the gate."""

import pytest
import torch

from effnet_kernels import functional as F
from effnet_kernels.ops.mbconv import triton as mbconv
from tests.ops.cases import MBConv, Squeeze
from tests.ops.device import native
from tests.ops.inputs import build


@pytest.mark.parametrize(
    ("images", "each", "l2", "share", "expected"),
    [
        (8, 10, 100, 1.0, 8),  # all fit
        (8, 10, 80, 1.0, 8),
        (8, 10, 79, 1.0, 4),  # 7 fit: two slices, evenly
        (8, 10, 79, 0.5, 3),  # 3 fit
        (9, 10, 100, 0.5, 5),
        (128, 10, 15, 1.0, 1),
        (128, 10, 9, 1.0, 128),  # not even one: slices would gain nothing
        (0, 10, 100, 1.0, 0),
        (5, 0, 100, 1.0, 5),
    ],
)
def test_images_per_slice(images, each, l2, share, expected):
    assert mbconv.images_per_slice(images, each, l2, share) == expected


@pytest.mark.parametrize("expand", [True, False])
@pytest.mark.parametrize("se", [True, False])
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_the_same_bits(expand, se, monkeypatch):
    """Five images in slices of two."""
    case = MBConv(5, (5, 6), cin=8, mid=16 if expand else None, cout=8, residual=True, reduced=4 if se else None)
    problem = native(build(case, torch.float32))
    whole = problem.call("triton")
    launched = []
    launch = mbconv.pointwise_conv_bn_act.launch
    monkeypatch.setattr(
        mbconv.pointwise_conv_bn_act, "launch", lambda y, *rest: (launched.append(len(y)), launch(y, *rest))
    )
    bytes_per_image = 4 * 5 * 6 * (2 * 16 if expand else 8)
    monkeypatch.setattr(mbconv, "L2_SHARE", 0.5)
    monkeypatch.setattr(mbconv, "l2_bytes", lambda device: 2 * 2 * bytes_per_image)
    sliced = problem.call("triton")
    assert launched == ([2, 2, 2, 2, 1, 1] if expand else [2, 2, 1])
    assert all(torch.equal(a, b) for a, b in zip(whole, sliced, strict=True))


@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_a_gate_has_the_same_bits_beside_any_other_images():
    """A program has four images of this size, and the last one fewer; hidden units and channels end within a tile."""
    mean, se = native(build(Squeeze(7, (3, 3), c=1000, reduced=130), torch.float32, gate_only=True)).args
    whole = F.squeeze_excite_gate(mean, se, backend="triton")
    for images in (slice(0, 1), slice(1, 7), slice(3, 5)):
        assert torch.equal(F.squeeze_excite_gate(mean[images], se, backend="triton"), whole[images])
