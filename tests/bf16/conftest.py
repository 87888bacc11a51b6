"""Where the processor has all instructions, tests/ops runs on them and nothing is left to emulate."""

from tests.processor import LACKING

collect_ignore = [] if LACKING else ["test_ops.py"]
