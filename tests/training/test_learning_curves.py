"""30 steps on handwritten digits: patched models learn as stock ones do, up to the order of summation.

Stock itself runs in three orders: contiguous maps, channels-last maps, and convolutions by torch's own loops instead of
oneDNN's. All runs start from the same numbers, and one in float64 tells how far each drifts from exact arithmetic.
Rounding errors grow from step to step in all of them alike, so the drift of a patched model is one more draw beside
stock's three. For Gaussian drifts the ratio of its mean square to theirs is F-distributed. At worst one number decides
a whole run; then it has 1 and 3 degrees of freedom, and exceeds ``FACTOR ** 2`` with a probability of 0.9%.
"""

import copy
import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effnet_kernels as ek
from tests.models import BACKENDS
from tests.training.test_models import narrow_b0, narrow_v2

pytestmark = pytest.mark.exhaustive

STEPS, BATCH, TEST = 30, 32, 297  # TEST: the last images
FACTOR = 6.0


class Run(NamedTuple):
    losses: Tensor  # [STEPS]
    running: Tensor  # all running statistics, each relative to the scale of its layer, flat
    logits: Tensor  # of the test images, in eval mode


def digits() -> tuple[Tensor, Tensor]:
    """Images [N, 3, 32, 32] and labels, shuffled once."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(data.images).float()[order, None] / 8 - 1
    return F.interpolate(images, (32, 32), mode="bilinear").expand(-1, 3, -1, -1), torch.from_numpy(data.target)[order]


def train(model: nn.Module, images: Tensor, labels: Tensor) -> Run:
    """SGD in the dtype of the model."""
    dtype = next(model.parameters()).dtype
    images = images.to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)  # stochastic depth
        batch = slice(step * BATCH, (step + 1) * BATCH)
        loss = F.cross_entropy(model.train()(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().double())
    with torch.no_grad():
        logits = model.eval()(images[-TEST:]).double()
    running = [b.double() for b in model.buffers() if b.dim() == 1]
    return Run(torch.stack(losses), torch.cat([b / b.square().mean().sqrt() for b in running]), logits)


def orders(model: nn.Module, images: Tensor, labels: Tensor) -> list[Run]:
    """Stock in its three orders of summation."""
    nhwc = {"memory_format": torch.channels_last}
    runs = [train(copy.deepcopy(model), images, labels)]
    runs.append(train(copy.deepcopy(model).to(**nhwc), images.contiguous(**nhwc), labels))
    with torch.backends.mkldnn.flags(enabled=False):
        runs.append(train(copy.deepcopy(model), images, labels))
    return runs


def drift(run: Run, exact: Run, field: str) -> float:
    return (getattr(run, field) - getattr(exact, field)).square().mean().sqrt().item()


def beyond(run: Run, stock: list[Run], exact: Run) -> dict[str, float]:
    """How many times as far as stock's runs, root mean square over the three, this run drifted."""
    drifts = {field: torch.tensor([drift(other, exact, field) for other in stock]) for field in Run._fields}
    return {field: drift(run, exact, field) / d.square().mean().sqrt().item() for field, d in drifts.items()}


class Baseline(NamedTuple):
    model: nn.Module  # untrained
    images: Tensor
    labels: Tensor
    exact: Run
    stock: list[Run]


@functools.cache
def baseline(make: Callable[[], nn.Module]) -> Baseline:
    images, labels = digits()
    model = make()
    exact = train(copy.deepcopy(model).double(), images, labels)
    return Baseline(model, images, labels, exact, orders(model, images, labels))


def accuracy(run: Run, labels: Tensor) -> float:
    return (run.logits.argmax(1) == labels[-TEST:]).double().mean().item()


@pytest.mark.parametrize("make", [narrow_b0, narrow_v2])
def test_learning_curves(make):
    model, images, labels, exact, stock = baseline(make)
    assert len({tuple(run.losses.tolist()) for run in stock}) == len(stock)  # the orders differ
    assert accuracy(exact, labels) > 0.3  # it learns: three times chance

    patched = train(ek.patch(copy.deepcopy(model), backend=BACKENDS[-1]), images, labels)
    found = beyond(patched, stock, exact)
    assert max(found.values()) <= FACTOR, found
    # One image may lie so near the border between two digits that drift decides.
    spread = max(abs(accuracy(run, labels) - accuracy(exact, labels)) for run in stock)
    assert abs(accuracy(patched, labels) - accuracy(exact, labels)) <= spread + 1.01 / TEST


def test_a_wrong_epsilon_in_one_norm_is_noticed():
    model, images, labels, exact, stock = baseline(narrow_b0)
    wrong = copy.deepcopy(model)
    wrong.blocks[1][0].bn2.eps *= 10
    assert min(beyond(train(wrong, images, labels), stock, exact).values()) > FACTOR
