"""The objective against TRL's formulas in float64, token by token, and the papers' in closed form.

`reference` says what trl 1.16.0 computes (GRPOTrainer._compute_loss), in plain loops; its results were once
compared with that function's own.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dscoder.config.grpo import PolicyLossConfig
from dscoder.testing.cases import generator
from dscoder.train.policy_loss import (
    SUMS,
    LossScale,
    PolicyBatch,
    PolicyLoss,
    correction_weights,
    policy_loss,
)

MAX_TOKENS = 9
OBJECTIVES = ("grpo", "dr_grpo", "dapo", "bnpo")


def case(name: str, *, num_rows: int = 5, width: int = 7) -> tuple[Tensor, PolicyBatch]:
    """Random float64 log-probabilities of answers of several lengths, NaN in the padding."""
    rng = generator(name)

    def drawn(scale: float) -> Tensor:
        return scale * torch.randn(num_rows, width, generator=rng, dtype=torch.float64)

    lengths = torch.randint(1, width + 1, (num_rows, 1), generator=rng)
    mask_BS = torch.arange(width) < lengths
    policy_BS = drawn(1.0) - 3
    batch = PolicyBatch(
        mask_BS=mask_BS,
        advantage_B1=drawn(1.0)[:, :1],
        old_BS=(policy_BS + drawn(0.3)).masked_fill(~mask_BS, torch.nan),
        reference_BS=(policy_BS + drawn(0.5)).masked_fill(~mask_BS, torch.nan),
        sampler_BS=(policy_BS + drawn(0.6)).masked_fill(~mask_BS, torch.nan),
    )
    return policy_BS.masked_fill(~mask_BS, torch.nan).requires_grad_(), batch


def scale_of(batch: PolicyBatch, *, num_batches: int = 1) -> LossScale:
    return LossScale(
        num_sequences=len(batch.mask_BS),
        num_tokens=int(batch.mask_BS.sum()),
        max_tokens=MAX_TOKENS,
        num_batches=num_batches,
    )


def reference(policy_BS: Tensor, batch: PolicyBatch, config: PolicyLossConfig) -> Tensor:
    """TRL's loss of a generation batch that is one micro-batch."""
    rows = []
    for row, mask_S in enumerate(batch.mask_BS):
        places = mask_S.nonzero()[:, 0].tolist()
        log_ratios = {t: policy_BS[row, t] - batch.old_BS[row, t] for t in places}
        differences = {t: batch.old_BS[row, t] - batch.sampler_BS[row, t] for t in places}
        terms = []
        for t in places:
            log_ratio = log_ratios[t]
            if config.ratio == "geometric_mean":
                log_ratio = sum(log_ratios.values()) / len(places)
            ratio = log_ratio.exp()
            advantage = batch.advantage_B1[row, 0]
            clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
            if config.ratio_cap is not None:
                ratio = ratio.clamp(max=config.ratio_cap)
            term = -torch.min(ratio * advantage, clipped * advantage)
            if config.correction != "none":
                by_token = config.correction == "token"
                weight = (differences[t] if by_token else sum(differences.values())).exp()
                is_inside = config.correction_floor <= weight <= config.correction_cap
                kept = weight if is_inside else weight * 0
                is_mask = config.correction_rule == "mask"
                bounded = weight.clamp(config.correction_floor, config.correction_cap)
                term = term * (kept if is_mask else bounded)
            x = batch.reference_BS[row, t] - policy_BS[row, t]
            terms.append(term + config.kl * (x.exp() - x - 1))
        rows.append(terms)
    flat = [term for terms in rows for term in terms]
    if config.objective == "grpo":
        return sum(sum(terms) / len(terms) for terms in rows) / len(rows)
    if config.objective == "dr_grpo":
        return sum(flat) / (len(rows) * MAX_TOKENS)
    return sum(flat) / len(flat)


