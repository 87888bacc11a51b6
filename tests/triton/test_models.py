"""Whole patched models on the Triton kernels."""

import pytest
import torch

from tests import whole_models

pytestmark = pytest.mark.usefixtures("poison")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_b0(dtype):
    assert whole_models.agrees(whole_models.narrow(whole_models.B0), "triton", dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_narrow_v2_padded_as_tensorflow_does(dtype):
    assert whole_models.agrees(whole_models.narrow(whole_models.V2, pad_type="same"), "triton", dtype)


def test_timms_test_efficientnet():
    timm = pytest.importorskip("timm")
    assert whole_models.agrees(timm.create_model("test_efficientnet"), "triton")


def test_torchvision():
    assert whole_models.agrees(whole_models.torchvision_efficientnet(), "triton")
