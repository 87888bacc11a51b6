"""The demo: a photograph through three models, stock and patched; what they say, how long they take, a plot."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels.benchmarking import UserError, contenders, plots, tables
from effnet_kernels.benchmarking.environment import describe, environment
from effnet_kernels.benchmarking.models import create_model, require

MODELS = (("timm", "efficientnet_b0"), ("timm", "tf_efficientnetv2_s"), ("torchvision", "efficientnet_b0"))
PHOTOGRAPH = "china.jpg"  # one of the two in scikit-learn's wheel


class Outcome(NamedTuple):
    """One model on the photograph."""

    title: str
    stock_logits: Tensor  # [classes]
    patched_logits: Tensor  # [classes]
    results: dict[str, dict[str, Any]]  # of contenders.compare


def run(
    *,
    out: Path,
    pretrained: bool,
    image: str | None,
    size: int | None,
    seconds: float,
    device: str,
    progress: Callable[[str], None],
) -> int:
    """Print the comparison and write ``out/demo.png``; 1 if a patched model disagrees with stock, else 0."""
    photograph = _photograph(image)
    plots.pyplot()  # a missing extra is said now, not after the measurements
    categories = require("torchvision.models", "demo").EfficientNet_B0_Weights.IMAGENET1K_V1.meta["categories"]
    weights = "pretrained" if pretrained else "seeded (the classes mean nothing; --pretrained fetches real weights)"
    print(f"photograph {image or PHOTOGRAPH}, {photograph.width} x {photograph.height}; weights {weights}")
    outcomes = []
    for index, (library, name) in enumerate(MODELS, 1):
        progress(f"[{index}/{len(MODELS)}] {library} {name}: building")
        stock = create_model(name, library, pretrained=pretrained)
        x = _transform(stock, name, library, size)(photograph)[None].to(device)
        title = f"{library} {name} @{x.shape[-1]}"
        outcomes.append(_outcome(title, stock.to(device), x, seconds, progress))
        _print(outcomes[-1], categories)
    record = environment(device)
    print(f"\nmeasured on {describe(record)}")
    file = out / "demo.png"
    _plot(outcomes, photograph, categories, record, file)
    print(f"plot in {file}")
    return 1 if any("wrong" in result for outcome in outcomes for result in outcome.results.values()) else 0


def _outcome(title: str, stock: nn.Module, x: Tensor, seconds: float, progress: Callable[[str], None]) -> Outcome:
    with torch.inference_mode():
        stock_logits, patched_logits = stock(x)[0], contenders.patched(stock, "auto")(x)[0]
    names = (contenders.STOCK, contenders.CHANNELS_LAST, contenders.ours("auto"))
    results = contenders.compare(stock, x, names, seconds=seconds, progress=progress)
    return Outcome(title, stock_logits.float().cpu(), patched_logits.float().cpu(), results)


def _print(outcome: Outcome, categories: list[str]) -> None:
    difference = (outcome.stock_logits - outcome.patched_logits).abs().max().item()
    scale = outcome.stock_logits.abs().max().item()
    print(f"\n{outcome.title}")
    print(f"logits differ by at most {difference:.2e}; the largest is {scale:.3g}")
    rows = []
    for rank, (a, b) in enumerate(zip(_top(outcome.stock_logits), _top(outcome.patched_logits), strict=True), 1):
        rows.append((str(rank), *(f"{categories[i]} {p:.4f}" for i, p in (a, b))))
    print(tables.text_table(("top", "stock", "patched"), rows))
    print(tables.comparison_table(outcome.results, batch=1))
    ours, stock = contenders.ours("auto"), contenders.STOCK
    ratios = [tables.speedup(outcome.results, ours, over) for over in (stock, contenders.CHANNELS_LAST)]
    if all(ratios):
        print(f"patched is {ratios[0]:.2f}x as fast as {stock}, {ratios[1]:.2f}x as {contenders.CHANNELS_LAST}")


def _top(logits: Tensor) -> list[tuple[int, float]]:
    values, indices = logits.softmax(0).topk(5)
    return list(zip(indices.tolist(), values.tolist(), strict=True))


def _photograph(file: str | None) -> Any:
    """The image as RGB."""
    image = require("PIL.Image", "demo")
    if file is not None:
        try:
            return image.open(file).convert("RGB")
        except OSError as error:
            raise UserError(f"--image {file}: {error}") from error
    return image.fromarray(require("sklearn.datasets", "demo").load_sample_image(PHOTOGRAPH))


def _transform(model: nn.Module, name: str, library: str, size: int | None) -> Callable[[Any], Tensor]:
    """The preprocessing that the model's weights were trained for; ``size`` replaces its crop."""
    if library == "timm":
        data = require("timm.data", "demo")
        config = data.resolve_data_config({}, model=model)
        if size is not None:
            config["input_size"] = (3, size, size)
        return data.create_transform(**config)
    models = require("torchvision.models", "demo")
    preset = models.get_model_weights(name).DEFAULT.transforms
    return preset() if size is None else preset(crop_size=size, resize_size=size)


def _plot(outcomes: list[Outcome], photograph: Any, categories: list[str], record: dict[str, Any], file: Path) -> None:
    figure, axes = plots.pyplot().subplots(1, 3, figsize=(15, 5), layout="constrained")
    axes[0].imshow(photograph)
    axes[0].axis("off")
    best = [categories[_top(outcome.patched_logits)[0][0]] for outcome in outcomes]
    axes[0].set_title("patched top-1: " + ", ".join(best), fontsize=8)
    for outcome in outcomes:
        axes[1].scatter(outcome.stock_logits, outcome.patched_logits, s=4, label=outcome.title)
    axes[1].set_xlabel("stock logit")
    axes[1].set_ylabel("patched logit")
    axes[1].legend(fontsize=7)
    plots.draw_cases(axes[2], {outcome.title: outcome.results for outcome in outcomes})
    plots.caption(figure, record)
    plots.save(figure, file)
