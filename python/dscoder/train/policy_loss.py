"""The objective of GRPO: clipped probability ratios times advantages, minus a KL term, averaged.

Sequence level (DeepSeek-V2 eqs 32-34): ratio r = pi(o|q) / pi_old(o|q) and KL of whole answers,
    mean over answers of min(r A, clip(r, 1 - low, 1 + high) A) - kl * k3(pi_ref(o|q) / pi(o|q)).
Token level (DeepSeekMath eqs 3-4): the same a token, and one of four averages.
k3(x) = x - log(x) - 1 is never negative and an unbiased estimate of the KL divergence.

A loss is computed a micro-batch at a time. What it is divided by (`LossScale`) is known for the whole step
beforehand, so the gradients of a step do not depend on how it is cut; of bnpo alone they do, by definition.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dscoder.config.grpo import PolicyLossConfig

# What PolicyLoss.sums_5 holds, by place: over all tokens (over answers, at the sequence level).
SUMS = ("kl", "ratio_error", "clipped_low", "clipped_high", "correction")
_LARGEST_LOG_RATIO = 60.0  # an infinite ratio makes NaN of the gradient even where clipping holds it back


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyBatch:
    """Answers of a micro-batch, one a row, padded on the right; what stands in the padding does not matter.

    Attributes:
        mask_BS: bool, the tokens that count.
        advantage_B1: [B, 1], or [B, S] where each token has its own.
        old_BS: log-probabilities under the policy that gave the answers, by the trainer; None: the same
            weights, so that ratios are 1 and only their gradient counts.
        reference_BS: log-probabilities under the reference; may be None only if the weight of the KL is 0.
        sampler_BS: log-probabilities as the sampler saw them; may be None only if nothing is corrected.
    """

    mask_BS: Tensor
    advantage_B1: Tensor
    old_BS: Tensor | None = None
    reference_BS: Tensor | None = None
    sampler_BS: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossScale:
    """The size of a whole step: what sums over its micro-batches are divided by."""

    num_sequences: int
    num_tokens: int  # that count
    max_tokens: int  # the longest an answer may be
    num_batches: int = 1  # micro-batches

    def __post_init__(self) -> None:
        if min(self.num_sequences, self.num_tokens, self.max_tokens, self.num_batches) < 1:
            raise ValueError(f"LossScale: all sizes must be >= 1, got {self}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyLoss:
    """A micro-batch's part of the loss, and sums for the metrics.

    Attributes:
        loss: to go backward from.
        sums_5: float32 without gradient, see `SUMS`: k3, |ratio - 1|, whether clipping held the term back for
            an answer worse and better than its group, and the correcting weight (1 where there is none).
        num_terms: how many terms were summed.
    """

    loss: Tensor
    sums_5: Tensor
    num_terms: Tensor


def _check(logprobs_BS: Tensor, batch: PolicyBatch, config: PolicyLossConfig) -> None:
    shape = logprobs_BS.shape
    named = {
        "mask_BS": batch.mask_BS,
        "old_BS": batch.old_BS,
        "reference_BS": batch.reference_BS,
        "sampler_BS": batch.sampler_BS,
    }
    for name, tensor in named.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"policy_loss: {name} must be {list(shape)}, got {list(tensor.shape)}")
    wanted = [shape[0], 1]
    widths = (1,) if config.objective == "sequence" else (1, shape[1])
    advantage = batch.advantage_B1
    if advantage.ndim != 2 or advantage.shape[0] != shape[0] or advantage.shape[1] not in widths:
        raise ValueError(f"policy_loss: advantage_B1 must be {wanted}, got {list(advantage.shape)}")
    if batch.mask_BS.dtype != torch.bool:
        raise TypeError(f"policy_loss: mask_BS must be bool, got {batch.mask_BS.dtype}")
    if config.kl > 0 and batch.reference_BS is None:
        raise ValueError(f"policy_loss: reference_BS must be given for kl = {config.kl}, got none")
    if config.correction != "none" and batch.sampler_BS is None:
        raise ValueError(
            f"policy_loss: sampler_BS must be given for correction {config.correction}, got none"
        )


def correction_weights(
    old_BS: Tensor, sampler_BS: Tensor, mask_BS: Tensor, config: PolicyLossConfig
) -> Tensor:
    """How much more likely the trainer finds what the sampler drew: [B, S] by token, [B, 1] by answer."""
    difference_BS = torch.where(mask_BS, old_BS - sampler_BS, 0.0)
    by_answer = config.correction == "sequence"
    weight = (difference_BS.sum(dim=1, keepdim=True) if by_answer else difference_BS).exp()
    if config.correction_rule == "truncate":
        return weight.clamp(min=config.correction_floor, max=config.correction_cap)
    is_outside = (weight < config.correction_floor) | (weight > config.correction_cap)
    return weight.masked_fill(is_outside, 0.0)


def _terms(
    log_ratio: Tensor,
    advantage: Tensor,
    log_reference: Tensor | None,
    weight: Tensor,
    config: PolicyLossConfig,
) -> tuple[Tensor, Tensor]:
    """The loss terms and what the metrics want of them, [5, ...], elementwise.

    Args:
        log_ratio: log(policy / old).
        log_reference: log(reference / policy).
        weight: correcting weights.
    """
    ratio = log_ratio.clamp(max=_LARGEST_LOG_RATIO).exp()
    clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    capped = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
    terms = -torch.minimum(capped * advantage, clipped * advantage) * weight
    k3 = torch.zeros_like(terms)
    if log_reference is not None:
        k3 = log_reference.clamp(max=_LARGEST_LOG_RATIO).exp() - log_reference - 1
        terms = terms + config.kl * k3
    with torch.no_grad():
        seen = [
            k3,
            (ratio - 1).abs(),
            (ratio < 1 - config.clip_low) & (advantage < 0),
            (ratio > 1 + config.clip_high) & (advantage > 0),
            weight,
        ]
        sums = torch.stack([part.detach().float().expand_as(terms) for part in seen])
    return terms, sums


def policy_loss(
    logprobs_BS: Tensor, batch: PolicyBatch, config: PolicyLossConfig, *, scale: LossScale
) -> PolicyLoss:
    """This micro-batch's part of the loss of a step.

    Args:
        logprobs_BS: log-probabilities of the answers' tokens under the policy, with gradient.
        scale: of the step that the micro-batch is part of.
    """
    _check(logprobs_BS, batch, config)
    mask_BS = batch.mask_BS
    # Not a product with the mask: padding may hold anything, NaN too.
    policy_BS = torch.where(mask_BS, logprobs_BS, 0.0)
    old_BS = policy_BS.detach() if batch.old_BS is None else torch.where(mask_BS, batch.old_BS, 0.0)
    log_ratio_BS = policy_BS - old_BS
    log_reference_BS = None
    if config.kl > 0 and batch.reference_BS is not None:
        log_reference_BS = torch.where(mask_BS, batch.reference_BS, 0.0) - policy_BS
    weight = torch.ones_like(policy_BS[:, :1])
    if config.correction != "none" and batch.sampler_BS is not None:
        weight = correction_weights(old_BS.detach(), batch.sampler_BS, mask_BS, config)
    if config.objective == "sequence":
        log_reference_B1 = None if log_reference_BS is None else log_reference_BS.sum(dim=1, keepdim=True)
        log_ratio_B1 = log_ratio_BS.sum(dim=1, keepdim=True)
        counts_B1 = mask_BS.any(dim=1, keepdim=True)
        terms_B1, seen = _terms(log_ratio_B1, batch.advantage_B1, log_reference_B1, weight, config)
        return _summed(terms_B1, seen, counts_B1, 1 / scale.num_sequences)
    if config.ratio == "geometric_mean":
        num_B1 = mask_BS.sum(dim=1, keepdim=True).clamp(min=1)
        log_ratio_BS = (log_ratio_BS.sum(dim=1, keepdim=True) / num_B1).expand_as(mask_BS)
    terms_BS, seen = _terms(log_ratio_BS, batch.advantage_B1, log_reference_BS, weight, config)
    return _summed(terms_BS, seen, mask_BS, _shares(mask_BS.to(terms_BS.dtype), config, scale))


def _shares(count_BS: Tensor, config: PolicyLossConfig, scale: LossScale) -> Tensor | float:
    """What a token's term counts; `count_BS` is 1 for tokens that count, else 0."""
    if config.objective == "grpo":
        return 1 / (count_BS.sum(dim=1, keepdim=True).clamp(min=1) * scale.num_sequences)
    if config.objective == "dr_grpo":
        return 1 / (scale.num_sequences * scale.max_tokens)
    if config.objective == "dapo":
        return 1 / scale.num_tokens
    return 1 / (count_BS.sum().clamp(min=1) * scale.num_batches)


def _summed(terms: Tensor, seen: Tensor, mask: Tensor, share: Tensor | float) -> PolicyLoss:
    """Put the terms that count together."""
    loss = (torch.where(mask, terms, 0.0) * share).sum()
    sums_5 = torch.where(mask, seen, 0.0).flatten(1).sum(dim=1)
    return PolicyLoss(loss=loss, sums_5=sums_5, num_terms=mask.sum())
