"""Small models that together have every kind of block, with their inputs."""

import pytest
from torch import Tensor, nn

from tests.models import images, timm_model, torchvision_model

NAMES = ["test_efficientnet", "mobilenetv3_small_050", "tf_efficientnetv2_b0", "torchvision"]


def build(name: str, **kwargs: object) -> nn.Module:
    """A calibrated stock model in eval mode; those with many blocks are cut short."""
    if name == "torchvision":
        model = torchvision_model("efficientnet_b0", num_classes=10, **kwargs)
        del model.features[3:8]  # type: ignore[operator]
        model.features[3][0] = nn.Conv2d(24, 1280, 1, bias=False)  # type: ignore[index]
        return model
    model = timm_model(name, num_classes=10, **kwargs)
    if name == "tf_efficientnetv2_b0":
        for stage in model.blocks:  # type: ignore[union-attr]
            del stage[2:]
    return model


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A stock model in eval mode."""
    return build(request.param)


@pytest.fixture
def x() -> Tensor:
    """Two images of an odd size."""
    return images(2, 37)
