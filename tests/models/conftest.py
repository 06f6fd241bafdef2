"""Pairs of a random transformers model and ours with the same weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from dscoder.config import ModelConfig
from dscoder.models import Transformer, allocate_cache

HfModel = DeepseekV2ForCausalLM | LlamaForCausalLM

# Ours -> theirs, within a layer; gate and up are separate matrices there.
_ATTENTION = {
    "query.weight": "q_proj.weight",
    "query_down.weight": "q_a_proj.weight",
    "query_norm.weight": "q_a_layernorm.weight",
    "query_up.weight": "q_b_proj.weight",
    "latent_down.weight": "kv_a_proj_with_mqa.weight",
    "latent_norm.weight": "kv_a_layernorm.weight",
    "latent_up.weight": "kv_b_proj.weight",
    "key.weight": "k_proj.weight",
    "value.weight": "v_proj.weight",
    "out.weight": "o_proj.weight",
}
_MLP = {
    "mlp.down.weight": "mlp.down_proj.weight",
    "moe.gate.weight": "mlp.gate.weight",
    "moe.experts.gate_up": "mlp.experts.gate_up_proj",
    "moe.experts.down": "mlp.experts.down_proj",
    "moe.shared.down.weight": "mlp.shared_experts.down_proj.weight",
}
_GATE_UP = {"mlp.gate_up.weight": "mlp", "moe.shared.gate_up.weight": "mlp.shared_experts"}
_TOP = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}


def _their_tensor(name: str, theirs: dict[str, Tensor]) -> Tensor:
    if name == "head.weight":
        return theirs["lm_head.weight"]
    if name in _TOP:
        return theirs[_TOP[name]]
    _, layer_idx, part = name.split(".", 2)
    prefix = f"model.layers.{layer_idx}"
    if part == "attention_norm.weight":
        return theirs[f"{prefix}.input_layernorm.weight"]
    if part == "mlp_norm.weight":
        return theirs[f"{prefix}.post_attention_layernorm.weight"]
    if part in _GATE_UP:
        halves = [theirs[f"{prefix}.{_GATE_UP[part]}.{half}_proj.weight"] for half in ("gate", "up")]
        return torch.cat(halves)
    if part.startswith("attention."):
        return theirs[f"{prefix}.self_attn.{_ATTENTION[part.removeprefix('attention.')]}"]
    return theirs[f"{prefix}.{_MLP[part]}"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A transformers model and ours, evaluating, with equal weights."""

    theirs: HfModel
    ours: Transformer

    def tokens(self, num_rows: int, length: int) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(0, self.ours.config.vocab_size, (num_rows, length), generator=generator)

    @torch.no_grad()
    def hidden_states(self, tokens_BS: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Theirs and ours: the embedding, then the stream after each layer, the last one normed."""
        theirs = self.theirs(tokens_BS, output_hidden_states=True).hidden_states
        ours: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _module, _args, out: ours.append(out[0]))
            for layer in self.ours.layers
        ]
        features = self.ours.features(tokens_BS)
        for hook in hooks:
            hook.remove()
        stream = [self.ours.embed(tokens_BS), *ours[:-1], features.hidden_BSD]
        return zip(theirs, (x.view(*tokens_BS.shape, -1) for x in stream), strict=True)

    @torch.no_grad()
    def greedy(self, prompt_BS: Tensor, num_new: int) -> tuple[Tensor, Tensor]:
        """Theirs and ours: the tokens each chooses from its own logits through its own cache."""
        return self._greedy_theirs(prompt_BS, num_new), self._greedy_ours(prompt_BS, num_new)

    def _greedy_theirs(self, tokens_BS: Tensor, num_new: int) -> Tensor:
        cache = DynamicCache(config=self.theirs.config)
        chosen = []
        for _ in range(num_new):
            logits_BSV = self.theirs(tokens_BS, past_key_values=cache, use_cache=True).logits
            tokens_BS = logits_BSV[:, -1:].argmax(dim=-1)
            chosen.append(tokens_BS)
        return torch.cat(chosen, dim=1)

    def _greedy_ours(self, tokens_BS: Tensor, num_new: int) -> Tensor:
        num_rows, length = tokens_BS.shape
        cache = allocate_cache(self.ours.config, num_sequences=num_rows, max_positions=length + num_new)
        chosen = []
        for _ in range(num_new):
            tokens_BS = self.ours(tokens_BS, cache=cache)[:, -1:].argmax(dim=-1)
            chosen.append(tokens_BS)
        return torch.cat(chosen, dim=1)


@pytest.fixture
def make_pair() -> Callable[..., Pair]:
    """make_pair(hf_config, config, std=...): random weights, norms not 1, the same on both sides."""

    def make(hf_config: DeepseekV2Config | LlamaConfig, config: ModelConfig, *, std: float = 0.1) -> Pair:
        is_v2 = isinstance(hf_config, DeepseekV2Config)
        theirs = (DeepseekV2ForCausalLM if is_v2 else LlamaForCausalLM)(hf_config).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in theirs.parameters():
            spread = 0.3 if parameter.dim() == 1 else std
            parameter.data.normal_(float(parameter.dim() == 1), spread, generator=generator)
        ours = Transformer(config).eval()
        state = theirs.state_dict()
        ours.load_state_dict({name: _their_tensor(name, state) for name in ours.state_dict()})
        return Pair(theirs=theirs, ours=ours)

    return make
