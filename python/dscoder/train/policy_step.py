"""What a step of GRPO does with its rollouts: updates of the policy, and figures for the report."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from dscoder.config.grpo import GrpoConfig
from dscoder.models import Transformer
from dscoder.runtime.seed import derive_seed
from dscoder.train.advantage import group_std
from dscoder.train.logprobs import AnswerLogprobs, PromptAndAnswer, answer_logprobs
from dscoder.train.loop import LossError
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.policy_loss import SUMS, LossScale, PolicyBatch, policy_loss
from dscoder.train.reward import failure_kind
from dscoder.train.rollout import Rollout, by_group


@dataclass(frozen=True, kw_only=True, slots=True)
class _Example:
    """A rollout to learn from, with what is known before the policy moves: one number a token, or nothing."""

    text: PromptAndAnswer
    advantage_S: Tensor  # [1] where all tokens have the same
    sampler_S: Tensor
    old_S: Tensor | None
    reference_S: Tensor | None


@dataclass(slots=True)
class _Seen:
    """Sums over the updates of a step."""

    loss: float = 0.0
    balance: float = 0.0
    grad_norm: float = 0.0
    num_updates: int = 0
    num_terms: float = 0.0
    num_tokens: float = 0.0
    mismatch: float = 0.0
    surprise: float = 0.0
    sums: Counter[str] = field(default_factory=Counter)


def _padded(rows: Sequence[Tensor], like_BS: Tensor) -> Tensor:
    """One row each, zeros to the right, on the device and of the shape of `like_BS`."""
    padded_BS = torch.zeros_like(like_BS)
    for row, values_S in zip(padded_BS, rows, strict=True):
        row[: len(values_S)] = values_S
    return padded_BS


def _stacked(rows: Sequence[Tensor | None], like_BS: Tensor) -> Tensor | None:
    """`_padded`, where there are rows."""
    there = [row for row in rows if row is not None]
    return _padded(there, like_BS) if there else None


class PolicyUpdates:
    """Moves a policy on rollouts.

    Policy and reference are in evaluation mode throughout: the sampler drops no tokens at crowded experts, so
    the probabilities that are compared with its own must not either. Balance losses are added all the same.
    """

    def __init__(
        self, model: Transformer, *, reference: Transformer | None, config: GrpoConfig, num_ids: int
    ) -> None:
        """`num_ids`: ids from there on are never drawn."""
        self._model = model
        self._reference = reference
        self._config = config
        self._num_ids = num_ids

    def update(
        self, optimizer: MasterAdamW, rollouts: Sequence[Rollout], *, step: int, lr: float
    ) -> dict[str, float]:
        """All updates of a step on the rollouts that are used; figures about them, those that there are.

        Raises:
            LossError: a loss or gradient is not a number.
        """
        used = [rollout for rollout in rollouts if rollout.is_used]
        if not used:
            return {"updates": 0.0}
        examples = self._examples(used)
        seen = _Seen()
        for turn in range(self._config.update.passes):
            rng = torch.Generator().manual_seed(derive_seed("update", self._config.seed, step, turn))
            order = torch.randperm(len(examples), generator=rng)
            # More minibatches than answers would leave some empty.
            for part in order.tensor_split(min(self._config.update.minibatches, len(examples))):
                self._move(optimizer, [examples[idx] for idx in part.tolist()], seen, step=step, lr=lr)
        means = {name: total / max(1, seen.num_terms) for name, total in seen.sums.items()}
        return {
            "loss": seen.loss / seen.num_updates,
            "balance": seen.balance / seen.num_updates,
            "grad_norm": seen.grad_norm / seen.num_updates,
            "updates": float(seen.num_updates),
            # A token: how far trainer and sampler are apart in log-probability, and the sampler's entropy.
            "mismatch": seen.mismatch / seen.num_tokens,
            "entropy": seen.surprise / seen.num_tokens,
            **means,
        }

    def _examples(self, rollouts: Sequence[Rollout]) -> list[_Example]:
        texts = [PromptAndAnswer(prompt=r.prompt_ids, answer=r.completion_ids) for r in rollouts]
        old: Sequence[Tensor | None] = [None] * len(texts)
        references = old
        # With one update the old policy is the one that is moved.
        if self._config.update.passes * self._config.update.minibatches > 1:
            old = self._frozen(self._model, texts)
        if self._reference is not None:
            references = self._frozen(self._reference, texts)
        found = []
        for rollout, text, old_S, reference_S in zip(rollouts, texts, old, references, strict=True):
            found.append(
                _Example(
                    text=text,
                    advantage_S=torch.tensor(rollout.token_advantages, dtype=torch.float32),
                    sampler_S=torch.tensor(rollout.logprobs, dtype=torch.float32),
                    old_S=old_S,
                    reference_S=reference_S,
                )
            )
        return found

    @torch.no_grad()
    def _frozen(self, model: Transformer, texts: Sequence[PromptAndAnswer]) -> list[Tensor]:
        """Log-probabilities under weights that do not move, one tensor an answer."""
        found: list[Tensor] = []
        micro = self._config.update.micro
        for start in range(0, len(texts), micro):
            part = texts[start : start + micro]
            logprobs_BS = self._logprobs(model, part).logprobs_BS
            found += [row[: len(text.answer)] for row, text in zip(logprobs_BS, part, strict=True)]
        return found

    def _logprobs(self, model: Transformer, texts: Sequence[PromptAndAnswer]) -> AnswerLogprobs:
        temperature = self._config.rollout.temperature
        return answer_logprobs(model, texts, temperature=temperature, num_ids=self._num_ids)

    def _move(
        self, optimizer: MasterAdamW, examples: Sequence[_Example], seen: _Seen, *, step: int, lr: float
    ) -> None:
        """One update."""
        micro = self._config.update.micro
        parts = [examples[start : start + micro] for start in range(0, len(examples), micro)]
        scale = LossScale(
            num_sequences=len(examples),
            num_tokens=sum(len(example.text.answer) for example in examples),
            max_tokens=self._config.rollout.max_new_tokens,
            num_batches=len(parts),
        )
        sums = torch.stack([self._backward(part, scale) for part in parts]).sum(dim=0)
        # The one read back from the device in an update.
        *values, norm = torch.cat([sums, optimizer.clip().float().reshape(1)]).tolist()
        loss, balance, num_terms, num_tokens, mismatch, surprise, *metrics = values
        if not (math.isfinite(loss) and math.isfinite(balance) and math.isfinite(norm)):
            raise LossError(
                f"step {step}: loss, balance loss and gradient norm must be finite, got {loss}, {balance} "
                f"and {norm}; the weights are those of the update before"
            )
        optimizer.step(lr)
        seen.loss += loss
        seen.balance += balance
        seen.grad_norm += norm
        seen.num_updates += 1
        seen.num_terms += num_terms
        seen.num_tokens += num_tokens
        seen.mismatch += mismatch
        seen.surprise += surprise
        for name, value in zip(SUMS, metrics, strict=True):
            seen.sums[name] += value

    def _backward(self, examples: Sequence[_Example], scale: LossScale) -> Tensor:
        """Add the gradients of a micro-batch; returns what `_move` takes apart."""
        found = self._logprobs(self._model, [example.text for example in examples])
        like_BS = found.logprobs_BS.detach()
        sampler_BS = _padded([example.sampler_S for example in examples], like_BS)
        has_steps = self._config.rewards.process is not None
        batch = PolicyBatch(
            mask_BS=found.mask_BS,
            advantage_B1=_padded(
                [example.advantage_S for example in examples], like_BS if has_steps else like_BS[:, :1]
            ),
            old_BS=_stacked([example.old_S for example in examples], like_BS),
            reference_BS=_stacked([example.reference_S for example in examples], like_BS),
            sampler_BS=sampler_BS,
        )
        part = policy_loss(found.logprobs_BS, batch, self._config.loss, scale=scale)
        balance = found.balance * (len(examples) / scale.num_sequences)
        (part.loss + balance).backward()  # type: ignore[no-untyped-call]
        mismatch = (like_BS if batch.old_BS is None else batch.old_BS) - sampler_BS  # both 0 in the padding
        own = [
            *(part.loss.detach(), balance.detach(), part.num_terms.float(), found.mask_BS.sum().float()),
            *(mismatch.abs().sum(), -sampler_BS.sum()),
        ]
        return torch.cat([torch.stack(own), part.sums_5])


def rollout_figures(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """What the report says of the answers of a step: rewards, lengths, and what was left out and why."""
    groups = by_group(rollouts)
    rewards = [[r.reward for r in group if r.reward is not None] for group in groups]
    stds = [group_std(group) for group in rewards if len(group) > 1]
    figures = {
        **_mean("reward", [reward for group in rewards for reward in group]),
        **_mean("reward_std", stds),
        **_mean("length", [float(len(r.completion_ids)) for r in rollouts]),
        **_mean("truncated", [float(r.is_truncated) for r in rollouts]),
        **_mean("suspect", [float(r.is_suspect) for r in rollouts]),
        **_mean("used", [float(r.is_used) for r in rollouts]),
        "groups": float(len(groups)),
        "groups_equal": float(sum(group[0].reason == "equal_rewards" for group in groups)),
        "groups_too_few": float(sum(group[0].reason == "too_few_rewards" for group in groups)),
        "groups_unjudged": float(sum(not group for group in rewards)),
    }
    steps = [step for r in rollouts for step in r.steps]
    if steps:
        figures["steps"] = len(steps) / len(rollouts)
        for name in sorted(steps[0].rewards):
            values = [value for step in steps if (value := step.rewards[name]) is not None]
            figures |= _mean(f"reward_{name}", values)
    for name in sorted({name for r in rollouts for name in r.rewards}):
        there = [value for r in rollouts if (value := r.rewards.get(name)) is not None]
        figures |= _mean(f"reward_{name}", there)
    failures = Counter(failure_kind(name, why) for r in rollouts for name, why in r.failures.items())
    return figures | {f"left_out {kind}": float(count) for kind, count in sorted(failures.items())}


def _mean(name: str, values: Sequence[float]) -> dict[str, float]:
    """A figure; none where there is no value, which is not 0."""
    return {name: fmean(values)} if values else {}
