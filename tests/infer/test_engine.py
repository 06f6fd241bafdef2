"""Batched generation: what ends a text, what streams, and that a batch changes nothing."""

import math
from collections.abc import Callable

import pytest
import torch

from dscoder.config.generate import BatchConfig, SamplingConfig
from dscoder.infer import engine as engine_module
from dscoder.infer.engine import Engine
from dscoder.infer.request import Completion, Event, Request
from dscoder.infer.runner import Runner
from dscoder.infer.scheduler import Job
from dscoder.models.cache import PAGE_SIZE
from dscoder.models.init import init_weights
from dscoder.models.transformer import Transformer
from tests.infer.stand_in import Tapes, tiny, tiny_model

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


@pytest.fixture(params=["tiny_dense", "tiny_moe"])
def model(request: pytest.FixtureRequest) -> Transformer:
    return tiny_model(request.param, max_positions=96)


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


def long_requests() -> list[Request]:
    """Some need one page, some two; drawn and greedy ones."""
    return [
        ask(
            bytes(
                torch.randint(97, 123, (length,), generator=torch.Generator().manual_seed(length)).tolist()
            ),
            max_new_tokens=num_new,
            sampling=SamplingConfig(temperature=0.7 * (length % 2), seed=length),
        )
        for length, num_new in ((60, 9), (3, 12), (61, 6), (1, 1), (64, 4), (40, 3), (5, 5))
    ]


def by_prompt(engine: Engine, requests: list[Request]) -> dict[tuple[int, ...], Completion]:
    completions = engine.generate(requests)
    return {request.prompt: answer for request, answer in zip(requests, completions, strict=True)}


@pytest.mark.parametrize(
    ("fields", "is_captured"),
    [
        ({"max_batch": 1}, False),
        ({"max_batch": 3, "prefill_chunk": 16}, True),
        ({"cache_tokens": 200, "prefill_chunk": 30}, False),
        ({"cache_tokens": 200}, True),
    ],
)
def test_neither_the_batch_nor_the_order_nor_scarce_memory_changes_an_answer(
    model: Transformer,
    tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, int],
    is_captured: bool,
) -> None:
    requests = long_requests()
    wanted = by_prompt(Engine(model, tokenizer), requests)
    if is_captured:
        capture_on_cpu(monkeypatch)
    engine = Engine(model, tokenizer, batch=BatchConfig(**fields))
    for order in (requests, requests[::-1]):
        assert by_prompt(engine, order) == wanted


def capture_on_cpu(monkeypatch: pytest.MonkeyPatch) -> list[Tapes]:
    """Engines capture their steps as on a GPU; returns what captures, an entry a runner."""
    made: list[Tapes] = []

    def capture() -> Tapes:
        made.append(Tapes())
        return made[-1]

    monkeypatch.setattr(engine_module, "cuda_graphs", capture)
    monkeypatch.setattr(Engine, "_uses_graphs", True)
    return made


# ---- memory ----


def test_when_pages_run_out_the_youngest_is_computed_again(
    tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("tiny_moe", max_positions=200)
    requests = [ask("a" * 60, max_new_tokens=8), ask("b" * 60, max_new_tokens=8)]
    wanted = Engine(model, tokenizer).generate(requests)
    prefilled: list[int] = []
    prefill = Runner.prefill

    def watch(runner: Runner, jobs: list[Job], pieces: list[list[int]]) -> None:
        prefilled.extend(map(len, pieces))
        prefill(runner, jobs, pieces)

    monkeypatch.setattr(Runner, "prefill", watch)
    # Three pages: both start in one each, and only one of them gets a second.
    engine = Engine(model, tokenizer, batch=BatchConfig(cache_tokens=3 * PAGE_SIZE))
    assert engine.generate(requests) == wanted
    assert prefilled == [59, 59, 64]


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_a_cache_too_small_for_one_request_is_an_error_before_anything_runs(tokenizer, name: str) -> None:
    model = tiny_model(name, max_positions=200).train()
    engine = Engine(model, tokenizer, batch=BatchConfig(cache_tokens=100))
    requests = [ask("a", max_new_tokens=9), ask("a" * 80, max_new_tokens=30)]
    with pytest.raises(ValueError, match="room for the 109 tokens of the longest request, got room for 100"):
        engine.generate(requests)
    assert model.training
    assert engine.generate(requests[:1])


def test_a_stream_left_early_gives_everything_back(
    model: Transformer, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = capture_on_cpu(monkeypatch)
    requests = long_requests()[:3]
    engine = Engine(model, tokenizer, batch=BatchConfig(cache_tokens=200))
    wanted = engine.generate(requests)
    for num_events in (1, 9, 20):
        stream = engine.stream(requests)
        for _ in range(num_events):
            next(stream)
        stream.close()
        assert engine.generate(requests) == wanted
    assert len(made) == 1  # one runner, with its graphs, served all of it


def test_two_streams_of_one_engine_do_not_disturb_each_other(
    model: Transformer, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = capture_on_cpu(monkeypatch)
    engine = Engine(model, tokenizer)
    requests = long_requests()[:3]
    wanted = engine.generate(requests)
    first, second = engine.stream(requests), engine.stream(requests)
    events: tuple[list[Event], list[Event]] = ([], [])
    for pair in zip(first, second, strict=True):
        for kept, event in zip(events, pair, strict=True):
            kept.append(event)
    for kept in events:
        done = {event.request_idx: event.completion for event in kept if event.completion}
        assert [done[i] for i in range(len(requests))] == wanted
    assert len(made) == 2


def test_memory_is_kept_for_graphs_alone_and_until_it_is_released(
    model: Transformer, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(model, tokenizer)
    engine.generate([ask("a", max_new_tokens=2)])
    assert engine._kept is None
    made = capture_on_cpu(monkeypatch)
    for num_new in (12, 2, 16, 20, 17):
        engine.generate([ask("a", max_new_tokens=num_new)])
    assert len(made) == 2  # up to 16 tokens, and up to 32
    engine.release()
    assert engine._kept is None
    engine.generate([ask("a", max_new_tokens=2)])
    assert len(made) == 3


def test_other_weights_are_captured_anew(
    model: Transformer, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = capture_on_cpu(monkeypatch)
    engine, requests = Engine(model, tokenizer), [ask("a", max_new_tokens=9)]
    before = engine.generate(requests)
    with torch.no_grad():
        model.head.weight.copy_(model.head.weight.roll(7, dims=0))  # in place: the same graphs
    assert engine.generate(requests) == Engine(model, tokenizer).generate(requests) != before
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().roll(-7, dims=0))
    assert engine.generate(requests) == before
    assert len(made) == 3  # one of them the other engine's


def test_what_a_failed_call_leaves_is_not_used_again(
    model: Transformer, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = capture_on_cpu(monkeypatch)
    engine, requests = Engine(model, tokenizer), [ask("a", max_new_tokens=9)]
    wanted = engine.generate(requests)
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    with pytest.raises(ValueError, match="request 0 at step 0"):
        engine.generate(requests)
    with torch.no_grad():
        model.norm.weight[3] = 1.0
    assert engine.generate(requests) == wanted
    assert len(made) == 2


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
