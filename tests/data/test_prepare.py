"""The stages `tokenizer` and `prepare`: nothing lost, nothing leaked, the same at any number of threads."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dscoder.config.data import PrepareConfig, SourcesConfig, TokenizerConfig
from dscoder.config.text import FimConfig
from dscoder.data import prepare, tokenizer
from dscoder.data.shards import Windows
from dscoder.data.sources import is_held_out, read_documents
from dscoder.runtime.artifact import read_manifest
from dscoder.testing.tiny_run import tiny_sources
from dscoder.text.tokenizer import Tokenizer

SOURCES = tiny_sources()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "out"
    return tokenizer.run(TokenizerConfig(out=str(out), sources=SOURCES, vocab_size=512))


def config_for(trained: Path, out: Path, **fields: object) -> PrepareConfig:
    config = PrepareConfig(out=str(out), tokenizer=str(trained), sources=SOURCES, window=128)
    return replace(config, **fields)  # type: ignore[arg-type]


def texts_of(windows: Windows, vocabulary: Tokenizer) -> Counter[str]:
    """The decoded documents of a split; those longer than a window come in pieces."""
    found: Counter[str] = Counter()
    for index in range(len(windows)):
        tokens, ends = windows.read(index)
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            found[vocabulary.decode(tokens[begin:end].tolist())] += 1
    return found


def expected(*, held_out: bool) -> list[str]:
    documents = read_documents(SOURCES, dropped=Counter())
    return [d.text for d in documents if is_held_out(d, share=SOURCES.held_out_share) == held_out]


@pytest.mark.parametrize(("split", "held_out"), [("train", False), ("held_out", True)])
def test_without_fim_the_windows_hold_every_document_framed(
    trained: Path, tmp_path: Path, split: str, held_out: bool
) -> None:
    # A window longer than any document keeps each whole.
    config = config_for(trained, tmp_path, window=60_000, fim=FimConfig(rate=0.0))
    vocabulary = Tokenizer.load(trained)
    bos, eos = (vocabulary.decode([vocabulary.require_id(name)]) for name in ("bos", "eos"))
    found = texts_of(Windows(prepare.run(config) / split), vocabulary)
    assert found == Counter(bos + text + eos for text in expected(held_out=held_out))


def test_token_bytes_add_up_to_the_bytes_of_the_documents(trained: Path, tmp_path: Path) -> None:
    out = prepare.run(config_for(trained, tmp_path))
    token_bytes = np.load(out / "token_bytes.npy")
    counts = read_manifest(out, command="prepare")["counts"]
    for split in ("train", "held_out"):
        windows = Windows(out / split)
        total = 0
        for index in range(len(windows)):
            tokens, ends = windows.read(index)
            total += int(token_bytes[tokens[: ends[-1]]].sum())
        assert total == counts[f"{split}_bytes"] > 0


def test_half_of_the_training_documents_and_no_held_out_one_is_rearranged(
    trained: Path, tmp_path: Path
) -> None:
    out = prepare.run(config_for(trained, tmp_path, section_bytes=200))
    counts = read_manifest(out, command="prepare")["counts"]
    assert 0.4 < counts["train_fim_psm"] / counts["train_documents"] < 0.6
    assert counts["held_out_fim_plain"] == counts["held_out_documents"] > 0


def test_sections_let_whole_rearranged_documents_stand_in_a_window(trained: Path, tmp_path: Path) -> None:
    vocabulary = Tokenizer.load(trained)
    order = [vocabulary.require_id(name) for name in ("bos", "fim_begin", "fim_hole", "fim_end", "eos")]
    out = prepare.run(config_for(trained, tmp_path, section_bytes=150))
    windows = Windows(out / "train")
    whole = 0
    for index in range(len(windows)):
        tokens, ends = windows.read(index)
        for begin, end in zip([0, *ends[:-1]], ends, strict=True):
            whole += [t for t in tokens[begin:end].tolist() if t in order] == order
    counts = read_manifest(out, command="prepare")["counts"]
    assert whole > 0.95 * counts["train_fim_psm"] > 0


def test_pools_bound_memory_and_lose_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 1000)
    small = prepare.run(config_for(trained, tmp_path / "small", pool_tokens=20_000))
    large = prepare.run(config_for(trained, tmp_path / "large"))
    assert len(list((small / "train").glob("tokens-*.npy"))) > 1
    counts = [read_manifest(out, command="prepare")["counts"] for out in (small, large)]
    assert counts[0]["train_tokens"] == counts[1]["train_tokens"]


def test_the_number_of_threads_does_not_change_the_result(trained: Path, tmp_path: Path) -> None:
    code = (
        "import os, sys; os.environ['RAYON_NUM_THREADS'] = sys.argv[1]\n"
        "from dscoder.config.data import PrepareConfig\n"
        "from dscoder.data import prepare\n"
        "from dscoder.testing.tiny_run import tiny_sources\n"
        "prepare.run(PrepareConfig(out=sys.argv[2], tokenizer=sys.argv[3], sources=tiny_sources()))"
    )
    outs = []
    for num_threads in ("1", "3"):
        out = tmp_path / num_threads
        subprocess.run([sys.executable, "-c", code, num_threads, str(out), str(trained)], check=True)
        files = sorted(path for path in out.rglob("*.npy"))
        outs.append([(path.relative_to(out), path.read_bytes()) for path in files])
    assert len(outs[0]) == 7
    assert outs[0] == outs[1]


def test_running_again_does_nothing_and_another_window_is_refused(trained: Path, tmp_path: Path) -> None:
    config = config_for(trained, tmp_path)
    path = prepare.run(config) / "manifest.json"
    before = path.stat().st_mtime_ns
    prepare.run(config)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match=r"config\.window: 128 there, 64 here"):
        prepare.run(replace(config, window=64))


def test_a_tokenizer_never_sees_held_out_documents(tmp_path: Path) -> None:
    secret = "zqzqzqzq " * 100
    texts = {f"{i}.py": f"{secret}{i}" for i in range(40)}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    sources = SourcesConfig(paths=(str(tmp_path),), held_out_share=0.5)
    counts = []
    for share in (0.0, 0.5):
        config = TokenizerConfig(
            out=str(tmp_path / f"out{share}"), sources=replace(sources, held_out_share=share), vocab_size=512
        )
        counts.append(read_manifest(tokenizer.run(config), command="tokenizer")["counts"])
    assert counts[0]["documents"] == 40
    assert counts[1]["documents"] + counts[1]["held_out_documents"] == 40
    assert 5 < counts[1]["held_out_documents"] < 35


def test_sources_without_a_document_are_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_bytes(b"\0")
    sources = SourcesConfig(paths=(str(tmp_path),))
    with pytest.raises(ValueError, match=r"must hold a document, got none; dropped \{'binary': 1\}"):
        prepare.run(config_for(trained, tmp_path / "out", sources=sources))
    with pytest.raises(ValueError, match=r"must hold a document, got none; dropped \{'binary': 1\}"):
        tokenizer.run(TokenizerConfig(out=str(tmp_path / "tok"), sources=sources))
