"""How likely the drawn tokens were, and weights that change under an engine: what training needs of it."""

import pytest
import torch
from torch import Tensor

from dscoder.config.generate import BatchConfig, SamplingConfig
from dscoder.infer import engine as engine_module
from dscoder.infer.engine import Engine
from dscoder.infer.request import Completion, Request
from dscoder.models.init import init_weights
from dscoder.models.transformer import Transformer
from dscoder.testing.compare import assert_close
from tests.infer.stand_in import PROMPTS, Tapes, ask, tiny_model


def wanted_logprobs(model: Transformer, request: Request, completion: Completion, num_ids: int) -> Tensor:
    """By one forward over the whole text, without a cache."""
    with torch.inference_mode():
        logits_SV = model.eval()(torch.tensor([[*request.prompt, *completion.tokens]]))[0]
    logits_SV = logits_SV[len(request.prompt) - 1 : -1, :num_ids] / (request.sampling.temperature or 1.0)
    return logits_SV.log_softmax(-1).gather(1, torch.tensor(completion.tokens)[:, None])[:, 0]


@pytest.mark.parametrize("is_captured", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_log_probabilities_are_those_of_forwards_without_a_cache(
    model: Transformer, tokenizer, temperature: float, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_captured:
        monkeypatch.setattr(engine_module, "cuda_graphs", Tapes)
        monkeypatch.setattr(Engine, "_uses_graphs", True)
    requests = [
        ask(
            prompt,
            max_new_tokens=9,
            sampling=SamplingConfig(temperature=temperature, seed=seed, top_p=0.9),
            keep_logprobs=True,
        )
        for seed, prompt in enumerate(PROMPTS)
    ]
    engine = Engine(model, tokenizer, batch=BatchConfig(max_batch=3))
    for request, completion in zip(requests, engine.generate(requests), strict=True):
        assert completion.logprobs is not None
        wanted_S = wanted_logprobs(model, request, completion, tokenizer.vocab_size)
        assert_close(torch.tensor(completion.logprobs), wanted_S)


def test_keeping_log_probabilities_changes_no_token_and_no_neighbour(model: Transformer, tokenizer) -> None:
    sampling = SamplingConfig(temperature=1.0, seed=5)
    plain = [ask(prompt, max_new_tokens=6, sampling=sampling) for prompt in PROMPTS]
    mixed = [
        ask(prompt, max_new_tokens=6, sampling=sampling, keep_logprobs=idx % 2 == 0)
        for idx, prompt in enumerate(PROMPTS)
    ]
    engine = Engine(model, tokenizer)
    without, with_some = engine.generate(plain), engine.generate(mixed)
    assert [c.tokens for c in with_some] == [c.tokens for c in without]
    assert [c.logprobs is None for c in with_some] == [False, True, False, True, False]
    assert all(c.logprobs is None or len(c.logprobs) == len(c.tokens) for c in with_some)


def test_an_empty_completion_has_no_log_probabilities(model: Transformer, tokenizer) -> None:
    (completion,) = Engine(model, tokenizer).generate([ask("a", max_new_tokens=0, keep_logprobs=True)])
    assert completion.logprobs == ()


@pytest.mark.parametrize("is_captured", [False, True])
def test_weights_overwritten_in_place_are_used_by_the_next_call(
    model: Transformer, tokenizer, is_captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tapes: list[Tapes] = []
    if is_captured:
        monkeypatch.setattr(engine_module, "cuda_graphs", lambda: tapes.append(Tapes()) or tapes[-1])
        monkeypatch.setattr(Engine, "_uses_graphs", True)
    requests = [ask(prompt, max_new_tokens=8) for prompt in PROMPTS]
    engine = Engine(model, tokenizer)
    before = engine.generate(requests)
    init_weights(model, seed=99)
    after = engine.generate(requests)
    monkeypatch.undo()
    other = tiny_model("tiny_dense" if model.config.moe is None else "tiny_moe", max_positions=96)
    init_weights(other, seed=99)
    assert [c.tokens for c in after] == [c.tokens for c in Engine(other, tokenizer).generate(requests)]
    assert [c.tokens for c in after] != [c.tokens for c in before]
    assert len(tapes) == int(is_captured)  # the graphs of the first call were replayed
