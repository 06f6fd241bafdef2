"""What a generation run does: how tokens are drawn, when it stops, how a hole is shown to the model."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How one request draws its tokens: temperature first, then top-k, then top-p on what is left."""

    temperature: float = 0.0  # 0 is greedy
    top_p: float = 1.0  # the smallest set of likeliest tokens with at least this probability
    top_k: int = 0  # 0 keeps the whole vocabulary
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"SamplingConfig: temperature must be finite and >= 0, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"SamplingConfig: top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise ValueError(f"SamplingConfig: top_k must be >= 0, got {self.top_k}")
        if self.seed < 0:
            raise ValueError(f"SamplingConfig: seed must be >= 0, got {self.seed}")


GREEDY = SamplingConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchConfig:
    """How many requests run at once, and in how much memory."""

    max_batch: int = 32  # requests decoding together
    prefill_chunk: int = 2048  # tokens of prompts computed in one forward; decoding waits for no more
    cache_tokens: int = 0  # that the cache holds, all requests together; 0: as many as they need
    memory_share: float = 0.9  # of a GPU's free memory, for the cache at most
    cuda_graphs: bool = True  # decode by replaying graphs, on a GPU

    def __post_init__(self) -> None:
        if self.max_batch < 1 or self.prefill_chunk < 1:
            raise ValueError(
                f"BatchConfig: max_batch and prefill_chunk must be >= 1, "
                f"got {self.max_batch} and {self.prefill_chunk}"
            )
        if self.cache_tokens < 0:
            raise ValueError(f"BatchConfig: cache_tokens must be >= 0, got {self.cache_tokens}")
        if not 0 < self.memory_share <= 1:
            raise ValueError(f"BatchConfig: memory_share must be in (0, 1], got {self.memory_share}")


DEFAULT_BATCH = BatchConfig()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Which model generates, where, and how many requests at once."""

    model: str  # a directory in the published layout, or a hub id
    dtype: str = "auto"  # auto: as stored
    device: str = "auto"  # auto: the GPU if there is one
    batch: BatchConfig = DEFAULT_BATCH

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(
                f"EngineConfig: dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """How a prompt is continued or a hole filled, and where the new text ends."""

    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()  # the text ends before the first of them
    single_line: bool = False  # stop at the first line break too
    fim_order: str = "psm"  # of a hole's prompt: psm (prefix, suffix, middle) or spm, as the model learnt it
    prefix_share: float = 0.75  # of a hole's prompt, when both sides are too long for the context
    sampling: SamplingConfig = GREEDY

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0:
            raise ValueError(f"GenerateConfig: max_new_tokens must be >= 0, got {self.max_new_tokens}")
        if self.fim_order not in ("psm", "spm"):
            raise ValueError(f"GenerateConfig: fim_order must be psm or spm, got {self.fim_order!r}")
        if "" in self.stop:
            raise ValueError(f"GenerateConfig: stop strings must not be empty, got {self.stop!r}")
        if not 0 <= self.prefix_share <= 1:
            raise ValueError(f"GenerateConfig: prefix_share must be in [0, 1], got {self.prefix_share}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop`, with the line breaks if only one line is wanted."""
        return (*self.stop, *(("\n", "\r\n") if self.single_line else ()))
