"""The one import of the compiled extension, and what this build of it can do."""

from dscoder import _C

__all__ = ["_C", "arch_for", "build_tools", "cuda_archs", "has_kernels", "kernel_ops", "require_kernels"]


def has_kernels() -> bool:
    """Whether this build holds CUDA kernels; whether there is a GPU to run them on is another question."""
    return _C.has_cuda


def cuda_archs() -> tuple[str, ...]:
    """The GPU architectures the kernels were compiled for, such as ("80", "90a"); () without kernels."""
    return _C.cuda_archs


def kernel_ops() -> frozenset[str]:
    """The ops that have CUDA kernels, in a build that holds kernels."""
    suffix = "_forward"  # what the binding of op x is called: x_forward
    names = {name.removesuffix(suffix) for name in vars(_C) if name.endswith(suffix)}
    # Ops without a binding of their own name: the one that the fused product is a part of, and the exchange,
    # whose steps are bound one by one.
    found = {"moe_experts" if name == "grouped_swiglu" else name for name in names}
    return frozenset(found | ({"expert_parallel"} if "dispatch_send" in vars(_C) else set()))


def build_tools() -> dict[str, str]:
    """Name and version of what compiled the extension; nvcc only in a build with kernels."""
    tools = {"compiler": _C.compiler}
    if _C.has_cuda:
        tools["nvcc"] = _C.cuda_version
    return tools


def require_kernels(op: str) -> None:
    """RuntimeError, saying how to build them, when `op` is called on a GPU and there are no kernels."""
    if not _C.has_cuda:
        raise RuntimeError(f"{op}: {_C.absent_hint}")


def arch_for(capability: tuple[int, int]) -> str | None:
    """Which of `cuda_archs()` a GPU of this compute capability runs; None when it can run none of them."""
    major, minor = capability
    if f"{major}{minor}a" in _C.cuda_archs:
        return f"{major}{minor}a"
    plain = [int(arch) for arch in _C.cuda_archs if arch.isdigit()]
    fitting = [arch for arch in plain if arch // 10 == major and arch % 10 <= minor]
    return str(max(fitting)) if fitting else None
