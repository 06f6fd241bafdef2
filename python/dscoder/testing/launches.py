"""Which ops of a forward would each be a kernel launch on a GPU, counted without one.

On the meta device nothing is computed, and a model takes the branches that it takes on a GPU. Under
inference_mode ops that torch has a kernel for (rms_norm, linear) arrive whole. An op launches nothing if its
results are views of its arguments or memory that is not filled.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

UNFILLED = frozenset(
    {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten.new_empty_strided"}
)
# Kernels that our ops launch on sm_90a at the sizes of a decoding step; one where nothing else is said.
KERNELS = {
    "dscoder.mla_decode": 2,  # the pieces, and their sum; the plan is an op of its own
    "dscoder.moe_experts": 3,  # rows in expert order, both products
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One op that is at least one kernel."""

    op: str  # aten.mm
    module: str  # the innermost one that was running, as named_modules names it; "" for the model itself
    num_kernels: int


class _Counter(TorchDispatchMode):
    """Notes every launch and the module that it belongs to."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches: list[Launch] = []
        self.modules = [""]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        op = str(func.overloadpacket)
        if func._schema.is_mutable or (op not in UNFILLED and _is_new(result, (args, kwargs))):
            num_kernels = KERNELS.get(op, 1)
            self.launches.append(Launch(op=op, module=self.modules[-1], num_kernels=num_kernels))
        return result


def _storages(value: Any) -> set[int]:
    return {leaf.untyped_storage()._cdata for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)}


def _is_new(result: Any, arguments: Any) -> bool:
    """Whether some of the result lies in memory of its own."""
    return bool(_storages(result) - _storages(arguments))


@contextmanager
def _named(model: nn.Module, counter: _Counter) -> Iterator[None]:
    """While it lasts, the counter knows which of the model's modules runs."""
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def enter(*_: Any, name: str = name) -> None:
                counter.modules.append(name)

            def leave(*_: Any) -> None:
                counter.modules.pop()

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            hooks.callback(module.register_forward_hook(leave).remove)
        yield


def launches_of(model: nn.Module, call: Callable[[], Any]) -> list[Launch]:
    """The launches of `call()`, in order; `model` and all that `call` uses lie on the meta device."""
    counter = _Counter()
    with torch.inference_mode(), _named(model, counter), counter:
        call()
    return counter.launches


def num_kernels(launches: Sequence[Launch], module: str = "") -> int:
    """Kernels of the launches below `module`; of all of them without one."""
    return sum(one.num_kernels for one in launches if not module or is_below(one.module, module))


def is_below(module: str, parent: str) -> bool:
    """Whether `module` is `parent` or a part of it."""
    return module == parent or module.startswith(f"{parent}.")


def table(launches: Sequence[Launch]) -> str:
    """One line a launch: kernels, module, op."""
    width = max((len(one.module) for one in launches), default=0)
    return "\n".join(f"{one.num_kernels:3}  {one.module:{width}}  {one.op}" for one in launches)
