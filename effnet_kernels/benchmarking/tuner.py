"""What ``effnet-kernels tune`` does: find the fastest tiles of the Triton kernels on this GPU.

A patched model runs once, and every launch of its kernels is kept with its arguments. Each problem class (see
``triton_common.config``) then goes downhill from the tile it has: the neighbours, one number doubled or halved, or a
side together with the warps, are measured on the launches of the class, and the fastest becomes the next tile, until
none is faster by ``MARGIN``. Neighbours that do not compile are passed over, and so are those whose results differ by
more than a sum's order can.
Classes that move the most data come first, so that a short budget is well spent.
"""

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from effnet_kernels import tuning
from effnet_kernels.benchmarking import timing
from effnet_kernels.dispatch import kernel_of
from effnet_kernels.ops import triton_common
from effnet_kernels.ops.triton_common import Config

# The functions that look up a tile and launch with it; everything else is made of them.
LAUNCHERS = {
    "depthwise_conv_bn_act": "launch_sums",
    "fused_mbconv": "launch",
    "pointwise_conv_bn_act": "launch",
    "squeeze_excite": "launch",
    "squeeze_excite_gate": "launch_sums",
}
MARGIN = 0.02  # a tile that is not faster by so much is not worth an entry
SECONDS = 0.1  # timed for about so long, each tile
MAX_WARPS, MAX_STAGES = 16, 5

Measure = Callable[[dict[Config, timing.Call]], dict[Config, float]]


class LauncherCall(NamedTuple):
    """One call of a launcher, with its tensors."""

    function: Callable[..., Tensor | None]
    args: tuple[Any, ...]

    def __call__(self) -> list[Tensor]:
        """Launch, and return what can be compared between tiles: the output, and sums of tiles added up."""
        sums = self.function(*self.args)
        return [self.args[0]] if sums is None else [self.args[0], sums.sum(1)]

    def shape(self) -> tuple[Any, ...]:
        """What tells launches of one class apart."""
        return tuple(tuple(arg.shape) if isinstance(arg, Tensor) else str(arg) for arg in self.args[:2])


class Tuned(NamedTuple):
    """What came of one problem class; times are seconds of its launches in one forward."""

    op: str
    problem_class: tuple[Any, ...]
    before: Config
    after: Config
    seconds_before: float
    seconds_after: float


