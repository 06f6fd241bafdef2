"""The stage that measures on held-out files: honest holes, honest figures, the same model untrained."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dscoder.checkpoint import load_pretrained, save_pretrained
from dscoder.config import preset
from dscoder.config.data import PrepareConfig, SourcesConfig, TokenizerConfig
from dscoder.config.evaluate import HeldOutConfig
from dscoder.data import prepare, tokenizer
from dscoder.eval import held_out
from dscoder.models import Transformer, init_weights
from dscoder.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> HeldOutConfig:
    root = tmp_path_factory.mktemp("held_out")
    (root / "sources").mkdir()
    for i in range(40):
        text = "".join(f"def name_{i}_{j}(value):\n    return value + {i * j}\n\n" for j in range(6))
        (root / "sources" / f"{i}.py").write_text(text)
    sources = SourcesConfig(paths=(str(root / "sources"),), held_out_share=0.3)
    tokenizer.run(TokenizerConfig(out=str(root / "tokenizer"), sources=sources, vocab_size=512))
    prepare.run(
        PrepareConfig(out=str(root / "data"), tokenizer=str(root / "tokenizer"), sources=sources, window=128)
    )
    loaded = Tokenizer.load(root / "tokenizer")
    shape = replace(
        preset("tiny_moe"),
        width=32,
        num_layers=2,
        mlp_width=48,
        max_positions=128,
        vocab_size=512,
        bos_id=loaded.require_id("bos"),
        eos_id=loaded.require_id("eos"),
        init_std=0.02,
    )
    model = Transformer(shape)
    init_weights(model, seed=5)
    with torch.no_grad():
        model.head.weight.mul_(3.0)
    save_pretrained(model, root / "model", tokenizer=root / "tokenizer")
    return HeldOutConfig(
        out=str(root / "out"),
        model=str(root / "model"),
        data=str(root / "data"),
        sources=sources,
        untrained_seed=5,
        num_holes=12,
        max_new_tokens=6,
    )


def test_holes_come_from_held_out_files_only(config: HeldOutConfig) -> None:
    holes = held_out.held_out_holes(config)
    assert [len(holes[kind]) for kind in (held_out.WHOLE_LINES, held_out.LINE_ENDS)] == [12, 12]
    manifest = json.loads((Path(config.data) / "manifest.json").read_text())
    assert 0 < manifest["counts"]["held_out_documents"] < 40
    # With the other files held out, every hole is another.
    others = held_out.held_out_holes(replace(config, sources=replace(config.sources, held_out_share=0.0)))
    assert others == {held_out.WHOLE_LINES: [], held_out.LINE_ENDS: []}


def test_results_hold_the_figures_and_every_completion(config: HeldOutConfig) -> None:
    results = json.loads((held_out.run(config) / held_out.RESULTS).read_text())
    holes = held_out.held_out_holes(config)
    for name in (held_out.TRAINED, held_out.UNTRAINED):
        for kind, chosen in holes.items():
            score, completions = results[name]["score"][kind], results[name]["completions"][kind]
            assert [entry["answer"] for entry in completions] == [hole.answer for hole in chosen]
            assert score["num_exact"] == sum(entry["exact"] for entry in completions)
            assert score["exact_match"] == score["num_exact"] / 12
            assert all("\n" not in entry["completion"] for entry in completions)
    # An untrained model guesses evenly among 512 tokens.
    untrained = results[held_out.UNTRAINED]["score"]
    assert untrained["loss"] == pytest.approx(math.log(512), rel=0.02)
    assert results[held_out.TRAINED]["score"]["bits_per_byte"] != untrained["bits_per_byte"]


def test_the_untrained_model_has_the_weights_that_training_started_from(
    config: HeldOutConfig, tmp_path: Path
) -> None:
    fresh = load_pretrained(config.model)
    init_weights(fresh, seed=5)
    save_pretrained(fresh, tmp_path / "fresh", tokenizer=config.model)
    found = json.loads(
        (
            held_out.run(replace(config, out=str(tmp_path / "out"), model=str(tmp_path / "fresh")))
            / held_out.RESULTS
        ).read_text()
    )
    assert found[held_out.TRAINED] == found[held_out.UNTRAINED]


def test_without_held_out_files_there_is_nothing_to_measure(config: HeldOutConfig, tmp_path: Path) -> None:
    without = replace(config, out=str(tmp_path / "o"), sources=replace(config.sources, held_out_share=0.0))
    with pytest.raises(ValueError, match="the held-out files must hold a line to take out, got none"):
        held_out.run(without)


@pytest.mark.parametrize(
    "field", ["num_holes", "max_per_document", "max_new_tokens", "max_batch", "num_windows"]
)
def test_counts_must_be_positive(config: HeldOutConfig, field: str) -> None:
    with pytest.raises(ValueError, match=f"HeldOutConfig: {field} must be >= 1, got 0"):
        replace(config, **{field: 0})
