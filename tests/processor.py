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


NATIVE = [isa for isa in native.instruction_sets() if _runs(isa)] if native.cpu_available()[0] else []
LACKING = [isa for isa in build.EMULATE if isa not in NATIVE]
EMULATED = LACKING if build.unavailable() is None else []
