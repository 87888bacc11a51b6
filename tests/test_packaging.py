"""The package alone: what importing it brings in, and life without the extras or the native library."""

import subprocess
import sys
import textwrap

import pytest

EXTRAS = ("timm", "torchvision", "matplotlib", "PIL", "sklearn", "onnx", "onnxruntime", "openvino", "pytest")


def run(code: str) -> str:
    """Run code in a fresh interpreter, with every optional package out of reach where it calls ``block()``."""
    prelude = f"""
        import sys
        def block(*names):
            for name in names:
                sys.modules[name] = None  # makes `import name` raise ImportError
        EXTRAS = {EXTRAS!r}
    """
    script = textwrap.dedent(prelude) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_brings_in_neither_triton_nor_extras():
    run("""
        import torch
        before = set(sys.modules)
        import effnet_kernels, effnet_kernels.functional
        new = {name.partition(".")[0] for name in set(sys.modules) - before}
        assert not new & {"triton", *EXTRAS}, new & {"triton", *EXTRAS}
    """)


def test_modules_and_functions_work_without_extras():
    run("""
        block("triton", *EXTRAS)
        import torch
        import effnet_kernels as ek
        block_ = ek.MBConv(16, 24).eval()
        with torch.inference_mode():
            assert block_(torch.randn(1, 16, 8, 8)).shape == (1, 24, 8, 8)
    """)


def test_command_line_without_extras_says_which_to_install():
    printed = run("""
        block(*EXTRAS)
        from effnet_kernels import cli
        assert cli.main(["info"]) == 0
        sys.stderr = sys.stdout
        assert cli.main(["verify", "--model", "efficientnet_b0"]) == 2
        assert cli.main(["demo"]) == 2
    """)
    assert "pip install 'effnet-kernels[timm]'" in printed
    assert "pip install 'effnet-kernels[demo]'" in printed


def test_patch_works_with_torchvision_alone():
    pytest.importorskip("torchvision")
    run("""
        block("timm")
        import effnet_kernels as ek, torch
        from torchvision.models import efficientnet_b0
        model = ek.patch(efficientnet_b0().eval())
        assert ek.report(model).patched
    """)


def test_patch_works_without_the_native_library():
    pytest.importorskip("timm")
    printed = run("""
        from pathlib import Path
        import torch, timm
        from effnet_kernels import native
        native._CPU_LIBRARY = Path("/nowhere/_native_cpu.so")
        import effnet_kernels as ek
        available, reason = ek.backends()["cpu"]
        assert not available
        print(reason)
        stock = timm.create_model("efficientnet_b0").eval()
        x = torch.randn(1, 3, 64, 64)
        with torch.inference_mode():
            expected = stock(x)
            for backend in ("auto", "reference"):
                torch.testing.assert_close(ek.patch(stock, backend=backend)(x), expected)
        try:
            ek.patch(stock, backend="cpu")
        except RuntimeError as error:
            print(error)
        else:
            raise AssertionError("a backend that is not there was accepted")
    """)
    assert printed.count("was not built") == 2
