"""Experts spread over ranks against the same experts in one process, over gloo."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from dscoder.testing import expert_ranks
from dscoder.testing.compare import assert_close, assert_same
from dscoder.testing.expert_ranks import Arrays, ExpertCase
from dscoder.testing.ranks import end_ranks, run_ranks

pytestmark = pytest.mark.dist

TOKENS = {1: (5,), 2: (7, 3), 4: (2, 0, 9, 5)}
UNEVEN = ExpertCase(tokens=TOKENS[2])

Layers = dict[str, list[tuple[Arrays, Arrays]]]


def cases_of(num_ranks: int) -> tuple[ExpertCase, ...]:
    tokens, empty = TOKENS[num_ranks], (0,) * num_ranks
    wanted = [
        *({"tokens": tokens, "routing": routing} for routing in ("any", "dropped", "one_expert", "none")),
        *({"tokens": tokens, "dtype": dtype} for dtype in (torch.bfloat16, torch.float16, torch.float64)),
        {"tokens": (4,) * num_ranks, "num_topk": 2, "routing": "one_rank"},
        {"tokens": empty},
        {"tokens": (*empty[:-1], 9)},
    ]
    return tuple(ExpertCase(**fields, exact=exact) for exact in (True, False) for fields in wanted)


@pytest.fixture(scope="module", params=sorted(TOKENS), ids=lambda num_ranks: f"{num_ranks}_ranks")
def layers(request: pytest.FixtureRequest) -> tuple[int, Layers]:
    """Each case's results on each rank, by dispatch and combine and by starts and waits."""
    num_ranks = request.param
    parts = run_ranks(expert_ranks.rank_layers, cases_of(num_ranks), num_ranks=num_ranks)
    return num_ranks, {name: [part[name] for part in parts] for name in parts[0]}


def tensors(parts: list[Arrays]) -> dict[str, torch.Tensor]:
    """Ranks' parts side by side."""
    return {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}


def test_ranks_compute_what_one_process_does(layers: tuple[int, Layers]) -> None:
    num_ranks, found = layers
    for case in cases_of(num_ranks):
        wanted = tensors([expert_ranks.whole_layer(case)])
        actual = tensors([short for short, _ in found[str(case)]])
        assert set(actual) == {"out", "x", "weight", "gate_up", "down"}
        for name in wanted:
            assert_close(actual[name], wanted[name], dtype=case.dtype)


def test_starts_and_waits_are_dispatch_and_combine(layers: tuple[int, Layers]) -> None:
    for parts in layers[1].values():
        short, split = tensors([one for one, _ in parts]), tensors([other for _, other in parts])
        for name in short:
            assert_same(split[name], short[name])


