"""The contract of samplers: our engine keeps it, and each way to break it is seen."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch

from dscoder.infer.engine import Engine
from dscoder.infer.request import Completion, Request
from dscoder.models import Transformer
from dscoder.testing.sampler_contract import check_sampler
from dscoder.train.explore import EngineSampler, Sampler
from tests.train.grpo_stand_in import TOKENIZER, policy


def made(name: str = "tiny_dense") -> Transformer:
    torch.manual_seed(0)
    return policy(name)


def check(sampler: Sampler, model: Transformer) -> None:
    check_sampler(
        sampler,
        model=model,
        tokenizer=TOKENIZER,
        prompts=["an apple", "def f(x):"],
        max_new_tokens=8,
        tolerance=1e-5,
    )


class Spoilt:
    """Our engine, with something wrong."""

    def __init__(self, model: Transformer, spoil: Callable[[Completion, Request], Completion]) -> None:
        self._engine = EngineSampler(Engine(model, TOKENIZER))
        self._spoil = spoil

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        for idx, completion in self._engine.sample(requests):
            yield idx, self._spoil(completion, requests[idx])


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_our_engine_keeps_the_contract(name: str) -> None:
    model = made(name)
    before = copy.deepcopy(model.state_dict())
    check(EngineSampler(Engine(model, TOKENIZER)), model)
    assert all(torch.equal(weight, before[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda completion, _: replace(completion, logprobs=tuple(p - 1e-3 for p in completion.logprobs)),
        lambda completion, _: replace(completion, logprobs=completion.logprobs[:-1]),
        lambda completion, _: replace(completion, logprobs=(float("nan"), *completion.logprobs[1:])),
        lambda completion, _: replace(completion, logprobs=None),
        lambda completion, _: replace(completion, tokens=completion.tokens[:-1]),
        lambda completion, _: replace(completion, text=completion.text + "x"),
        lambda completion, request: replace(completion, text=completion.text + "".join(request.stop)),
        lambda completion, _: replace(completion, finish_reason="context"),
    ],
)
def test_what_does_not_agree_with_the_tokens_is_seen(
    spoil: Callable[[Completion, Request], Completion],
) -> None:
    model = made()
    with pytest.raises(AssertionError):
        check(Spoilt(model, spoil), model)


def test_old_weights_are_seen() -> None:
    model = made()
    with pytest.raises(AssertionError, match="the weights are old ones"):
        check(EngineSampler(Engine(copy.deepcopy(model), TOKENIZER)), model)


def test_answers_that_are_all_the_same_are_seen() -> None:
    class Greedy(Spoilt):
        def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
            seedless = [replace(request, sampling=replace(request.sampling, seed=0)) for request in requests]
            return super().sample(seedless)

    model = made()
    with pytest.raises(AssertionError, match="must differ"):
        check(Greedy(model, lambda completion, _: completion), model)


@pytest.mark.parametrize("keep", [lambda idx: idx > 0, lambda idx: True])
def test_a_request_that_is_not_completed_once_is_seen(keep: Callable[[int], bool]) -> None:
    class Uneven(Spoilt):
        def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
            answers = [answer for answer in super().sample(requests) if keep(answer[0])]
            yield from answers
            yield answers[-1]

    model = made()
    with pytest.raises(AssertionError):
        check(Uneven(model, lambda completion, _: completion), model)
