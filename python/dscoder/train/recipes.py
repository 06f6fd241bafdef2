"""The papers' training runs, numbers from the papers; data, places and hardware are the caller's.

DeepSeek-Coder section 3 and Table 2 (v1), DeepSeek LLM section 2.3 (what v1 leaves out), DeepSeek-V2 section
3.1 and appendix B, DeepSeek-Coder-V2 sections 3.1 to 3.4. Where the papers are silent a line says so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from dscoder.config import ModelConfig, preset
from dscoder.config.train import BatchConfig, PretrainConfig, ScheduleConfig
from dscoder.train.long_context import unstretched
from dscoder.train.schedule import steps_for_tokens

_SHORT_WINDOW = 4096
_FINAL_SHARE = 0.1  # of the largest rate, where every schedule ends


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """A run of a paper."""

    model: ModelConfig | None  # None: goes on from an earlier model
    window: int  # what `dscoder prepare` must be told; another one is refused
    num_steps: int
    batch: BatchConfig
    schedule: ScheduleConfig
    stage: Literal["pretrain", "long_context"] = "pretrain"

    def config(self, *, data: str, out: str, init_from: str | None = None) -> PretrainConfig:
        """The whole config of the run."""
        return PretrainConfig(
            data=data,
            out=out,
            init_from=init_from,
            model=self.model,
            stage=self.stage,
            window=self.window,
            num_steps=self.num_steps,
            batch=self.batch,
            schedule=self.schedule,
            precision="bf16",
        )

    def fields(self) -> dict[str, object]:
        """The fields of the config without the places, which the recipe does not know."""
        config = self.config(data="", out="", init_from=None if self.model else "")
        names = {field.name for field in fields(config)} - {"data", "out", "init_from"}
        return {name: getattr(config, name) for name in names}


def _from_scratch(name: str, *, num_tokens: int, batch: BatchConfig, schedule: ScheduleConfig) -> Recipe:
    return Recipe(
        model=unstretched(preset(name), max_positions=_SHORT_WINDOW),
        window=_SHORT_WINDOW,
        num_steps=steps_for_tokens(batch, num_tokens=num_tokens, window=_SHORT_WINDOW),
        batch=batch,
        schedule=schedule,
    )


def _v1(name: str, *, max_lr: float, sequences: int) -> Recipe:
    # Table 2; 2T tokens; each stage is sqrt(1/10) of the one before, the last 10 % (section 3.4).
    return _from_scratch(
        name,
        num_tokens=2_000_000_000_000,
        batch=BatchConfig(sequences=sequences, micro=1),
        schedule=ScheduleConfig(kind="multi_step", max_lr=max_lr, milestones=(0.8, 0.9)),
    )


def _v1_long(max_lr: float) -> Recipe:
    # Section 3.6: 1000 steps of 512 sequences of 16K, 8.4B tokens, at the final rate of pre-training. The
    # README of the published models says otherwise: 200B tokens at 16K after 1.8T at 4K. This is the paper's.
    return Recipe(
        model=None,
        stage="long_context",
        window=16384,
        num_steps=1000,
        batch=BatchConfig(sequences=512, micro=1),
        schedule=ScheduleConfig(kind="constant", max_lr=max_lr * _FINAL_SHARE, warmup_steps=0),
    )


def _continued(*, max_lr: float, batch: BatchConfig) -> Recipe:
    # Coder-V2 sections 3.2 and 3.3: 6T more tokens, cosine to 10 %; rate and batch "per DeepSeek-V2".
    return Recipe(
        model=None,
        window=_SHORT_WINDOW,
        num_steps=steps_for_tokens(batch, num_tokens=6_000_000_000_000, window=_SHORT_WINDOW),
        batch=batch,
        schedule=ScheduleConfig(kind="cosine", max_lr=max_lr, final_share=_FINAL_SHARE),
    )


def _v2_long(*, window: int, sequences: int, max_lr: float) -> Recipe:
    # Coder-V2 section 3.4: 1000 steps a stage. The rate is not stated: the final one of pre-training.
    return Recipe(
        model=None,
        stage="long_context",
        window=window,
        num_steps=1000,
        batch=BatchConfig(sequences=sequences, micro=1),
        schedule=ScheduleConfig(kind="constant", max_lr=max_lr * _FINAL_SHARE, warmup_steps=0),
    )


_V2_LITE_LR = 4.2e-4
_V2_LR = 2.4e-4
_V2_LITE_BATCH = BatchConfig(sequences=4608, micro=1)
_V2_BATCH = BatchConfig(sequences=9216, ramp_from=2304, ramp_tokens=225_000_000_000, micro=1)

RECIPES: Mapping[str, Recipe] = {
    "coder_1_3b": _v1("coder_1_3b", max_lr=5.3e-4, sequences=1024),
    "coder_6_7b": _v1("coder_6_7b", max_lr=4.2e-4, sequences=2304),
    "coder_33b": _v1("coder_33b", max_lr=3.5e-4, sequences=3840),
    "coder_1_3b_long": _v1_long(5.3e-4),
    "coder_6_7b_long": _v1_long(4.2e-4),
    "coder_33b_long": _v1_long(3.5e-4),
    "v2_lite": _from_scratch(
        "v2_lite",
        num_tokens=5_700_000_000_000,
        batch=_V2_LITE_BATCH,
        schedule=ScheduleConfig(kind="multi_step", max_lr=_V2_LITE_LR, milestones=(0.8, 0.9)),
    ),
    "v2": _from_scratch(
        "v2",
        num_tokens=8_100_000_000_000,
        batch=_V2_BATCH,
        schedule=ScheduleConfig(kind="multi_step", max_lr=_V2_LR, milestones=(0.6, 0.9)),
    ),
    "coder_v2_lite": _continued(max_lr=_V2_LITE_LR, batch=_V2_LITE_BATCH),
    # The checkpoint it goes on from was past the ramp.
    "coder_v2": _continued(max_lr=_V2_LR, batch=BatchConfig(sequences=9216, micro=1)),
    "coder_v2_lite_32k": _v2_long(window=32768, sequences=1152, max_lr=_V2_LITE_LR),
    "coder_v2_lite_128k": _v2_long(window=131072, sequences=288, max_lr=_V2_LITE_LR),
    "coder_v2_32k": _v2_long(window=32768, sequences=1152, max_lr=_V2_LR),
    "coder_v2_128k": _v2_long(window=131072, sequences=288, max_lr=_V2_LR),
}


def recipe(name: str) -> Recipe:
    """The recipe called `name`; ValueError lists the names there are."""
    if name not in RECIPES:
        raise ValueError(f"recipe: name must be one of {', '.join(sorted(RECIPES))}, got {name!r}")
    return RECIPES[name]
