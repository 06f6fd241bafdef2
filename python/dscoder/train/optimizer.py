"""AdamW on float32 masters, or on bfloat16 weights that are rounded at random; on one process or sharded.

In fp32 the masters are the parameters. In bf16 they are float32 copies: gradients of the bf16 parameters are
added into float32 as they appear, AdamW moves the masters, and the parameters are their rounding
(DeepSeek LLM section 2.4). Only the masters and AdamW's moments need to be saved. With a seed for rounding
there are no masters: see train/stochastic.py.

Under a mesh all of it is done on a rank's own part of each parameter; only the norm of the gradients is a sum
over ranks.
"""

import torch
from torch import Tensor, nn

from dscoder.config.train import OptimizerConfig
from dscoder.models.sharding import Part, is_counted, move_gradient, parts
from dscoder.runtime.mesh import Mesh
from dscoder.train.stochastic import StochasticAdamW

_NORM_FLOOR = 1e-6  # what torch.nn.utils.clip_grad_norm_ adds to the norm


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and stacks of them, not to norms."""
    return parameter.ndim >= 2


def _add_into(master: Tensor, parameter: nn.Parameter) -> None:
    """Have every backward pass move the gradient of `parameter` to `master`, where they add up."""

    def move(shadowed: Tensor) -> None:
        master.grad = move_gradient(shadowed, master.grad)

    parameter.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]


class MasterAdamW:
    """AdamW with global-norm clipping over a model's parameters, by name."""

    def __init__(
        self,
        model: nn.Module,
        config: OptimizerConfig,
        *,
        mesh: Mesh | None = None,
        rounding_seed: int | None = None,
    ) -> None:
        """Make masters and zero moments; from here on backward passes of `model` add into the masters.

        Parameters that require no gradient are left out: they stay as they are.

        Args:
            mesh: over which `model` is sharded. Then `clip` is a collective.
            rounding_seed: parameters of lower precision than float32 get no masters, and this decides how
                they are rounded.
        """
        self._config = config
        self._mesh = mesh
        self._parts: dict[str, Part] = {
            name: part for name, part in parts(model, mesh).items() if part.parameter.requires_grad
        }
        self.masters: dict[str, Tensor] = {}
        rounded: dict[str, Part] = {}
        for name, part in self._parts.items():
            if part.parameter.dtype == torch.float32:
                self.masters[name] = part.parameter if mesh is None else part.local
            elif rounding_seed is None:
                self.masters[name] = part.local.detach().float().requires_grad_()
            else:
                rounded[name] = part
        self.moments: dict[str, Tensor] = {}
        self._adam = self._build()
        self._rounded = StochasticAdamW(rounded, config, seed=rounding_seed or 0)
        self.moments |= self._rounded.moments
        for name, master in self.masters.items():
            if self._parts[name].parameter.dtype != torch.float32:
                _add_into(master, self._parts[name].parameter)
        self._rounded.watch()

    def _build(self) -> torch.optim.AdamW | None:
        """AdamW over the masters; None if there are none."""
        if not self.masters:
            return None
        config = self._config
        groups = [
            {"params": [m for m in self.masters.values() if decays(m)], "weight_decay": config.weight_decay},
            {"params": [m for m in self.masters.values() if not decays(m)], "weight_decay": 0.0},
        ]
        # Fused: one pass over parameter, gradient and moments.
        adam = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        for name, master in self.masters.items():
            state = {
                "step": torch.zeros((), dtype=torch.float32, device=master.device),
                "exp_avg": torch.zeros_like(master, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(master, requires_grad=False),
            }
            adam.state[master] = state
            self.moments.update({f"{name}.{key}": value for key, value in state.items()})
        return adam

    def gradients(self) -> dict[str, Tensor]:
        """Every float32 gradient of the step under way, by the parameter's name: the live ones."""
        for name, master in self.masters.items():
            parameter = self._parts[name].parameter
            if parameter is not master and parameter.grad is not None:
                # FSDP adds float32 gradients up at the parameter; what AdamW moves is the memory below it.
                master.grad = move_gradient(parameter, master.grad)
        found = {name: master.grad for name, master in self.masters.items() if master.grad is not None}
        return found | self._rounded.gradients

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold, by name; the tensors are the live ones, or parts of a whole."""
        masters = {f"master.{name}": self._parts[name].whole(m.detach()) for name, m in self.masters.items()}
        weights = {
            f"weight.{name}": self._parts[name].whole(weight)
            for name, weight in self._rounded.weights().items()
        }
        moments = {}
        for name, moment in self.moments.items():
            parameter, _, key = name.rpartition(".")
            moments[f"adam.{name}"] = moment if key == "step" else self._parts[parameter].whole(moment)
        return masters | weights | moments

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Round the masters into the parameters; after the masters were loaded."""
        for name, master in self.masters.items():
            local = self._parts[name].local
            if local.data_ptr() != master.data_ptr():
                local.copy_(master)

    @torch.no_grad()
    def clip(self) -> Tensor:
        """Scale the gradients down to the largest allowed norm; returns the norm they had, on every rank."""
        gradients = self.gradients()
        tensors = list(gradients.values())
        if self._mesh is None:
            norm = nn.utils.get_total_norm(tensors, foreach=True)
        else:
            norm = self._norm_over(self._mesh, gradients)
        scale = (self._config.clip_norm / (norm + _NORM_FLOOR)).clamp(max=1.0)
        if tensors:
            torch._foreach_mul_(tensors, scale)
        return norm

    def _norm_over(self, mesh: Mesh, gradients: dict[str, Tensor]) -> Tensor:
        """The norm of the whole model's gradient: every element counts once, whoever holds copies of it."""
        counted = [
            tensor for name, tensor in gradients.items() if tensor.numel() and is_counted(self._parts[name])
        ]
        square = torch.zeros(1, dtype=torch.float64, device=mesh.device)
        if counted:
            square += torch.stack(torch._foreach_norm(counted)).double().square().sum()
        return mesh.all_sum(square).sqrt().float().squeeze(0)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Move the masters by one step of AdamW, refresh the parameters and drop the gradients."""
        self.gradients()
        if self._adam is not None:
            for group in self._adam.param_groups:
                group["lr"] = lr
            self._adam.step()
            self._adam.zero_grad(set_to_none=True)
        self._rounded.step(lr)
        self.refresh_parameters()
