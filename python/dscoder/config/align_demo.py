"""The alignment demo: every number of a run in which a tiny model learns from tests of its own answers.

The model is the demo's DeepSeek-Coder-V2 with one layer less. It learns small functions from generated text
(pre-training), to write one on request (SFT), and then from what its answers to unseen requests are worth
(GRPO): once by raw tests, once by a reward model that learnt from the same tests. Where it leaves the papers,
it is for its size: rates of a width of 128, short windows, small groups. docs/align_demo.md says how the
sizes were chosen and how far the figures can be trusted.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from dscoder.config import generate
from dscoder.config.data import PrepareConfig, SourcesConfig, TokenizerConfig
from dscoder.config.demo import DemoConfig
from dscoder.config.evaluate import TaskScoreConfig
from dscoder.config.generated import GeneratedConfig, ProblemCounts
from dscoder.config.grpo import GrpoConfig, PolicyLossConfig, RewardsConfig, RolloutConfig, UpdateConfig
from dscoder.config.model import ModelConfig
from dscoder.config.reward import PreferConfig, ReadingConfig, RewardLossConfig, RewardModelConfig
from dscoder.config.sft import ExamplesConfig, SftConfig
from dscoder.config.task import TaskConfig
from dscoder.config.text import FimConfig
from dscoder.config.train import BatchConfig, CheckpointConfig, PretrainConfig, ReportConfig, ScheduleConfig

Signal = Literal["tests", "reward_model"]
SIGNALS: tuple[Signal, ...] = ("tests", "reward_model")
Split = Literal["practised", "validation", "test"]

_TEMPLATE: Literal["v2"] = "v2"
_ANSWER_TOKENS = 128
_BATCH = generate.BatchConfig(max_batch=128)
_MODEL = replace(DemoConfig().model, vocab_size=704, num_layers=2)
# Of every stage that learns but GRPO.
_CHECKPOINT = CheckpointConfig(every=100, keep=1)
_REPORT = ReportConfig(log_every=20, tensorboard="off")


def _learning(num_steps: int, max_lr: float, *, sequences: int) -> "LearningConfig":
    return LearningConfig(
        num_steps=num_steps,
        batch=BatchConfig(sequences=sequences, micro=sequences),
        schedule=ScheduleConfig(kind="cosine", max_lr=max_lr, warmup_steps=num_steps // 10),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class LearningConfig:
    """How long and how fast one stage learns."""

    num_steps: int
    batch: BatchConfig
    schedule: ScheduleConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class PolicyConfig:
    """What both runs of GRPO share."""

    num_steps: int = 16
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(
            groups=16, group_size=8, max_new_tokens=_ANSWER_TOKENS, template=_TEMPLATE, batch=_BATCH
        )
    )
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    update: UpdateConfig = field(default_factory=lambda: UpdateConfig(micro=32))
    schedule: ScheduleConfig = field(
        default_factory=lambda: ScheduleConfig(kind="cosine", max_lr=3e-4, warmup_steps=0)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignDemoConfig:
    """The stages of the alignment demo; what they share is said once."""

    out: str = "runs/align"  # each stage has a directory in it
    problems: ProblemCounts = field(default_factory=ProblemCounts)
    model: ModelConfig = _MODEL
    pretrain: LearningConfig = field(default_factory=lambda: _learning(400, 6e-3, sequences=8))
    sft: LearningConfig = field(default_factory=lambda: _learning(240, 2e-3, sequences=8))
    reward: LearningConfig = field(default_factory=lambda: _learning(80, 1e-3, sequences=64))
    # The pass rate of each answer: problems whose answers all fail, or all pass, teach something too.
    reward_loss: RewardLossConfig = field(default_factory=lambda: RewardLossConfig(kind="pointwise"))
    num_asked: int = 512  # practised problems to which the reward model sees candidates
    num_candidates: int = 6  # of one problem
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    num_samples: int = 4  # answers drawn to each test problem
    watch_every: int = 4  # steps of GRPO between two looks at the validation problems
    num_watched: int = 3  # answers drawn to each of them
    isolation: Literal["full", "rlimits"] = "full"  # of the sandbox; rlimits is much weaker
    num_threads: int = 1  # of torch: so small a model gains little by more, and sandboxes use the other core
    seed: int = 0
    overwrite: bool = False

    def directory(self, stage: str) -> str:
        """Where a stage leaves its results."""
        return str(Path(self.out) / stage)

    def generated(self) -> GeneratedConfig:
        """Text to learn from, and problems."""
        return GeneratedConfig(
            out=self.directory("problems"), num=self.problems, seed=self.seed, overwrite=self.overwrite
        )

    def tokenizer(self) -> TokenizerConfig:
        """A vocabulary of the size of the model's."""
        return TokenizerConfig(
            out=self.directory("tokenizer"),
            sources=self._sources(),
            vocab_size=self.model.vocab_size,
            overwrite=self.overwrite,
        )

    def prepare(self) -> PrepareConfig:
        """Windows as long as the model's context; nothing is infilled here, so there is no FIM."""
        return PrepareConfig(
            out=self.directory("data"),
            tokenizer=self.directory("tokenizer"),
            sources=self._sources(),
            fim=FimConfig(rate=0.0),
            window=self.model.max_positions,
            seed=self.seed,
            overwrite=self.overwrite,
        )

    def pretrain_run(self) -> PretrainConfig:
        """From initial weights."""
        return PretrainConfig(
            data=self.directory("data"),
            out=self.directory("pretrain"),
            model=self.model,
            num_steps=self.pretrain.num_steps,
            batch=self.pretrain.batch,
            schedule=self.pretrain.schedule,
            device="cpu",
            seed=self.seed,
            num_threads=self.num_threads,
            checkpoint=_CHECKPOINT,
            report=_REPORT,
            overwrite=self.overwrite,
        )

    def sft_run(self) -> SftConfig:
        """From the pre-trained model."""
        return SftConfig(
            dialogues=(self.directory("problems/dialogues.jsonl"),),
            init_from=self.directory("pretrain/model"),
            out=self.directory("sft"),
            examples=ExamplesConfig(template=_TEMPLATE, window=self.model.max_positions),
            num_steps=self.sft.num_steps,
            batch=self.sft.batch,
            schedule=self.sft.schedule,
            device="cpu",
            seed=self.seed,
            num_threads=self.num_threads,
            checkpoint=_CHECKPOINT,
            report=_REPORT,
            overwrite=self.overwrite,
        )

    def prefer(self) -> PreferConfig:
        """Candidates of the fine-tuned model, by what the few tests say."""
        return PreferConfig(
            out=self.directory("preferences"),
            model=self.directory("sft/model"),
            task=self.task("practised"),
            max_problems=self.num_asked,
            num_candidates=self.num_candidates,
            temperature=1.0,
            top_p=1.0,
            max_new_tokens=_ANSWER_TOKENS,
            template=_TEMPLATE,
            batch=_BATCH,
            device="cpu",
            isolation=self.isolation,
            num_threads=self.num_threads,
            seed=self.seed,
            overwrite=self.overwrite,
        )

    def reward_model(self) -> RewardModelConfig:
        """From the fine-tuned model."""
        return RewardModelConfig(
            preferences=(self.directory("preferences"),),
            init_from=self.directory("sft/model"),
            out=self.directory("reward_model"),
            loss=self.reward_loss,
            reading=ReadingConfig(template=_TEMPLATE),
            num_steps=self.reward.num_steps,
            batch=self.reward.batch,
            schedule=self.reward.schedule,
            device="cpu",
            seed=self.seed,
            num_threads=self.num_threads,
            checkpoint=_CHECKPOINT,
            report=_REPORT,
            overwrite=self.overwrite,
        )

    def grpo(self, signal: Signal) -> GrpoConfig:
        """From the fine-tuned model, by one signal; all else is the same for both."""
        return GrpoConfig(
            model=self.directory("sft/model"),
            out=self.directory(f"grpo_{signal}"),
            task=self.task("practised"),
            num_steps=self.policy.num_steps,
            loss=self.policy.loss,
            reward_model=self.directory("reward_model/model") if signal == "reward_model" else "",
            rewards=RewardsConfig(functions=(signal,)),
            rollout=replace(self.policy.rollout, isolation=self.isolation),
            update=self.policy.update,
            schedule=self.policy.schedule,
            device="cpu",
            seed=self.seed,
            num_threads=self.num_threads,
            checkpoint=CheckpointConfig(every=10, keep=1),
            report=ReportConfig(log_every=1, eval_every=self.watch_every, tensorboard="off", plot="off"),
            overwrite=self.overwrite,
        )

    def score(self, stage: str, split: Split) -> TaskScoreConfig:
        """The model of a stage on the problems of a split."""
        return TaskScoreConfig(
            out=self.directory(f"{split}_{stage}"),
            model=self.directory(f"{stage}/model"),
            task=self.task(split),
            num_samples=self.num_samples if split == "test" else self.num_watched,
            max_new_tokens=_ANSWER_TOKENS,
            template=_TEMPLATE,
            batch=_BATCH,
            device="cpu",
            isolation=self.isolation,
            num_threads=self.num_threads,
            seed=self.seed,
            overwrite=self.overwrite,
        )

    def task(self, split: Split) -> TaskConfig:
        """The problems of a split, asked as messages."""
        return TaskConfig(
            name="generated", sources=(self.directory(f"problems/{split}.jsonl"),), asking="instruct"
        )

    def _sources(self) -> SourcesConfig:
        return SourcesConfig(paths=(self.directory("problems/corpus.jsonl"),))
