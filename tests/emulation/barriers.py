"""Removes each barrier of the CUDA kernels in turn, in a copy of the tree, and runs the emulated tests of the kernel.

    python -m tests.emulation.barriers [file of csrc/cuda ...]

prints a line per barrier, with the first test that failed, and exits with 1 if the tests passed without one of them. A
minute or two for each.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
BARRIER = re.compile(r"__sync(threads|warp)\(\);")
TESTS = {
    "depthwise_conv_bn_act.cu": "test_depthwise.py",
    "expand_depthwise.cu": "test_mbconv.py",
    "fused_mbconv.cu": "test_fused_mbconv.py",
    "gemm.cuh": "test_pointwise.py",
    "pointwise_conv_bn_act.cu": "test_pointwise.py",
    "squeeze_excite.cu": "test_squeeze_excite.py",
    "train_depthwise.cu": "test_training.py",
}


def first_failure(tree: Path, file: str) -> str | None:
    """The test that notices, or None."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/cuda/{TESTS[file]}"]
    result = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if result.returncode != 0 and not found:
        raise RuntimeError(result.stdout + result.stderr)
    return found[1] if found else None


def main(files: list[str]) -> int:
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "out", "dist", "*.pyc"))
        for file in files or TESTS:
            source = tree / "csrc" / "cuda" / file
            text = source.read_text()
            for barrier in BARRIER.finditer(text):
                source.write_text(text[: barrier.start()] + text[barrier.end() :])
                found = first_failure(tree, file)
                missed += found is None
                line = text.count("\n", 0, barrier.start()) + 1
                print(f"{file}:{line}: {found or 'NOBODY NOTICES'}", flush=True)
            source.write_text(text)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
