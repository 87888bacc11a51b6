"""Stock models with reproducible, lively numbers: seeded weights, randomised BatchNorm statistics."""

import copy
import functools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effnet_kernels.dispatch import backends

# The reference and, where it is built, the native library; both run every test of modules and patching.
BACKENDS = ["reference", *(["cpu"] if backends()["cpu"][0] else [])]


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every parameter and buffer drawn anew from ``seed``, so that no BatchNorm is near the identity."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(t: Tensor, low: float, high: float) -> None:
        t.copy_(torch.empty(t.shape, dtype=torch.float64).uniform_(low, high, generator=generator))

    with torch.no_grad():
        for m in module.modules():
            for p in m.parameters(recurse=False):
                fan_in = max(p[0].numel(), 1) if p.dim() > 1 else 1
                bound = (3.0 / fan_in) ** 0.5
                uniform(p, -bound, bound) if p.dim() > 1 else uniform(p, -0.1, 0.1)
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None:
                uniform(m.weight, 0.7, 1.6)
                uniform(m.bias, -0.3, 0.3)
                uniform(m.running_mean, -0.2, 0.2)
                uniform(m.running_var, 0.3, 1.2)
    return module


def calibrate(model: nn.Module, x: Tensor) -> nn.Module:
    """BatchNorm statistics near those of ``x``, as after training, but not equal to them.

    Far from them a deep network amplifies its inputs and its rounding errors alike until only noise is left.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.reset_running_stats()
        m.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            m.running_mean += 0.1 * m.running_var.sqrt()
            m.running_var *= 1.2
    return model.eval()


def images(n: int = 2, size: int = 64, channels: int = 3, seed: int = 1) -> Tensor:
    """Normal noise of [n, channels, size, size]."""
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def timm_model(name: str, **kwargs: object) -> nn.Module:
    """A randomised timm model in eval mode."""
    return copy.deepcopy(_timm_model(name, **kwargs))


@functools.cache
def _timm_model(name: str, **kwargs: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    return calibrate(randomize(timm.create_model(name, pretrained=False, **kwargs)), images(4, seed=2))


def torchvision_model(name: str, **kwargs: object) -> nn.Module:
    """A randomised torchvision model in eval mode."""
    return copy.deepcopy(_torchvision_model(name, **kwargs))


@functools.cache
def _torchvision_model(name: str, **kwargs: object) -> nn.Module:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)  # stochastic depth while calibrating
    return calibrate(randomize(torchvision.models.get_model(name, weights=None, **kwargs)), images(4, seed=2))


def in_two_threads(work: Callable[[int], object]) -> None:
    """``work(0)`` and ``work(1)`` at the same time, to their end."""
    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
