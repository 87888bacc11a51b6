"""What autograd keeps between forward and backward, in bytes."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def saved_bytes(module: nn.Module, call: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages saved by ``call``, those of the module's own state left out."""
    own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
    kept: dict[int, Tensor] = {}  # alive until the end, so that no address comes twice

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(t.untyped_storage().nbytes() for t in kept.values())
