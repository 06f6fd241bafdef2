"""Both caches: rows of any lengths decode as if alone; what does not fit is refused."""

from dataclasses import replace

import pytest
import torch

from dscoder.config import preset
from dscoder.models import KeyValueCache, LatentCache, Transformer, allocate_cache

NAMES = ["tiny_dense", "tiny_moe"]


@pytest.fixture(params=NAMES)
def model(request):
    config = replace(preset(request.param), num_layers=2, vocab_size=64)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10.0)
    return model


def tokens(num_rows, length, *, seed=0):
    return torch.randint(0, 64, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def lens(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_each_family_gets_its_cache():
    assert isinstance(allocate_cache(preset("tiny_moe"), num_sequences=1, max_positions=4), LatentCache)
    assert isinstance(allocate_cache(preset("tiny_dense"), num_sequences=1, max_positions=4), KeyValueCache)


def test_v2_caches_576_numbers_a_token_and_layer():
    config = replace(preset("v2_lite"), num_layers=1)
    assert allocate_cache(config, num_sequences=1, max_positions=64, device="meta").pages[0].shape[-1] == 576


def test_ragged_rows_decode_as_if_alone(model):
    prompts = [tokens(1, length, seed=length) for length in (3, 70, 1)]
    padded_BS = torch.zeros(3, 70, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        padded_BS[row, : prompt.shape[1]] = prompt
    cache = allocate_cache(model.config, num_sequences=3, max_positions=80)
    logits = model(padded_BS, cache=cache, num_new_B=lens(3, 70, 1))
    # A chunk on filled rows, with padding of its own, then single tokens; row 1 pauses once.
    chunk, step = tokens(3, 6, seed=9), tokens(3, 1, seed=10)
    chunk_logits = model(chunk, cache=cache, num_new_B=lens(6, 2, 4))
    step_logits = model(step, cache=cache, num_new_B=lens(1, 0, 1))
    last_logits = model(step, cache=cache)
    assert cache.seq_lens_B.tolist() == [11, 73, 7]
    for row, (length, num_chunk, num_steps) in enumerate([(3, 6, 2), (70, 2, 1), (1, 4, 2)]):
        steps = step[row : row + 1].expand(1, num_steps)
        alone = model(torch.cat([prompts[row], chunk[row : row + 1, :num_chunk], steps], dim=1))[0]
        torch.testing.assert_close(logits[row, :length], alone[:length], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            chunk_logits[row, :num_chunk], alone[length : length + num_chunk], rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(last_logits[row, 0], alone[-1], rtol=1e-4, atol=1e-4)
        if num_steps == 2:
            torch.testing.assert_close(step_logits[row, 0], alone[-2], rtol=1e-4, atol=1e-4)


def test_a_row_can_be_filled_to_the_last_position(model):
    # 65 positions: the last one alone on its page; padding points beyond both the row and its pages.
    cache = allocate_cache(model.config, num_sequences=2, max_positions=65)
    sequence = tokens(2, 65)
    model(sequence[:, :60], cache=cache)
    padded = torch.cat([sequence[:, 60:], torch.zeros(2, 90, dtype=torch.int64)], dim=1)
    got = model(padded, cache=cache, num_new_B=lens(5, 5))[:, :5]
    torch.testing.assert_close(got, model(sequence)[:, 60:], rtol=1e-4, atol=1e-4)


def test_what_other_pages_hold_does_not_matter():
    model = Transformer(replace(preset("tiny_moe"), num_layers=1)).eval().requires_grad_(False)
    sequence = tokens(1, 12)
    cache = allocate_cache(model.config, num_sequences=1, max_positions=200)
    cache.pages[0].fill_(float("nan"))
    model(sequence[:, :11], cache=cache)
    got = model(sequence[:, 11:], cache=cache)
    torch.testing.assert_close(got[:, 0], model(sequence)[:, -1], rtol=1e-4, atol=1e-4)


def test_one_token_too_many_is_refused_and_changes_nothing(model):
    cache = allocate_cache(model.config, num_sequences=2, max_positions=6)
    model(tokens(2, 5), cache=cache, num_new_B=lens(5, 2))
    with pytest.raises(ValueError, match="cache: a row must hold <= 6 tokens, got 7"):
        model(tokens(2, 2), cache=cache)
    assert cache.seq_lens_B.tolist() == [5, 2]
    model(tokens(2, 2), cache=cache, num_new_B=lens(1, 2))
    assert cache.seq_lens_B.tolist() == [6, 4]


def test_a_failed_forward_leaves_the_lengths(model):
    cache = allocate_cache(model.config, num_sequences=1, max_positions=6)
    model(tokens(1, 2), cache=cache)
    with pytest.raises(IndexError):
        model(torch.tensor([[64]]), cache=cache)
    assert cache.seq_lens_B.tolist() == [2]


def test_wrong_rows_are_refused(model):
    cache = allocate_cache(model.config, num_sequences=2, max_positions=6)
    with pytest.raises(ValueError, match="tokens must have 2 rows, got 3"):
        model(tokens(3, 1), cache=cache)
    with pytest.raises(ValueError, match=r"num_new_B must have shape \(2,\), got \(1,\)"):
        model(tokens(2, 1), cache=cache, num_new_B=lens(1))


@pytest.mark.parametrize(("num_sequences", "max_positions"), [(-1, 4), (2, 0)])
def test_impossible_sizes_are_refused(num_sequences, max_positions):
    with pytest.raises(ValueError, match=f"got {num_sequences} and {max_positions}"):
        allocate_cache(preset("tiny_moe"), num_sequences=num_sequences, max_positions=max_positions)
