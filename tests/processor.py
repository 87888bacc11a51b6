"""Which builds of the CPU kernels this processor runs, and which of the others are emulated."""

from effnet_kernels import native
from tests.bf16 import build


def _runs(isa: str) -> bool:
    try:
        native.set_instruction_set(isa)
    except ValueError:
        return False
    finally:
        native.set_instruction_set("auto")
    return True


NATIVE = [isa for isa in native.INSTRUCTION_SETS[1:] if native.cpu_available()[0] and _runs(isa)]
LACKING = [isa for isa in build.MACROS if isa not in NATIVE]
EMULATED = LACKING if build.unavailable() is None else []
