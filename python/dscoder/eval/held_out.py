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
from dscoder.config.generate import GenerateConfig
from dscoder.data.sources import hash_sources, is_held_out, read_documents
from dscoder.eval.infilling import Hole, is_exact, score_infilling, single_line_holes
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
_LOG = get_logger(__name__)


def held_out_holes(config: HeldOutConfig) -> list[Hole]:
    """The holes of the held-out files, the same each time."""
    share = config.sources.held_out_share
    documents = read_documents(config.sources, dropped=Counter())
    return single_line_holes(
        ((document.name, document.text) for document in documents if is_held_out(document, share=share)),
        num_holes=config.num_holes,
        seed=config.hole_seed,
        max_per_document=config.max_per_document,
    )


def fill_holes(model: Transformer, holes: Sequence[Hole], *, config: HeldOutConfig) -> list[str]:
    """One greedy line for each hole."""
    tokenizer = Tokenizer.load(config.model)
    engine = Engine(model, tokenizer, max_batch=config.max_batch)
    how = GenerateConfig(
        max_new_tokens=config.max_new_tokens, single_line=True, prefix_share=config.prefix_share
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
        if not holes:
            raise ValueError("held_out: the held-out files must hold a line to take out, got none")
        model = load_pretrained(config.model)
        figures = {TRAINED: _measure(model, holes, name=TRAINED, config=config)}
        if config.untrained_seed is not None:
            init_weights(model, seed=config.untrained_seed)
            figures[UNTRAINED] = _measure(model, holes, name=UNTRAINED, config=config)
        write_json(stage.directory / RESULTS, figures)
        stage.finish(
            counts={"holes": len(holes)}, facts={name: found["score"] for name, found in figures.items()}
        )
        return stage.directory


def _measure(
    model: Transformer, holes: Sequence[Hole], *, name: str, config: HeldOutConfig
) -> dict[str, Any]:
    spent = bits_per_byte(model, Path(config.data), max_windows=config.num_windows)
    completions = fill_holes(model, holes, config=config)
    score = score_infilling(completions, holes)
    _LOG.info(
        "%s: %.3f bits per byte, %d of %d lines exact",
        *(name, spent.bits_per_byte, score.num_exact, score.num_holes),
    )
    return {
        "score": {
            "bits_per_byte": spent.bits_per_byte,
            "loss": spent.loss,
            "exact_match": score.exact_match,
            **asdict(score),
        },
        "completions": [
            {
                "hole": hole.name,
                "completion": text,
                "answer": hole.answer,
                "exact": is_exact(text, hole.answer),
            }
            for hole, text in zip(holes, completions, strict=True)
        ],
    }
