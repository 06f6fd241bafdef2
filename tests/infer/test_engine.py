"""Generation: what ends a text, what streams, what is refused, and that it is what the model says."""

import math
from collections.abc import Callable

import pytest
import torch

from dscoder.config.generate import BatchConfig, SamplingConfig
from dscoder.infer.engine import Engine
from dscoder.infer.request import Completion, Event, Request
from dscoder.models.init import init_weights
from dscoder.models.transformer import Transformer
from tests.infer.stand_in import PROMPTS, ask, tiny

Build = Callable[..., torch.nn.Module]


def run(engine: Engine, requests: list[Request]) -> tuple[list[Completion], list[str]]:
    """Completions and, for each request, its streamed text put together."""
    events = list(engine.stream(requests))
    texts = ["".join(e.text for e in events if e.request_idx == i) for i in range(len(requests))]
    completions = {e.request_idx: e.completion for e in events if e.completion is not None}
    return [completions[i] for i in range(len(requests))], texts


# ---- what ends a text ----


def test_the_end_of_text_token_ends_the_text_and_is_not_part_of_it(scripted: Build, tokenizer) -> None:
    [completion], [streamed] = run(Engine(scripted("0abc"), tokenizer), [ask("0")])
    assert (completion.text, completion.finish_reason, streamed) == ("abc", "eos", "abc")
    assert completion.tokens == (*b"abc", tokenizer.eos_id)


def test_a_stop_token_ends_the_text(scripted: Build, tokenizer) -> None:
    [completion] = Engine(scripted("0abc"), tokenizer).generate([ask("0", stop_ids=(ord("b"),))])
    assert (completion.text, completion.finish_reason, completion.tokens) == ("a", "stop", tuple(b"ab"))


def test_a_stop_string_across_tokens_is_kept_out_of_text_and_stream(scripted: Build, tokenizer) -> None:
    [completion], [streamed] = run(Engine(scripted("0abcde"), tokenizer), [ask("0", stop=("cd", "zz"))])
    assert (completion.text, streamed, completion.finish_reason) == ("ab", "ab", "stop")


def test_the_budget_ends_the_text_and_releases_what_was_held_back(scripted: Build, tokenizer) -> None:
    request = ask("0", stop=("cx",), max_new_tokens=3)
    [completion], [streamed] = run(Engine(scripted("0abcde"), tokenizer), [request])
    assert (completion.text, streamed, completion.finish_reason) == ("abc", "abc", "length")


def test_the_context_ends_the_text_when_it_is_full(scripted: Build, tokenizer) -> None:
    engine = Engine(scripted("0123456789", max_positions=6), tokenizer)
    completions = engine.generate([ask("0123"), ask("0123", max_new_tokens=2), ask("012345")])
    assert [(c.text, c.finish_reason) for c in completions] == [
        ("45", "context"),
        ("45", "length"),
        ("", "context"),
    ]


def test_no_new_tokens_asked_for_is_an_empty_text(scripted: Build, tokenizer) -> None:
    completions = Engine(scripted("0abc"), tokenizer).generate([ask("0", max_new_tokens=0), ask("0")])
    assert [(c.text, c.finish_reason) for c in completions] == [("", "length"), ("abc", "eos")]


def test_no_requests_give_no_completions(scripted: Build, tokenizer) -> None:
    assert Engine(scripted("0a"), tokenizer).generate([]) == []


# ---- streaming ----


def test_characters_stream_whole(scripted: Build, tokenizer) -> None:
    events = list(Engine(scripted("0\u00e9\u4e2d!"), tokenizer).stream([ask("0")]))
    assert [event.text for event in events] == ["", "\u00e9", "", "", "\u4e2d", "!", ""]


def test_the_last_event_of_a_request_carries_its_completion(scripted: Build, tokenizer) -> None:
    events: list[Event] = list(Engine(scripted("0abc"), tokenizer).stream([ask("b"), ask("0")]))
    assert [(e.request_idx, e.completion is not None) for e in events] == [
        *((0, False), (1, False), (0, True), (1, False), (1, False), (1, True))
    ]


