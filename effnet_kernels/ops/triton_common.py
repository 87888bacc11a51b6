"""What the Triton kernels share: activation and BatchNorm in an epilogue, tile configurations, the launch.

The file of an op, ``ops/<op>_triton.py``, has two functions:

* ``launch(out, *args)``: enqueue the kernels that fill ``out``, what the op's fake kernel allocates;
* ``run(*args)``: allocate and launch.

``mbconv`` is made of the ``launch`` functions of the other ops.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from effnet_kernels import tuning
from effnet_kernels.dispatch import Query
from effnet_kernels.ops.activations import CODES
from effnet_kernels.ops.common import to_nhwc

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

_INTERPRETED = tl.constexpr(INTERPRETED)
RELU = tl.constexpr(CODES["relu"])
RELU6 = tl.constexpr(CODES["relu6"])
SILU = tl.constexpr(CODES["silu"])
HARDSWISH = tl.constexpr(CODES["hardswish"])
SIGMOID = tl.constexpr(CODES["sigmoid"])
HARDSIGMOID = tl.constexpr(CODES["hardsigmoid"])


def supports(query: Query) -> tuple[bool, str]:
    """Device and dtype; the kernels take every shape, kernel size, stride and padding."""
    if query.device_type != ("cpu" if INTERPRETED else "cuda"):
        return False, f"the tensors are on {query.device}"
    if query.dtype not in DTYPES:
        return False, "only float32, float16 and bfloat16 have Triton kernels"
    if not INTERPRETED:
        index = torch.device(query.device).index
        what, least = ("bfloat16", (8, 0)) if query.dtype == torch.bfloat16 else ("Triton", (7, 5))
        if torch.cuda.get_device_capability(index) < least:
            needed = f"{what} needs compute capability {least[0]}.{least[1]}"
            return False, f"{needed}, {torch.cuda.get_device_name(index)} has less"
    return True, "any shape"


# ---- device code ----


def callee(function: Callable[..., Any]) -> Any:
    """``triton.jit`` for what kernels call, hashed at once.

    Triton hashes a kernel together with the globals of those callees that have been hashed before it. Left to the
    first launch, a kernel's key in the cache would depend on which other kernels were launched before.
    """
    jitted = triton.jit(function)
    getattr(jitted, "cache_key", None)  # the interpreter's functions have none
    return jitted


@callee
def reciprocal_of_sum(x):
    """1 / (1/4 + 2^x) by two hardware approximations within 2 ulp; the interpreter has no assembly."""
    if _INTERPRETED:
        y = 1.0 / (0.25 + tl.exp2(x))
    else:
        y = tl.inline_asm_elementwise(
            "{ .reg .f32 t; ex2.approx.ftz.f32 t, $1; add.f32 t, t, 0f3E800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return y


@callee
def sigmoid(x, EXACT: tl.constexpr):
    """1 / (1 + exp(-x)), NaN only for NaN: the exponential of -|x| cannot overflow.

    Rounding |x| log2(e) costs exp2 up to 80 ulp at |x| = 80, which vanishes in a 16-bit result. ``EXACT`` splits
    |x| into n ln(2) + r, |r| <= ln(2) / 2, first: every product with the upper part of ln(2) is exact. A GPU's exp2 is
    zero instead of a subnormal number, where x times it would still be a normal one: it gets 64 - n, in -95 ... 64.
    """
    if EXACT:
        a = tl.minimum(tl.abs(x), 110.0, propagate_nan=tl.PropagateNan.ALL)  # exp(-110) is 0 in float32
        n = tl.floor(a * 1.4426950408889634 + 0.5)
        r = (a - n * 0.693359375) + n * 2.12194440e-4
        e = tl.exp2(r * -1.4426950408889634) * tl.exp2(64.0 - n) * 5.421010862427522e-20  # 2^-64
        y = tl.where(x < 0, e, 1.0) / (1.0 + e)
    else:
        # Two hardware approximations within 2 ulp, where exp2 and / would add a dozen instructions for subnormals. All
        # is divided by 4 so that the reciprocal is normal up to where exp(-x) overflows, in stock layers too.
        y = 0.25 * reciprocal_of_sum(tl.fma(x, -1.4426950408889634, -2.0))
    return y


@callee
def activate(x, ACT: tl.constexpr, EXACT: tl.constexpr = True):
    """Activation number ``ACT`` of ``ops.activations`` of float32 values; NaN stays NaN.

    ``EXACT`` may be False where the result is rounded to 16 bits: see ``sigmoid``.
    """
    if ACT == RELU:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == RELU6:
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        x = tl.minimum(x, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == SILU:
        x = x * sigmoid(x, EXACT)
    elif ACT == SIGMOID:
        x = sigmoid(x, EXACT)
    elif ACT == HARDSWISH or ACT == HARDSIGMOID:
        gate = tl.maximum(x + 3.0, 0.0, propagate_nan=tl.PropagateNan.ALL)
        gate = tl.minimum(gate, 6.0, propagate_nan=tl.PropagateNan.ALL)
        if ACT == HARDSWISH:
            x = x * gate / 6.0
        else:
            x = gate / 6.0
    return x


@callee
def batch_norm_act(x, scale, shift, ACT: tl.constexpr, EXACT: tl.constexpr):
    """activate(x * scale + shift); scale and shift are broadcast to x.

    SiLU for a result of 16 bits is z / 4 * 1 / ((1 + exp(-z)) / 4), as in ``sigmoid``; a quarter of z costs nothing
    where scale and shift are quartered.
    """
    if ACT == SILU and not EXACT:
        x = x * (scale * 0.25) + shift * 0.25
        x *= reciprocal_of_sum(tl.fma(x, -5.770780163555854, -2.0))  # 4 log2(e)
    else:
        x = activate(x * scale + shift, ACT, EXACT)
    return x


@callee
def activate_gradient(grad, x, ACT: tl.constexpr, EXACT: tl.constexpr = True):
    """The gradient of x from that of ``activate(x)``, the choices at the kinks being torch's own."""
    if ACT == RELU:
        grad = tl.where(x <= 0, 0.0, grad)
    elif ACT == RELU6:
        grad = tl.where((x <= 0) | (x >= 6), 0.0, grad)
    elif ACT == SILU:
        s = sigmoid(x, EXACT)
        grad = grad * (s * (1.0 + x * (1.0 - s)))
    elif ACT == HARDSWISH:
        grad = tl.where(x >= 3, grad, tl.where(x <= -3, 0.0, grad * (x / 3.0 + 0.5)))
    return grad


