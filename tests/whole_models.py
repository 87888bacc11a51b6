"""Small whole models with every kind of block, and docs/numerics.md's criterion for what patching makes of them."""

import pytest
import torch
from torch import nn

import effnet_kernels as ek
from effnet_kernels.benchmarking.agreement import agreement, exact_output
from tests.criterion import measuring
from tests.models import calibrate, images, randomize
from tests.ops.device import DEVICE
from tests.thinning import daily

# The blocks of B0 and of V2, narrow.
B0 = ["ds_r1_k3_s1_e1_c8_se0.25", "ir_r1_k3_s2_e6_c8_se0.25", "ir_r2_k5_s2_e6_c12_se0.25"]
V2 = ["cn_r1_k3_s1_e1_c8_skip", "er_r2_k3_s2_e4_c12", "ir_r2_k3_s2_e4_c16_se0.25"]


def narrow(stages: list[str], **arguments) -> nn.Module:
    """timm's EfficientNet of these stages."""
    pytest.importorskip("timm")
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet

    stages = decode_arch_def([[stage] for stage in stages])
    small = {"num_classes": 10, "stem_size": 8, "num_features": 32, "act_layer": nn.SiLU}
    return EfficientNet(stages, **small | arguments)


def torchvision_efficientnet() -> nn.Module:
    """torchvision's, with a block of each kind."""
    efficientnet = pytest.importorskip("torchvision.models.efficientnet")
    stages = [
        efficientnet.FusedMBConvConfig(2, 3, 2, 8, 16, 1),
        efficientnet.MBConvConfig(4, 5, 2, 16, 24, 2),
    ]
    return efficientnet.EfficientNet(stages, 0.2, 0.0, num_classes=10, last_channel=32)


MODELS = {
    "b0": lambda: narrow(B0),
    "v2-padded-as-tensorflow": lambda: narrow(V2, pad_type="same"),
    "timm": lambda: pytest.importorskip("timm").create_model("test_efficientnet"),
    "torchvision": torchvision_efficientnet,
}
EVERY_DAY = [("b0", torch.float16), ("v2-padded-as-tensorflow", torch.bfloat16), ("torchvision", torch.float32)]
REST = [("b0", torch.float32), ("b0", torch.bfloat16), ("v2-padded-as-tensorflow", torch.float16)]
CASES = [*EVERY_DAY, *REST, ("timm", torch.float32)]
each_model = pytest.mark.parametrize(("name", "dtype"), daily(CASES, EVERY_DAY))


def agrees(name: str, backend: str, dtype: torch.dtype) -> bool:
    """Whether the patched model's error is within the bounds, nothing being left stock."""
    model = calibrate(randomize(MODELS[name]()), images(4, 48)).to(DEVICE, dtype)
    x = images(2, 25).to(DEVICE, dtype)
    with torch.inference_mode():
        with measuring():
            exact, stock = exact_output(model, x), model(x)
        patched = ek.patch(model, backend=backend)
        assert not ek.report(patched).skipped
        return agreement(patched(x), stock, exact).ok
