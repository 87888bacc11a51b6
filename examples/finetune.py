"""Fine-tuning in two phases: a new head on a frozen backbone, then everything at a small learning rate.

    python examples/finetune.py --model efficientnet_b0 --pretrained

Trains a stock and a patched copy of the same model on scikit-learn's handwritten digits (1797 images of 8 x 8, ten
classes, in the package) and plots both learning curves. In phase 1 only the head has gradients, so a patched
backbone keeps no activations at all. Without ``--pretrained`` the weights are seeded and nothing is downloaded.

Needs timm or torchvision, scikit-learn and matplotlib: pip install 'effnet-kernels[demo]'.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import effnet_kernels as ek

CLASSES = 10


def digits(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; images [N, 3, size, size] with mean 0, shuffled once."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().div(8.0).sub(1.0)[:, None]
    images = F.interpolate(images, (size, size), mode="bilinear").expand(-1, 3, -1, -1)
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1500], labels[:1500], images[1500:], labels[1500:]


def build(library: str, name: str, pretrained: bool) -> tuple[nn.Module, nn.Module]:
    """The model with a new head of ten classes, and that head."""
    torch.manual_seed(0)
    if library == "timm":
        import timm

        model = timm.create_model(name, pretrained=pretrained, num_classes=CLASSES)
        return model, model.get_classifier()
    import torchvision

    model = torchvision.models.get_model(name, weights="DEFAULT" if pretrained else None)
    model.classifier[1] = nn.Linear(model.classifier[1].in_features, CLASSES)
    return model, model.classifier[1]


def set_phase(model: nn.Module, head: nn.Module, phase: int) -> str:
    """Phase 1 trains the head alone, phase 2 everything; returns how much that is."""
    model.requires_grad_(phase == 2)
    head.requires_grad_(True)
    model.train()
    if phase == 1:  # a frozen backbone keeps the statistics that its weights belong to
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"phase {phase}: {trainable:,} trainable of {sum(p.numel() for p in model.parameters()):,} parameters"


def train(model: nn.Module, head: nn.Module, data: tuple[Tensor, ...], options: argparse.Namespace, label: str) -> dict:
    """Both phases; the loss of every step, the test accuracy behind every epoch, and the seconds."""
    x, y, x_test, y_test = data
    history: dict = {"loss": [], "accuracy": [], "seconds": 0.0}
    steps = len(x) // options.batch if options.steps is None else options.steps
    for phase, epochs, rate in ((1, options.head_epochs, 1e-2), (2, options.epochs, 1e-3)):
        if epochs == 0:
            continue
        print(f"{label}, {set_phase(model, head, phase)}", flush=True)
        torch.manual_seed(phase)  # dropout and stochastic depth
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        for epoch in range(epochs):
            set_phase(model, head, phase)
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(100 * phase + epoch))
            for step in range(steps):
                start = time.perf_counter()
                batch = order[step * options.batch : (step + 1) * options.batch]
                loss = F.cross_entropy(model(x[batch]), y[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                history["seconds"] += time.perf_counter() - start
                history["loss"].append(loss.item())
                if step % 10 == 0 or step == steps - 1:
                    print(f"  epoch {epoch + 1}/{epochs} step {step + 1}/{steps} loss {loss.item():.3f}", flush=True)
            model.eval()
            with torch.no_grad():
                right = [(model(i).argmax(1) == t) for i, t in zip(x_test.split(64), y_test.split(64), strict=True)]
            history["accuracy"].append(torch.cat(right).float().mean().item())
            print(f"  epoch {epoch + 1}/{epochs} test accuracy {history['accuracy'][-1]:.1%}", flush=True)
    return history


def plot(histories: dict[str, dict], file: Path) -> None:
    """Losses and accuracies of all runs in one picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for (name, history), style in zip(histories.items(), ("-", "--"), strict=False):
        left.plot(history["loss"], style, label=name)
        right.plot(range(1, len(history["accuracy"]) + 1), history["accuracy"], style, marker="o", label=name)
    left.set(xlabel="step", ylabel="loss", yscale="log")
    right.set(xlabel="epoch", ylabel="test accuracy")
    left.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    plt.close(figure)
    print(file)


def main(arguments: list[str] | None = None) -> dict[str, dict]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--library", choices=("timm", "torchvision"), default="timm")
    parser.add_argument("--model", default="efficientnet_b0")
    parser.add_argument("--pretrained", action="store_true", help="download the library's weights")
    parser.add_argument("--size", type=int, default=64, help="side of the images")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--head-epochs", type=int, default=1, help="phase 1")
    parser.add_argument("--epochs", type=int, default=3, help="phase 2")
    parser.add_argument("--steps", type=int, default=None, help="steps an epoch; default: the whole training set")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--out", type=Path, default=Path("out/finetune.png"))
    options = parser.parse_args(arguments)
    data = digits(options.size)
    model, _ = build(options.library, options.model, options.pretrained)
    histories = {}
    for label in ("stock", "patched"):
        copied = copy.deepcopy(model)
        head = copied.get_submodule("classifier" if options.library == "timm" else "classifier.1")
        if label == "patched":
            ek.patch(copied, backend=options.backend)
        histories[label] = train(copied, head, data, options, label)
    for label, history in histories.items():
        accuracy = f", test accuracy {history['accuracy'][-1]:.1%}" if history["accuracy"] else ""
        print(f"{label}: {history['seconds']:.1f} s of training, last loss {history['loss'][-1]:.4f}{accuracy}")
    plot(histories, options.out)
    return histories


if __name__ == "__main__":
    main()
