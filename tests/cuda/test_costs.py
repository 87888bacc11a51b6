"""The command that counts what accesses cost."""

from pathlib import Path

import pytest
import torch

from tests.emulation import build, costs
from tests.ops.cases import Pointwise

KERNELS = {path.name for path in Path(build.ROOT, "csrc", "cuda").iterdir()}


@pytest.mark.skipif(build.asan_is_loaded(), reason="AddressSanitizer takes the place of the counters")
def test_every_row_is_a_line_of_a_kernel(emulation, monkeypatch):
    if emulation is None:
        pytest.skip("a GPU has its own counters")
    monkeypatch.setattr(costs, "CASES", (Pointwise(1, (16, 16), cin=64, cout=64),))
    rows = list(costs.counted(torch.float16))
    assert {"pointwise_kernel", "forward_kernel", "backward_kernel"} <= {row.kernel for row in rows}
    assert {row.line.split(":")[0] for row in rows} <= KERNELS
    table = costs.table(rows, ("kernel", "memory"))
    assert len(table) == len({(row.kernel, row.memory) for row in rows})
