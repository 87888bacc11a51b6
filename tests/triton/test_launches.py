"""Triton's own launcher passes on what the ops mean: pointers, values, grid, stream, first time and later.

There is no GPU in this: ``libcuda/driver.c`` is a driver that writes down what arrives.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent / "libcuda"
INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def launched(driver: Path, cache: Path, **environment: str) -> tuple[list[bool], list[object]]:
    """In a process without the interpreter: which variants the cache had, and the launches."""
    record = cache.with_suffix(".json")
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    libraries = os.pathsep.join([str(driver), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    environment |= {"LD_LIBRARY_PATH": libraries, "TRITON_LIBCUDA_PATH": str(driver)}
    environment |= {"TRITON_CACHE_DIR": str(cache), "LAUNCHES_RECORD": str(record)}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        str(HERE / "launches.py"),
    ]
    result = subprocess.run(command, env=inherited | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(record.read_text())


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_launches_arrive_at_the_driver_and_a_second_process_compiles_nothing(tmp_path):
    command = ["cc", "-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", "-I", str(INCLUDE)]
    subprocess.run([*command, str(HERE / "driver.c"), "-o", str(tmp_path / "libcuda.so.1")], check=True)
    cached, launches = launched(tmp_path, tmp_path / "cache", CC="cc")
    assert len(cached) == 16
    assert cached.count(True) == 1  # the one that two devices share
    again, repeated = launched(tmp_path, tmp_path / "cache", CC="false")  # no launcher is compiled either
    assert again == [True] * 16
    assert repeated == launches
