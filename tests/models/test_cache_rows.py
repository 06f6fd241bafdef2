"""Rows of a cache that come and go one by one, used by views: each decodes as if it were alone."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dscoder.config import MlaConfig, preset
from dscoder.models import PAGE_SIZE, Transformer, allocate_cache, cache_token_bytes
from dscoder.models.cache import Cache

NAMES = ["tiny_dense", "tiny_moe"]
MAX_POSITIONS = 200


@pytest.fixture(params=NAMES)
def model(request):
    config = replace(preset(request.param), num_layers=2, vocab_size=64)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10.0)
    return model


def tokens(length: int, *, seed: int) -> Tensor:
    return torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(seed))


class Rows:
    """Sequences in rows of one cache, with pages in no order, and what the last step said of each."""

    def __init__(self, model: Transformer, *, num_rows: int, num_pages: int) -> None:
        is_paged = isinstance(model.config.attention, MlaConfig)
        self.model = model
        self.cache: Cache = allocate_cache(
            model.config,
            num_sequences=num_rows,
            max_positions=MAX_POSITIONS,
            num_pages=num_pages if is_paged else None,
        )
        shuffled = torch.randperm(self.cache.num_pages, generator=torch.Generator().manual_seed(7))
        self.free = shuffled.tolist()
        self.pages: dict[int, list[int]] = {}
        self.history: dict[int, Tensor] = {}

    def admit(self, row: int, prompt: Tensor, *, chunk: int = 50) -> None:
        self.history[row], self.pages[row] = prompt[:0], []
        for piece in prompt.split(chunk):
            max_len = len(self.history[row])
            self.extend(row, piece)
            self.model(piece[None], cache=self.cache.rows(row, row + 1, max_len=max_len))

    def extend(self, row: int, piece: Tensor) -> None:
        self.history[row] = torch.cat([self.history[row], piece])
        pages, num_needed = self.pages[row], self.cache.num_pages_of(len(self.history[row]))
        if num_needed > len(pages):
            pages += [self.free.pop() for _ in range(num_needed - len(pages))]
            self.cache.assign(row, pages)

    def release(self, row: int) -> None:
        self.cache.clear(row)
        self.free += self.pages.pop(row)
        del self.history[row]

    def move(self, source: int, target: int) -> None:
        self.cache.move(source, target, num_tokens=len(self.history[source]))
        self.cache.clear(source)
        self.history[target], self.pages[target] = self.history.pop(source), self.pages.pop(source)

    def step_and_check(self, *, seed: int) -> None:
        """One token for every live row in one forward; each says what it says alone."""
        num_rows = max(self.history) + 1
        new_B = tokens(num_rows, seed=seed)
        max_len = max(map(len, self.history.values()))
        is_live_B = torch.tensor([row in self.history for row in range(num_rows)])
        for row in self.history:
            self.extend(row, new_B[row : row + 1])
        view = self.cache.rows(0, num_rows, max_len=max_len)
        got_B1V = self.model(new_B[:, None], cache=view, num_new_B=is_live_B.int())
        for row, history in self.history.items():
            alone_V = self.model(history[None])[0, -1]
            torch.testing.assert_close(got_B1V[row, 0], alone_V, rtol=1e-4, atol=1e-4)
        lengths = [len(self.history.get(row, ())) for row in range(num_rows)]
        assert self.cache.seq_lens_B[:num_rows].tolist() == lengths


def test_rows_come_go_and_move_while_others_decode(model):
    rows = Rows(model, num_rows=4, num_pages=6)
    rows.admit(0, tokens(63, seed=1))
    rows.step_and_check(seed=11)
    rows.admit(2, tokens(120, seed=2))  # row 1 stays empty between two live ones
    rows.step_and_check(seed=12)
    rows.step_and_check(seed=13)  # row 0 goes on to its second page
    rows.release(0)
    rows.step_and_check(seed=14)
    rows.admit(3, tokens(70, seed=3))  # over what row 0 left
    rows.step_and_check(seed=15)
    rows.move(3, 0)
    rows.step_and_check(seed=16)
    rows.admit(1, tokens(3, seed=4))
    rows.step_and_check(seed=17)
    assert sorted(rows.history) == [0, 1, 2]


def test_lengths_and_pages_stay_where_a_graph_reads_them(model):
    rows = Rows(model, num_rows=3, num_pages=6)

    def addresses() -> list[int]:
        view = rows.cache.rows(0, 2, max_len=9)
        table = [view.page_table_BN.data_ptr()] if rows.cache.num_pages else []
        return [view.seq_lens_B.data_ptr(), *table]

    before = addresses()
    rows.admit(0, tokens(5, seed=1))
    rows.admit(2, tokens(70, seed=2))
    rows.release(0)
    rows.move(2, 0)
    rows.step_and_check(seed=3)
    assert addresses() == before


def test_a_view_of_a_view_is_rows_of_the_cache(model):
    rows = Rows(model, num_rows=5, num_pages=10)
    rows.admit(3, tokens(4, seed=1))
    view = rows.cache.rows(1, 5, max_len=4).rows(2, 3, max_len=4)
    assert view.seq_lens_B.tolist() == [4]
    rows.extend(3, torch.tensor([9]))
    got = model(torch.tensor([[9]]), cache=view)[0, 0]
    torch.testing.assert_close(got, model(rows.history[3][None])[0, -1], rtol=1e-4, atol=1e-4)
    assert rows.cache.seq_lens_B.tolist() == [0, 0, 0, 5, 0]


def test_a_row_that_is_not_live_changes_nothing_that_is(model):
    rows = Rows(model, num_rows=3, num_pages=6)
    rows.admit(1, tokens(10, seed=1))
    stored = rows.cache.pages if rows.cache.num_pages else [*rows.cache.keys, *rows.cache.values]
    view = rows.cache.rows(0, 3, max_len=10)
    append = view.begin(torch.zeros(3, 1, dtype=torch.int64), None)
    live_slot = int(append.slots_T[1])
    before = [entries.clone().flatten(0, -2 if rows.cache.num_pages else -3) for entries in stored]
    model(torch.zeros(3, 1, dtype=torch.int64), cache=view, num_new_B=torch.tensor([0, 1, 0]))
    assert rows.cache.seq_lens_B.tolist() == [0, 11, 0]
    allowed = {int(slot) for slot in append.slots_T}
    for old, entries in zip(before, stored, strict=True):
        changed = (entries.view_as(old) != old).flatten(1).any(dim=1).nonzero().flatten().tolist()
        assert live_slot in changed
        assert set(changed) <= allowed
    if rows.cache.num_pages:  # rows without pages write where no row reads
        assert {slot // PAGE_SIZE for slot in allowed - {live_slot}} == {rows.cache.num_pages}


def test_a_full_row_that_is_not_live_writes_into_no_other():
    config = replace(preset("tiny_dense"), num_layers=1, vocab_size=64)
    cache = allocate_cache(config, num_sequences=2, max_positions=8)
    cache.seq_lens_B.copy_(torch.tensor([8, 3]))
    append = cache.rows(0, 2, max_len=3).begin(torch.zeros(2, 1, dtype=torch.int64), None)
    assert append.slots_T.tolist() == [16, 11]  # 16: nobody's


def test_rows_of_latents_share_pages_and_rows_of_keys_have_their_own():
    paged = allocate_cache(preset("tiny_moe"), num_sequences=3, max_positions=130, num_pages=5)
    assert (paged.num_pages, [paged.num_pages_of(n) for n in (0, 1, 64, 65, 130)]) == (5, [0, 1, 1, 2, 3])
    assert paged.page_table_BN.tolist() == [[5, 5, 5]] * 3
    own = allocate_cache(preset("tiny_dense"), num_sequences=3, max_positions=130)
    assert (own.num_pages, own.num_pages_of(130)) == (0, 0)
    own.assign(0, [])


def test_a_row_lists_its_pages_and_then_the_one_that_is_nobodys():
    cache = allocate_cache(preset("tiny_moe"), num_sequences=2, max_positions=130, num_pages=5)
    cache.assign(1, [4, 0])
    assert cache.page_table_BN.tolist() == [[5, 5, 5], [4, 0, 5]]
    cache.clear(1)
    assert cache.page_table_BN.tolist() == [[5, 5, 5], [5, 5, 5]]


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("tiny_moe", lambda c: c.assign(0, [1, 2, 3, 0]), "a row must have <= 3 pages, got 4"),
        ("tiny_dense", lambda c: c.assign(0, [1]), "rows of keys and values must have 0 pages, got 1"),
    ],
    ids=["too_many", "not_paged"],
)
def test_pages_that_a_row_cannot_have_are_refused(name, call, message):
    cache = allocate_cache(preset(name), num_sequences=2, max_positions=130)
    with pytest.raises(ValueError, match=message):
        call(cache)


@pytest.mark.parametrize(
    ("name", "num_pages", "message"),
    [
        ("tiny_dense", 4, "num_pages must be None for keys and values, got 4"),
        ("tiny_moe", -1, "num_pages must be >= 0, got -1"),
    ],
)
def test_pools_that_cannot_be_are_refused(name, num_pages, message):
    with pytest.raises(ValueError, match=message):
        allocate_cache(preset(name), num_sequences=1, max_positions=8, num_pages=num_pages)


@pytest.mark.parametrize(
    ("name", "num_bytes"), [("v2_lite", 27 * 576 * 2), ("v2", 60 * 576 * 2), ("coder_6_7b", 32 * 8192 * 2)]
)
def test_a_token_costs_what_its_entries_take(name, num_bytes):
    assert cache_token_bytes(preset(name), torch.bfloat16) == num_bytes
    config = replace(preset(name), num_layers=3)
    cache = allocate_cache(
        config, num_sequences=1, max_positions=PAGE_SIZE, dtype=torch.bfloat16, device="meta"
    )
    stored = cache.pages if cache.num_pages else [*cache.keys, *cache.values]
    held = sum(entries.nbytes for entries in stored)
    spare = PAGE_SIZE if cache.num_pages else 1
    assert held == cache_token_bytes(config, torch.bfloat16) * (PAGE_SIZE + spare)
