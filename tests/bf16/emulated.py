"""A pytest plugin: the process runs on the emulated CPU library instead of the installed one."""

from effnet_kernels import native
from tests.bf16 import build

native._CPU_LIBRARY = build.library()