@callee
def bn_affine(gamma_ptr, beta_ptr, mean_ptr, var_ptr, eps, offs, mask, EXACT: tl.constexpr):
    """BatchNorm as y * scale + shift for the channels ``offs``, in float32; zeros outside the mask.

    Without ``EXACT``, for a result that is rounded to 16 bits, one hardware approximation within 2 ulp: small tiles do
    this for few pixels.
    """
    gamma = tl.load(gamma_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    beta = tl.load(beta_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + offs, mask=mask, other=1.0).to(tl.float32)
    if EXACT:
        scale = tl.div_rn(gamma, tl.sqrt_rn(var + eps))
    else:
        scale = gamma * tl.rsqrt(var + eps)
    return scale, beta - mean * scale


@callee
def narrow(x, dtype: tl.constexpr):
    """float32 values in the dtype of a map, rounded to nearest even; the interpreter would truncate to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        rounded = tl.where(x == x, rounded, 0x7FC00000)
        result = (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result


@callee
def dot(a, b, acc):
    """acc + a @ b, products and sums in float32; the interpreter would multiply the bit patterns of bfloat16."""
    if _INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@callee
def mean_of_sums(at, ok, tiles, pixels, C: tl.constexpr, TILES: tl.constexpr):
    """Means from the sums of tiles, [tiles, C]: of the channels whose sums of the first tile are ``at``, where ``ok``.

    ``TILES`` rows are loaded at once and added to those before them, and all are added up at the end. 0 where masked.
    """
    # The first rows are not added to zeros: ptxas would put additions between the loads, which then wait in turn.
    t = tl.arange(0, TILES)
    sums = tl.load(at[None, :] + t[:, None] * C, mask=ok[None, :] & (t < tiles)[:, None], other=0.0).to(tl.float32)
    first = TILES
    while first < tiles:  # not `for`: the interpreter cannot count to a tensor under numpy 2.4
        t = first + tl.arange(0, TILES)
        mask = ok[None, :] & (t < tiles)[:, None]
        sums += tl.load(at[None, :] + t[:, None] * C, mask=mask, other=0.0).to(tl.float32)
        first += TILES
    total = tl.sum(sums, 0)
    return tl.div_rn(total, tl.zeros(total.shape, tl.float32) + pixels)


# ---- host code ----


def dense_map(x: Tensor | None) -> Tensor | None:
    """The map in dense [N, H, W, C] memory; None stays None."""
    return None if x is None else to_nhwc(x)


def dense(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Parameters in contiguous memory, copied only where they are not."""
    return [t if t.is_contiguous() else t.contiguous() for t in tensors]


class Config(NamedTuple):
    """Tile of one kernel: ``block`` in the order that the op's file states, and how Triton compiles it."""

    block: tuple[int, ...]
    num_warps: int
    num_stages: int = 2

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.block))} w{self.num_warps} s{self.num_stages}"


# In the ``with`` block of ``recording``: who gets the launches, and for GPUs of which column (``arch``).
_recorder: tuple[Callable[..., None], int] | None = None


@contextlib.contextmanager
def recording(record: Callable[..., None], arch: int) -> Iterator[None]:
    """Give ``record`` the arguments of ``launch_kernel`` in its place, with the tiles of ``arch``."""
    global _recorder
    before, _recorder = _recorder, (record, arch)
    try:
        yield
    finally:
        _recorder = before


