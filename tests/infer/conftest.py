"""A model that follows a script, so that the engine is tested in milliseconds."""

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from dscoder.config import GqaConfig, ModelConfig
from dscoder.models.transformer import Transformer
from tests.infer.stand_in import ByteTokenizer, tiny_model


class ScriptedModel(nn.Module):
    """The next token is a function of the last one; a token that the script lacks ends the text."""

    def __init__(self, follow: dict[int, int], *, max_positions: int, vocab_size: int = 264) -> None:
        super().__init__()
        self.config = ModelConfig(
            vocab_size=vocab_size,
            width=vocab_size,
            num_layers=1,
            mlp_width=1,
            attention=GqaConfig(num_heads=1, num_kv_heads=1, head_dim=2),
            max_positions=max_positions,
        )
        self.head = nn.Linear(vocab_size, vocab_size, bias=False)
        nn.init.eye_(self.head.weight)
        self.follow = follow
        self.batch_sizes: list[tuple[int, int]] = []  # the shape of every forward

    def features(self, tokens_BS: Tensor, *, cache, num_new_B: Tensor | None = None) -> SimpleNamespace:
        self.batch_sizes.append((tokens_BS.shape[0], tokens_BS.shape[1]))
        assert cache.num_sequences == tokens_BS.shape[0]
        eos = ByteTokenizer.eos_id
        target_BS = torch.tensor(
            [[self.follow.get(token, eos) for token in row] for row in tokens_BS.tolist()]
        )
        return SimpleNamespace(
            hidden_BSD=10.0 * nn.functional.one_hot(target_BS, self.config.vocab_size).float()
        )


@pytest.fixture
def tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


@pytest.fixture
def scripted() -> Callable[..., ScriptedModel]:
    """Build a model that, from the first byte of `text`, writes the rest; bytes must be distinct."""

    def build(text: str | bytes, *, max_positions: int = 64) -> ScriptedModel:
        script = text if isinstance(text, bytes) else text.encode()
        assert len(set(script)) == len(script)
        return ScriptedModel(dict(pairwise(script)), max_positions=max_positions)

    return build


@pytest.fixture(params=["tiny_dense", "tiny_moe"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return tiny_model(request.param, max_positions=96)
