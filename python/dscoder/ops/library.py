"""The one torch library of the package, how an op enters it, and the argument checks all ops share.

An op is a schema, a reference in plain torch (the specification, the test oracle and the CPU path), a fake
for tracing and, where it has gradients, a backward that is an op of its own, so that both directions find
their kernel through the dispatcher.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dscoder.runtime import native

# Any: torch leaves the class untyped.
LIBRARY: Any = torch.library.Library("dscoder", "DEF")  # type: ignore[no-untyped-call]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT32_MAX = 2**31 - 1
ARCHS = ("auto", "sm80", "sm90", "reference")


def define_op(
    schema: str,
    *,
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: Callable[..., Any] | None = None,
) -> None:
    """Register the op `dscoder::<name in schema>`.

    `kernel` is the CUDA implementation; an op that has none runs its reference on CUDA, which may read sizes
    on the host. Either way a package built without kernels says so on a CUDA call.
    """
    name = schema.partition("(")[0]
    on_cuda = kernel if kernel is not None else reference

    def run_on_cuda(*args: Any) -> Any:
        native.require_kernels(name)
        return on_cuda(*args)

    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, reference, "CPU")
    LIBRARY.impl(name, run_on_cuda, "CUDA")
    torch.library.register_fake(f"dscoder::{name}", fake, lib=LIBRARY)


def define_gradient(
    name: str, *, save: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., Any]
) -> None:
    """Give the op `name` a gradient: `save(ctx, inputs, output)` keeps what `backward(ctx, *grads)` needs.

    An output that nothing was differentiated through, or that has no gradient, has None among the grads,
    which are not all None.
    """

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.set_materialize_grads(False)  # by default torch fills zeros: a launch for each such output
        save(ctx, inputs, output)

    def differentiate(ctx: Any, *grads: Tensor | None) -> Any:
        if all(grad is None for grad in grads):
            return (None,) * len(ctx.needs_input_grad)
        return backward(ctx, *grads)

    torch.library.register_autograd(f"dscoder::{name}", differentiate, setup_context=keep, lib=LIBRARY)


def refuse_second_derivative(op: str) -> None:
    """Called in a backward pass that is itself not differentiable: RuntimeError under create_graph=True.

    torch's once_differentiable lets a gradient pass whose dependence on the inputs it has dropped.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(f"{op}: the gradient must not be differentiated again, got create_graph=True")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: float32, or float64 for float64 input (gradient checks)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def aligned(tensor: Tensor) -> Tensor:
    """The tensor as kernels take rows: contiguous and on a 16-byte boundary; a copy only where it is not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % 16 else tensor


def spread_rows(tensor: Tensor, *, num_dense: int) -> Tensor:
    """The tensor as kernels take rows that may lie apart; a copy only where it is not so.

    Its last `num_dense` dimensions are contiguous, and every step along the others is a multiple of 16 bytes.
    """
    wanted, step = 1, 16 // tensor.element_size()
    is_whole = tensor.data_ptr() % 16 == 0
    for dim in reversed(range(tensor.ndim)):
        size, stride = tensor.shape[dim], tensor.stride(dim)
        fits = stride == wanted if dim >= tensor.ndim - num_dense else stride % step == 0
        is_whole = is_whole and (size <= 1 or fits)
        wanted *= size
    return tensor if is_whole else aligned(tensor)


def check_tensor(
    op: str, argument: str, tensor: Tensor, *, num_dims: int, dtypes: Sequence[torch.dtype]
) -> None:
    """TypeError unless `tensor` is a tensor of one of `dtypes`, ValueError unless it has `num_dims` dims."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {argument} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{op}: {argument} must be {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.ndim != num_dims:
        raise ValueError(f"{op}: {argument} must have {num_dims} dimensions, got shape {tuple(tensor.shape)}")


def check_shape(op: str, argument: str, tensor: Tensor, wanted: tuple[int, ...]) -> None:
    """ValueError unless `tensor` has the shape that the op's other arguments fix."""
    if tensor.shape != wanted:
        raise ValueError(f"{op}: {argument} must have shape {wanted}, got {tuple(tensor.shape)}")


def check_devices(op: str, **tensors: Tensor) -> None:
    """ValueError unless all tensors live where the first one does."""
    first, *others = tensors
    device = tensors[first].device
    for argument in others:
        if tensors[argument].device != device:
            raise ValueError(
                f"{op}: {argument} must be on {device} like {first}, got {tensors[argument].device}"
            )


def check_at_least(op: str, argument: str, value: int, minimum: int) -> None:
    """TypeError unless `value` is an int (True is not), ValueError unless value >= minimum."""
    # A traced size is a SymInt.
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{op}: {argument} must be int, got {type(value).__name__}")
    if not value >= minimum:
        raise ValueError(f"{op}: {argument} must be >= {minimum}, got {value}")


def check_at_most(op: str, argument: str, value: int, maximum: int) -> None:
    """ValueError unless value <= maximum."""
    if not value <= maximum:
        raise ValueError(f"{op}: {argument} must be <= {maximum}, got {value}")


def check_number(op: str, argument: str, value: float) -> None:
    """TypeError unless `value` is a float or an int (True is neither)."""
    if isinstance(value, bool) or not isinstance(value, int | float | torch.SymInt | torch.SymFloat):
        raise TypeError(f"{op}: {argument} must be float, got {type(value).__name__}")


def check_arch(op: str, arch: str, x: Tensor, refusal: Callable[[], str | None]) -> None:
    """ValueError unless `arch` is one of ARCHS and, if it names kernels, they can do the call.

    `refusal()` is what they want and do not get, or None.
    """
    if arch not in ARCHS:
        raise ValueError(f"{op}: arch must be one of {', '.join(ARCHS)}, got {arch!r}")
    if arch in ("auto", "reference"):
        return
    if x.device.type != "cuda":
        raise ValueError(f"{op}: arch must be auto or reference on {x.device.type}, got {arch}")
    wanted = refusal()
    if wanted is not None:
        raise ValueError(f"{op}: arch {arch} wants {wanted}")


def gpu_of(device: torch.device | None) -> tuple[int, int, int]:
    """(major, minor, number of SMs) of a GPU, default the current one.

    A CPU, where kernels run in the host executor, counts as one SM of sm_80.
    """
    if device is not None and device.type == "cpu":
        return 8, 0, 1
    found = torch.cuda.get_device_properties(device)
    return found.major, found.minor, found.multi_processor_count


def gpu_refusal(capability: tuple[int, int]) -> str | None:
    """What the kernels want of a GPU, if this one is none they know."""
    major, minor = capability
    if major == 8 or capability == (9, 0):
        return None
    return f"compute capability 8.x or 9.0, got {major}.{minor}"


@functools.cache
def _cached_refusal(device: torch.device) -> str | None:
    return gpu_refusal(torch.cuda.get_device_capability(device))


# Tracing takes the answer as it is.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def device_refusal(device: torch.device) -> str | None:
    """A CPU is refused nothing: kernels run there in the host executor."""
    return _cached_refusal(device) if device.type == "cuda" else None
