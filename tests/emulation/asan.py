"""Runs pytest, with the arguments given, in a process that has AddressSanitizer: the emulated kernels are then built
with it. ``python -m tests.emulation.asan tests/cuda``"""

import os
import sys

from tests.emulation.build import asan_environment

if __name__ == "__main__":
    environment = {**os.environ, **asan_environment()}
    os.execve(sys.executable, [sys.executable, "-m", "pytest", *sys.argv[1:]], environment)
