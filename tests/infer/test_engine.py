"""Batched generation: what ends a text, what streams, and that a batch changes nothing."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dscoder.config import ModelConfig, preset
from dscoder.config.generate import BatchConfig, SamplingConfig
from dscoder.infer.engine import Engine
from dscoder.infer.request import Completion, Event, Request
from dscoder.models.init import init_weights
from dscoder.models.transformer import Transformer

Build = Callable[..., torch.nn.Module]


def ask(text: str | bytes, **fields: object) -> Request:
    return Request(prompt=tuple(text if isinstance(text, bytes) else text.encode()), **fields)


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
    assert model.training  # the mode that generation changed is back


# ---- batches ----


def test_finished_rows_leave_the_batch(scripted: Build, tokenizer) -> None:
    model = scripted("0abcdef")
    Engine(model, tokenizer).generate([ask("0"), ask("e"), ask("c")])
    assert model.batch_sizes == [(3, 1), (3, 1), (2, 1), (2, 1), (1, 1), (1, 1), (1, 1)]


def test_more_requests_than_rows_take_turns_and_keep_their_order(scripted: Build, tokenizer) -> None:
    model = scripted("0abcdef")
    completions = Engine(model, tokenizer, batch=BatchConfig(max_batch=2)).generate(
        [ask(prompt) for prompt in "d0ebc"]
    )
    assert [c.text for c in completions] == ["ef", "abcdef", "f", "cdef", "def"]
    assert max(rows for rows, _ in model.batch_sizes) == 2


def test_a_row_that_is_free_is_taken_at_once(scripted: Build, tokenizer) -> None:
    model = scripted("0abcdef")
    Engine(model, tokenizer, batch=BatchConfig(max_batch=2)).generate([ask("0"), ask("f"), ask("d")])
    assert model.batch_sizes == [(2, 1)] * 4 + [(1, 1)] * 3


def test_prompts_are_computed_in_chunks_while_others_decode(scripted: Build, tokenizer) -> None:
    model = scripted("0abcdef")
    engine = Engine(model, tokenizer, batch=BatchConfig(prefill_chunk=4))
    completions = engine.generate([ask("0"), ask("xxxxxxxxxe")])
    assert [c.text for c in completions] == ["abcdef", "f"]
    assert model.batch_sizes[:6] == [(1, 4), (1, 1), (1, 4), (1, 1), (1, 1), (2, 1)]


def test_prompts_that_fit_in_one_forward_are_computed_together(scripted: Build, tokenizer) -> None:
    model = scripted("0abcdef")
    engine = Engine(model, tokenizer, batch=BatchConfig(prefill_chunk=8))
    completions = engine.generate([ask("xxxe"), ask("xd"), ask("xxxxxc"), ask("xxb")])
    assert [c.text for c in completions] == ["f", "ef", "def", "cdef"]
    # Three and one token beside each other; with five the padding would be too much.
    assert [shape for shape in model.batch_sizes if shape[1] > 1] == [(2, 3), (1, 5), (1, 2)]


def tiny(name: str, **fields: object) -> ModelConfig:
    return replace(preset(name), vocab_size=264, width=64, num_layers=2, mlp_width=96, **fields)


@pytest.fixture(params=["tiny_dense", "tiny_moe"])
def model(request: pytest.FixtureRequest) -> Transformer:
    built = Transformer(tiny(request.param, max_positions=96))
    # Wide enough that the logits are far apart: rounding must not decide a token.
    for index, parameter in enumerate(built.parameters()):
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    return built


PROMPTS = (b"def f(x):", b"a", b"import os, sys\nfor name in os.listdir('.'):", b"class A:\n    def", b"if")


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_batch_gives_what_each_request_gives_alone(
    model: Transformer, tokenizer, temperature: float
) -> None:
    requests = [
        ask(
            prompt,
            max_new_tokens=8 + 5 * i,
            sampling=SamplingConfig(temperature=temperature, top_p=0.95, seed=i),
        )
        for i, prompt in enumerate(PROMPTS)
    ]
    together = Engine(model, tokenizer, batch=BatchConfig(prefill_chunk=7)).generate(requests)
    for request, completion in zip(requests, together, strict=True):
        [alone] = Engine(model, tokenizer).generate([request])
        assert alone.tokens == completion.tokens
        assert alone.text == completion.text
    assert len({completion.tokens[:8] for completion in together}) == len(PROMPTS)


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
