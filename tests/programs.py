"""What the tests of programs share."""

import copy

import pytest
import torch
from torch import Tensor, nn

import effnet_kernels as ek
from effnet_kernels.modules.program import Program
from tests.models import images, randomize


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """The programs that were repeated so far and gave a result."""
    programs = []
    call = Program.__call__

    def counting(self: Program, x: Tensor) -> Tensor | None:
        y = call(self, x)
        if y is not None:
            programs.append(self)
        return y

    monkeypatch.setattr(Program, "__call__", counting)
    return programs


@torch.inference_mode()
def warm(module: nn.Module, x: Tensor) -> list[Tensor]:
    """The first call is recorded, the second repeated."""
    return [module(x) for _ in range(2)]


@torch.inference_mode()
def the_long_way(module: nn.Module, x: Tensor) -> Tensor:
    return copy.deepcopy(module)(x)


def make() -> ek.MBConv:
    return randomize(ek.MBConv(8, 8, exp_ratio=4.0, se_layer=ek.SqueezeExcite, act_layer=nn.SiLU)).eval()


@pytest.fixture
def block():
    return make()


@pytest.fixture
def x():
    return images(2, 9, 8).to(memory_format=torch.channels_last)
