"""A pytest plugin: the process runs on the emulated CPU library, of EMULATED_SET, instead of the installed one."""

import os

from effnet_kernels import native
from tests.bf16 import build

native._CPU_LIBRARY = build.library(os.environ["EMULATED_SET"])
