"""The stage `dscoder reward-model`: preferences become a model that scores answers.

model/           the backbone and its scalar head, as transformers' ...ForSequenceClassification has them
held_out.json    accuracy and calibration on prompts that were not learnt from, accuracy before it learnt too
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dscoder.checkpoint import check_replaceable, load_config, load_scalar_model, save_pretrained
from dscoder.config.reward import RewardModelConfig
from dscoder.data.loader import window_order
from dscoder.models import ScalarModel
from dscoder.runtime.artifact import hash_path, write_json
from dscoder.runtime.device import resolve_device
from dscoder.runtime.log import get_logger
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.loop import apply_gradients
from dscoder.train.memory import require_memory
from dscoder.train.optimizer import MasterAdamW
from dscoder.train.prompts import PromptEncoder
from dscoder.train.report import OnMetrics
from dscoder.train.reward_data import Preferences, PreferenceSet, add_replay, read_preferences
from dscoder.train.reward_loss import pairwise_losses, pointwise_losses
from dscoder.train.reward_report import held_out_report
from dscoder.train.run import MODEL, Job, StepDone, hash_model, run_stage
from dscoder.train.schedule import learning_rate, plan_batches, steps_for_tokens
from dscoder.train.scoring import packed

HELD_OUT = "held_out.json"
TOKENIZER = "tokenizer"
# Besides those of every run: the inputs are compared by what they hold.
_FREE = ("preferences", "init_from")
_LOG = get_logger(__name__)


class RewardSteps:
    """The steps of a run over shuffled epochs of pairs, or of answers for a pointwise loss."""

    def __init__(self, model: ScalarModel, found: PreferenceSet, config: RewardModelConfig) -> None:
        """Plan the whole run; a batch is counted in pairs or answers, and so is `ramp_tokens`."""
        self._model = model
        self._found = found
        self._config = config
        self._is_pairwise = config.loss.kind == "pairwise"
        self._size = len(found.pairs if self._is_pairwise else found.answers)
        wanted = steps_for_tokens(config.batch, num_tokens=round(config.epochs * self._size), window=1)
        self.num_steps = config.num_steps or max(1, wanted)
        self._consumed = plan_batches(config.batch, num_steps=self.num_steps, window=1)

    def learning_rate(self, step: int) -> float:
        """Of step `step`, from 0."""
        return learning_rate(self._config.schedule, step=step, consumed=self._consumed)

    def examples(self, step: int) -> list[int]:
        """The pairs or answers that step `step` learns from."""
        begin, end = int(self._consumed[step]), int(self._consumed[step + 1])
        order = window_order(begin, end - begin, size=self._size, seed=self._config.seed)
        return [int(idx) for idx in order]

    def train_step(self, optimizer: MasterAdamW, step: int, lr: float) -> StepDone:
        """Move the weights by the mean loss of the step's examples."""
        examples, micro = self.examples(step), self._config.batch.micro
        parts = [examples[start : start + micro] for start in range(0, len(examples), micro)]
        shares, num_tokens = [], 0
        for part in parts:
            sequences = self._sequences(part)
            shares.append(self._backward(part, sequences, num_examples=len(examples)))
            num_tokens += sum(map(len, sequences))
        what = "pairs" if self._is_pairwise else "answers"
        figures = apply_gradients(
            optimizer,
            torch.stack(shares).sum(dim=0),
            names=("loss", "balance", "accuracy", "score"),
            lr=lr,
            step=step,
            read=lambda: f"The step read the training {what} {examples}",
        )
        if not self._is_pairwise:
            del figures["accuracy"]  # of single answers there is none
        return StepDone(figures=figures, num_sequences=len(examples), num_tokens=num_tokens)

    def _sequences(self, part: Sequence[int]) -> list[tuple[int, ...]]:
        """The answers of a micro-batch; of pairs, all chosen ones and then all rejected ones."""
        answers, pairs = self._found.answers, self._found.pairs
        if not self._is_pairwise:
            return [answers[idx].ids for idx in part]
        places = [pairs[idx].chosen for idx in part] + [pairs[idx].rejected for idx in part]
        return [answers[place].ids for place in places]

    def _backward(
        self, part: Sequence[int], sequences: Sequence[Sequence[int]], *, num_examples: int
    ) -> Tensor:
        """Add the gradients of one micro-batch; returns its shares of loss, balance, accuracy, score: [4]."""
        device = self._model.score.weight.device
        tokens_BS, cu_seqlens = packed(sequences, device)
        scores = self._model.scores(tokens_BS, cu_seqlens=cu_seqlens)
        score_B = scores.score_B
        if self._is_pairwise:
            chosen_B, rejected_B = score_B.chunk(2)
            gaps = [self._found.gap(self._found.pairs[idx]) for idx in part]
            losses_B = pairwise_losses(
                chosen_B,
                rejected_B,
                margin_B=self._config.loss.margin * torch.tensor(gaps, device=device),
                centring=self._config.loss.centring,
            )
            correct = (chosen_B > rejected_B).float().sum() / num_examples
        else:
            rates = [self._found.answers[idx].pass_rate for idx in part]
            losses_B = pointwise_losses(score_B, torch.tensor(rates, device=device))
            correct = torch.zeros((), device=device)
        share = len(part) / num_examples
        loss, balance = losses_B.sum() / num_examples, scores.balance * share
        (loss + balance).backward()  # type: ignore[no-untyped-call]
        return torch.stack([loss.detach(), balance.detach(), correct, score_B.detach().mean() * share])


