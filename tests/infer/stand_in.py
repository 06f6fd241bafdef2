"""A byte tokenizer, a stand-in for CUDA graphs on the CPU, and models small enough to run whole."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from dscoder.config import ModelConfig, preset
from dscoder.infer.request import Request
from dscoder.infer.runner import Step
from dscoder.models.transformer import Transformer

_WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")


PROMPTS = (b"def f(x):", b"a", b"import os, sys\nfor name in os.listdir('.'):", b"class A:\n    def", b"if")


def ask(text: str | bytes, **fields: object) -> Request:
    return Request(prompt=tuple(text if isinstance(text, bytes) else text.encode()), **fields)


class ByteTokenizer:
    """Token = byte; ids from 256 are special and decode to nothing."""

    bos_id: int | None = 256
    eos_id: int | None = 257
    fim_begin_id: int | None = 258
    fim_hole_id: int | None = 259
    fim_end_id: int | None = 260
    vocab_size = 261

    def encode(self, text: str, *, allow_special: bool = False, add_bos: bool = False) -> list[int]:
        return [*([256] if add_bos else []), *text.encode()]

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        special = [] if skip_special else [f"<{token}>" for token in ids if token >= 256]
        return bytes(token for token in ids if token < 256).decode(errors="replace") + "".join(special)


class Tape(TorchDispatchMode):
    """Records ops with the very tensors they ran on, and replays them there: a CUDA graph in small.

    Python does not run again, what an op made stays where it was made, and an op that would have to wait
    for a device is refused.
    """

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in _WAITING, f"a captured step must not wait: {func}"
        out = func(*args, **(kwargs or {}))
        self._calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self._calls:
            given = {x.untyped_storage().data_ptr() for x in tensors_in((args, kwargs))}
            again = func(*args, **kwargs)
            for kept, got in zip(tensors_in(out), tensors_in(again), strict=True):
                if kept.untyped_storage().data_ptr() not in given:  # views and in-place ops are there already
                    kept.copy_(got)


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor)]


class Tapes:
    """A `Capture` of tapes; counts what it is asked for."""

    def __init__(self) -> None:
        self.num_captured = 0
        self.num_replays = 0

    def __call__(self, step: Step) -> Step:
        self.num_captured += 1
        step()  # as for a CUDA graph, whose kernels are loaded first
        with Tape() as tape:
            outputs = step()

        def replay() -> tuple[Tensor, Tensor]:
            self.num_replays += 1
            tape.replay()
            return outputs

        return replay


def tiny(name: str, **fields: object) -> ModelConfig:
    return replace(preset(name), vocab_size=264, width=64, num_layers=2, mlp_width=96, **fields)


def tiny_model(name: str, **fields: object) -> Transformer:
    """Weights so wide that the logits are far apart: rounding must not decide a token."""
    built = Transformer(tiny(name, **fields))
    for index, parameter in enumerate(built.parameters()):
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    return built
