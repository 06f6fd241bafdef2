"""The stage that measures a model on held-out files, beside the same model untrained if asked for.

results.json holds the figures of each model and every completion, so that each figure can be looked into.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dscoder.checkpoint import load_pretrained
from dscoder.config.evaluate import HeldOutConfig
from dscoder.config.generate import BatchConfig, GenerateConfig
from dscoder.data.sources import hash_sources, is_held_out, read_documents
from dscoder.eval.infilling import Hole, is_exact, line_end_holes, score_infilling, single_line_holes
from dscoder.eval.perplexity import bits_per_byte
from dscoder.infer.engine import Engine
from dscoder.infer.infill import infill_request
from dscoder.models import Transformer, init_weights
from dscoder.runtime.artifact import hash_path, open_stage, write_json
from dscoder.runtime.log import get_logger
from dscoder.text.tokenizer import Tokenizer

RESULTS = "results.json"
TRAINED = "trained"
UNTRAINED = "untrained"
WHOLE_LINES = "whole_lines"
LINE_ENDS = "line_ends"
_LOG = get_logger(__name__)


def held_out_holes(config: HeldOutConfig) -> dict[str, list[Hole]]:
    """The holes of the held-out files, the same each time: WHOLE_LINES, and LINE_ENDS of the same lines."""
    share = config.sources.held_out_share
    documents = read_documents(config.sources, dropped=Counter())
    lines = single_line_holes(
        ((document.name, document.text) for document in documents if is_held_out(document, share=share)),
        num_holes=config.num_holes,
        seed=config.hole_seed,
        max_per_document=config.max_per_document,
    )
    return {WHOLE_LINES: lines, LINE_ENDS: line_end_holes(lines, seed=config.hole_seed)}


def fill_holes(model: Transformer, holes: Sequence[Hole], *, config: HeldOutConfig) -> list[str]:
    """One greedy line for each hole."""
    tokenizer = Tokenizer.load(config.model)
    engine = Engine(model, tokenizer, batch=BatchConfig(max_batch=config.max_batch))
    how = GenerateConfig(
        max_new_tokens=config.max_new_tokens,
        single_line=True,
        fim_order=config.fim_order,
        prefix_share=config.prefix_share,
    )
    requests = [
        infill_request(tokenizer, hole.prefix, hole.suffix, max_positions=engine.max_positions, config=how)
        for hole in holes
    ]
    return [completion.text for completion in engine.generate(requests)]


def run(config: HeldOutConfig) -> Path:
    """Measure and write results.json to `config.out`; returns that directory."""
    with open_stage(
        Path(config.out),
        command="held_out",
        config=asdict(config),
        inputs={
            "model": hash_path(Path(config.model)),
            "data": hash_path(Path(config.data)),
            "sources": hash_sources(config.sources),
        },
        free=("out", "model", "data", "max_batch", "overwrite"),
        overwrite=config.overwrite,
    ) as stage:
        if stage.is_finished:
            _LOG.info("%s is finished already", stage.directory)
            return stage.directory
        holes = held_out_holes(config)
        if not holes[WHOLE_LINES]:
            raise ValueError("held_out: the held-out files must hold a line to take out, got none")
        model = load_pretrained(config.model)
        figures = {TRAINED: _measure(model, holes, name=TRAINED, config=config)}
        if config.untrained_seed is not None:
            init_weights(model, seed=config.untrained_seed)
            figures[UNTRAINED] = _measure(model, holes, name=UNTRAINED, config=config)
        write_json(stage.directory / RESULTS, figures)
        stage.finish(
            counts={"holes": len(holes[WHOLE_LINES])},
            facts={name: found["score"] for name, found in figures.items()},
        )
        return stage.directory


def _measure(
    model: Transformer, holes: dict[str, list[Hole]], *, name: str, config: HeldOutConfig
) -> dict[str, Any]:
    spent = bits_per_byte(model, Path(config.data), max_windows=config.num_windows)
    score: dict[str, Any] = {"bits_per_byte": spent.bits_per_byte, "loss": spent.loss}
    completions = {}
    for kind, chosen in holes.items():
        texts = fill_holes(model, chosen, config=config)
        exact = score_infilling(texts, chosen)
        score[kind] = {"exact_match": exact.exact_match, **asdict(exact)}
        completions[kind] = [_record(hole, text) for hole, text in zip(chosen, texts, strict=True)]
    _LOG.info(
        "%s: %.3f bits per byte; of %d lines %d exact whole and %d from inside",
        name,
        spent.bits_per_byte,
        len(holes[WHOLE_LINES]),
        score[WHOLE_LINES]["num_exact"],
        score[LINE_ENDS]["num_exact"],
    )
    return {"score": score, "completions": completions}


def _record(hole: Hole, text: str) -> dict[str, Any]:
    return {
        "hole": hole.name,
        "completion": text,
        "answer": hole.answer,
        "exact": is_exact(text, hole.answer),
    }
