"""Examples on disk: what is learnt of each, what is left out, and how holes are mixed in."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from dscoder.config.data import SourcesConfig
from dscoder.config.sft import ExamplesConfig, FimExamplesConfig
from dscoder.data.examples import COMMAND, hash_examples, write_examples
from dscoder.data.loader import IGNORED, assemble
from dscoder.data.prepare import HELD_OUT, TOKENIZER, TRAIN
from dscoder.data.shards import Windows
from dscoder.runtime.artifact import read_manifest
from dscoder.text.flavors import BOS, EOS, EOT, FIM_BEGIN, FIM_END, FIM_HOLE
from dscoder.text.tokenizer import Tokenizer

WINDOW = 128


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["def add(a, b):\n    return a + b\n"], vocab_size=512, flavor="v2")


def dialogues(path: Path, records: Sequence[tuple[str, str]]) -> Path:
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in records]
    path.write_text("\n".join(lines) + "\n")
    return path


def written(
    tmp_path: Path, tokenizer: Tokenizer, records: Sequence[tuple[str, str]], config: ExamplesConfig
) -> tuple[Path, dict[str, int], dict[str, int]]:
    paths = [str(dialogues(tmp_path / "d.jsonl", records))]
    inputs = hash_examples(paths, config)
    out = write_examples(tmp_path / "out", paths, tokenizer=tokenizer, config=config, seed=0, inputs=inputs)
    manifest = read_manifest(out, command=COMMAND)
    return out, manifest["counts"], manifest["dropped"]


def texts_of(directory: Path, tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """(all of it, what is learnt of it) of each document, as the loss sees them."""
    windows = Windows(directory)
    found = []
    for index in range(len(windows)):
        batch = assemble(windows, np.array([index]))
        tokens, labels = batch.tokens_BS[0].tolist(), batch.labels_BS[0].tolist()
        _, ends = windows.read(index)
        start = 0
        for end in ends.tolist():
            learnt = [label for label in labels[start:end] if label != IGNORED]
            found.append((tokenizer.decode(tokens[start:end]), tokenizer.decode(learnt)))
            start = end
        assert all(label == IGNORED for label in labels[start:])
    return found


ONLY_TRAIN = ExamplesConfig(window=WINDOW, held_out_share=0.0)


def test_only_the_answer_and_its_end_are_learnt(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [("Add.", "a + b"), ("Multiply.", "a * b")]
    out, counts, dropped = written(tmp_path, tokenizer, records, ONLY_TRAIN)
    assert set(texts_of(out / TRAIN, tokenizer)) == {
        (f"{BOS}User: {prompt}\n\nAssistant: {answer}{EOS}", f" {answer}{EOS}") for prompt, answer in records
    }
    assert counts["train_dialogues"] == 2
    assert counts["train_windows"] == 1
    assert dropped == {}
    assert not (out / HELD_OUT).exists()


def test_the_v1_template_ends_answers_with_eot_and_so_does_its_tokenizer(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = ExamplesConfig(window=512, held_out_share=0.0, template="coder")
    out, _, _ = written(tmp_path, tokenizer, [("Add.", "a + b")], config)
    [(text, learnt)] = texts_of(out / TRAIN, tokenizer)
    assert learnt == f"a + b\n{EOT}"
    assert text.endswith(f"### Instruction:\nAdd.\n### Response:\na + b\n{EOT}\n")
    saved = Tokenizer.load(out / TOKENIZER)
    assert saved.eos_id == tokenizer.eot_id
    assert saved.chat_template is not None
    assert "### Instruction" in saved.chat_template


def test_what_is_longer_than_a_window_is_dropped_or_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [("Short.", "a"), ("Long answer.", "b" * 500), ("Long question: " + "c" * 500, "d")]
    (tmp_path / "drop").mkdir()
    _, counts, dropped = written(tmp_path / "drop", tokenizer, records, ONLY_TRAIN)
    assert (counts["train_dialogues"], dropped) == (1, {"too_long": 2})
    config = ExamplesConfig(window=WINDOW, held_out_share=0.0, too_long="cut")
    out, counts, dropped = written(tmp_path, tokenizer, records, config)
    assert (counts["train_dialogues"], counts["train_cut"]) == (2, 1)
    assert dropped == {"no_answer_in_window": 1}
    learnt = [learnt for _, learnt in texts_of(out / TRAIN, tokenizer)]
    assert f" a{EOS}" in learnt
    assert any(text.startswith(" bbb") and EOS not in text for text in learnt)


def test_a_question_stands_in_one_split_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    records = [(f"Question {i % 50}.", f"answer {i}") for i in range(100)]
    config = ExamplesConfig(window=WINDOW, held_out_share=0.3)
    out, counts, _ = written(tmp_path, tokenizer, records, config)
    split = [
        {text.partition("Assistant")[0] for text, _ in texts_of(out / name, tokenizer)}
        for name in (TRAIN, HELD_OUT)
    ]
    assert split[0].isdisjoint(split[1])
    assert len(split[0] | split[1]) == 50
    assert 4 < len(split[1]) < 30
    assert counts["train_dialogues"] + counts["held_out_dialogues"] == 100


def source(folder: Path, *, count: int) -> SourcesConfig:
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.py").write_text(f"def f_{i}(x):\n    return x + {i}\n")
    return SourcesConfig(paths=(str(folder),), held_out_share=0.0)


@pytest.mark.parametrize(("spm_share", "order"), [(0.0, "psm"), (1.0, "spm")])
def test_holes_are_mixed_in_at_their_share_and_learn_the_middle(
    tmp_path: Path, tokenizer: Tokenizer, spm_share: float, order: str
) -> None:
    fim = FimExamplesConfig(share=0.25, sources=source(tmp_path / "src", count=40), spm_share=spm_share)
    records = [(f"Question {i}.", "yes") for i in range(30)]
    config = ExamplesConfig(window=WINDOW, held_out_share=0.0, fim=fim)
    out, counts, _ = written(tmp_path, tokenizer, records, config)
    assert counts[f"train_fim_{order}"] == 10
    holes = [pair for pair in texts_of(out / TRAIN, tokenizer) if FIM_BEGIN in pair[0]]
    assert len(holes) == 10
    for text, learnt in holes:
        assert learnt.endswith(EOS)
        assert text.endswith(learnt)
        head = text.removesuffix(learnt)
        parts = head.removeprefix(BOS + FIM_BEGIN)
        if order == "psm":
            prefix, _, suffix = parts.removesuffix(FIM_END).partition(FIM_HOLE)
        else:
            suffix, _, prefix = parts.removeprefix(FIM_HOLE).partition(FIM_END)
        document = prefix + learnt.removesuffix(EOS) + suffix
        assert document.startswith("def f_")
        assert document.count("return") == 1


def test_the_holes_do_not_depend_on_where_the_files_lie(tmp_path: Path, tokenizer: Tokenizer) -> None:
    found = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        sources = source(tmp_path / name / "src", count=20)
        config = ExamplesConfig(
            window=WINDOW, held_out_share=0.0, fim=FimExamplesConfig(share=0.5, sources=sources)
        )
        out, _, _ = written(tmp_path / name, tokenizer, [(f"Q{i}", "A") for i in range(5)], config)
        found.append(texts_of(out / TRAIN, tokenizer))
    assert found[0] == found[1]


def test_too_few_files_for_the_share_are_told(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    fim = FimExamplesConfig(share=0.5, sources=source(tmp_path / "src", count=3))
    config = ExamplesConfig(window=WINDOW, held_out_share=0.0, fim=fim)
    _, counts, _ = written(tmp_path, tokenizer, [(f"Q{i}", "A") for i in range(10)], config)
    assert counts["train_fim_psm"] == 3
    assert "give 3 examples, 10 were wanted" in caplog.text


def test_files_that_teach_nothing_are_refused_with_the_reasons(tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(
        ValueError, match=r"must hold one to learn from, got none; dropped .'empty_message': 1"
    ):
        written(tmp_path, tokenizer, [("Q", "")], ONLY_TRAIN)


def test_finished_examples_are_left_alone(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out, _, _ = written(tmp_path, tokenizer, [("Q", "A")], ONLY_TRAIN)
    before = (out / "manifest.json").stat().st_mtime_ns
    written(tmp_path, tokenizer, [("Q", "A")], ONLY_TRAIN)
    assert (out / "manifest.json").stat().st_mtime_ns == before


def test_a_mask_of_another_shape_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    out, _, _ = written(tmp_path, tokenizer, [("Q", "A")], ONLY_TRAIN)
    np.save(out / TRAIN / "mask-00000.npy", np.zeros((2, WINDOW), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"mask-00000\.npy must be \[1, 128\], .* got \[2, 128\]"):
        Windows(out / TRAIN)
