"""Patched logits against a float64 stock model: at most twice the error of stock, for every family."""

import pytest
import torch

import effnet_kernels as ek
from effnet_kernels.benchmarking.agreement import exact_output
from tests.criterion import assert_as_accurate
from tests.models import BACKENDS, images, timm_model, torchvision_model
from tests.thinning import daily

TIMM = [
    "efficientnet_b0",
    "efficientnet_b3_pruned",
    "efficientnet_blur_b0",
    "efficientnet_b0_gn",
    "efficientnet_em",
    "efficientnet_es_pruned",
    "efficientnet_lite0",
    "efficientnetv2_rw_t",
    "fbnetc_100",
    "fbnetv3_b",
    "ghostnet_050",
    "hardcorenas_a",
    "lcnet_050",
    "mixnet_s",
    "mnasnet_small",
    "mobilenet_edgetpu_v2_xs",
    "mobilenetv1_100",
    "mobilenetv2_050",
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_050",
    "repghostnet_050",
    "semnasnet_075",
    "spnasnet_100",
    "test_efficientnet",
    "tf_efficientnet_b0",
    "tf_efficientnet_cc_b0_4e",
    "tf_efficientnet_lite0",
    "tf_efficientnetv2_b0",
    "tf_mobilenetv3_small_minimal_100",
    "tinynet_e",
]
TORCHVISION = ["efficientnet_b0", "efficientnet_v2_s", "mobilenet_v3_small"]
MODELS = [("timm", name) for name in TIMM] + [("torchvision", name) for name in TORCHVISION]
EVERY_DAY = ["efficientnet_b0", "efficientnet_b0_gn", "mixnet_s", "mobilenetv2_050", "mobilenetv3_small_050",
             "mobilenetv4_conv_small_050", "test_efficientnet", "tf_efficientnet_lite0", "tf_efficientnetv2_b0",
             "efficientnet_v2_s"]  # fmt: skip


@pytest.mark.parametrize("backend", daily(BACKENDS, BACKENDS[-1:]))
@pytest.mark.parametrize(("library", "name"), daily(MODELS, [model for model in MODELS if model[1] in EVERY_DAY]))
def test_error_is_at_most_twice_that_of_stock(library: str, name: str, backend: str) -> None:
    model = timm_model(name) if library == "timm" else torchvision_model(name)
    x = images(2, 65)  # odd: SAME pads differ on the two sides
    exact = exact_output(model, x)
    with torch.no_grad():
        stock = model(x)
        y = ek.patch(model, backend=backend)(x)
    assert ek.report(model).patched
    assert y.dtype == torch.float32
    assert_as_accurate(y, stock, exact)
