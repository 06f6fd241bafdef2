"""Steps over tensors that stay in place: what is captured follows its inputs, and padding changes nothing."""

import math

import pytest
import torch

from dscoder.config import preset
from dscoder.config.generate import SamplingConfig
from dscoder.infer.pages import Room
from dscoder.infer.runner import Runner, waits_for_device
from dscoder.infer.sampler import draw_numbers
from dscoder.infer.scheduler import Job
from dscoder.models.cache import PAGE_SIZE, KeyValueCache, LatentCache
from dscoder.models.transformer import Transformer
from dscoder.runtime import native
from tests.infer.stand_in import Tapes, tiny_model

NAMES = ["tiny_dense", "tiny_moe"]
PAGES_A_ROW = 3


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest) -> Transformer:
    return tiny_model(request.param).eval()


def build(model: Transformer, *, capture: Tapes | None, num_rows: int = 4) -> Runner:
    is_paged = model.config.moe is not None  # of the two tiny models, the one with latents
    room = Room(
        num_rows=num_rows,
        max_positions=PAGES_A_ROW * PAGE_SIZE,
        num_pages=num_rows * PAGES_A_ROW + 2 if is_paged else None,
    )
    runner = Runner(model, room=room, num_ids=261, capture=capture)
    for row in range(num_rows):
        # Every row has its pages, in an order of its own, and two pages have no row.
        pages = [(5 * (row * PAGES_A_ROW + i) + 3) % (num_rows * PAGES_A_ROW) for i in range(PAGES_A_ROW)]
        runner.cache.assign(row, pages if is_paged else [])
    return runner


def job(row: int, num_cached: int) -> Job:
    return Job(request_idx=row, num_tokens=num_cached + 1, most_tokens=999, num_cached=num_cached, row=row)


def prompt(row: int, length: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(row)).tolist()


def fill(runner: Runner, lengths: list[int]) -> None:
    for row, length in enumerate(lengths):
        if length:
            runner.prefill([job(row, 0)], [prompt(row, length)])


def wanted_token(model: Transformer, tokens: list[int]) -> int:
    """Without a cache."""
    with torch.inference_mode():
        return int(model(torch.tensor([tokens]))[0, -1, :261].argmax())


@pytest.mark.parametrize("is_captured", [False, True])
def test_each_row_goes_on_from_what_it_holds(model: Transformer, is_captured: bool) -> None:
    runner = build(model, capture=Tapes() if is_captured else None)
    # Row 2 is a page short of a token; row 1 is empty.
    texts = {row: prompt(row, length) for row, length in ((0, 5), (1, 0), (2, 63), (3, 100))}
    fill(runner, [5, 0, 63, 100])
    for step in range(4):
        # Rows take part by turns; the last alone needs the whole batch.
        rows = [row for row in (0, 1, 2, 3) if (step + row) % 4]
        fed = {row: 7 * step + row for row in rows}
        jobs = [job(row, len(texts[row])) for row in rows]
        _, tokens = runner.step(jobs, list(fed.values()), None).tolist()
        for row in rows:
            texts[row].append(fed[row])
            assert int(tokens[row]) == wanted_token(model, texts[row])
    assert runner.cache.seq_lens_B.tolist() == [len(texts[row]) for row in range(4)]


def test_a_batch_size_is_captured_once_and_then_replayed(model: Transformer) -> None:
    tapes = Tapes()
    runner = build(model, capture=tapes, num_rows=6)
    fill(runner, [3] * 6)
    for length, rows in enumerate(([0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 2, 3, 4], [0, 5], [2], [0])):
        runner.step([job(row, 3 + length) for row in rows], [1] * len(rows), None)
    assert (tapes.num_captured, tapes.num_replays) == (4, 8)  # batches of 1, 2, 4 and all 6 rows


def test_nothing_that_a_captured_step_reads_or_writes_ever_moves(model: Transformer) -> None:
    runner = build(model, capture=Tapes())
    cache = runner.cache
    stores = cache.pages if isinstance(cache, LatentCache) else [*cache.keys, *cache.values]
    tables = [cache.page_table_BN] if isinstance(cache, LatentCache) else []

    def places() -> list[int]:
        inputs = [runner._input_2B, runner._how_B4, cache.seq_lens_B]
        return [x.data_ptr() for x in (*inputs, *tables, *stores)]

    before = places()
    fill(runner, [3, 4])
    logits = set()
    for step in range(3):
        answer_2B = runner.step([job(0, 3 + step), job(1, 4 + step)], [step, 9], None)
        logits.add(answer_2B.data_ptr())
    cache.move(1, 3, num_tokens=7)
    cache.clear(1)
    runner.clear()
    assert places() == before
    assert len(logits) == 1


def test_rows_that_do_not_decode_keep_what_they_hold(model: Transformer) -> None:
    """Row 1 is between two chunks of its prompt while rows 0 and 3 decode; row 2 is empty."""
    runner = build(model, capture=Tapes())
    fill(runner, [4, 70, 0, 6])
    for step in range(3):
        runner.step([job(0, 4 + step), job(3, 6 + step)], [step, step], None)
    assert runner.cache.seq_lens_B.tolist() == [7, 70, 0, 9]
    runner.prefill([job(1, 70)], [[5] * 8])
    _, tokens = runner.step([job(1, 78)], [9], None).tolist()
    assert int(tokens[1]) == wanted_token(model, [*prompt(1, 70), *[5] * 8, 9])