def assert_as_reference(name: str, config: PolicyLossConfig) -> None:
    policy_BS, batch = case(name)
    wanted = reference(policy_BS, batch, config)
    (wanted_BS,) = torch.autograd.grad(wanted, policy_BS)
    ours = policy_loss(policy_BS, batch, config, scale=scale_of(batch)).loss
    (found_BS,) = torch.autograd.grad(ours, policy_BS)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-10)
    torch.testing.assert_close(found_BS, wanted_BS.nan_to_num(), rtol=1e-10, atol=1e-12)
    # And as it is computed in training, in float32.
    lower = PolicyBatch(
        mask_BS=batch.mask_BS,
        **{
            name: getattr(batch, name).float()
            for name in ("advantage_B1", "old_BS", "reference_BS", "sampler_BS")
        },
    )
    policy_BS = policy_BS.detach().float().requires_grad_()
    ours = policy_loss(policy_BS, lower, config, scale=scale_of(batch)).loss
    (found_BS,) = torch.autograd.grad(ours, policy_BS)
    assert ours.item() == pytest.approx(wanted.item(), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(found_BS.double(), wanted_BS.nan_to_num(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("ratio", ["token", "geometric_mean"])
@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_loss_and_gradient_are_those_of_trl(objective: str, ratio: str, kl: float) -> None:
    config = PolicyLossConfig(objective=objective, ratio=ratio, kl=kl)  # type: ignore[arg-type]
    for number in range(4):
        assert_as_reference(f"{objective} {ratio} {kl} {number}", config)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_asymmetric_clipping_and_a_cap_are_those_of_trl(objective: str) -> None:
    config = PolicyLossConfig(objective=objective, clip_low=0.1, clip_high=0.28, ratio_cap=1.3)  # type: ignore[arg-type]
    for number in range(4):
        assert_as_reference(f"asymmetric {objective} {number}", config)


@pytest.mark.parametrize("correction", ["token", "sequence"])
@pytest.mark.parametrize("rule", ["truncate", "mask"])
def test_corrections_are_those_of_trl(correction: str, rule: str) -> None:
    config = PolicyLossConfig(
        correction=correction,  # type: ignore[arg-type]
        correction_rule=rule,  # type: ignore[arg-type]
        correction_cap=1.5,
        correction_floor=0.7,
    )
    for number in range(4):
        assert_as_reference(f"{correction} {rule} {number}", config)


@pytest.mark.parametrize("objective", ["sequence", "grpo", "dr_grpo", "dapo"])
def test_how_a_step_is_cut_does_not_change_its_loss_and_gradient(objective: str) -> None:
    policy_BS, batch = case(f"cut {objective}")
    config = PolicyLossConfig(objective=objective)  # type: ignore[arg-type]
    whole = policy_loss(policy_BS, batch, config, scale=scale_of(batch)).loss
    parts = []
    for rows in (slice(0, 2), slice(2, 5)):
        part = PolicyBatch(
            mask_BS=batch.mask_BS[rows],
            advantage_B1=batch.advantage_B1[rows],
            old_BS=batch.old_BS[rows],  # type: ignore[index]
            reference_BS=batch.reference_BS[rows],  # type: ignore[index]
        )
        parts.append(policy_loss(policy_BS[rows], part, config, scale=scale_of(batch, num_batches=2)).loss)
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=0)
    (wanted_BS,) = torch.autograd.grad(whole, policy_BS)
    (found_BS,) = torch.autograd.grad(sum(parts), policy_BS)  # type: ignore[arg-type]
    torch.testing.assert_close(found_BS, wanted_BS, rtol=1e-10, atol=1e-14)


def test_bnpo_is_the_mean_over_micro_batches_of_their_means() -> None:
    policy_BS, batch = case("bnpo parts")
    config = PolicyLossConfig(objective="bnpo", kl=0.0)
    parts = [
        PolicyBatch(
            mask_BS=batch.mask_BS[rows],
            advantage_B1=batch.advantage_B1[rows],
            old_BS=batch.old_BS[rows],  # type: ignore[index]
        )
        for rows in (slice(0, 2), slice(2, 5))
    ]
    scales = (scale_of(batch, num_batches=1), scale_of(batch, num_batches=2))
    means, halves = (
        [
            policy_loss(policy_BS[rows], part, config, scale=scale).loss
            for rows, part in zip((slice(0, 2), slice(2, 5)), parts, strict=True)
        ]
        for scale in scales
    )
    torch.testing.assert_close(sum(halves), sum(means) / 2)


def small(**fields: object) -> tuple[Tensor, PolicyBatch]:
    """Two answers, of two tokens and of one, with ratios 2 and 1/2, and 3/2."""
    policy_BS = torch.tensor([[0.5, 0.25], [0.75, torch.nan]], dtype=torch.float64).log().requires_grad_()
    batch = PolicyBatch(
        mask_BS=torch.tensor([[True, True], [True, False]]),
        advantage_B1=torch.tensor([[1.0], [-1.0]], dtype=torch.float64),
        old_BS=torch.tensor([[0.25, 0.5], [0.5, 1.0]], dtype=torch.float64).log(),
        reference_BS=torch.tensor([[0.5, 0.5], [0.75, 1.0]], dtype=torch.float64).log(),
    )
    return policy_BS, replace(batch, **fields)  # type: ignore[arg-type]


def test_the_sequence_level_objective_of_deepseek_v2_in_closed_form() -> None:
    # Ratios of whole answers: 2 * 1/2 = 1 and 3/2; reference over policy: 2 and 1.
    policy_BS, batch = small()
    config = PolicyLossConfig(objective="sequence", kl=0.5)
    found = policy_loss(policy_BS, batch, config, scale=scale_of(batch))
    first = 1.0 - 0.5 * (2 - math.log(2) - 1)
    second = -1.5  # worse than its group: no clipping above
    assert found.loss.item() == pytest.approx(-(first + second) / 2)
    (gradient_BS,) = torch.autograd.grad(found.loss, policy_BS)
    # d first = r A - kl * (1 - ratio to the reference); every token of an answer has the same.
    assert gradient_BS.tolist() == [pytest.approx([-(1 + 0.5) / 2] * 2), pytest.approx([1.5 / 2, 0.0])]
    assert found.num_terms.item() == 2


def test_clipping_bounds_a_whole_answer() -> None:
    policy_BS, batch = small(advantage_B1=torch.tensor([[-1.0], [1.0]], dtype=torch.float64))
    config = PolicyLossConfig(objective="sequence", kl=0.0)
    found = policy_loss(policy_BS, batch, config, scale=scale_of(batch))
    assert found.loss.item() == pytest.approx(-(-1.0 + 1.2) / 2)
    assert torch.autograd.grad(found.loss, policy_BS)[0][1].tolist() == [0.0, 0.0]
    assert dict(zip(SUMS, found.sums_5.tolist(), strict=True)) == pytest.approx(
        {"kl": 0.0, "ratio_error": 0.5, "clipped_low": 0.0, "clipped_high": 1.0, "correction": 2.0}
    )


def test_the_token_level_objective_of_deepseekmath_in_closed_form() -> None:
    policy_BS, batch = small()
    found = policy_loss(policy_BS, batch, PolicyLossConfig(kl=0.5), scale=scale_of(batch))
    k3 = 2 - math.log(2) - 1  # of the second token of the first answer; the others are those of the reference
    first = (1.2 + (0.5 - 0.5 * k3)) / 2
    assert found.loss.item() == pytest.approx(-(first - 1.5) / 2)
    assert found.sums_5.tolist() == pytest.approx([k3, 1 + 0.5 + 0.5, 0.0, 1.0, 3.0], rel=1e-6)
    assert found.num_terms.item() == 3


def test_without_old_probabilities_the_gradient_is_that_of_the_policy_gradient() -> None:
    policy_BS, batch = small(old_BS=None)
    config = PolicyLossConfig(objective="dapo", kl=0.0)
    found = policy_loss(policy_BS, batch, config, scale=scale_of(batch)).loss
    assert found.item() == pytest.approx(-(1 + 1 - 1) / 3)
    assert torch.autograd.grad(found, policy_BS)[0].tolist() == [[-1 / 3, -1 / 3], [1 / 3, 0.0]]


def test_tokens_may_have_advantages_of_their_own() -> None:
    advantage_BS = torch.tensor([[2.0, -3.0], [0.5, torch.nan]], dtype=torch.float64)
    policy_BS, batch = small(advantage_B1=advantage_BS, old_BS=None)
    config = PolicyLossConfig(objective="dr_grpo", kl=0.0)
    found = policy_loss(policy_BS, batch, config, scale=scale_of(batch)).loss
    assert found.item() == pytest.approx(-(2.0 - 3.0 + 0.5) / (2 * MAX_TOKENS))


def test_weights_outside_their_bounds_are_moved_or_masked() -> None:
    old_BS = torch.tensor([[4.0, 0.25], [1.5, 7.0]]).log()
    mask_BS = torch.tensor([[True, True], [True, False]])
    config = PolicyLossConfig(correction="token", correction_floor=0.5)
    zeros_BS = torch.zeros(2, 2)
    assert correction_weights(old_BS, zeros_BS, mask_BS, config).flatten().tolist() == pytest.approx(
        [3.0, 0.5, 1.5, 1.0]
    )
    config = replace(config, correction_rule="mask")
    assert correction_weights(old_BS, zeros_BS, mask_BS, config).flatten().tolist() == pytest.approx(
        [0.0, 0.0, 1.5, 1.0]
    )
    config = replace(config, correction="sequence")
    assert correction_weights(old_BS, zeros_BS, mask_BS, config).tolist() == [
        pytest.approx([1.0]),
        pytest.approx([1.5]),
    ]


@pytest.mark.parametrize("objective", ["sequence", *OBJECTIVES])
def test_a_row_without_tokens_counts_nothing(objective: str) -> None:
    policy_BS, batch = small(mask_BS=torch.tensor([[True, True], [False, False]]))
    config = PolicyLossConfig(objective=objective)  # type: ignore[arg-type]
    found = policy_loss(policy_BS, batch, config, scale=scale_of(batch))
    gradient_BS = torch.autograd.grad(found.loss, policy_BS)[0]
    assert gradient_BS.isfinite().all()
    assert not gradient_BS[1].any()


def test_a_ratio_beyond_float_range_leaves_the_gradient_finite() -> None:
    policy_BS = torch.tensor([[0.0, 0.0]], requires_grad=True)
    batch = PolicyBatch(
        mask_BS=torch.ones(1, 2, dtype=torch.bool),
        advantage_B1=torch.ones(1, 1),
        old_BS=torch.full((1, 2), -90.0),
    )
    config = PolicyLossConfig(objective="sequence", kl=0.0)
    found: PolicyLoss = policy_loss(policy_BS, batch, config, scale=scale_of(batch))
    assert found.loss.item() == pytest.approx(-1.2)
    assert torch.autograd.grad(found.loss, policy_BS)[0].tolist() == [[0.0, 0.0]]


def test_wrong_arguments_are_named() -> None:
    policy_BS, batch = small()
    scale, config = scale_of(batch), PolicyLossConfig()
    with pytest.raises(ValueError, match=r"policy_loss: old_BS must be \[2, 2\], got \[1, 2\]"):
        policy_loss(policy_BS, replace(batch, old_BS=torch.zeros(1, 2)), config, scale=scale)
    with pytest.raises(ValueError, match=r"advantage_B1 must be \[2, 1\], got \[2\]"):
        policy_loss(policy_BS, replace(batch, advantage_B1=torch.zeros(2)), config, scale=scale)
    with pytest.raises(ValueError, match=r"advantage_B1 must be \[2, 1\], got \[2, 2\]"):
        policy_loss(
            policy_BS,
            replace(batch, advantage_B1=torch.zeros(2, 2)),
            PolicyLossConfig(objective="sequence"),
            scale=scale,
        )
    with pytest.raises(TypeError, match=r"mask_BS must be bool, got torch.int64"):
        policy_loss(policy_BS, replace(batch, mask_BS=batch.mask_BS.long()), config, scale=scale)
    with pytest.raises(ValueError, match=r"reference_BS must be given for kl = 0.04, got none"):
        policy_loss(policy_BS, replace(batch, reference_BS=None), config, scale=scale)
    with pytest.raises(ValueError, match="sampler_BS must be given for correction token, got none"):
        policy_loss(policy_BS, batch, PolicyLossConfig(correction="token"), scale=scale)
    with pytest.raises(ValueError, match="LossScale: all sizes must be >= 1"):
        LossScale(num_sequences=0, num_tokens=1, max_tokens=1)


@pytest.mark.parametrize("objective", ["sequence", "grpo"])
def test_a_reference_far_likelier_than_the_policy_keeps_the_loss_finite(objective: str) -> None:
    config = PolicyLossConfig(objective=objective)  # type: ignore[arg-type]
    policy_BS = torch.tensor([[-200.0, -1.0]], requires_grad=True)
    batch = PolicyBatch(
        mask_BS=torch.ones(1, 2, dtype=torch.bool),
        advantage_B1=torch.ones(1, 1),
        old_BS=policy_BS.detach(),
        reference_BS=torch.full((1, 2), -1.0),
        sampler_BS=None,
    )
    found = policy_loss(policy_BS, batch, config, scale=scale_of(batch))
    found.loss.backward()
    assert found.loss.isfinite()
    assert policy_BS.grad is not None
    assert policy_BS.grad.isfinite().all()
    assert policy_BS.grad[0, 0] < 0  # towards the reference, or up by its advantage