def reading_encoder(config: RewardModelConfig) -> PromptEncoder:
    """How prompts and answers are read; ValueError if tokenizer and model do not go together."""
    tokenizer = Tokenizer.load(config.init_from)
    model = load_config(config.init_from)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"reward-model: the tokenizer of {config.init_from} must have at most {model.vocab_size} ids, "
            f"the model's vocab_size, got {tokenizer.vocab_size}"
        )
    if tokenizer.bos_id != model.bos_id:
        # transformers is told to skip it as padding.
        raise ValueError(
            f"reward-model: the begin-of-text token of {config.init_from} must be {model.bos_id}, the "
            f"model's, got {tokenizer.bos_id}"
        )
    if config.reading.max_length is not None and config.reading.max_length > model.max_positions:
        raise ValueError(
            f"reward-model: max_length must be <= {model.max_positions}, the model's max_positions, "
            f"got {config.reading.max_length}"
        )
    return PromptEncoder(
        tokenizer=tokenizer,
        max_positions=model.max_positions,
        template=config.reading.template,
        fim_order=config.reading.fim_order,
    )


def _read(config: RewardModelConfig, encoder: PromptEncoder) -> tuple[Preferences, int]:
    """The preferences, with some of earlier ones among what is learnt, and how many.

    What is held out is of the new ones alone.
    """
    read = functools.partial(
        read_preferences,
        encoder=encoder,
        max_length=config.reading.max_length or encoder.max_positions,
        held_out_share=config.held_out_share,
    )
    found = read(config.preferences)
    count = 0
    if config.replay.preferences:
        earlier = read(config.replay.preferences, needs_held_out=False)
        count = add_replay(
            found.train,
            earlier.train,
            share=config.replay.share,
            is_pairwise=config.loss.kind == "pairwise",
            seed=config.seed,
        )
        _LOG.info("%d earlier examples are learnt from again", count)
    return found, count


def _export(
    config: RewardModelConfig,
    model: ScalarModel,
    found: Preferences,
    out: Path,
    *,
    told: Mapping[str, object],
) -> None:
    """The model, and the report on all that was held out, with what else is `told`."""
    save_pretrained(model, out / MODEL, tokenizer=out / TOKENIZER, overwrite=True)
    report = held_out_report(model, found.held_out, config.loss)
    counts = {
        "train_prompts": len(found.train.prompts),
        "train_pairs": len(found.train.pairs),
        "train_answers": len(found.train.answers),
        "held_out_prompts": len(found.held_out.prompts),
        **told,
    }
    write_json(out / HELD_OUT, {**counts, "dropped": dict(found.dropped), **report.record()})
    _LOG.info(
        "held out: %d pairs of %d prompts, accuracy %.3f (the shorter answer: %.3f), calibration error %.3f",
        *(report.num_pairs, len(found.held_out.prompts), report.accuracy, report.shorter_accuracy),
        report.order_error,
    )


def _job(config: RewardModelConfig, directory: Path) -> Job:
    """The run's preferences, model and plan."""
    check_replaceable(directory / MODEL, overwrite=True)
    encoder = reading_encoder(config)
    found, num_replayed = _read(config, encoder)
    device = resolve_device(config.device)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    require_memory(load_config(config.init_from), dtype=dtype, device=device)
    model = load_scalar_model(config.init_from, dtype=dtype, device=device, seed=config.seed).train()
    encoder.tokenizer.save(directory / TOKENIZER)
    steps = RewardSteps(model, found.train, config)
    _LOG.info(
        "%d pairs of %d prompts, held out %d of %d; left out %s",
        *(len(found.train.pairs), len(found.train.prompts)),
        *(len(found.held_out.pairs), len(found.held_out.prompts), dict(found.dropped)),
    )
    # Of the weights that a run goes on from, too: a checkpoint is read after this.
    before = held_out_report(model, found.held_out, config.loss).figures()
    told = {"replayed": num_replayed, "before": before}
    max_pairs = config.report.eval_windows
    return Job(
        model=model,
        num_steps=steps.num_steps,
        learning_rate=steps.learning_rate,
        train_step=steps.train_step,
        export=lambda out: _export(config, model, found, out, told=told),
        results=(MODEL, HELD_OUT),
        evaluate=lambda: held_out_report(model, found.held_out, config.loss, max_pairs=max_pairs).figures(),
    )


def run(config: RewardModelConfig, *, on_metrics: OnMetrics | None = None) -> Path:
    """Train, or go on training, and leave the model in `config.out`/model; returns `config.out`.

    Raises what `run_stage` does; ValueError too if there is no pair to learn from, or none is held out.
    """
    inputs = {f"preferences{idx}": hash_path(Path(path)) for idx, path in enumerate(config.preferences)}
    inputs |= {f"replay{idx}": hash_path(Path(path)) for idx, path in enumerate(config.replay.preferences)}
    return run_stage(
        config,
        lambda directory: _job(config, directory),
        command="reward-model",
        inputs=inputs | {"init_from": hash_model(config.init_from)},
        free=_FREE,
        on_metrics=on_metrics,
    )