def test_padding_is_harmless_even_where_it_is_nan() -> None:
    """All pages hold NaN but for what rows wrote, the page for padding too."""
    model = tiny_model("tiny_moe").eval()
    clean, poisoned = build(model, capture=Tapes()), build(model, capture=Tapes())
    assert isinstance(poisoned.cache, LatentCache)
    for pages in poisoned.cache.pages:
        pages.fill_(math.nan)
    answers = []
    for runner in (clean, poisoned):
        runner.cache.clear(1)  # no pages: padding
        fill(runner, [5, 0, 40])
        jobs = [job(0, 5), job(2, 40)]
        answers.append(runner.step(jobs, [3, 4], None)[:, [0, 2]].clone())
    assert torch.isfinite(answers[1]).all()
    assert torch.equal(*answers)
    assert torch.isnan(poisoned.cache.pages[0][12:14]).all()  # the two that no row has


def test_a_step_beside_others_is_the_step_alone(model: Transformer) -> None:
    together, alone = build(model, capture=None), build(model, capture=None)
    fill(together, [5, 9, 66])
    fill(alone, [5, 9, 66])
    jobs = [job(0, 5), job(1, 9), job(2, 66)]
    peaks, tokens = together.step(jobs, [1, 2, 3], None).tolist()
    for i, one in enumerate(jobs):
        peaks_alone, tokens_alone = alone.step([one], [i + 1], None).tolist()
        assert tokens[i] == tokens_alone[i]
        assert peaks[i] == pytest.approx(peaks_alone[i], rel=1e-4)


def test_neighbouring_prompts_of_any_lengths_are_computed_in_one_forward(model: Transformer) -> None:
    runner = build(model, capture=None)
    runner.prefill([job(1, 0), job(2, 0)], [prompt(1, 20), prompt(2, 4)])
    runner.prefill([job(1, 20), job(2, 4)], [[1, 2], [3, 4, 5]])
    assert runner.cache.seq_lens_B.tolist() == [0, 22, 7, 0]
    _, tokens = runner.step([job(1, 22), job(2, 7)], [8, 9], None).tolist()
    assert int(tokens[1]) == wanted_token(model, [*prompt(1, 20), 1, 2, 8])
    assert int(tokens[2]) == wanted_token(model, [*prompt(2, 4), 3, 4, 5, 9])


@pytest.mark.parametrize("is_captured", [False, True])
def test_draws_belong_to_their_rows(model: Transformer, is_captured: bool) -> None:
    runner = build(model, capture=Tapes() if is_captured else None)
    fill(runner, [5, 5, 5])
    hot = SamplingConfig(temperature=50.0, seed=3)
    how = [draw_numbers(SamplingConfig(), 0), draw_numbers(hot, 1)]
    _, tokens = runner.step([job(0, 5), job(2, 5)], [1, 1], how).tolist()
    assert int(tokens[0]) == wanted_token(model, [*prompt(0, 5), 1])
    assert int(tokens[2]) != wanted_token(model, [*prompt(2, 5), 1])


def test_width_of_rows_with_memory_of_their_own_grows_in_powers_of_two() -> None:
    model, tapes = tiny_model("tiny_dense").eval(), Tapes()
    runner = Runner(
        model, room=Room(num_rows=1, max_positions=1024, num_pages=None), num_ids=261, capture=tapes
    )
    assert isinstance(runner.cache, KeyValueCache)
    text = prompt(0, 254)
    runner.prefill([job(0, 0)], [text])
    for length in range(254, 259):
        _, tokens = runner.step([job(0, length)], [length % 256], None).tolist()
        text.append(length % 256)
        assert int(tokens[0]) == wanted_token(model, text)
    assert tapes.num_captured == 2  # up to 256 entries, and up to 512


def test_weights_that_moved_are_noticed(model: Transformer) -> None:
    runner = build(model, capture=Tapes())
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert runner.is_current
    model.head.weight = torch.nn.Parameter(model.head.weight.detach().clone())
    assert not runner.is_current


@pytest.mark.parametrize(
    ("name", "dtype", "waits"),
    [
        ("coder_6_7b", torch.float32, False),  # nothing in it does
        ("v2_lite", torch.bfloat16, False),
        ("v2_lite", torch.float32, True),  # the kernels of latent decoding take two bytes
        ("tiny_moe", torch.bfloat16, True),  # and rows of 576
    ],
)
def test_what_the_kernels_cannot_do_is_not_captured(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, waits: bool
) -> None:
    monkeypatch.setattr(native, "has_kernels", lambda: True)
    model = Transformer(preset(name), device="meta", dtype=dtype)
    assert waits_for_device(model) is waits


def test_without_kernels_latents_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has_kernels", lambda: False)
    assert waits_for_device(Transformer(preset("v2_lite"), device="meta", dtype=torch.bfloat16))
