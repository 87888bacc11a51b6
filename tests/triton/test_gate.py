"""The gate: the same bits beside any other images and by any number of programs."""

import pytest
import torch

from effnet_kernels import functional as F
from effnet_kernels.ops import squeeze_excite_gate_triton as squeeze_excite_gate
from tests.ops.cases import SqueezeGate
from tests.ops.device import native
from tests.ops.inputs import build

# One launch; and two, whose programs have four images each, the last one fewer. Tiles end within R and C.
SQUEEZES = pytest.mark.parametrize(("c", "reduced"), [(600, 20), (1000, 130)])


@SQUEEZES
@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_a_gate_has_the_same_bits_beside_any_other_images(c, reduced):
    mean, se = native(build(SqueezeGate(7, c=c, reduced=reduced), torch.float32)).args
    whole = F.squeeze_excite_gate(mean, se, backend="triton")
    for images in (slice(0, 1), slice(1, 7), slice(3, 5)):
        assert torch.equal(F.squeeze_excite_gate(mean[images], se, backend="triton"), whole[images])


@pytest.mark.parametrize(
    ("dtype", "c", "reduced", "launches"),
    [
        (torch.float16, 1152, 48, 1),
        (torch.bfloat16, 1024, 64, 1),  # 128 KB to the byte
        (torch.float16, 1632, 68, 2),
        (torch.float16, 480, 120, 2),  # few weights, but more hidden units than registers hold
        (torch.float16, 5000, 8, 2),  # and so channels
        (torch.float32, 960, 64, 2),
        (torch.float32, 672, 28, 1),
    ],
)
def test_bytes_of_weights_decide_how_many_launches_a_gate_is(dtype, c, reduced, launches):
    assert {2: 1, 3: 2}[len(squeeze_excite_gate.default_config(dtype, c, reduced, 90).block)] == launches


@pytest.mark.parametrize(
    ("images", "blocks", "available", "expected"),
    [
        (1, 5, 132, (5, 1)),  # a program for each block of channels
        (1, 5, 4, (3, 2)),  # 2, 2 and 1
        (40, 5, 132, (3, 2)),
        (128, 5, 132, (1, 5)),
        (1000, 5, 132, (1, 5)),
        (0, 5, 132, (5, 1)),
    ],
)
def test_programs_that_share_an_image(images, blocks, available, expected):
    assert squeeze_excite_gate.shares(images, blocks, available) == expected


@pytest.mark.usefixtures("poison")
@torch.no_grad()
def test_a_gate_has_the_same_bits_by_any_number_of_programs(monkeypatch):
    mean, se = native(build(SqueezeGate(2, c=1100, reduced=20), torch.float32)).args
    launched, gates = [], []
    launch = squeeze_excite_gate.launch_kernel

    def count(kernel, programs, *rest):
        launched.append(programs)
        launch(kernel, programs, *rest)

    monkeypatch.setattr(squeeze_excite_gate, "launch_kernel", count)
    for available in (1, 6, 8, 132):
        monkeypatch.setattr(squeeze_excite_gate, "multiprocessors", lambda device, available=available: available)
        gates.append(F.squeeze_excite_gate(mean, se, backend="triton"))
    assert launched == [2, 6, 6, 10]
    assert all(torch.equal(gate, gates[0]) for gate in gates)
