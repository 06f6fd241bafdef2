"""AdamW on float32 masters.

In fp32 the masters are the parameters. In bf16 they are float32 copies: gradients of the bf16 parameters are
added into float32 as they appear, AdamW moves the masters, and the parameters are their rounding
(DeepSeek LLM section 2.4). Only the masters and AdamW's moments need to be saved.
"""

import torch
from torch import Tensor, nn

from dscoder.config.train import OptimizerConfig


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and stacks of them, not to norms."""
    return parameter.ndim >= 2


class MasterAdamW:
    """AdamW with global-norm clipping over a model's parameters, by name."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        """Make masters and zero moments; from here on backward passes of `model` add into the masters.

        Parameters that require no gradient are left out: they stay as they are.
        """
        self._config = config
        self._parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        self.masters: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = self._shadow(parameter)
        self._adam = self._build()

    def _shadow(self, parameter: nn.Parameter) -> Tensor:
        master = parameter.detach().float().requires_grad_()

        def add_to_master(shadowed: Tensor) -> None:
            assert shadowed.grad is not None
            if master.grad is None:
                master.grad = shadowed.grad.float()
            else:
                master.grad += shadowed.grad
            shadowed.grad = None

        parameter.register_post_accumulate_grad_hook(add_to_master)  # type: ignore[no-untyped-call]
        return master

    def _build(self) -> torch.optim.AdamW:
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

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold, by name; the tensors are the live ones."""
        masters = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        return masters | {f"adam.{name}": moment for name, moment in self.moments.items()}

    @torch.no_grad()
    def refresh_parameters(self) -> None:
        """Round the masters into the parameters; after the masters were loaded."""
        for name, parameter in self._parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    def clip(self) -> Tensor:
        """Scale the gradients down to the largest allowed norm; returns the norm they had."""
        masters = list(self.masters.values())
        return torch.nn.utils.clip_grad_norm_(masters, self._config.clip_norm, foreach=True)

    def step(self, lr: float) -> None:
        """Move the masters by one step of AdamW, refresh the parameters and drop the gradients."""
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.refresh_parameters()