@torch.inference_mode()
def tune(
    model: nn.Module,
    x: Tensor,
    *,
    minutes: float = 10.0,
    rounds: int | None = None,
    measure: Measure | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> Iterator[Tuned]:
    """Tune the classes that ``model``, patched, meets on ``x``; yields each as it is done.

    The tiles found are in use from then on in this process; ``save`` stores them.

    Args:
        model: a patched model on the GPU, in eval mode.
        x: its input, [N, 3, H, W]. Activations of one forward are kept, all of them.
        minutes: no class is begun after so long.
        rounds: so many steps of the search at most, of each class; by default until no neighbour is faster.
        measure: seconds of each call; by default a median of CUDA graph replays.
        progress: told what is being done.
    """
    measure = measure or _measure
    end = time.monotonic() + 60 * minutes
    classes = record(model, x)
    cost = {key: sum(_elements(launch) for launch in launches) for key, launches in classes.items()}
    for i, key in enumerate(sorted(classes, key=lambda key: -cost[key]), 1):
        if time.monotonic() > end:
            progress(f"out of time after {i - 1} of {len(classes)} classes")
            return
        progress(f"{i}/{len(classes)} {key[0]} {tuning.class_name(key[1])}")
        yield _tune_class(key, classes[key], measure, rounds)


def save(device_name: str, tuned: Tuned) -> None:
    """Store a tile that is better than the one before; the others would only hide later defaults."""
    if tuned.after != tuned.before:
        tuning.save(device_name, {tuned.op: {tuning.class_name(tuned.problem_class): tuned.after}})


def record(model: nn.Module, x: Tensor) -> dict[tuple[Any, ...], list[LauncherCall]]:
    """The launches of one forward by class, one of each shape as often as it occurs."""
    classes: dict[tuple[Any, ...], list[LauncherCall]] = {}

    def recording(op: str, function: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def launcher(*args: Any) -> Tensor | None:
            known = dict(triton_common.chosen)
            triton_common.chosen.clear()
            result = function(*args)
            (key,) = (key for key in triton_common.chosen if key[0] == op)
            triton_common.chosen.update(known)
            launches = classes.setdefault(key, [])
            launch = LauncherCall(function, args)
            launches.append(next((each for each in launches if each.shape() == launch.shape()), launch))
            return result

        return launcher

    with contextlib.ExitStack() as patches:  # launchers call each other by way of their modules
        for op, name in LAUNCHERS.items():
            module = sys.modules[kernel_of(op, "triton").__module__]
            launcher = getattr(module, name)
            patches.callback(setattr, module, name, launcher)
            setattr(module, name, recording(op, launcher))
        model(x)
    return classes


def _elements(launch: LauncherCall) -> int:
    return sum(arg.numel() for arg in launch.args if isinstance(arg, Tensor))


def neighbours(config: Config) -> list[Config]:
    """The tiles one step away. A side may move together with the warps that share it: alone, each can be uphill."""
    warps, halved = config.num_warps * 2, config.num_warps // 2
    found = [config._replace(num_warps=other) for other in (warps, halved)]
    for i, size in enumerate(config.block):
        for other, with_it in ((size * 2, warps), (size // 2, halved)):
            wider = config._replace(block=(*config.block[:i], other, *config.block[i + 1 :]))
            found += [wider, wider._replace(num_warps=with_it)]
    found = [other for other in found if min(other.block) >= 1 and 1 <= other.num_warps <= MAX_WARPS]
    for stages in (config.num_stages + 1, config.num_stages - 1):
        if 1 <= stages <= MAX_STAGES:
            found.append(config._replace(num_stages=stages))
    return found


def _tune_class(
    key: tuple[Any, ...], launches: list[LauncherCall], measure: Measure, rounds: int | None = None
) -> Tuned:
    def using(config: Config) -> timing.Call:
        def run() -> None:
            triton_common.chosen[key] = config
            for launch in launches:
                launch()

        return run

    before = best = triton_common.chosen[key]
    expected = [[t.clone() for t in launch()] for launch in launches]
    rejected: set[Config] = set()
    for _ in itertools.count() if rounds is None else range(rounds):
        candidates = [config for config in neighbours(best) if config not in rejected]
        right = [config for config in candidates if _right(key, config, launches, expected)]
        rejected.update(set(candidates) - set(right))
        times = measure({config: using(config) for config in (best, *right)})
        fastest = min(times, key=lambda config: times[config])
        if times[fastest] > (1 - MARGIN) * times[best]:
            break
        best = fastest
    times = measure({config: using(config) for config in (before, best)})
    triton_common.chosen[key] = best
    return Tuned(key[0], key[1], before, best, times[before], times[best])


def _right(key: tuple[Any, ...], config: Config, launches: list[LauncherCall], expected: list[list[Tensor]]) -> bool:
    """Whether a tile compiles and computes what the first one did, but for the order of sums."""
    triton_common.chosen[key] = config
    try:
        for launch, wanted in zip(launches, expected, strict=True):
            for got, reference in zip(launch(), wanted, strict=True):
                error = (got.double() - reference.double()).square().mean()
                scale = reference.double().square().mean()
                if not error <= (16 * torch.finfo(reference.dtype).eps) ** 2 * scale:
                    return False
    except Exception:  # a tile too small for a matrix instruction, too large for the chip: Triton has many errors
        return False
    return True


def _measure(calls: dict[Config, timing.Call]) -> dict[Config, float]:
    """Medians of replays, taking turns; inputs as warm as in a model, where a kernel reads what the last one wrote."""
    graphs = {}
    for config, call in calls.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graphs[str(config)] = graph
    replays = {name: graph.replay for name, graph in graphs.items()}
    samples = timing.interleaved(replays, seconds=SECONDS, device="cuda")
    return {config: statistics.median(samples[str(config)]) for config in calls}
