"""The tests of the native CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer: ``make sanitize``.

Their library is in build/sanitized. Arguments are pytest's.
"""

import os
import sys

from tests.emulation.build import asan_environment

# Of the reference there is nothing to sanitize; tests/guarded.py has its own way to see what is touched.
TESTS = [
    "tests/sanitizers",
    "tests/ops",
    "tests/training",
    "tests/modules",
    "--exhaustive",
    "-k",
    "not reference and not bounds",
]

if __name__ == "__main__":
    environment = {**os.environ, **asan_environment(), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--capture=sys",
        "-p",
        "tests.sanitizers.plugin",
        *(sys.argv[1:] or TESTS),
    ]
    os.execve(sys.executable, command, environment)