def test_a_stream_can_be_left_early(scripted: Build, tokenizer) -> None:
    model = scripted("0abc").train()
    for event in Engine(model, tokenizer).stream([ask("0")]):
        if event.text == "a":
            break
    assert model.training  # as it was


# ---- against the model itself ----


def test_greedy_tokens_are_those_of_forwards_without_a_cache(model: Transformer, tokenizer) -> None:
    completions = Engine(model, tokenizer).generate([ask(p, max_new_tokens=12) for p in PROMPTS])
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        with torch.inference_mode():
            logits_SV = model.eval()(torch.tensor([[*prompt, *completion.tokens]]))[0]
        drawn_from_SV = logits_SV[len(prompt) - 1 : -1, : tokenizer.vocab_size]
        assert drawn_from_SV.argmax(-1).tolist() == list(completion.tokens)


def test_padding_rows_of_the_embedding_are_never_drawn(tokenizer) -> None:
    model = Transformer(tiny("tiny_dense"))
    init_weights(model, seed=1)
    with torch.no_grad():
        model.head.weight[tokenizer.vocab_size :] = 1e3
    requests = [
        ask("a", max_new_tokens=30, sampling=SamplingConfig(temperature=5.0, seed=i)) for i in range(3)
    ]
    for completion in Engine(model, tokenizer).generate(requests):
        assert max(completion.tokens) < tokenizer.vocab_size


# ---- errors ----


def test_a_prompt_longer_than_the_context_is_refused_before_anything_runs(scripted: Build, tokenizer) -> None:
    model = scripted("0a", max_positions=4)
    with pytest.raises(
        ValueError, match="request 1 must have <= 4 prompt tokens, the model's context, got 5"
    ):
        Engine(model, tokenizer).stream([ask("0"), ask("00000")])
    assert model.batch_sizes == []


def test_ids_outside_the_vocabulary_are_refused(scripted: Build, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"request 0 must be in \[0, 264\), got 7 to 264"):
        Engine(scripted("0a"), tokenizer).generate([Request(prompt=(264, 7))])


def test_logits_that_are_not_finite_name_request_and_step(model: Transformer, tokenizer) -> None:
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="the logits of request 0 at step 0 must be finite"):
        Engine(model, tokenizer).generate([ask("a")])


def test_an_interrupt_passes_through_and_leaves_the_engine_usable(scripted: Build, tokenizer) -> None:
    model = scripted("0abc")
    engine = Engine(model, tokenizer)
    forward = model.features

    def interrupted(*args: object, **kwargs: object) -> object:
        if len(model.batch_sizes) == 2:
            model.features = forward
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    model.features = interrupted
    with pytest.raises(KeyboardInterrupt):
        engine.generate([ask("0")])
    assert engine.generate([ask("0")])[0].text == "abc"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "prompt must hold at least one token"),
        ({"prompt": (1,), "max_new_tokens": -1}, "max_new_tokens must be >= 0, got -1"),
        ({"prompt": (1,), "stop": ("a", "")}, r"stop strings must not be empty, got \('a', ''\)"),
    ],
)
def test_requests_are_checked(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Request(**fields)


@pytest.mark.parametrize(
    ("field", "value", "wanted"),
    [
        ("max_batch", 0, "max_batch and prefill_chunk must be >= 1, got 0 and 2048"),
        ("prefill_chunk", 0, "max_batch and prefill_chunk must be >= 1, got 32 and 0"),
        ("cache_tokens", -1, "cache_tokens must be >= 0, got -1"),
        ("memory_share", 0.0, r"memory_share must be in \(0, 1\], got 0.0"),
        ("memory_share", 1.5, r"memory_share must be in \(0, 1\], got 1.5"),
    ],
)
def test_engine_sizes_are_checked(field: str, value: float, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        BatchConfig(**{field: value})
