"""Log-probabilities of packed answers against plain forwards, one answer at a time."""

import pytest
import torch

from dscoder.config import preset
from dscoder.models import Transformer
from dscoder.testing.cases import generator, randn
from dscoder.testing.compare import assert_close
from dscoder.train import logprobs
from dscoder.train.logprobs import PromptAndAnswer, answer_logprobs, token_logprobs

TEXTS = [
    PromptAndAnswer(prompt=[5, 6, 7], answer=[8, 9]),
    PromptAndAnswer(prompt=[1], answer=[2]),
    PromptAndAnswer(prompt=[4, 4], answer=[3, 200, 11, 12]),
]
NUM_IDS = 250


@pytest.fixture(params=["tiny_dense", "tiny_moe"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return Transformer(preset(request.param)).eval()


def plain(model: Transformer, text: PromptAndAnswer, temperature: float) -> torch.Tensor:
    tokens_1S = torch.tensor([[*text.prompt, *text.answer]])
    logits_SV = model(tokens_1S)[0, len(text.prompt) - 1 : -1, :NUM_IDS].float() / temperature
    return logits_SV.log_softmax(-1).gather(1, torch.tensor(text.answer)[:, None])[:, 0]


def test_packed_answers_are_as_likely_as_each_alone(model: Transformer) -> None:
    found = answer_logprobs(model, TEXTS, temperature=0.7, num_ids=NUM_IDS)
    assert found.mask_BS.tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    for row, text in enumerate(TEXTS):
        assert_close(found.logprobs_BS[row, : len(text.answer)], plain(model, text, 0.7))
    assert not found.logprobs_BS[~found.mask_BS].any()


def test_gradients_are_those_of_plain_forwards(model: Transformer) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = answer_logprobs(model, TEXTS, temperature=0.7, num_ids=NUM_IDS).logprobs_BS
    weights_BS = randn(generator("gradients"), *found.shape)
    actual = torch.autograd.grad((found * weights_BS).sum(), parameters, allow_unused=True)
    total = sum(
        (plain(model, text, 0.7) * weights_BS[row, : len(text.answer)]).sum()
        for row, text in enumerate(TEXTS)
    )
    wanted = torch.autograd.grad(total, parameters, allow_unused=True)  # type: ignore[arg-type]
    for mine, theirs in zip(actual, wanted, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = generator("chunks")
    hidden_TD, weight_VD = randn(rng, 7, 4).requires_grad_(), randn(rng, 9, 4).requires_grad_()
    ids_T = torch.randint(9, (7,), generator=rng)
    gradient_T = randn(rng, 7)

    def computed() -> list[torch.Tensor]:
        found_T = token_logprobs(hidden_TD, weight_VD, ids_T, temperature=1.3)
        return [found_T, *torch.autograd.grad(found_T, (hidden_TD, weight_VD), gradient_T)]

    whole = computed()
    monkeypatch.setattr(logprobs, "_CHUNK_TOKENS", 3)
    for actual, wanted in zip(computed(), whole, strict=True):
        assert_close(actual, wanted)


def test_values_and_gradients_are_those_of_float64() -> None:
    rng = generator("differences")
    hidden_TD, weight_VD = randn(rng, 3, 4, dtype=torch.float64), randn(rng, 5, 4, dtype=torch.float64)
    ids_T = torch.tensor([0, 4, 2])
    logits_TV = (hidden_TD @ weight_VD.T / 1.5).requires_grad_()
    wanted_T = logits_TV.log_softmax(-1).gather(1, ids_T[:, None])[:, 0]
    hidden_TD.requires_grad_()
    found_T = token_logprobs(hidden_TD, weight_VD, ids_T, temperature=1.5)
    torch.testing.assert_close(found_T.double(), wanted_T, rtol=1e-6, atol=1e-6)
    (found_TD,) = torch.autograd.grad(found_T.sum(), hidden_TD)
    (wanted_TV,) = torch.autograd.grad(wanted_T.sum(), logits_TV)
    torch.testing.assert_close(found_TD, wanted_TV @ weight_VD / 1.5, rtol=1e-5, atol=1e-6)


def test_a_head_that_does_not_learn_gets_no_gradient() -> None:
    hidden_TD, weight_VD = torch.randn(2, 4, requires_grad=True), torch.randn(5, 4)
    token_logprobs(hidden_TD, weight_VD, torch.tensor([1, 2])).sum().backward()
    assert hidden_TD.grad is not None
    assert weight_VD.grad is None


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"one id a row of hidden_TD \[2, 4\], got \[3\]"):
        token_logprobs(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        token_logprobs(torch.zeros(2, 4), torch.zeros(5, 4), torch.zeros(2, dtype=torch.long), temperature=0)
    with pytest.raises(ValueError, match="must hold at least one token, got 1 and 0"):
        PromptAndAnswer(prompt=[1], answer=[])
