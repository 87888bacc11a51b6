"""Progressive learning (EfficientNetV2, https://arxiv.org/abs/2104.00298): small and easy images first.

    python examples/progressive.py

Resolution and the strength of regularisation grow together from stage to stage: augmentation (shift and contrast) and
dropout. The model is patched; after every change of resolution the script reports how many kernels were compiled.
Native kernels are compiled when the package is built and work at any size. Triton's are compiled at their first
use, and none depends on the resolution: after the first stage there is nothing left to compile.

Needs timm, scikit-learn and matplotlib: pip install 'effnet-kernels[demo]'.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effnet_kernels as ek

sys.path.insert(0, str(Path(__file__).resolve().parent))
from finetune import CLASSES, digits, plot


def compiled_kernels() -> int:
    """Kernels that this process has compiled so far: what Triton's functions hold for all devices."""
    if "triton" not in sys.modules:
        return 0
    total = 0
    for name, module in list(sys.modules.items()):
        if name.startswith("effnet_kernels"):
            for value in vars(module).values():
                for cache in getattr(value, "device_caches", {}).values():
                    total += len(cache[0])
    return total


def augment(images: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Every image shifted by up to ``strength`` of 8 pixels in 64 and its contrast changed by up to half of it."""
    n, _, height, _ = images.shape
    reach = round(strength * height / 8)
    shifts = torch.randint(-reach, reach + 1, (2,), generator=generator).tolist()
    contrast = 1.0 + strength * (torch.rand((n, 1, 1, 1), generator=generator) - 0.5)
    return images.roll(shifts, (2, 3)) * contrast


def train(model: nn.Module, options: argparse.Namespace, label: str) -> dict:
    """All stages; the loss of every step, the test accuracy and the compiled kernels behind every stage."""
    history: dict = {"loss": [], "accuracy": [], "compiled": []}
    optimizer = torch.optim.SGD(model.parameters(), options.rate, momentum=0.9, weight_decay=1e-4)
    stages = len(options.sizes)
    before = compiled_kernels()
    for stage, size in enumerate(options.sizes):
        strength = stage / max(stages - 1, 1)
        x, y, x_test, y_test = digits(size)
        model.train()
        model.drop_rate = 0.1 + 0.2 * strength
        torch.manual_seed(stage)
        generator = torch.Generator().manual_seed(stage)
        start = time.perf_counter()
        for step in range(options.steps):
            batch = torch.randint(len(x), (options.batch,), generator=generator)
            loss = F.cross_entropy(model(augment(x[batch], strength, generator)), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            history["loss"].append(loss.item())
            if step % 10 == 0 or step == options.steps - 1:
                print(f"  {label} @{size} step {step + 1}/{options.steps} loss {loss.item():.3f}", flush=True)
        seconds = time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            right = [(model(i).argmax(1) == t) for i, t in zip(x_test.split(64), y_test.split(64), strict=True)]
        history["accuracy"].append(torch.cat(right).float().mean().item())
        compiled, before = compiled_kernels() - before, compiled_kernels()
        history["compiled"].append(compiled)
        print(
            f"{label} stage {stage + 1}/{stages} @{size}, strength {strength:.2f}: {seconds:.1f} s, "
            f"test accuracy {history['accuracy'][-1]:.1%}, {compiled} kernels compiled",
            flush=True,
        )
    return history


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    import timm

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="efficientnetv2_rw_t")
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 48, 64], help="sides of the images, by stage")
    parser.add_argument("--steps", type=int, default=40, help="steps a stage")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/progressive.png"))
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = timm.create_model(options.model, num_classes=CLASSES)
    histories = {}
    for label in ("stock", "patched"):
        copied = copy.deepcopy(model)
        if label == "patched":
            ek.patch(copied, backend=options.backend)
        histories[label] = train(copied, options, label)
    plot(histories, options.out)
    return histories


if __name__ == "__main__":
    main()
