"""What every op must keep to on a GPU: the reference's answer, and out of the host's way.

A *function* takes tensors and returns a tensor or several; a *step* returns several, gradients among them,
and is what `forward_and_backward` makes of a function. Inputs come in as plain tensors, without gradients.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from dscoder.runtime import native
from dscoder.testing.compare import assert_close, assert_same

Function = Callable[..., Tensor | tuple[Tensor, ...]]
Step = Callable[..., tuple[Tensor, ...]]
Outputs = TypeVar("Outputs")

DEVICE = "cuda"
# Two bytes of every poisoned value: a NaN of float32, bfloat16 and float16, a wild int32.
_POISON = 0x7FFF
_SMALL_BLOCK = 1 << 20  # torch's allocator serves tensors up to this size from a pool of their own
_NUM_SMALL_BLOCKS = 64
_LARGE_BLOCK = 256 << 20  # what is poisoned for larger tensors at the least
_NUM_TIMES_OUTPUTS = 4  # outputs, what is kept for gradients, and scratch


def has_hopper() -> bool:
    """Whether this machine's GPU runs what this build holds for sm_90a."""
    return torch.cuda.is_available() and native.arch_for(torch.cuda.get_device_capability()) == "90a"


def wake() -> None:
    """Raises in a process that has lost its GPU to a fault."""
    torch.ones(1, device=DEVICE).sum().item()


def archs() -> list[str]:
    """Each `arch` with kernels that this machine's GPU can be asked for; "auto" alone where there is none.

    "sm90" is among them only if "auto" takes those kernels: until then one of them may hang, and
    tests/gpu/test_grouped_gemm_sm90.py, which runs them apart, is the place for them.
    """
    if not torch.cuda.is_available():
        return ["auto"]
    plan = native._C.grouped_gemm_plan("forward", 8192, 8, 2048, 2048, (9, 0), 132, "auto")
    return ["auto", "sm80", *(["sm90"] if has_hopper() and plan["arch"] == "sm90" else [])]


def forward_and_backward(function: Function) -> Step:
    """The step that returns the function's outputs, then the gradient of each floating input.

    The outputs' own gradients are eighths between -1 and 1, which every dtype and device holds exactly.
    """

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
        result = function(*leaves)
        outputs = (result,) if isinstance(result, Tensor) else result
        roots = [y for y in outputs if y.requires_grad]
        grads = [
            (torch.arange(y.numel(), device=y.device) % 17 - 8).div(8).view_as(y).to(y.dtype) for y in roots
        ]
        gradients = torch.autograd.grad(roots, [x for x in leaves if x.requires_grad], grads)
        return *(y.detach() for y in outputs), *gradients

    return step


def poison_free_memory(outputs: Sequence[Tensor] = ()) -> None:
    """Leave NaNs and wild indices in the memory that the next tensors on the GPU are allocated in.

    One block is large enough for tensors like `outputs` and what is made on the way: the allocator, whose
    cache is empty but for this, cuts all that is larger than a small block from it.
    """
    torch.cuda.empty_cache()
    large = max(_LARGE_BLOCK, _NUM_TIMES_OUTPUTS * sum(x.nbytes + _SMALL_BLOCK for x in outputs))
    sizes = [_SMALL_BLOCK] * _NUM_SMALL_BLOCKS + [large]
    blocks = [torch.full((n // 2,), _POISON, dtype=torch.int16, device=DEVICE) for n in sizes]
    del blocks


def _on_gpu(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x.to(DEVICE) for x in inputs]


def assert_agrees(actual: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Integers are the same bit for bit, floats within the tolerance of their dtype."""
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == want.dtype
        if want.is_floating_point():
            assert_close(got.cpu(), want.cpu())
        else:
            assert_same(got.cpu(), want.cpu())


def assert_all_same(actual: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """The same bits in every tensor."""
    for got, want in zip(actual, wanted, strict=True):
        assert_same(got, want)


def assert_is_reference(step: Step, *inputs: Tensor) -> None:
    """The step on the GPU, in poisoned memory, agrees with the step on the CPU, which runs the reference."""
    on_gpu, wanted = _on_gpu(inputs), step(*inputs)
    poison_free_memory(wanted)
    assert_agrees(step(*on_gpu), wanted)


def captured(call: Callable[[], Outputs]) -> Callable[[], Outputs]:
    """A CUDA graph of `call()`: replays it, and gives its results, the same tensors every time."""
    # The first call loads the kernels, which capturing forbids.
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()

    def replay() -> Outputs:
        graph.replay()
        return outputs

    return replay


def assert_replay_follows(step: Step, *runs: Sequence[Tensor]) -> None:
    """A CUDA graph of the step, replayed after each run's inputs were copied in, gives what a call gives.

    The first run's inputs are captured; all runs' are of the same shapes.
    """
    on_gpu = [_on_gpu(inputs) for inputs in runs]
    kept = [x.clone() for x in on_gpu[0]]
    replay = captured(lambda: step(*kept))
    for inputs in (*on_gpu, on_gpu[0]):
        for place, x in zip(kept, inputs, strict=True):
            place.copy_(x)
        assert_all_same(replay(), step(*inputs))


def assert_runs_on_the_callers_stream(step: Step, *inputs: Tensor) -> None:
    """The inputs are written late on a side stream: a launch on any other stream would not see them."""
    values = _on_gpu(inputs)
    wanted = step(*values)
    late = [torch.zeros_like(x) for x in values]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
        for place, x in zip(late, values, strict=True):
            place.copy_(x)
        got = step(*late)
    side.synchronize()
    assert_all_same(got, wanted)


def assert_never_waits(step: Step, *inputs: Tensor) -> None:
    """The step asks the GPU for nothing that the host would have to wait for."""
    on_gpu = _on_gpu(inputs)
    previous = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode(previous)


def assert_same_bits_every_time(step: Step, *inputs: Tensor, num_times: int = 5) -> None:
    """Neither the order of blocks nor the memory that happens to be free changes a bit."""
    on_gpu = _on_gpu(inputs)
    wanted = step(*on_gpu)
    for _ in range(num_times - 1):
        poison_free_memory(wanted)
        assert_all_same(step(*on_gpu), wanted)


def assert_compiles_whole(function: Function, *inputs: Tensor) -> None:
    """torch.compile takes the function, and its gradient, in one graph and changes nothing."""
    on_gpu = _on_gpu(inputs)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True)
    assert_agrees(forward_and_backward(compiled)(*on_gpu), forward_and_backward(function)(*on_gpu))
