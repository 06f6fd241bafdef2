"""One number a sequence: where it is read, what it learns from, what is refused."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from dscoder.config import preset
from dscoder.models import ScalarModel, Transformer

NAMES = ["tiny_dense", "tiny_moe"]


def small(name, **changes):
    return replace(preset(name), num_layers=2, vocab_size=64, init_std=0.1, **changes)


def tokens(num_rows, length):
    return torch.randint(0, 64, (num_rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", NAMES)
def test_the_score_is_read_at_the_last_token_of_each_sequence(name):
    model = ScalarModel(Transformer(small(name))).eval().requires_grad_(False)
    tokens_BS = tokens(2, 11)
    hidden_BSD = model.backbone.features(tokens_BS).hidden_BSD
    wanted = (hidden_BSD[:, -1] * model.score.weight).sum(dim=-1)
    assert wanted.abs().min() > 0
    torch.testing.assert_close(model(tokens_BS), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_packed_sequences_score_as_if_alone(name):
    model = ScalarModel(Transformer(small(name))).eval().requires_grad_(False)
    tokens_BS = tokens(1, 30)
    ends = [0, 7, 8, 30]
    got = model(tokens_BS, cu_seqlens=torch.tensor(ends, dtype=torch.int32))
    alone = [model(tokens_BS[:, start:end])[0] for start, end in pairwise(ends)]
    torch.testing.assert_close(got, torch.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    model = ScalarModel(Transformer(small(name))).train()
    scores = model.scores(tokens(4, 40))
    (scores.score_B.sum() + scores.balance).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_there_is_no_vocabulary_head():
    names = [name for name, _ in ScalarModel(Transformer(small("tiny_dense"))).named_parameters()]
    assert "score.weight" in names
    assert not [name for name in names if "head" in name]


def test_the_score_is_float32_of_a_bfloat16_model():
    model = ScalarModel(Transformer(small("tiny_dense"), dtype=torch.bfloat16)).eval()
    with torch.no_grad():
        score_B = model(tokens(3, 9))
    assert score_B.dtype == torch.float32
    assert not torch.equal(score_B, score_B.bfloat16().float())


def test_the_head_is_drawn_by_its_seed():
    heads = [
        ScalarModel(Transformer(small("tiny_dense")), seed=seed).score.weight.detach() for seed in (1, 1, 2)
    ]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.05 < float(heads[0].std()) < 0.2


def test_an_empty_sequence_is_refused():
    model = ScalarModel(Transformer(small("tiny_dense")))
    with pytest.raises(ValueError, match="cu_seqlens must hold no empty sequence, got one at 1"):
        model(tokens(1, 8), cu_seqlens=torch.tensor([0, 3, 3, 8], dtype=torch.int32))
    with pytest.raises(ValueError, match=r"a token a row, got \[2, 0\]"):
        model(tokens(2, 0))
