"""Cached latents expanded for a chunk of a prompt: when, which of them at once, and with what result."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dscoder.config import MlaConfig, preset
from dscoder.models import Transformer, allocate_cache, cache, expansion
from dscoder.models.expansion import Expansion, merge, pays_to_expand, plan_expansion

LITE = preset("v2_lite").attention
TINY = MlaConfig(num_heads=2, q_lora_rank=None, kv_lora_rank=9, nope_dim=2, rope_dim=2, value_dim=2)
PAGE_SIZE = 4
# Sequences of 7, 3 and 10 rows with their new tokens; the second is the only one with its pages in order.
LENGTHS = torch.tensor([7, 3, 10], dtype=torch.int32)
PAGES = torch.tensor([[5, 2, 9], [0, 1, 9], [8, 3, 6]], dtype=torch.int32)


def products(attention: MlaConfig, num_new: int, num_cached: int, *, is_expanded: bool) -> int:
    """That one head multiplies, each counted for itself."""
    rank, rope = attention.kv_lora_rank, attention.rope_dim
    nope, value = attention.nope_dim, attention.value_dim
    pairs = sum(num_cached + i + 1 for i in range(num_new))
    if is_expanded:
        return (num_cached + num_new) * rank * (nope + value) + pairs * (nope + rope + value)
    return num_new * rank * (nope + value) + pairs * (rank + rope + rank)


@pytest.mark.parametrize("attention", [LITE, preset("v2").attention, preset("tiny_moe").attention, TINY])
def test_the_form_with_fewer_products_is_chosen(attention: MlaConfig) -> None:
    for num_new in (2, 3, 20, 64, 65, 90, 170, 171, 512):
        for num_cached in (1, 5, 64, 1000, 100_000):
            sizes = (attention, num_new, num_cached)
            is_less = products(*sizes, is_expanded=True) < products(*sizes, is_expanded=False)
            assert pays_to_expand(attention, num_new=num_new, num_cached=num_cached) is is_less, sizes


def test_chunks_of_171_tokens_pay_however_much_is_cached_and_steps_never() -> None:
    for num_cached in (1, 171, 4096, 163_840):
        assert pays_to_expand(LITE, num_new=171, num_cached=num_cached)
        assert not pays_to_expand(LITE, num_new=1, num_cached=num_cached)
    assert not pays_to_expand(LITE, num_new=170, num_cached=163_840)
    narrow = replace(TINY, kv_lora_rank=100, nope_dim=1, value_dim=1)
    assert not pays_to_expand(narrow, num_new=1, num_cached=1)  # where it would be less


def plan(*, num_new: int, most_expanded: int, num_cached: int | None = None) -> Expansion:
    found = plan_expansion(
        TINY,
        LENGTHS,
        PAGES,
        page_size=PAGE_SIZE,
        num_new=num_new,
        num_cached=10 - num_new if num_cached is None else num_cached,
        most_expanded=most_expanded,
    )
    assert found is not None
    return found


def rows_of(found: Expansion) -> list[list[list[int]]]:
    """The slots of each sequence, block by block."""
    ends = [block.ends_k.tolist() for block in found.blocks]
    return [
        [block.slots_M[end[b] : end[b + 1]].tolist() for b in range(len(LENGTHS))]
        for block, end in zip(found.blocks, ends, strict=True)
    ]


def slots(sequence: int, first: int, last: int) -> list[int]:
    return [int(PAGES[sequence, i // PAGE_SIZE]) * PAGE_SIZE + i % PAGE_SIZE for i in range(first, last)]


def test_one_block_holds_each_sequence_whole() -> None:
    found = plan(num_new=3, most_expanded=1000)
    assert rows_of(found) == [[slots(0, 0, 7), slots(1, 0, 3), slots(2, 0, 10)]]
    assert found.ends_q.tolist() == [0, 3, 6, 9]
    assert [block.is_causal for block in found.blocks] == [True]


def test_blocks_count_from_the_end_and_share_no_row() -> None:
    found = plan(num_new=3, most_expanded=4 * len(LENGTHS) * TINY.num_heads)
    assert rows_of(found) == [
        [slots(0, 3, 7), slots(1, 0, 3), slots(2, 6, 10)],
        [slots(0, 0, 3), [], slots(2, 2, 6)],
        [[], [], slots(2, 0, 2)],
    ]
    assert [block.is_causal for block in found.blocks] == [True, False, False]
    assert [len(block.slots_M) for block in found.blocks] == [12, 12, 6]


def test_a_block_is_never_narrower_than_the_new_tokens() -> None:
    found = plan(num_new=3, most_expanded=1)
    assert [len(block.slots_M) for block in found.blocks] == [9, 9, 9, 3]


def test_a_sequence_longer_than_was_said_takes_no_rows_of_others() -> None:
    """It does not live; the others are whole."""
    found = plan(num_new=3, num_cached=4, most_expanded=4 * len(LENGTHS) * TINY.num_heads)
    assert [block[:2] for block in rows_of(found)] == [
        [slots(0, 3, 7), slots(1, 0, 3)],
        [slots(0, 0, 3), []],
    ]
    assert all(int(block.ends_k[-1]) <= len(block.slots_M) for block in found.blocks)


def test_without_cached_rows_or_sequences_there_is_nothing_to_do() -> None:
    sizes = {"page_size": PAGE_SIZE, "num_new": 3}
    assert plan_expansion(TINY, LENGTHS, PAGES, num_cached=0, **sizes) is None
    none = plan_expansion(TINY, LENGTHS[:0], PAGES[:0], num_cached=9, **sizes)
    assert none is not None
    assert all(block.slots_M.numel() == 0 for block in none.blocks)


def test_merging_parts_is_attending_all() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 1, 6, generator=generator)
    values = torch.randn(6, 3, generator=generator)

    def part(keys: slice) -> tuple[Tensor, Tensor]:
        return scores[..., keys].softmax(dim=-1) @ values[keys], scores[..., keys].logsumexp(dim=-1)

    nothing = (torch.zeros(2, 1, 3), torch.full((2, 1), -torch.inf))
    for parts in ((part(slice(0, 2)), part(slice(2, 6))), (part(slice(0, 6)), nothing)):
        for ordered in (parts, parts[::-1]):
            torch.testing.assert_close(merge(*ordered), part(slice(0, 6)))


def model_and_prompts() -> tuple[Transformer, list[Tensor]]:
    config = replace(preset("tiny_moe"), num_layers=2, vocab_size=64)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10.0)
    generator = torch.Generator().manual_seed(3)
    return model, [torch.randint(0, 64, (length,), generator=generator) for length in (200, 131, 95, 1)]


def in_chunks(model: Transformer, prompts: list[Tensor], chunk: int) -> tuple[list[Tensor], list[bool]]:
    """Logits of each prompt, beside the others and in pages that held NaN, and which forwards expanded."""
    rows = allocate_cache(model.config, num_sequences=4, max_positions=256, num_pages=18)
    assert isinstance(rows, cache.LatentCache)
    for pages in rows.pages:
        pages.fill_(torch.nan)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(4)).tolist()
    for row, prompt in enumerate(prompts):
        rows.assign(row, [order.pop() for _ in range(rows.num_pages_of(len(prompt)))])
    got: list[list[Tensor]] = [[] for _ in prompts]
    forms = []
    for start in range(0, 200, chunk):
        pieces = [prompt[start : start + chunk] for prompt in prompts]
        tokens_BS = torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True)
        num_new_B = torch.tensor([len(piece) for piece in pieces])
        view = rows.rows(0, 4, max_len=start)
        append = view.begin(tokens_BS, num_new_B)
        assert isinstance(append, cache.LatentAppend)
        forms.append(append.expansion is not None)
        logits_BSV = model(tokens_BS, cache=view, num_new_B=num_new_B)
        for row, piece in enumerate(pieces):
            got[row].append(logits_BSV[row, : len(piece)])
    assert rows.seq_lens_B.tolist() == [len(prompt) for prompt in prompts]
    return [torch.cat(pieces) for pieces in got], forms


@pytest.mark.parametrize(("chunk", "most_expanded"), [(80, 1 << 20), (80, 1400), (70, 1), (30, 1 << 20)])
def test_a_prompt_in_chunks_beside_others_is_the_prompt_alone(
    monkeypatch: pytest.MonkeyPatch, chunk: int, most_expanded: int
) -> None:
    """In one block, in several, and with chunks too short to be expanded; no NaN of a page comes through."""
    monkeypatch.setattr(
        cache,
        "plan_expansion",
        lambda *args, **sizes: plan_expansion(*args, **sizes, most_expanded=most_expanded),
    )
    model, prompts = model_and_prompts()
    got, forms = in_chunks(model, prompts, chunk)
    for prompt, logits_SV in zip(prompts, got, strict=True):
        torch.testing.assert_close(logits_SV, model(prompt[None])[0], rtol=1e-4, atol=1e-4)
    assert any(forms) is (chunk > 64)


def test_both_forms_give_the_same_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = model_and_prompts()
    expanded, forms = in_chunks(model, prompts, 80)
    assert any(forms)
    monkeypatch.setattr(expansion, "pays_to_expand", lambda *_, **__: False)
    absorbed, forms = in_chunks(model, prompts, 80)
    assert not any(forms)
    torch.testing.assert_close(expanded, absorbed, rtol=1e-4, atol=1e-4)
