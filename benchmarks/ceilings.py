"""What a device reaches at best: in copying, and in products of matrices."""

import statistics

import torch

from effnet_kernels.benchmarking import timing


def copy_bandwidth(device: str = "cuda", bytes_: int = 1 << 30) -> float:
    """Bytes per second, read plus written, of a copy within the memory of a device, far larger than its caches."""
    source = torch.empty(bytes_, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    samples = timing.interleaved({"copy": lambda: target.copy_(source)}, seconds=0.5, device=device)
    return 2 * bytes_ / statistics.median(samples["copy"])


def matrix_rate(dtype: torch.dtype, device: str = "cuda", size: int = 8192) -> float:
    """Floating-point operations per second of the library's product of two square matrices of random numbers."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    samples = timing.interleaved({"product": lambda: torch.mm(a, b, out=out)}, seconds=0.5, device=device)
    return 2 * size**3 / statistics.median(samples["product"])
