"""30 steps on handwritten digits: patched models learn as stock ones do, up to the order of summation.

Stock itself is run in three orders: contiguous maps, channels-last maps, and convolutions by torch's own loops instead of
oneDNN's. All runs start as the same numbers, and a run in float64 tells how far each has drifted from exact arithmetic.
Rounding errors grow from step to step, in all of them alike, so the drift of a patched model is one more draw from
the distribution of stock's three. For Gaussian drifts the ratio of a fourth draw's mean square to that of the three is
F-distributed; at worst, when one number decides a whole run, with 1 and 3 degrees of freedom, and then it exceeds
``FACTOR ** 2`` with a probability of 0.9%. A wrong epsilon in a single BatchNorm exceeds it many times over.
"""

import contextlib
import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effnet_kernels as ek
from tests.models import BACKENDS
from tests.training.test_models import narrow_b0, narrow_v2

STEPS, BATCH = 30, 32
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
    """The last 297 images are for the test."""
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
        logits = model.eval()(images[-297:]).double()
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


@pytest.mark.parametrize("make", [narrow_b0, narrow_v2])
def test_learning_curves(make):
    images, labels = digits()
    model = make()
    exact = train(copy.deepcopy(model).double(), images, labels)
    stock = orders(model, images, labels)
    assert len({tuple(run.losses.tolist()) for run in stock}) == len(stock)  # they are different orders
    accuracy = (exact.logits.argmax(1) == labels[-297:]).double().mean()
    assert accuracy > 0.5  # it learns

    patched = train(ek.patch(copy.deepcopy(model), backend=BACKENDS[-1]), images, labels)
    found = beyond(patched, stock, exact)
    assert max(found.values()) <= FACTOR, found
    # Where the exact logits are further apart than twice the allowed drift, the prediction is the same.
    assert (patched.logits.argmax(1) == labels[-297:]).double().mean() == pytest.approx(accuracy, abs=1 / 297)


def test_a_wrong_epsilon_is_noticed():
    images, labels = digits()
    model = narrow_b0()
    exact = train(copy.deepcopy(model).double(), images, labels)
    stock = orders(model, images, labels)
    wrong = copy.deepcopy(model)
    wrong.blocks[1][1].bn2.eps *= 2
    assert min(beyond(train(wrong, images, labels), stock, exact).values()) > FACTOR
