"""One step: micro-batches add up to the batch, documents do not see one another, NaN stops the run."""

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dscoder.config import BalanceConfig
from dscoder.config.train import OptimizerConfig
from dscoder.data.loader import IGNORED, Batch, shuffled_batch
from dscoder.data.prepare import TRAIN
from dscoder.data.shards import Windows
from dscoder.models import Transformer, init_weights
from dscoder.testing.tiny_run import TINY_MOE
from dscoder.train.loop import LossError, StepStats, train_step
from dscoder.train.optimizer import MasterAdamW


@pytest.fixture
def model() -> Transformer:
    # Wide initial weights, so that a forgotten boundary shows in the loss.
    built = Transformer(replace(TINY_MOE, init_std=0.3))
    init_weights(built, seed=1)
    return built.train()


def batches(windows: Path, *, micro: int, count: int = 6) -> list[Batch]:
    split = Windows(windows / TRAIN)
    return [shuffled_batch(split, position=p, count=micro, seed=0) for p in range(0, count, micro)]


def stepped(model: Transformer, parts: list[Batch]) -> tuple[StepStats, Transformer]:
    moved = copy.deepcopy(model)
    stats = train_step(moved, MasterAdamW(moved, OptimizerConfig()), parts, lr=1e-3, step=0)
    return stats, moved


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_how_a_batch_is_cut_into_micro_batches_does_not_matter(
    model: Transformer, windows: Path, micro: int
) -> None:
    whole, moved_whole = stepped(model, batches(windows, micro=6))
    cut, moved_cut = stepped(model, batches(windows, micro=micro))
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert cut.balance == pytest.approx(whole.balance, rel=1e-4)
    assert cut.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)
    for (name, mine), wanted in zip(moved_cut.named_parameters(), moved_whole.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=2e-4, msg=name)


def test_the_loss_is_the_mean_over_labelled_tokens_of_single_documents(
    model: Transformer, windows: Path
) -> None:
    [batch] = batches(windows, micro=3, count=3)
    stats, _ = stepped(model, [batch])
    nats, num_labels = 0.0, 0
    tokens_T, edges = batch.tokens_BS.flatten(), batch.cu_seqlens.tolist()
    for begin, end in itertools.pairwise(edges):
        labels_S = batch.labels_BS.flatten()[begin:end]
        logits_SV = model(tokens_T[None, begin:end])[0]
        nats += torch.nn.functional.cross_entropy(
            logits_SV, labels_S, ignore_index=IGNORED, reduction="sum"
        ).item()
        num_labels += int((labels_S != IGNORED).sum())
    assert stats.loss == pytest.approx(nats / num_labels, rel=1e-4)


def test_balance_losses_are_added_and_told_term_by_term(model: Transformer, windows: Path) -> None:
    stats, _ = stepped(model, batches(windows, micro=6))
    num_moe_layers = 1
    weight = TINY_MOE.moe.balance.expert if TINY_MOE.moe else 0.0
    assert stats.balance == pytest.approx(weight * stats.balance_expert * num_moe_layers, rel=1e-5)
    assert stats.balance_expert >= 0.99  # 1 is perfect balance


def test_the_balance_loss_moves_the_gate(model: Transformer, windows: Path) -> None:
    assert TINY_MOE.moe is not None
    gates = []
    for weight in (0.001, 1.0):
        moe = replace(TINY_MOE.moe, balance=BalanceConfig(expert=weight))
        heavy = Transformer(replace(model.config, moe=moe)).train()
        heavy.load_state_dict(model.state_dict())
        _, moved = stepped(heavy, batches(windows, micro=6))
        gates.append(dict(moved.named_parameters())["layers.1.moe.gate.weight"])
    assert not torch.equal(gates[0], gates[1])


def test_a_loss_that_is_no_number_stops_before_the_weights_move(model: Transformer, windows: Path) -> None:
    with torch.no_grad():
        model.norm.weight[0] = float("nan")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parts = batches(windows, micro=3)
    read = [index for part in parts for index in part.window_idx]
    with pytest.raises(LossError, match=r"step 17: .* must be finite, got nan") as error:
        train_step(model, MasterAdamW(model, OptimizerConfig()), parts, lr=1e-3, step=17)
    assert str(read) in str(error.value)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0, equal_nan=True)


def test_windows_without_a_label_give_no_loss(model: Transformer) -> None:
    empty = Batch(
        tokens_BS=torch.zeros(1, 4, dtype=torch.long),
        labels_BS=torch.full((1, 4), IGNORED),
        cu_seqlens=torch.tensor([0, 4], dtype=torch.int32),
        window_idx=(0,),
    )
    stats, _ = stepped(model, [empty])
    assert stats.loss == 0.0