def test_exact_and_worst_case_buffers_give_the_same_bits(layers: tuple[int, Layers]) -> None:
    num_ranks, found = layers
    cases = cases_of(num_ranks)
    for exact, worst in zip(cases[: len(cases) // 2], cases[len(cases) // 2 :], strict=True):
        assert exact.exact
        assert not worst.exact
        one, other = (tensors([short for short, _ in found[str(case)]]) for case in (exact, worst))
        for name in one:
            assert_same(other[name], one[name])


CHOICES = [[[0, 1], [7, 2], [-1, 3], [-1, -1]], [[4, 0], [5, 6]]]  # of two ranks' tokens, experts 0-3 and 4-7


def test_a_token_goes_once_to_each_rank_of_its_experts() -> None:
    case = ExpertCase(tokens=(4, 2), num_topk=2)
    first, second = run_ranks(expert_ranks.rank_slots, case, CHOICES, num_ranks=2)
    assert first["slot"] == [[0, -1], [1, 0], [2, -1], [-1, -1]]
    assert first["counts"] == [3, 1]
    assert second["slot"] == [[0, 0], [-1, 1]]
    assert second["counts"] == [1, 2]
    # Slots: rank 0's tokens, then rank 1's, which are 10 and 11.
    assert first["x"] == [0, 1, 2, 10]
    assert first["idx"] == [[0, 1], [-1, 2], [-1, 3], [-1, 0]]
    assert first["weight"] == [[0, 0.25], [1, 1.25], [2, 2.25], [10, 10.25]]
    assert first["offsets"] == [2, 3, 4, 5]
    assert second["x"] == [1, 10, 11]
    assert second["idx"] == [[3, -1], [0, -1], [1, 2]]
    # Each rank's row once: tokens of experts on two ranks count twice, those without experts not at all.
    assert first["out"] == [0, 2, 2, 0]
    assert second["out"] == [20, 11]


def test_worst_case_slots_begin_at_a_multiple_of_max_tokens() -> None:
    case = ExpertCase(tokens=(4, 2), num_topk=2, exact=False, max_tokens=5)
    first, second = run_ranks(expert_ranks.rank_slots, case, CHOICES, num_ranks=2)
    assert [first["idx"][slot] for slot in (0, 1, 2, 5)] == [[0, 1], [-1, 2], [-1, 3], [-1, 0]]
    assert [first["x"][slot] for slot in (0, 1, 2, 5)] == [0, 1, 2, 10]
    assert [second["idx"][slot] for slot in (0, 5, 6)] == [[3, -1], [0, -1], [1, 2]]
    assert [row for rank in (first, second) for row in rank["idx"]].count([-1, -1]) == 20 - 7
    assert first["out"] == [0, 2, 2, 0]


@pytest.mark.parametrize("exact", [True, False])
def test_statistics_count_pairs_of_token_and_rank(exact: bool) -> None:
    case = ExpertCase(tokens=(4, 2), num_topk=2, exact=exact)
    first, second = (
        rank["statistics"] for rank in run_ranks(expert_ranks.rank_slots, case, CHOICES, num_ranks=2)
    )
    row = case.hidden * 4
    row_and_choices = row + case.num_topk * (4 + 4)
    for found, num_tokens, num_pairs, num_remote in ((first, 4, 4, 1), (second, 2, 3, 1)):
        counted = {name: count for name, count in found.items() if "seconds" not in name}
        assert counted == {
            "num_tokens": num_tokens,
            "num_pairs": num_pairs,
            "num_remote_pairs": num_remote,
            "dispatch_bytes": num_pairs * row_and_choices,
            "dispatch_remote_bytes": num_remote * row_and_choices,
            "combine_bytes": num_pairs * row,
            "combine_remote_bytes": num_remote * row,
        }
        assert 0 < found["dispatch_seconds"] < 60
        assert 0 < found["combine_seconds"] < 60


def test_work_between_starts_and_waits_overlaps_in_both_directions() -> None:
    for log in run_ranks(expert_ranks.rank_order, UNEVEN, num_ranks=2):
        assert log == [
            *("start spread", "shared", "land spread", "experts"),
            *("start gather rows", "more", "land gather rows"),
            *("start spread", "more gradient", "land spread", "experts gradient"),
            *("start gather rows and weights", "shared gradient", "land gather rows and weights"),
        ]


def test_a_recomputed_layer_has_the_same_gradients_and_skips_its_last_combine() -> None:
    for is_same, kept, recomputed in run_ranks(expert_ranks.rank_checkpoint, UNEVEN, num_ranks=2):
        assert is_same
        spread, rows, both = "start spread", "start gather rows", "start gather rows and weights"
        assert kept == [spread, rows, spread, both]
        assert sorted(recomputed) == sorted([*kept, spread])


@pytest.mark.parametrize(
    ("wanted", "backward"),
    [
        (("x",), ["start spread", "start gather rows"]),
        (("weight",), ["start spread", "start gather weights"]),
        (("gate_up",), ["start spread"]),
        (("weight", "down"), ["start spread", "start gather weights"]),
        ((), []),
    ],
)
def test_only_wanted_gradients_travel(wanted: tuple[str, ...], backward: list[str]) -> None:
    parts = run_ranks(expert_ranks.rank_partial, UNEVEN, wanted, num_ranks=2)
    grads = tensors([grads for grads, _ in parts])
    assert set(grads) == set(wanted)
    for name, grad in grads.items():
        assert_close(grad, tensors([expert_ranks.whole_layer(UNEVEN)])[name], dtype=UNEVEN.dtype)
    for _, log in parts:
        assert log == ["start spread", "start gather rows", *backward]


def test_a_gradient_is_not_differentiated_again() -> None:
    for error in run_ranks(expert_ranks.rank_second_derivative, UNEVEN, num_ranks=2):
        assert error == (
            "RuntimeError: expert_parallel: the gradient must not be differentiated again,"
            " got create_graph=True"
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": 8}, "hidden must be the same on every rank, got 6 on rank 0 and 8 on rank 1"),
        ({"max_tokens": 8}, "max_tokens must be the same on every rank, got 9 on rank 0 and 8 on rank 1"),
        (
            {"dtype": torch.bfloat16},
            "dtype must be the same on every rank, got torch.float32 on rank 0 and torch.bfloat16 on rank 1",
        ),
        ({"exact": False}, "exact must be the same on every rank, got True on rank 0 and False on rank 1"),
    ],
)
def test_ranks_built_otherwise_are_named(changed: dict[str, object], message: str) -> None:
    for error in run_ranks(expert_ranks.rank_mismatch, UNEVEN, changed, num_ranks=2):
        assert error == f"ValueError: expert_parallel: {message}"


def test_a_rank_that_dies_is_named_by_the_others() -> None:
    ended = end_ranks(expert_ranks.rank_lost, ExpertCase(tokens=(3, 3, 3), num_experts=6), 1, num_ranks=3)
    assert ended[1].status == 3
    for rank in (0, 2):
        error, later = ended[rank].value
        lost = "ExchangeError: expert_parallel: rank 1 did not answer for 5 s; "
        assert error.startswith(f"{lost}rank {rank} failed to ")
        assert error.isascii()
        assert "GLHF" not in error
        assert later == error


def test_a_rank_that_dies_with_the_store_is_an_error_too() -> None:
    ended = end_ranks(expert_ranks.rank_lost, UNEVEN, 0, num_ranks=2)
    assert ended[0].status == 3
    assert "the group's store is gone (by default global rank 0 serves it: " in ended[1].value[0]


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        ("construction", "rank 0 waited for the sizes of rank 1 for 1 s"),
        ("dispatch", "rank 1 did not answer for 0.5 s; rank 0 failed to end an exchange within 1 s: "),
    ],
)
def test_a_rank_that_does_not_come_ends_the_wait(absent: str, message: str) -> None:
    ended = end_ranks(expert_ranks.rank_late, UNEVEN, absent, num_ranks=2)
    assert ended[0].value.startswith(f"ExchangeError: expert_parallel: {message}")


def late_in_a_subgroup() -> str:
    """The error of global rank 1 in a group of ranks 1 and 2, the second of which does not come."""
    with expert_ranks.rank_group() as everybody:
        group, store = dist.new_group([1, 2]), everybody.get_group_store()
        if dist.get_rank() != 1:
            store.wait(["done"])
            return ""
        error = expert_ranks.error_of(lambda: expert_ranks.group_of(UNEVEN, group, timeout=0.5))
        store.set("done", "")
        return error


def test_ranks_of_a_subgroup_have_their_global_numbers_too() -> None:
    _, error, _ = run_ranks(late_in_a_subgroup, num_ranks=3)
    wanted = "rank 0 waited for the sizes of rank 1 (globally 2) for 0.5 s"
    assert error == f"ExchangeError: expert_parallel: {wanted}"


def run_example() -> None:
    text = (Path(__file__).parents[2] / "docs" / "expert_parallel.md").read_text(encoding="utf-8")
    exec(compile(text.partition("```python\n")[2].partition("```")[0], "moe.py", "exec"), {})


def test_the_example_of_the_docs_runs() -> None:
    assert [end.error for end in end_ranks(run_example, num_ranks=2)] == ["", ""]
