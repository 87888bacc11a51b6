"""Peak memory of a patched forward is below stock's."""

import subprocess
import sys

import pytest

from effnet_kernels.dispatch import backends

# Resident memory, because the kernels' scratch is not the allocator's. The small first forward brings in
# libraries, threads and packed weights, which stay; the peak counter is cleared behind it.
PROGRAM = """
import sys, torch, timm
import effnet_kernels
model = timm.create_model("efficientnet_b0").eval().to(memory_format=torch.channels_last)
if sys.argv[1] == "patched":
    effnet_kernels.patch(model)
x = torch.randn(4, 3, 224, 224).to(memory_format=torch.channels_last)
with torch.inference_mode():
    model(x[:1, :, :64, :64].contiguous(memory_format=torch.channels_last))
    resident = int(open("/proc/self/statm").read().split()[1]) * 4
    open("/proc/self/clear_refs", "w").write("5")
    model(x)
(peak,) = (int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(peak - resident)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.skipif(not backends()["cpu"][0], reason="without kernels a patched model runs stock")
def test_peak_of_a_forward_is_below_stock():
    pytest.importorskip("timm")

    def peak(kind: str) -> int:
        done = subprocess.run([sys.executable, "-c", PROGRAM, kind], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert peak("patched") < 0.7 * peak("stock")
