"""Whole patched models on the CPU: one result for any number of threads and callers, and no thread too many.

Each test is a process of its own: only there the number of threads that are started shows.
"""

import subprocess
import sys
import textwrap

import pytest

from effnet_kernels.dispatch import backends

pytest.importorskip("timm")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.skipif(not backends()["cpu"][0], reason=backends()["cpu"][1]),
]

PRELUDE = '''
import os, signal, threading, time
import torch
import effnet_kernels as ek
from effnet_kernels import native
from tests.models import calibrate, images, randomize
from tests.whole_models import B0, V2, narrow

def started():
    return len(os.listdir("/proc/self/task"))

def model(stages, dtype=torch.float32):
    return ek.patch(calibrate(randomize(narrow(stages)), images(4, 64)).to(dtype), backend="cpu")

def in_a_fork(function):
    """Its result, a small number, in a child of this process; 255 where it raises, negative where it never ends."""
    child = os.fork()
    if child == 0:
        result = 255
        try:
            signal.alarm(60)
            result = function()
        finally:
            os._exit(result)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

torch.set_num_threads(1)
alone = started()
'''


def run(program: str) -> None:
    code = PRELUDE + textwrap.dedent(program)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_models_have_the_same_bits_for_any_number_of_threads():
    run(
        """
        cases = [(model(stages, dtype), images(n, 96).to(dtype))
                 for stages in (B0, V2) for dtype in (torch.float32, torch.bfloat16) for n in (1, 4)]
        for isa in native.instruction_sets():
            try:
                native.set_instruction_set(isa)
            except ValueError:
                continue  # not on this machine
            torch.set_num_threads(1)
            with torch.inference_mode():
                expected = [m(x) for m, x in cases]
                for threads in (2, 3):
                    torch.set_num_threads(threads)
                    for (m, x), y in zip(cases, expected, strict=True):
                        for _ in range(4):  # the last ones are programs
                            assert torch.equal(m(x), y), (isa, threads)
                    assert started() == alone + threads - 1
        """
    )


def test_two_callers_of_one_model_have_the_bits_of_one():
    run(
        """
        m, inputs, wrong = model(B0), [images(n, 96) for n in (1, 3)], []
        with torch.inference_mode():
            expected = [m(x) for x in inputs]
        torch.set_num_threads(2)

        @torch.inference_mode()
        def call(i):
            for _ in range(20):
                if not torch.equal(m(inputs[i]), expected[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=call, args=(i,)) for i in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        """
    )


def test_two_callers_share_the_threads():
    """A call starts a thread where it is alone and none where another call has taken them all."""
    run(
        """
        torch.set_num_threads(2)
        block, small = ek.MBConv(16, 16).eval(), images(1, 32, 16)
        heavy, large = ek.MBConv(128, 128, exp_ratio=6.0).eval(), images(24, 56, 128)  # tens of GFLOP
        large = large.contiguous(memory_format=torch.channels_last)
        more, during = [], []

        @torch.inference_mode()
        def call():
            before = started()
            block(small)
            more.append(started() - before)

        def of_its_own(function):
            thread = threading.Thread(target=function)
            thread.start()
            return thread

        @torch.inference_mode()
        def occupy():
            block(small)  # its threads are there
            during.append(time.monotonic())
            heavy(large)
            during.append(time.monotonic())

        of_its_own(call).join()
        assert more == [1]
        for _ in range(20):  # until a call has begun and ended within the other one, where that had begun
            during.clear()
            other = of_its_own(occupy)
            while not during:
                time.sleep(0.01)
            time.sleep(0.02)
            of_its_own(call).join()
            within = len(during) == 1
            other.join()
            if within and more[-1] == 0:
                break
        assert within, "the other call has always ended too early for this test"
        assert more[-1] == 0
        """
    )


def test_a_fork_during_a_call_leaves_the_child_all_threads():
    """The call of another thread is none of the child's: the first call there starts as many threads as any."""
    run(
        """
        block, small = ek.MBConv(16, 16).eval(), images(1, 32, 16)
        heavy, large = ek.MBConv(128, 128, exp_ratio=6.0).eval(), images(24, 56, 128)  # tens of GFLOP
        large = large.contiguous(memory_format=torch.channels_last)
        torch.set_num_threads(2)  # now: a thread that has used OpenMP's cannot fork and use them again
        during = []

        @torch.inference_mode()
        def occupy():
            during.append("begun")
            heavy(large)
            during.append("ended")

        @torch.inference_mode()
        def more():
            before = started()
            block(small)
            return started() - before

        for _ in range(20):  # until the fork is within the other call
            during.clear()
            other = threading.Thread(target=occupy)
            other.start()
            while not during:
                time.sleep(0.01)
            time.sleep(0.05)
            begun = during == ["begun"]
            found = in_a_fork(more)
            other.join()
            if begun:
                break
        assert begun, "the other call has always ended too early for this test"
        assert found == 1, found
        """
    )
