"""AdamW on bfloat16 weights without float32 masters: every step's result is rounded at random.

AdamW is computed in float32 from the weights as they are, float32 moments and float32 gradients. Only
operations that round their result once are used, one after another: a fused multiply-add in one place and not
in another (the end of a vector loop, say) would let the result hang on how a parameter is cut over ranks.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dscoder.config.train import OptimizerConfig
from dscoder.models.region import Run
from dscoder.models.sharding import Part, move_gradient
from dscoder.train.rounding import random_bits, round_stochastically, rounding_key

# Elements at once, with some 40 bytes of intermediate values for each: a CPU is twice as fast where its cache
# holds them, a GPU needs more to be busy.
_CPU_CHUNK = 1 << 18
_GPU_CHUNK = 1 << 22


def _adder(gradients: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """What adds the gradient of a parameter to `gradients[name]`, in float32, and takes it away."""

    def move(parameter: Tensor) -> None:
        gradients[name] = move_gradient(parameter, gradients.get(name))

    return move


class StochasticAdamW:
    """The moments, the gradients and the steps of the parameters that have no masters."""

    def __init__(self, parts: Mapping[str, Part], config: OptimizerConfig, *, seed: int) -> None:
        """Zero moments for `parts`, which are bfloat16 (TypeError); the rounding hangs on `seed`."""
        self._parts = parts
        self._config = config
        self._seed = seed
        self.gradients: dict[str, Tensor] = {}  # float32, of the step under way
        self.moments: dict[str, Tensor] = {}
        for name, part in parts.items():
            local = part.local
            if local.dtype != torch.bfloat16:
                raise TypeError(
                    f"StochasticAdamW: parameter {name} must be torch.bfloat16 to have no master, "
                    f"got {local.dtype}"
                )
            self.moments[f"{name}.step"] = torch.zeros((), dtype=torch.float32, device=local.device)
            for key in ("exp_avg", "exp_avg_sq"):
                self.moments[f"{name}.{key}"] = torch.zeros_like(local, dtype=torch.float32)

    def weights(self) -> dict[str, Tensor]:
        """The live parameters, this rank's part of each."""
        return {name: part.local for name, part in self._parts.items()}

    def watch(self) -> None:
        """Have every backward pass move the gradients to `gradients`, to add up there.

        FSDP calls the hook of a part as soon as that is summed over ranks, on the stream of the sums.
        """
        for name, part in self._parts.items():
            part.parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                _adder(self.gradients, name)
            )

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the parameters that have a gradient by one step, and drop the gradients."""
        for name, gradient in self.gradients.items():
            part = self._parts[name]
            step = self.moments[f"{name}.step"].add_(1.0)
            key = rounding_key(step, seed=self._seed, name=name)
            state = [
                part.local,
                gradient,
                self.moments[f"{name}.exp_avg"],
                self.moments[f"{name}.exp_avg_sq"],
            ]
            assert all(tensor.is_contiguous() for tensor in state)
            flat = [tensor.view(-1) for tensor in state]
            decay = self._config.weight_decay if len(part.whole_shape) >= 2 else 0.0
            for run in part.region.runs():
                self._move(flat, run, step=step, key=key, lr=lr, decay=decay)
        self.gradients.clear()

    def _move(
        self, flat: list[Tensor], run: Run, *, step: Tensor, key: Tensor, lr: float, decay: float
    ) -> None:
        """One run of elements; `flat` are weight, gradient and the two moments."""
        chunk = _CPU_CHUNK if key.device.type == "cpu" else _GPU_CHUNK
        for ahead in range(0, run.length, chunk):
            length = min(chunk, run.length - ahead)
            weight, gradient, mean, square = (t.narrow(0, run.inside + ahead, length) for t in flat)
            moved = self._moved(weight.float(), gradient, mean, square, step=step, lr=lr, decay=decay)
            bits = random_bits(key, start=run.whole + ahead, length=length)
            weight.copy_(round_stochastically(moved, bits))

    def _moved(
        self,
        weight: Tensor,
        gradient: Tensor,
        mean: Tensor,
        square: Tensor,
        *,
        step: Tensor,
        lr: float,
        decay: float,
    ) -> Tensor:
        """`weight`, in place, after a step of AdamW (Loshchilov and Hutter 2019), which moves the moments."""
        beta1, beta2 = self._config.beta1, self._config.beta2
        mean.mul_(beta1).add_(gradient * (1.0 - beta1))
        square.mul_(beta2).add_((gradient * gradient).mul_(1.0 - beta2))
        spread = (square / (1.0 - beta2**step)).sqrt_().add_(self._config.eps)
        update = (mean / (1.0 - beta1**step)).div_(spread).mul_(lr)
        return weight.mul_(1.0 - lr * decay).sub_(update)
