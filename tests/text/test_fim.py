import math
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from multiprocessing import get_context

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dscoder.config.text import FimConfig
from dscoder.text.fim import FimDocument, FimOrder, apply_fim, encode_fim, fim_prompt, plan_fim
from dscoder.text.flavors import EOT, FIM_BEGIN, FIM_END, FIM_HOLE, FIM_SENTINELS
from dscoder.text.tokenizer import Tokenizer

ALWAYS = FimConfig(rate=1.0)
LINES = FimConfig(rate=1.0, cut="line")
MIXED = FimConfig(rate=0.8, spm_share=0.5)

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "\u4f60\u597d, \U0001f600 w\u00f6rld\r\nnext line\n",
    "",
    f"tokens = {FIM_HOLE!r}\n",
    "no newline at the end",
]


def cut(text: str, config: FimConfig, *, count: int, seed: int = 0) -> list[FimDocument]:
    """One text under `count` document ids."""
    return apply_fim([text] * count, document_ids=range(count), config=config, seed=seed)


# ---- the parts ----


@given(text=st.text(), document_id=st.integers(0, 2**64 - 1), at_lines=st.booleans())
def test_the_parts_are_the_text(text: str, document_id: int, at_lines: bool) -> None:
    config = LINES if at_lines else ALWAYS
    [document] = apply_fim([text], document_ids=[document_id], config=config, seed=1)
    assert document.prefix + document.middle + document.suffix == text
    assert document.order is (FimOrder.PSM if text else FimOrder.PLAIN)


@pytest.mark.parametrize("text", ["abc", "\u00e9\u4f60\U0001f600", "a\u0301\u200d\n", "\r\n\0"])
def test_every_place_between_characters_is_reached(text: str) -> None:
    documents = cut(text, ALWAYS, count=400)
    places = {len(d.prefix) for d in documents} | {len(d.prefix + d.middle) for d in documents}
    assert places == set(range(len(text) + 1))


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("a\nbc\n\nd", {0, 2, 5, 6, 7}),
        ("a\nbc\n", {0, 2, 5}),
        ("\u4f60\r\n\U0001f600\r\nx", {0, 3, 6, 7}),
        ("one line", {0, 8}),
        ("\n", {0, 1}),
    ],
)
def test_line_cuts_stand_before_lines_and_at_the_ends(text: str, places: set[int]) -> None:
    documents = cut(text, LINES, count=400)
    assert {len(d.prefix) for d in documents} | {len(d.prefix + d.middle) for d in documents} == places


def test_a_long_text_is_cut_where_its_characters_are_counted() -> None:
    # Longer than the eight bytes that are counted at once, and of every character width.
    text = "aaa\u00e9\u4f60\U0001f600bb\n" * 1000
    plan = plan_fim([text] * 200, document_ids=range(200), config=LINES, seed=5)
    assert plan.middle_N2.max() > 5000
    assert plan.middle_N2.max() <= len(text)
    assert not np.any(plan.middle_N2 % 9)  # lines of nine characters


# ---- how often, and where ----


def chi_square(observed: Counter[tuple[int, int]], expected: dict[tuple[int, int], float]) -> float:
    assert observed.keys() <= expected.keys()
    return sum((observed[pair] - mean) ** 2 / mean for pair, mean in expected.items())


def assert_share(count: int, total: int, share: float) -> None:
    """Within five standard deviations."""
    assert abs(count - total * share) <= 5 * math.sqrt(total * share * (1 - share))


@pytest.mark.parametrize(("rate", "spm_share"), [(0.5, 0.0), (0.5, 0.5), (0.1, 0.9), (1.0, 1.0), (0.0, 0.5)])
def test_the_rate_and_the_share_of_spm_are_kept(rate: float, spm_share: float) -> None:
    total = 20000
    config = FimConfig(rate=rate, spm_share=spm_share)
    counts = plan_fim(["ab"] * total, document_ids=range(total), config=config, seed=7).counts()
    assert sum(counts.values()) == total
    assert counts["sentinel"] == 0
    assert_share(counts["psm"] + counts["spm"], total, rate)
    assert_share(counts["spm"], counts["psm"] + counts["spm"], spm_share)


