"""Keys and values of a cache attended as packed sequences: the rows, and the same logits as under a mask."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dscoder.config import preset
from dscoder.models import KeyValueCache, Transformer, allocate_cache, cache
from dscoder.models.cached_rows import PackedRows, mask_rows, pack_rows, pays_to_pack

MAX_POSITIONS = 65


def test_each_row_is_followed_by_the_rest_of_its_memory() -> None:
    packed = pack_rows(torch.tensor([3, 0, 7], dtype=torch.int32), num_new=2, max_positions=10)
    assert packed.ends_k.tolist() == [0, 5, 10, 12, 20, 29, 30]
    assert packed.ends_q.tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert packed.ends_k.dtype == packed.ends_q.dtype == torch.int32


def test_padding_that_does_not_fit_sees_nothing() -> None:
    packed = pack_rows(torch.tensor([8, 10], dtype=torch.int32), num_new=5, max_positions=10)
    assert packed.ends_k.tolist() == [0, 10, 10, 20, 20]
    assert packed.ends_q.tolist() == [0, 2, 5, 5, 10]


def test_no_rows_are_no_sequences() -> None:
    packed = pack_rows(torch.zeros(0, dtype=torch.int32), num_new=5, max_positions=10)
    assert packed.ends_k.tolist() == packed.ends_q.tolist() == [0]


def test_a_mask_hides_what_is_behind_a_column() -> None:
    mask = mask_rows(torch.tensor([[1, 2]]), 4, num_sharing=2, dtype=torch.float32)
    seen = [[True, True, False, False], [True, True, True, False]]
    assert (mask == 0).tolist() == [[seen * 2]]


def test_a_cpu_keeps_to_the_mask() -> None:
    entries = torch.zeros(4, 2, 128, dtype=torch.bfloat16)
    assert not pays_to_pack(entries, entries, num_new=64)


def in_chunks(model: Transformer, *, unused: float) -> tuple[list[Tensor], list[bool]]:
    """Logits of the tokens that count, in chunks on rows of other lengths; and whether rows were packed.

    `unused` is what memory holds that no row has written.
    """
    num_rows = 3
    whole = allocate_cache(model.config, num_sequences=num_rows + 2, max_positions=MAX_POSITIONS)
    assert isinstance(whole, KeyValueCache)
    for entries in (*whole.keys, *whole.values):
        entries.fill_(unused)
    found, forms = [], []
    generator = torch.Generator().manual_seed(0)
    lengths = [0] * num_rows
    # The last chunk fills a row to its last position, with padding beyond it.
    for counts in ([3, 40, 1], [6, 2, 9], [1, 1, 1], [30, 22, 20]):
        num_new = max(counts)
        tokens_BS = torch.randint(0, 64, (num_rows, num_new), generator=generator)
        view = whole.rows(1, num_rows + 1, max_len=max(lengths))
        num_new_B = torch.tensor(counts)
        append = view.begin(tokens_BS, num_new_B)
        assert isinstance(append, cache.KeyValueAppend)
        forms.append(isinstance(append.seen, PackedRows))
        logits_BSV = model(tokens_BS, cache=view, num_new_B=num_new_B)
        found += [logits_BSV[row, :count] for row, count in enumerate(counts)]
        lengths = [length + count for length, count in zip(lengths, counts, strict=True)]
    assert max(lengths) == MAX_POSITIONS
    return found, forms


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_packed_rows_give_the_logits_of_masked_ones(
    monkeypatch: pytest.MonkeyPatch, num_kv_heads: int
) -> None:
    config = preset("tiny_dense")
    attention = replace(config.attention, num_kv_heads=num_kv_heads)
    model = Transformer(replace(config, num_layers=2, vocab_size=64, attention=attention)).eval()
    for parameter in model.requires_grad_(False).parameters():
        if parameter.dim() > 1:
            parameter.mul_(10.0)
    masked, forms = in_chunks(model, unused=0.0)
    assert forms == [False] * 4
    monkeypatch.setattr(cache, "pays_to_pack", lambda *_, **__: True)  # steps, too
    packed, forms = in_chunks(model, unused=torch.nan)
    assert forms == [False, True, True, True]
    for got, want in zip(packed, masked, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
