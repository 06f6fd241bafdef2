"""Later chunks of prompts over a cache of keys and values: packed, the logits are those under a mask."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dscoder.config import GqaConfig, ModelConfig, preset
from dscoder.models import Transformer, allocate_cache, cache
from dscoder.models.cached_rows import PackedRows, pays_to_pack
from dscoder.testing import gpu

CHUNKS = ([100, 3, 64], [70, 30, 1], [60, 128, 200])  # tokens of each row that count
MAX_POSITIONS = 270  # the last chunk's padding does not fit the first row


def small(num_kv_heads: int) -> ModelConfig:
    attention = GqaConfig(num_heads=4, num_kv_heads=num_kv_heads, head_dim=128)
    return replace(preset("tiny_dense"), num_layers=2, vocab_size=256, attention=attention)


def in_chunks(model: Transformer, *, is_packed: bool) -> list[Tensor]:
    """Logits of the tokens that count."""
    rows = allocate_cache(
        model.config, num_sequences=3, max_positions=MAX_POSITIONS, dtype=torch.bfloat16, device=gpu.DEVICE
    )
    generator = torch.Generator().manual_seed(0)
    found, lengths = [], [0, 0, 0]
    for counts in CHUNKS:
        tokens_BS = torch.randint(0, 256, (3, max(counts)), generator=generator).to(gpu.DEVICE)
        num_new_B = torch.tensor(counts)
        view = rows.rows(0, 3, max_len=max(lengths))
        append = view.begin(tokens_BS, num_new_B)
        assert isinstance(append, cache.KeyValueAppend)
        assert isinstance(append.seen, PackedRows) is (is_packed and any(lengths))
        logits_BSV = model(tokens_BS, cache=view, num_new_B=num_new_B)
        found += [logits_BSV[row, :count].float() for row, count in enumerate(counts)]
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
    return found


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_packed_rows_give_the_logits_of_masked_ones(
    monkeypatch: pytest.MonkeyPatch, num_kv_heads: int
) -> None:
    model = Transformer(small(num_kv_heads), dtype=torch.bfloat16).to(gpu.DEVICE).eval().requires_grad_(False)
    packed = in_chunks(model, is_packed=True)
    monkeypatch.setattr(cache, "pays_to_pack", lambda *_, **__: False)
    masked = in_chunks(model, is_packed=False)
    for got, want in zip(packed, masked, strict=True):
        assert float((got - want).norm() / want.norm()) < 2e-2  # two roundings to bfloat16 a layer apart


def test_only_what_kernels_take_is_packed() -> None:
    entries = torch.zeros(8, 2, 128, dtype=torch.bfloat16, device=gpu.DEVICE)
    assert pays_to_pack(entries, entries, num_new=2)
    assert not pays_to_pack(entries, entries, num_new=1)
    assert not pays_to_pack(entries.float(), entries.float(), num_new=2)
    assert not pays_to_pack(entries[..., :64], entries[..., :64], num_new=2)
