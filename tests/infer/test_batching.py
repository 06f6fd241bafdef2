"""Requests that share a batch, a cache and graphs: who runs when, and that none of it changes an answer."""

import math
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from dscoder.config.generate import BatchConfig, SamplingConfig
from dscoder.infer import engine as engine_module
from dscoder.infer.engine import Engine
from dscoder.infer.request import Completion, Event, Request
from dscoder.infer.runner import Runner
from dscoder.infer.scheduler import Job
from dscoder.models.cache import PAGE_SIZE
from dscoder.models.transformer import Transformer
from tests.infer.stand_in import PROMPTS, Tapes, ask, tiny_model

Build = Callable[..., torch.nn.Module]

# ---- who runs when ----


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


@pytest.mark.parametrize("is_captured", [False, True])
def test_neither_inference_mode_nor_autocast_around_a_call_reaches_the_model(
    model: Transformer, tokenizer, monkeypatch: pytest.MonkeyPatch, is_captured: bool
) -> None:
    """What is kept was made in one of them, and serves in the others."""
    if is_captured:
        capture_on_cpu(monkeypatch)
    requests = long_requests()[:3]
    wanted = Engine(model, tokenizer).generate(requests)
    engine = Engine(model, tokenizer, batch=BatchConfig(max_batch=2))
    for around in (torch.inference_mode(), nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with around:
            assert engine.generate(requests) == wanted
    stream = engine.stream(requests)
    with torch.inference_mode():
        events = [next(stream)]
    events += stream
    done = {event.request_idx: event.completion for event in events if event.completion}
    assert [done[i] for i in range(len(requests))] == wanted


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
