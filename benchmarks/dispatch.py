"""Write ``effnet_kernels/dispatch.json``, the order of the GPU backends, from results measured on a GPU.

    python -m benchmarks.dispatch benchmarks/results/<GPU>.json

For each op its backends come in the order of the geometric mean of their times over the cases that all of them ran.
An op that was measured on fewer than two backends keeps its order.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.files import in_same_turns, levels
from effnet_kernels.benchmarking.contenders import ours
from effnet_kernels.benchmarking.environment import describe

TABLE = Path(__file__).resolve().parents[1] / "effnet_kernels" / "dispatch.json"
BACKENDS = ("cuda", "triton")
OF_BLOCKS = {"mbconv": ("mixed", *BACKENDS)}  # what has parts of several backends, too
# The word of a case that names its op (see shapes.py). The gate is measured as a part of the stand-alone SE.
OPS = {
    "depthwise": ("depthwise_conv_bn_act",),
    "fused": ("fused_mbconv",),
    "fused_mbconv": ("fused_mbconv",),
    "mbconv": ("mbconv",),
    "pointwise": ("pointwise_conv_bn_act",),
    "squeeze_excite": ("squeeze_excite", "squeeze_excite_gate"),
}


def orders(cases: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, list[str]]:
    """Backends by op, fastest first, from (case, its contenders)."""
    times: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case, contenders in cases:
        compared = in_same_turns(contenders)
        for op in next((OPS[word] for word in case.split() if word in OPS), ()):
            medians = {name: compared.get(ours(name), {}).get("median") for name in OF_BLOCKS.get(op, BACKENDS)}
            if None in medians.values():
                continue
            for name, median in medians.items():
                times[op][name].append(median)
    return {op: sorted(of, key=lambda name: statistics.geometric_mean(of[name])) for op, of in times.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    for file in options.results:
        content = json.loads(file.read_text())
        if content["environment"]["device_type"] != "cuda":
            parser.error(f"{file} was not measured on a GPU")
        results += [one for one in levels(file.stem, content).values() if one["level"] in ("op", "block")]
    table = json.loads(options.table.read_text())
    cases = [(case, one["contenders"]) for result in results for case, one in result["cases"].items()]
    found = orders(cases)
    if not found:
        parser.error(f"no case was measured on all of {', '.join(BACKENDS)}")
    order = {**table["order"], **found}
    rows = ",\n".join(f'  "{op}": {json.dumps(order[op])}' for op in sorted(order))
    measured = json.dumps(describe(results[0]["environment"]))
    options.table.write_text(f'{{\n "measured": {measured},\n "order": {{\n{rows}\n }}\n}}\n')
    print(f"{', '.join(sorted(found))}: {options.table}")


if __name__ == "__main__":
    main()