# By key: a compiled variant, and what its launch takes; nothing where that is not known, and all launches go through
# Triton. The variant is kept because its module goes with it.
_compiled: dict[tuple[Any, ...], tuple[Any, ...]] = {}


def launch_kernel(
    kernel: Any,
    programs: int,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int | float],
    constants: tuple[Any, ...],
    config: Config,
) -> None:
    """Enqueue ``kernel[(programs,)](*tensors, *sizes, *constants)`` on the current stream of the tensors' device.

    Triton finds a kernel's compiled variant by formatting the types and values of all arguments into a string. Here
    the first call goes through Triton, and later ones through a dictionary. Its key is all that a variant may
    depend on, if the kernel lists every one of ``sizes`` under ``do_not_specialize`` and
    ``do_not_specialize_on_alignment``. What is found there is called as Triton's own launch calls it, without hooks;
    while somebody has put hooks on launches (a profiler), all calls go through Triton.

    Raises:
        RuntimeError: the variant would have to be compiled during a CUDA graph capture.
    """
    if _recorder is not None:
        _recorder[0](kernel, programs, tensors, sizes, constants, config)
        return
    if programs == 0:
        return
    if INTERPRETED:
        kernel[(programs,)](*tensors, *sizes, *constants, num_warps=config.num_warps, num_stages=config.num_stages)
        return
    device = tensors[0].get_device()  # type: ignore[union-attr]
    if device != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch_kernel(kernel, programs, tensors, sizes, constants, config)
        return
    wide = tuple(size >= 2**31 for size in sizes) if max(sizes) >= 2**31 else ()  # passed in 64 bits
    key = (
        kernel.fn, device, constants, config.num_warps, config.num_stages, wide,
        *[None if t is None else (t.dtype, t.data_ptr() % 16 == 0) for t in tensors],
    )  # fmt: skip
    compiled = _compiled.get(key)
    if compiled and not _listened_to():
        _, run, function, metadata, stream = compiled
        run(programs, 1, 1, stream(device), function, metadata, None, None, None, *tensors, *sizes, *constants)
        return
    if compiled is None and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{kernel.fn.__name__} is not compiled for these arguments: run them once before capturing a CUDA graph"
        )
    variant = kernel[(programs,)](
        *tensors, *sizes, *constants, num_warps=config.num_warps, num_stages=config.num_stages
    )
    if compiled is None and variant is not None:  # None: a hook on compilation has declined
        _compiled[key] = _launch_of(variant)


def _launch_of(variant: Any) -> tuple[Any, ...]:
    """A compiled variant, and what its launch takes: names that Triton does not document."""
    try:
        stream = triton.runtime.driver.active.get_current_stream
        return variant, variant.run, variant.function, variant.packed_metadata, stream
    except AttributeError:  # in this Triton they have others
        return ()


def _listened_to() -> bool:
    """Whether there are hooks on launches: since Triton 3.5 in lists, before that themselves or None."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def channel_block(channels: int) -> int:
    """The largest of 64, 32, 16 that pads ``channels`` by an eighth more than 16 would, at most.

    A warp's 16-byte loads then lie in few cache lines: 144 channels take 32, 240 to 1152 take 64.
    """
    limit = cdiv(channels, 16) * 18
    return next(block for block in (64, 32, 16) if cdiv(channels, block) * block <= limit)


def arch(device: torch.device) -> int:
    """Which column of a table of configurations a GPU takes: 75, 80, 90 or 100.

    Consumer GPUs (8.6, 8.9, 12.x) have neither the matrix instructions nor the shared memory of 9.0 and 10.x and take
    column 80, whose tiles need at most 99 KiB. The interpreter takes it too.
    """
    if _recorder is not None:
        return _recorder[1]
    return 80 if INTERPRETED else _arch(device.index)


@functools.cache
def _arch(index: int | None) -> int:
    return arch_of(torch.cuda.get_device_capability(index)[0])


def arch_of(major: int) -> int:
    """The column for GPUs of compute capability ``major``.x."""
    return {7: 75, 9: 90, 10: 100, 11: 100}.get(major, 80)


# The tile of every class met so far, by op, class and index of the device.
chosen: dict[tuple[Any, ...], Config] = {}


def config(op: str, default: Callable[..., Config], problem_class: tuple[Any, ...], device: torch.device) -> Config:
    """The tile for a class of problems: what ``effnet-kernels tune`` stored for this GPU, else ``default``.

    ``default(*problem_class, arch)`` is the rule in the op's file. Its arguments are what a kernel is
    specialised on (dtype, channels, window), never sizes of maps or batches.
    """
    if _recorder is not None:
        return default(*problem_class, arch(device))
    key = (op, problem_class, device.index)
    found = chosen.get(key)
    if found is None:
        name = None if INTERPRETED else torch.cuda.get_device_name(device)
        tuned = tuning.load(name).get(op, {}).get(tuning.class_name(problem_class)) if name else None
        found = default(*problem_class, arch(device)) if tuned is None else Config(*tuned)
        chosen[key] = found
    return found
