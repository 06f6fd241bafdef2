"""Bits per byte: exact on models whose bits are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from dscoder.data.prepare import HELD_OUT, TOKEN_BYTES
from dscoder.data.shards import Windows
from dscoder.eval.perplexity import bits_per_byte, held_out_report
from dscoder.models import Transformer
from dscoder.runtime.artifact import read_manifest
from dscoder.testing.tiny_run import TINY_MOE, tiny_windows


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_windows(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def uniform() -> Transformer:
    """A model that finds all 512 tokens equally likely: 9 bits each."""
    model = Transformer(TINY_MOE)
    with torch.no_grad():
        model.head.weight.zero_()
    return model


def test_a_uniform_model_needs_nine_bits_a_token(uniform: Transformer, windows: Path) -> None:
    found = bits_per_byte(uniform, windows)
    assert found.bits == pytest.approx(9 * found.num_tokens, rel=1e-6)
    assert found.loss == pytest.approx(math.log(512), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(9 * found.num_tokens / found.num_bytes, rel=1e-6)


def test_every_byte_of_documents_that_fit_a_window_is_counted(
    uniform: Transformer, windows: Path, tmp_path: Path
) -> None:
    # Windows so long that no section is cut: bos predicts the first token, so nothing is left out.
    counts = read_manifest(windows, command="prepare")["counts"]
    split = Windows(windows / HELD_OUT)
    token_bytes = np.load(windows / TOKEN_BYTES)
    missing = 0
    for index in range(len(split)):
        tokens, ends = split.read(index)
        starts = [0, *ends[:-1].tolist()]
        missing += sum(int(token_bytes[tokens[start]]) for start in starts)
    found = bits_per_byte(uniform, windows)
    assert found.num_bytes == counts["held_out_bytes"] - missing
    assert missing < 0.03 * counts["held_out_bytes"]


def test_a_choice_of_windows_is_the_same_each_time_and_part_of_the_whole(
    uniform: Transformer, windows: Path
) -> None:
    first, again = (bits_per_byte(uniform, windows, max_windows=5) for _ in range(2))
    whole = bits_per_byte(uniform, windows)
    assert first == again
    assert 0 < first.num_bytes < whole.num_bytes
    assert bits_per_byte(uniform, windows, max_windows=10**6) == whole


def test_the_training_mode_is_given_back(uniform: Transformer, windows: Path) -> None:
    for mode in (True, False):
        uniform.train(mode)
        report = held_out_report(uniform, directory=windows, max_windows=2)
        assert uniform.training is mode
        assert set(report) == {"held_out_bits_per_byte", "held_out_loss"}
        assert all(parameter.grad is None for parameter in uniform.parameters())
