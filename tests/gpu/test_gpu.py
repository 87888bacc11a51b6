"""What only a GPU can show: graph capture, streams, 64-bit offsets, torch.compile and autocast on the device."""

import copy

import pytest
import torch
from torch import Tensor

import effnet_kernels as ek
from benchmarks.training_step import Step
from effnet_kernels import functional as F
from effnet_kernels.benchmarking import timing
from effnet_kernels.benchmarking.agreement import agreement, exact_output
from effnet_kernels.dispatch import Query, automatic, backends, implementation
from effnet_kernels.modules.program import KEPT_ATTRIBUTE, Captured
from tests import whole_models
from tests.models import calibrate, images, randomize
from tests.ops.device import on_device, opcheck
from tests.ops.inputs import SAMPLES, sample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
BACKENDS = ["mixed", "triton", "cuda"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    available, reason = backends()[request.param]
    if not available:
        pytest.skip(reason)
    return request.param


class Call:
    """One sample problem on the GPU; ``x`` may be filled anew between calls."""

    def __init__(self, name: str, backend: str, dtype: torch.dtype) -> None:
        # The gate's problem is float32 whatever the maps are.
        problem = sample(name, torch.float32 if name == "squeeze_excite_gate" else dtype)
        self.function, self.backend = problem.function, backend
        (self.x, *self.args), self.kwargs = on_device((problem.args, problem.kwargs))
        self.x = self.x.contiguous(memory_format=torch.channels_last) if self.x.dim() == 4 else self.x

    @torch.no_grad()
    def __call__(self) -> list[Tensor]:
        result = self.function(self.x, *self.args, **self.kwargs, backend=self.backend)
        return list(result) if isinstance(result, tuple) else [result]


def equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_captured_call_follows_its_input(name, backend, dtype):
    """The graph replays the call on whatever the input holds by then, to the bit."""
    call = Call(name, backend, dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        call.x.copy_(torch.randn(call.x.shape, generator=generator))
        for result in captured:
            result.fill_(torch.nan)
        graph.replay()
        assert equal(captured, call())
        assert all(result.isfinite().all() for result in captured)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_call_waits_for_its_own_stream_and_no_other(name, backend):
    """Input that arrives late on the stream of the call: a launch elsewhere would read what was there before."""
    call = Call(name, backend, torch.float16)
    x = call.x.clone()
    expected = call()
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        call.x.fill_(torch.nan)
        torch.cuda._sleep(20_000_000)
        call.x.copy_(x)
        got = call()
        stream.synchronize()
    assert equal(got, expected)


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_many_runs_give_the_same_bits(name, backend, dtype):
    """Under load, when blocks finish in any order. Also what the sanitizers look at: every kernel, small."""
    call = Call(name, backend, dtype)
    expected = call()
    assert all(equal(call(), expected) for _ in range(20))


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name, backend):
    opcheck(sample(name), backend)


@torch.no_grad()
def test_nothing_compiles_during_a_capture():
    available, reason = backends()["triton"]
    if not available:
        pytest.skip(reason)
    x = torch.randn(1, 13, 9, 9, device="cuda", dtype=torch.float16)  # 13 channels: nobody has compiled for them
    weight, ones = torch.ones(13, 1, 3, 3, device="cuda", dtype=torch.float16), torch.ones(13, device="cuda")
    with (
        pytest.raises(RuntimeError, match="run them once before capturing a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        F.depthwise_conv_bn_act(x, weight, F.BatchNorm(ones, ones, ones, ones), backend="triton")
    torch.cuda.synchronize()


@pytest.mark.parametrize("op", ["depthwise", "pointwise"])
@torch.no_grad()
def test_maps_of_more_elements_than_32_bits_count(op, backend):
    """The last image of 2^31 elements and more has the bits that it has alone."""
    images, channels, size = 5, 32, 4096
    if torch.cuda.mem_get_info()[0] < 5 * images * channels * size**2:
        pytest.skip("too little memory is free")
    generator = torch.Generator(device="cuda").manual_seed(0)
    x = torch.empty(images, size, size, channels, device="cuda", dtype=torch.float16).permute(0, 3, 1, 2)
    x.normal_(generator=generator)
    assert x.numel() > 2**31
    ones = torch.ones(channels, device="cuda")
    bn = F.BatchNorm(ones, ones, ones, ones)
    shape = (channels, 1, 3, 3) if op == "depthwise" else (channels, channels, 1, 1)
    weight = torch.randn(shape, device="cuda", dtype=torch.float16, generator=generator) / 3

    def run(x: Tensor) -> Tensor:
        if op == "depthwise":
            return F.depthwise_conv_bn_act(x, weight, bn, backend=backend)[0]
        return F.pointwise_conv_bn_act(x, weight, bn, backend=backend)

    last = run(x)[-1:].clone()
    assert torch.equal(last, run(x[-1:].contiguous(memory_format=torch.channels_last)))


def narrow_model(dtype: torch.dtype) -> tuple[torch.nn.Module, Tensor]:
    model = calibrate(randomize(whole_models.narrow(whole_models.B0)), images(4, 48)).to("cuda", dtype)
    return model, images(2, 33).to("cuda", dtype)


@torch.inference_mode()
def test_a_model_in_a_graph(backend):
    """What the benchmark times: the model's output for each of its input buffers, to the bit."""
    model, x = narrow_model(torch.float16)
    patched = ek.patch(model, backend=backend)
    expected = patched(x)
    graph = timing.Graph(patched, x)
    for _ in range(2):
        graph()
    assert graph.calls == len(graph.outputs) > 1
    assert all(torch.equal(output, expected) for output in graph.outputs)


@torch.inference_mode()
def test_a_frozen_model_is_one_graph(backend):
    """Called by itself; it agrees with the same model as it is, for other images, forms and streams."""
    model, _ = narrow_model(torch.float16)
    frozen = ek.patch(copy.deepcopy(model), backend=backend, frozen=True)
    ek.patch(model, backend=backend)
    for n in (1, 2):
        for seed in (1, 2, 3):
            x = images(n, 64, seed=seed).to("cuda", torch.float16)
            with torch.cuda.stream(torch.cuda.Stream()) as stream:
                y = frozen(x)
            torch.cuda.synchronize()
            assert torch.equal(y, model(x)), stream
    (programs,) = [vars(m)[KEPT_ATTRIBUTE].programs for m in frozen.modules() if KEPT_ATTRIBUTE in vars(m)]
    assert [type(program) for program in programs.values()] == [Captured, Captured]


@torch.inference_mode()
def test_a_compiled_model(backend):
    model, x = narrow_model(torch.float16)
    exact, stock = exact_output(model, x), model(x)
    compiled = torch.compile(ek.patch(copy.deepcopy(model), backend=backend), fullgraph=True)
    assert agreement(compiled(x), stock, exact).ok


@torch.inference_mode()
def test_autocast(backend):
    """As stock's convolutions under autocast: maps in float16, parameters of BatchNorm in float32."""
    model, x = narrow_model(torch.float32)
    exact = exact_output(model, x)
    with torch.autocast("cuda", torch.float16):
        stock, patched = model(x), ek.patch(copy.deepcopy(model), backend=backend)(x)
    assert patched.dtype == stock.dtype
    assert agreement(patched, stock, exact).ok


@torch.inference_mode()
def test_another_resolution_and_batch_and_back(backend):
    """A graph captured before, and calls after every change: as accurate as stock, the same bits on the way back."""
    model, x = narrow_model(torch.float16)
    patched = ek.patch(copy.deepcopy(model), backend=backend)
    graph, first = timing.Graph(patched, x), patched(x)
    before = model(x)
    for batch, size in ((2, 65), (3, 33), (1, 33), (5, 48)):
        other = images(batch, size).to(x)
        assert agreement(patched(other), model(other), exact_output(model, other)).ok
    assert torch.equal(patched(x), first)
    graph()
    assert all(torch.equal(output, first) for output in graph.outputs)
    assert agreement(model(x), before, exact_output(model, x)).ok, "stock beside it"


@torch.inference_mode()
def test_two_streams_at_a_time(backend):
    """Calls that overlap share no memory: each has the bits that it has alone."""
    model, x = narrow_model(torch.float16)
    patched = ek.patch(model, backend=backend)
    inputs = [x, images(3, 40).to(x)]
    alone = [patched(each) for each in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]
    for _ in range(5):
        for stream, each, outputs in zip(streams, inputs, found, strict=True):
            with torch.cuda.stream(stream):
                outputs.append(patched(each))
    torch.cuda.synchronize()
    for outputs, expected in zip(found, alone, strict=True):
        assert all(torch.equal(output, expected) for output in outputs)


def test_a_gradient_scaler(backend):
    """AMP training: gradients as near to float64's as stock's, and a step whose gradients overflow is left out."""
    model, x = narrow_model(torch.float32)
    model.train()
    exact = Step(copy.deepcopy(model).double(), x.double(), None).gradients()

    def step(model: torch.nn.Module, x: Tensor, scale: float) -> tuple[Tensor, float]:
        optimizer, scaler = torch.optim.SGD(model.parameters(), 1e-2), torch.amp.GradScaler("cuda", init_scale=scale)
        with torch.autocast("cuda", torch.float16):
            y = model(x)
        generator = torch.Generator().manual_seed(2)  # as Step's
        grad = (torch.randn(y.shape, generator=generator) / y.numel() ** 0.5).to(y)
        scaler.scale((y * grad).sum()).backward()
        scaler.unscale_(optimizer)
        gradients = torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        return gradients, scaler.get_scale()

    patched = ek.patch(copy.deepcopy(model), backend=backend)
    stock_gradients, stock_scale = step(copy.deepcopy(model), x, 256.0)
    gradients, scale = step(patched, x, 256.0)
    assert scale == stock_scale == 256.0
    error, stock_error = (found.sub(exact).square().mean().sqrt() for found in (gradients, stock_gradients))
    assert error <= 2 * stock_error
    before = [p.clone() for p in patched.parameters()]
    _, scale = step(patched, x, 2.0**40)
    assert scale == 2.0**39
    assert all(torch.equal(p, old) for p, old in zip(patched.parameters(), before, strict=True))


def test_a_training_step_in_a_graph():
    """Forward, backward and update replayed: parameters and running statistics move as step by step."""
    available, reason = backends()["triton"]
    if not available:
        pytest.skip(reason)
    block = ek.MBConv(8, 8, 5, exp_ratio=4.0, se_layer=ek.SqueezeExcite)
    block, x = randomize(block).train().to("cuda"), torch.randn(4, 8, 13, 13, device="cuda")
    with ek.use_backend("triton"):
        eager, captured = Step(copy.deepcopy(block), x, None), Step(block, x, None)
        graph = timing.Graph(captured, x)
        graph()
        for _ in range(timing.WARM_UP + graph.calls):
            eager(x)
    state = eager.module.state_dict()
    for name, value in captured.module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_auto_is_the_first_of_the_dispatch_table_that_serves():
    available = {name for name, (served, _) in backends().items() if served}
    for op in ("depthwise_conv_bn_act", "pointwise_conv_bn_act", "mbconv", "fused_mbconv", "squeeze_excite"):
        problem = Query(op, "cuda", torch.float16, (3, 3))
        first = next(name for name in automatic("cuda", op) if name in available)
        assert implementation(problem) is implementation(problem, first)
