"""Pairs of a random transformers model and ours with the same weights."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicCache

from dscoder.checkpoint.names import pieces
from dscoder.config import ModelConfig
from dscoder.models import Transformer, allocate_cache

HfModel = DeepseekV2ForCausalLM | LlamaForCausalLM


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
        parameters, state = dict(ours.named_parameters()), theirs.state_dict()
        with torch.no_grad():
            for piece in pieces(config, stacked_experts=True):
                piece.view(parameters[piece.parameter]).copy_(state[piece.name])
        return Pair(theirs=theirs, ours=ours)

    return make
