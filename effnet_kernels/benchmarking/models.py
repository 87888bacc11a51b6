"""Models to measure: timm's or torchvision's by name, with seeded weights or pretrained ones."""

import difflib
import importlib
import logging
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effnet_kernels.benchmarking import UserError

LIBRARIES = ("timm", "torchvision")
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency, or say in one line which extra brings it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is needed for this: pip install 'effnet-kernels[{extra}]' ({error})") from error


def create_model(name: str, library: str = "timm", *, pretrained: bool = False, seed: int = 0) -> nn.Module:
    """The stock model in eval mode.

    Without ``pretrained`` its weights come from ``seed`` and its BatchNorm statistics from seeded noise
    (see ``calibrate``). Raises UserError for an unknown name, a missing library or weights out of reach.
    """
    check_name(name, library)
    # Its retries, one log line each, would bury the one line that says what is wrong.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            model = library_model(name, library, pretrained=pretrained)
        except Exception as error:  # every library below has its own way to say "no network"
            if not pretrained:
                raise
            raise UserError(f"the weights of {name} could not be loaded: {_first_line(error)}") from error
        if not pretrained:
            calibrate(model)
    return model.eval()


def library_model(name: str, library: str, *, pretrained: bool = False) -> nn.Module:
    """The model as its library makes it."""
    if library == "timm":
        return importlib.import_module("timm").create_model(name, pretrained=pretrained)
    models = importlib.import_module("torchvision.models")
    return models.get_model(name, weights="DEFAULT" if pretrained else None)


def check_name(name: str, library: str) -> None:
    """Raise UserError unless ``library`` is known, installed and has a model of that name."""
    if library not in LIBRARIES:
        raise UserError(f"library must be one of {LIBRARIES}, got {library!r}")
    names = require("timm" if library == "timm" else "torchvision.models", library).list_models()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        raise UserError(f"{library} has no model {name!r}" + (f"; close: {', '.join(close)}" if close else ""))


def image_size(name: str, library: str = "timm") -> int:
    """The side of the square images that the model was trained for; UserError as in ``create_model``."""
    check_name(name, library)
    if library == "timm":
        return require("timm", "timm").get_pretrained_cfg(name).input_size[-1]
    weights = require("torchvision.models", "torchvision").get_model_weights(name).DEFAULT
    return weights.transforms().crop_size[0]


@torch.no_grad()
def calibrate(model: nn.Module, size: int = 192) -> None:
    """Give every BatchNorm an affine part of its own and the statistics of one batch of noise.

    Freshly built BatchNorms are identities: folding, swapping or dropping one would go unseen, and
    activations of deep seeded models fade or explode. Draws from torch's global generator.
    """
    norms = [module for module in model.modules() if isinstance(module, BATCH_NORMS)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        if norm.affine:
            norm.weight.uniform_(0.7, 1.3)
            norm.bias.normal_(0.0, 0.2)
        norm.momentum = 1.0
        norm.train()
    for module in model.modules():
        # Squeeze-and-excitation's layers, the only convolutions with a bias. At their fresh scale the gates
        # follow the signal so steeply that a deep seeded model is chaotic: its logits tell rounding apart.
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            module.weight.mul_(0.2)
            module.bias.normal_(0.0, 0.5)
    model(_noise_at_all_scales(size))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        # No channel is amplified far beyond the others: what is faint in noise may be strong in a photograph.
        if norm.running_var is not None:
            norm.running_var.lerp_(norm.running_var.mean(), 0.5)
    model.eval()


def noise(batch: int, size: int, *, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 1) -> Tensor:
    """Seeded input, [batch, 3, size, size], the same numbers on every device up to rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, size, size, generator=generator).to(device, dtype)


def _noise_at_all_scales(size: int) -> Tensor:
    """[4, 3, size, size] with as much variance in coarse structure as in fine, like photographs.

    White noise leaves low-pass channels with hardly any variance, and a photograph then overdrives them.
    """
    scales = [max(1, size >> shift) for shift in range(6)]
    layers = [F.interpolate(torch.randn(4, 3, s, s), (size, size), mode="bilinear") for s in scales]
    return torch.stack(layers).sum(0) / len(layers) ** 0.5


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