@pytest.mark.parametrize("config", [ALWAYS, LINES])
def test_both_cuts_are_uniform_and_independent(config: FimConfig) -> None:
    num_places, total = 9, 40500
    unit = "\u4f60\n" if config.cut == "line" else "\u4f60"
    plan = plan_fim([unit * (num_places - 1)] * total, document_ids=range(total), config=config, seed=3)
    observed = Counter((begin // len(unit), end // len(unit)) for begin, end in plan.middle_N2.tolist())
    pair_mean = total / num_places**2
    expected = {
        (i, j): pair_mean * (1 if i == j else 2) for i in range(num_places) for j in range(i, num_places)
    }
    # 44 degrees of freedom: mean 44, standard deviation 9.4.
    assert 44 - 3.5 * 9.4 < chi_square(observed, expected) < 44 + 5 * 9.4


def test_a_higher_rate_only_adds_documents() -> None:
    ids = range(500)
    drawn = [
        {d for d in ids if document[d].order is FimOrder.PSM}
        for document in (cut("abc", FimConfig(rate=rate), count=500) for rate in (0.1, 0.5, 0.9))
    ]
    assert drawn[0] < drawn[1] < drawn[2]


# ---- the same in any order, in any number of workers ----


def test_a_document_is_cut_the_same_whatever_stands_beside_it() -> None:
    ids = [f"repo/{i}.py" for i in range(len(TEXTS))]
    together = apply_fim(TEXTS, document_ids=ids, config=MIXED, seed=11)
    alone = [
        apply_fim([t], document_ids=[i], config=MIXED, seed=11)[0] for t, i in zip(TEXTS, ids, strict=True)
    ]
    reversed_ = apply_fim(TEXTS[::-1], document_ids=ids[::-1], config=MIXED, seed=11)
    assert together == alone == reversed_[::-1]


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_number_of_workers_changes_nothing(num_workers: int) -> None:
    texts = [f"{text}{i}" for i in range(20) for text in TEXTS]
    ids = list(range(len(texts)))
    expected = apply_fim(texts, document_ids=ids, config=MIXED, seed=2)
    size = -(-len(texts) // num_workers)
    parts = [(texts[i : i + size], ids[i : i + size]) for i in range(0, len(texts), size)]
    work = partial(_apply, seed=2)
    with ThreadPoolExecutor(num_workers) as threads:
        assert [d for part in threads.map(work, parts) for d in part] == expected
    if num_workers == 2:
        with ProcessPoolExecutor(num_workers, mp_context=get_context("fork")) as processes:
            assert [d for part in processes.map(work, parts) for d in part] == expected


def _apply(part: tuple[list[str], list[int]], *, seed: int) -> list[FimDocument]:
    texts, ids = part
    return apply_fim(texts, document_ids=ids, config=MIXED, seed=seed)


def test_the_seed_and_the_id_decide() -> None:
    text = "x" * 1000
    base = cut(text, ALWAYS, count=50, seed=1)
    assert cut(text, ALWAYS, count=50, seed=1) == base
    assert len({(len(d.prefix), len(d.middle)) for d in base}) == 50
    assert not set(map(repr, cut(text, ALWAYS, count=50, seed=2))) & set(map(repr, base))
    assert cut(text, ALWAYS, count=50, seed=1 + 2**64) == base  # seeds are taken modulo 2**64


def test_the_draws_are_those_that_stored_data_was_made_with() -> None:
    # Prepared data is made again from its manifest, so a change here is a change of format.
    plan = plan_fim(["x" * 1000] * 4, document_ids=[0, 1, "a/b.py", 2**64 - 1], config=MIXED, seed=1234)
    assert plan.order_N.tolist() == [FimOrder.SPM, FimOrder.SPM, FimOrder.PSM, FimOrder.SPM]
    assert plan.middle_N2.tolist() == [[33, 668], [447, 680], [220, 638], [346, 723]]


# ---- sentinels in the text ----


@pytest.mark.parametrize("sentinel", FIM_SENTINELS)
def test_a_text_that_holds_a_sentinel_is_left_alone_and_counted(sentinel: str) -> None:
    texts = [f"before {sentinel} after", sentinel, f"{sentinel[:-1]} {sentinel[1:]}"]
    plan = plan_fim(texts, document_ids=range(3), config=ALWAYS, seed=0)
    assert plan.counts() == {"plain": 0, "psm": 1, "spm": 0, "sentinel": 2}
    documents = apply_fim(texts, document_ids=range(3), config=ALWAYS, seed=0)
    assert [d.order for d in documents] == [FimOrder.SENTINEL, FimOrder.SENTINEL, FimOrder.PSM]
    assert [d.prefix for d in documents[:2]] == texts[:2]


def test_the_sentinels_looked_for_can_be_chosen() -> None:
    config = FimConfig(rate=1.0)
    counts = plan_fim([EOT, FIM_HOLE], document_ids=[0, 1], config=config, seed=0, sentinels=[EOT]).counts()
    assert counts == {"plain": 0, "psm": 1, "spm": 0, "sentinel": 1}


# ---- ids ----


def parts_of(order: FimOrder) -> FimDocument:
    return FimDocument(order=order, prefix="def f(x", middle="):\n", suffix="    return x\n")


def test_psm_and_spm_have_their_sentinels_in_place(tokenizer: Tokenizer) -> None:
    psm, spm = encode_fim([parts_of(FimOrder.PSM), parts_of(FimOrder.SPM)], tokenizer)
    prefix, middle, suffix = tokenizer.encode_batch(["def f(x", "):\n", "    return x\n"])
    begin, hole, end = (tokenizer.special_tokens[s] for s in (FIM_BEGIN, FIM_HOLE, FIM_END))
    assert psm == [begin, *prefix, hole, *suffix, end, *middle]
    assert spm == [begin, hole, *suffix, end, *prefix, *middle]
    assert tokenizer.decode(psm) == f"{FIM_BEGIN}def f(x{FIM_HOLE}    return x\n{FIM_END}):\n"


@pytest.mark.parametrize("order", [FimOrder.PSM, FimOrder.SPM])
def test_a_prompt_is_what_training_puts_before_the_middle(tokenizer: Tokenizer, order: FimOrder) -> None:
    [trained] = encode_fim([parts_of(order)], tokenizer)
    prompt = fim_prompt("def f(x", "    return x\n", tokenizer=tokenizer, order=order, add_bos=False)
    assert prompt + tokenizer.encode("):\n") == trained
    with_bos = fim_prompt("def f(x", "    return x\n", tokenizer=tokenizer, order=order)
    assert with_bos == [tokenizer.bos_id, *prompt]


def test_documents_left_alone_are_encoded_as_text(tokenizer: Tokenizer) -> None:
    hostile = f"{FIM_BEGIN}a{FIM_HOLE}b{FIM_END}c{EOT}"
    documents = apply_fim([hostile, "plain"], document_ids=[0, 1], config=ALWAYS, seed=0)
    documents[1] = FimDocument(order=FimOrder.PLAIN, prefix="plain")
    rows = encode_fim(documents, tokenizer)
    assert rows == [tokenizer.encode(hostile), tokenizer.encode("plain")]
    assert not set(rows[0]) & set(tokenizer.special_tokens.values())


def test_text_round_a_hole_cannot_end_it(tokenizer: Tokenizer) -> None:
    prompt = fim_prompt(f"a{FIM_HOLE}", f"{FIM_END}b", tokenizer=tokenizer)
    special = [token_id for token_id in prompt if token_id in tokenizer.special_tokens.values()]
    assert special == [tokenizer.bos_id, tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id]


def test_nothing_is_lost_or_added_over_a_corpus(tokenizer: Tokenizer, corpus: list[str]) -> None:
    documents = apply_fim(corpus, document_ids=range(len(corpus)), config=MIXED, seed=0)
    special = set(tokenizer.special_tokens.values())
    for text, document, ids in zip(corpus, documents, encode_fim(documents, tokenizer), strict=True):
        kept = tokenizer.decode([i for i in ids if i not in special])
        parts = {
            FimOrder.PSM: document.prefix + document.suffix + document.middle,
            FimOrder.SPM: document.suffix + document.prefix + document.middle,
        }
        assert kept == parts.get(document.order, text)


# ---- errors ----


def test_a_tokenizer_without_sentinels_is_an_error_only_when_they_are_needed(v2: Tokenizer) -> None:
    bare = Tokenizer(v2._plain)
    assert encode_fim([FimDocument(order=FimOrder.PLAIN, prefix="ab")], bare) == [v2.encode("ab")]
    with pytest.raises(ValueError, match="the tokenizer must have a token for fim_begin, got none"):
        encode_fim([parts_of(FimOrder.PSM)], bare)
    with pytest.raises(ValueError, match="the tokenizer must have a token for fim_begin, got none"):
        fim_prompt("a", "b", tokenizer=bare, add_bos=False)
    with pytest.raises(ValueError, match="the tokenizer must have a token for bos, got none"):
        fim_prompt("a", "b", tokenizer=bare)


def test_a_prompt_has_an_order(v2: Tokenizer) -> None:
    with pytest.raises(ValueError, match="fim_prompt: order must be PSM or SPM, got PLAIN"):
        fim_prompt("a", "b", tokenizer=v2, order=FimOrder.PLAIN)


@pytest.mark.parametrize(
    ("texts", "ids", "error", "message"),
    [
        (["a", b"b"], [0, 1], TypeError, r"apply_fim: texts\[1\] must be str, got bytes"),
        (
            ["a", "\ud800"],
            [0, 1],
            ValueError,
            r"apply_fim: texts\[1\] must be valid Unicode, got a lone surrogate",
        ),
        (["a"], [0, 1], ValueError, "apply_fim: document_ids must be as many as texts, got 2 and 1"),
        (["a"], [-1], ValueError, r"apply_fim: document_ids must be in \[0, 2\*\*64\), got -1"),
        (
            ["a"],
            [2**64],
            ValueError,
            r"apply_fim: document_ids must be in \[0, 2\*\*64\), got 18446744073709551616",
        ),
    ],
)
def test_wrong_documents_are_named(
    texts: list[str], ids: list[int], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        apply_fim(texts, document_ids=ids, config=ALWAYS, seed=0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rate": 1.5}, "FimConfig: rate must be between 0 and 1, got 1.5"),
        ({"rate": float("nan")}, "FimConfig: rate must be between 0 and 1, got nan"),
        ({"spm_share": -0.1}, "FimConfig: spm_share must be between 0 and 1, got -0.1"),
        ({"cut": "token"}, "FimConfig: cut must be 'character' or 'line', got 'token'"),
    ],
)
def test_a_wrong_config_is_named(fields: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FimConfig(**fields)


def test_no_documents_give_no_documents() -> None:
    assert apply_fim([], document_ids=[], config=ALWAYS, seed=0) == []
