"""The configs of the data stages and of training name what is wrong."""

import pytest

from dscoder.config.data import PrepareConfig, TokenizerConfig
from dscoder.config.train import CheckpointConfig, OptimizerConfig, PretrainConfig, ReportConfig


@pytest.mark.parametrize(
    ("record", "fields", "message"),
    [
        (TokenizerConfig, {"out": "o", "vocab_size": 100}, r"vocab_size must be >= 512 .*, got 100"),
        (PrepareConfig, {"out": "o", "tokenizer": "t", "window": 1}, "window must be >= 2, got 1"),
        (
            PrepareConfig,
            {"out": "o", "tokenizer": "t", "section_bytes": 0},
            "section_bytes must be >= 1, got 0",
        ),
        (
            PrepareConfig,
            {"out": "o", "tokenizer": "t", "pool_tokens": 9},
            r"pool_tokens must be >= window \(1024\)",
        ),
        (OptimizerConfig, {"beta1": 1.0}, r"beta1 must be in \[0, 1\), got 1.0"),
        (OptimizerConfig, {"beta2": float("nan")}, r"beta2 must be in \[0, 1\), got nan"),
        (
            OptimizerConfig,
            {"clip_norm": 0.0},
            "eps and clip_norm must be positive .*, got 1e-08, 0.0 and 0.1",
        ),
        (CheckpointConfig, {"keep": 0}, "every and keep must be >= 1, got 200 and 0"),
        (ReportConfig, {"eval_every": 0}, "eval_every must be >= 1, got 0"),
        (
            PretrainConfig,
            {"data": "d", "out": "o"},
            "exactly one of model and init_from must be given, got neither",
        ),
    ],
)
def test_a_wrong_field_is_named(record: type[object], fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(**fields)
