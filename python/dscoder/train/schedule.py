"""Batch sizes and learning rates as functions of the step: a run's whole plan, known before it starts.

Shares of a run are shares of its tokens, as in the papers (DeepSeek LLM section 2.3, DeepSeek-V2 section
3.1.2, DeepSeek-Coder-V2 section 3.3), so a batch that grows moves the milestones to later steps.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from dscoder.config.train import BatchConfig, ScheduleConfig


def batch_sequences(config: BatchConfig, *, num_tokens: int) -> int:
    """Sequences of the next step after `num_tokens`; while growing, a multiple of `micro` where it can be."""
    if config.ramp_from is None or num_tokens >= config.ramp_tokens:
        return config.sequences
    growth = (config.sequences - config.ramp_from) * num_tokens // config.ramp_tokens
    sequences = config.ramp_from + growth
    return max(config.ramp_from, sequences // config.micro * config.micro)


def _batches(config: BatchConfig, *, window: int) -> Iterator[int]:
    num_sequences = 0
    while True:
        batch = batch_sequences(config, num_tokens=num_sequences * window)
        num_sequences += batch
        yield batch


def plan_batches(config: BatchConfig, *, num_steps: int, window: int) -> NDArray[np.int64]:
    """Sequences consumed before each step and, last, by the whole run: [num_steps + 1]."""
    sizes = np.fromiter(_batches(config, window=window), dtype=np.int64, count=num_steps)
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(sizes)])


def steps_for_tokens(config: BatchConfig, *, num_tokens: int, window: int) -> int:
    """The smallest number of steps that sees `num_tokens`."""
    seen = 0
    num_steps = 0
    while seen < num_tokens and seen < config.ramp_tokens:
        seen += batch_sequences(config, num_tokens=seen) * window
        num_steps += 1
    return num_steps + max(0, math.ceil((num_tokens - seen) / (config.sequences * window)))


def learning_rate(config: ScheduleConfig, *, step: int, consumed: NDArray[np.int64]) -> float:
    """The rate of step `step` (from 0) of a run whose plan is `consumed`."""
    if step < config.warmup_steps:
        return config.max_lr * (step + 1) / config.warmup_steps
    seen, total = int(consumed[step]), int(consumed[-1])
    if config.kind == "constant":
        return config.max_lr
    if config.kind == "multi_step":
        num_cuts = sum(seen >= milestone * total for milestone in config.milestones)
        return float(config.max_lr * config.factor**num_cuts)
    start = int(consumed[min(config.warmup_steps, len(consumed) - 1)])
    progress = (seen - start) / max(1, total - start)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.max_lr * (config.final_share + (1.0 - config.final_share) * cosine)
