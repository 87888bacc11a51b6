"""What can be done to the parameters of a model, and to the model as a whole."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import weight_norm as old_weight_norm

import effnet_kernels as ek
from tests.models import BACKENDS
from tests.patching.property.changes import On, action, note
from tests.patching.property.models import Wrapped, blocks


@action(nn.Conv2d, nn.BatchNorm2d)
def shared_parameter(on: On) -> None:
    shape = on.module.weight.shape
    others = [m for m in on.model.modules() if getattr(getattr(m, "weight", None), "shape", None) == shape]
    on.module.weight = others[on.how % len(others)].weight


@action(nn.Conv2d, nn.BatchNorm2d)
def new_parameter(on: On) -> None:
    on.module.weight = nn.Parameter(1.25 * on.module.weight.detach())


@action(nn.Conv2d, nn.BatchNorm2d)
def written_in_place(on: On) -> None:
    with torch.no_grad():
        on.one_of(lambda w: w.mul_(1.5), lambda w: w[0].add_(0.5))(on.module.weight)


class Factor(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 1.5 * weight


@action(nn.Conv2d, nn.BatchNorm2d)
def parametrization(on: On) -> None:
    parametrize.register_parametrization(on.module, "weight", Factor())


@action(nn.Conv2d)
def parametrization_that_goes(on: On) -> None:
    parametrize.register_parametrization(on.module, "weight", Factor())
    parametrize.remove_parametrizations(on.module, "weight")


@action(nn.Conv2d)
def normed_weight(on: On) -> None:
    torch.manual_seed(0)
    on.one_of(parametrizations.weight_norm, old_weight_norm, parametrizations.spectral_norm)(on.module)


@action(nn.Conv2d)
def pruned(on: On) -> None:
    prune.l1_unstructured(on.module, "weight", 0.3)
    if on.how % 2:
        prune.remove(on.module, "weight")


@action(nn.Module)
def module_in_bfloat16(on: On) -> None:
    if on.role != "exact":
        on.module.bfloat16()


@action()
def optimizer_step(on: On) -> None:
    torch.optim.SGD(on.model.parameters(), 0.01).step()


@action()
def state_loaded(on: On) -> None:
    state = {name: 1.25 * t if "running_var" in name else t.clone() for name, t in on.model.state_dict().items()}
    on.model.load_state_dict(state, assign=on.one_of(False, True))


@action()
def checkpointing(on: On) -> None:
    on.model.set_grad_checkpointing(on.one_of(True, False))


@action()
def channels_last(on: On) -> None:
    on.model.to(memory_format=on.one_of(torch.channels_last, torch.contiguous_format))


@action()
def another_dtype_and_back(on: On) -> None:
    if on.role != "exact":
        on.model.to(on.one_of(torch.bfloat16, torch.float64, torch.float16)).to(on.dtype)


@action()
def meta_and_back(on: On) -> None:
    state = copy.deepcopy(on.model.state_dict())
    on.model.to("meta").to_empty(device="cpu").load_state_dict(state)


@action()
def deepcopied(on: On) -> nn.Module:
    return copy.deepcopy(on.model)


@action()
def copied(on: On) -> nn.Module:
    return copy.copy(on.model)


@action()
def pickled(on: On) -> nn.Module:
    return pickle.loads(pickle.dumps(on.model))


@action()
def saved(on: On) -> nn.Module:
    file = io.BytesIO()
    torch.save(on.model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@action()
def patched_again(on: On) -> None:
    if on.role == "patched":
        if on.how % 2:
            ek.unpatch(on.model)
        ek.patch(on.model)


@action()
def backend_of_the_model(on: On) -> None:
    if on.role == "patched":
        ek.patch(on.model, backend=on.one_of(*BACKENDS))


@action()
def made_in_inference_mode(on: On) -> nn.Module:
    with torch.inference_mode():
        return copy.deepcopy(on.model)


def doubling(graph: Any, _: Any) -> Callable[..., Any]:
    return lambda *a: [2 * y if isinstance(y, Tensor) else y for y in graph(*a)]


@action(nn.Module)
def compiled_by_itself(on: On) -> None:
    if on.role == "exact":
        on.module.register_forward_hook(functools.partial(note, "", 2))
    else:
        on.module.compile(backend=doubling)


@action()
def reported(on: On) -> None:
    if on.role == "patched":
        ek.report(on.model)


@action()
def sharded(on: On) -> None:
    from torch.distributed.fsdp import fully_shard

    if on.role == "exact":
        return
    parts = [m for m in on.model.modules() if isinstance(m, tuple(BLOCKS))] if on.how % 2 else []
    for module in [*parts, on.model]:
        fully_shard(module, mesh=_mesh())


@action()
def data_parallel(on: On) -> nn.Module:
    _mesh()
    return Wrapped(on.model, "module") if on.role == "exact" else nn.parallel.DistributedDataParallel(on.model)


@action()
def compiled(on: On) -> nn.Module:
    return Wrapped(on.model, "_orig_mod") if on.role == "exact" else torch.compile(on.model, backend="eager")  # type: ignore[return-value]


BLOCKS = [blocks.InvertedResidual, blocks.DepthwiseSeparableConv, blocks.EdgeResidual, blocks.ConvBnAct]
SLOW = ("compiled", "compiled by itself")
OF_OURS_NOT = ("global hook", "forward of class", "patched again", "backend of the model", "reported")


@functools.cache
def _mesh() -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (1,))
