"""Records of ``python -m benchmarks.gpu`` for its tests: an empty one, one case to measure, and a whole one."""

import pytest
import torch
from torch import nn

from benchmarks import gpu, gpu_scope
from benchmarks.cases import Case
from benchmarks.gpu_record import Record
from effnet_kernels.benchmarking.contenders import COMPILED, ours

REFERENCE = ours("reference")


@pytest.fixture
def record(tmp_path):
    return Record(tmp_path / "gpu.json", part="ops")


def case(fused=lambda module, backend: module) -> Case:
    def make():
        return nn.Conv2d(3, 4, 3).eval(), torch.randn(2, 3, 8, 8)

    return Case("op", "a convolution", 2, make, fused, traffic=lambda: 8)


def contenders_of(record: Record, title: str = "a convolution") -> dict:
    return record.content["levels"]["op"][title]["contenders"]


def fabricated() -> dict:
    """The record of a whole run, every number made up."""
    scope = gpu_scope.GPU
    timed = {"median": 1e-3, "q1": 1e-3, "q3": 1e-3, "error": 0.0, "samples": 9, "share_of_copy": 0.5,
             "bytes_per_second": 1e12}  # fmt: skip
    names = [*scope.eager, *map(ours, scope.backends), COMPILED]
    measured = {"batch": 128, "count": 1, "bytes": 8, "contenders": {name: dict(timed) for name in names}}
    models = [f"{model} @{size}, batch {batch}, float16" for model, size, batch in (scope.flagship, *scope.models)]
    training = [f"{model} @{size}, batch {batch}, AMP float16" for model, size, batch in scope.training]
    titles = {"model": models, "training_model": training, "block": models[:8]}
    titles["op"] = [f"efficientnet_b0 {op}, batch 128, float16" for op in scope.ops]
    environment = {
        "device": "a GPU", "device_type": "cuda", "versions": {"torch": "9.9"}, "commit": "c0ffee", "date": "today",
        "copy_bytes_per_second": 3e12, "matrix_flops_per_second": 8e14,
    }  # fmt: skip
    part = {"status": "failed", "seconds": 99.9, "errors": "x" * 2000}
    return {
        "environment": environment,
        "parts": dict.fromkeys(gpu.PARTS, part),
        "levels": {level: dict.fromkeys(of, measured) for level, of in titles.items()},
    }
