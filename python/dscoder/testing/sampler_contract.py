"""What GRPO relies on in a `Sampler`, whatever writes its answers: one check for ours and for others'.

The claims: every request is completed once; tokens and log-probabilities go together and are those of the
policy's weights at the time of the call; a text says what its tokens say and ends where a request says.
"""

import copy
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dscoder.config.generate import SamplingConfig
from dscoder.infer.request import Completion, Request
from dscoder.infer.written_text import WrittenText
from dscoder.models import Transformer
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.explore import Sampler
from dscoder.train.logprobs import PromptAndAnswer, answer_logprobs

_ANSWERS = 8  # to each prompt
_STOP_STRINGS = 4


def check_sampler(
    sampler: Sampler,
    *,
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    tolerance: float,
) -> None:
    """AssertionError unless the answers of three rounds keep to the contract.

    Args:
        model: the policy that `sampler` writes for; it has other weights during the last round.
        prompts: few and different; each is asked several times, at a temperature of 1.
        tolerance: of the mean difference between the sampler's and the model's log-probabilities, a token.
    """
    requests = [
        Request(
            prompt=tuple(tokenizer.encode(prompt, add_bos=True)),
            max_new_tokens=max_new_tokens,
            sampling=SamplingConfig(temperature=1.0, seed=seed),
            keep_logprobs=True,
        )
        for prompt in prompts
        for seed in range(_ANSWERS)
    ]
    first = complete(sampler, requests, model=model, tokenizer=tokenizer)
    assert distance(model, requests, first, tokenizer=tokenizer) <= tolerance
    assert len({completion.tokens for completion in first}) > len(prompts), "answers to a prompt must differ"

    letters = Counter("".join(completion.text for completion in first))
    stop = tuple(letter for letter, _ in letters.most_common(_STOP_STRINGS))
    stopping = [replace(request, stop=stop) for request in requests]
    stopped = complete(sampler, stopping, model=model, tokenizer=tokenizer)
    assert any(completion.finish_reason == "stop" for completion in stopped), f"none of {stop} was written"
    assert not any(word in completion.text for completion in stopped for word in stop)

    before = copy.deepcopy(model)
    try:
        _change(model)
        last = complete(sampler, requests, model=model, tokenizer=tokenizer)
        assert distance(model, requests, last, tokenizer=tokenizer) <= tolerance, "the weights are old ones"
        assert distance(before, requests, last, tokenizer=tokenizer) > tolerance
    finally:
        model.load_state_dict(before.state_dict())


def complete(
    sampler: Sampler, requests: Sequence[Request], *, model: Transformer, tokenizer: Tokenizer
) -> list[Completion]:
    """The completions in the order of their requests, each of which keeps to the rules of its request."""
    found: dict[int, Completion] = {}
    for request_idx, completion in sampler.sample(requests):
        assert request_idx not in found, f"request {request_idx} is completed twice"
        found[request_idx] = completion
    assert sorted(found) == list(range(len(requests)))
    for request_idx, completion in found.items():
        logprobs = completion.logprobs
        assert logprobs is not None
        assert len(logprobs) == len(completion.tokens)
        assert all(math.isfinite(logprob) and logprob <= 1e-6 for logprob in logprobs)
        wanted = _written(requests[request_idx], completion.tokens, model=model, tokenizer=tokenizer)
        assert replace(completion, logprobs=None) == wanted
    return [found[request_idx] for request_idx in range(len(requests))]


def _written(
    request: Request, tokens: Sequence[int], *, model: Transformer, tokenizer: Tokenizer
) -> Completion | None:
    """What the tokens are as an answer; None unless they end with the last of them."""
    text = WrittenText(
        0,
        replace(request, keep_logprobs=False),
        tokenizer=tokenizer,
        max_positions=model.config.max_positions,
        whole_tokens={},
    )
    if text.budget == 0:
        return text.finish().completion
    ends = [text.accept(token).completion for token in tokens]
    return ends[-1] if ends and not any(ends[:-1]) else None


@torch.no_grad()
def distance(
    model: Transformer,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    *,
    tokenizer: Tokenizer,
) -> float:
    """Mean absolute difference of the sampler's log-probabilities and those by `model`, a token."""
    differences: list[Tensor] = []
    for request, completion in zip(requests, completions, strict=True):
        assert completion.logprobs is not None
        likely = answer_logprobs(
            model,
            [PromptAndAnswer(prompt=request.prompt, answer=completion.tokens)],
            temperature=request.sampling.temperature,
            num_ids=min(model.config.vocab_size, tokenizer.vocab_size),
        )
        differences.append(likely.logprobs_BS[0].cpu() - torch.tensor(completion.logprobs))
    return torch.cat(differences).abs().mean().item()


@torch.no_grad()
def _change(model: Transformer) -> None:
    """Move every weight in place, as an update of the policy does, but further."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        parameter.add_(noise * parameter.abs().mean())
