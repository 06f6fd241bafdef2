"""The verb `dscoder demo`."""

import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dscoder.cli import align_demo
from dscoder.cli.arguments import parse
from dscoder.cli.context import render_in_context
from dscoder.cli.progress import sparkline, step
from dscoder.config.demo import DemoConfig
from dscoder.data import prepare, tokenizer
from dscoder.eval import held_out
from dscoder.eval.perplexity import held_out_report
from dscoder.models.count import count_parameters
from dscoder.runtime import log
from dscoder.train import pretrain
from dscoder.train.metrics import METRICS, read_metrics
from dscoder.train.run import MODEL

_ALIGN = "--align"
_SPARK_WIDTH = 60


def main(argv: Sequence[str]) -> None:
    """Train a tiny DeepSeek-Coder-V2 on Python's standard library and fill holes with it.

    With --align it learns to write small functions instead, and then by GRPO from what tests say of them:
    dscoder demo --align --help.
    """
    if _ALIGN in argv:
        align_demo.main([word for word in argv if word != _ALIGN])
        return
    log.configure()
    config = parse(argv, DemoConfig, verb="demo", description=main.__doc__)
    screen = Console()
    begin = time.perf_counter()
    with step(screen, "1/4 tokenizer"):
        tokenizer.run(config.tokenizer())
    with step(screen, "2/4 prepare"):
        data = prepare.run(config.prepare())
    with step(screen, "3/4 pretrain"):
        run = _pretrain(config, data)
    with step(screen, "4/4 held-out files"):
        results = json.loads((held_out.run(config.held_out()) / held_out.RESULTS).read_text())
    _show_curve(screen, run)
    _show_figures(screen, results, config)
    _show_completions(screen, results, config)
    screen.print(f"\n{time.perf_counter() - begin:.0f} s in all. Fill holes of your own with")
    screen.print(
        f"  dscoder infill FILE --line N --column M --single-line --fim-order {config.held_out().fim_order} "
        f"--model {run / MODEL}",
        soft_wrap=True,
    )


def _pretrain(config: DemoConfig, data: Path) -> Path:
    recipe = config.pretrain()
    evaluate = functools.partial(held_out_report, directory=data, max_windows=recipe.report.eval_windows)
    return pretrain.run(recipe, evaluate=evaluate)


def _show_curve(screen: Console, run: Path) -> None:
    losses = [report["loss"] for report in read_metrics(run / METRICS) if "loss" in report]
    picture = sparkline(losses, width=_SPARK_WIDTH)
    screen.rule("results", align="left")
    screen.print(f"training loss, nats per token\n{losses[0]:.2f} {picture} {losses[-1]:.2f}")


def _show_figures(screen: Console, results: dict[str, Any], config: DemoConfig) -> None:
    size = count_parameters(config.model)
    table = Table(title="held-out files, never seen in training", title_justify="left")
    for heading in ("model", "bits per byte", "whole lines filled exactly", "line ends"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name in (held_out.UNTRAINED, held_out.TRAINED):
        score = results[name]["score"]
        exact = [
            f"{found['num_exact']} of {found['num_holes']} = {100 * found['exact_match']:.1f} %"
            for found in (score[held_out.WHOLE_LINES], score[held_out.LINE_ENDS])
        ]
        table.add_row(name, f"{score['bits_per_byte']:.3f}", *exact)
    screen.print(f"{size.total / 1e6:.2f} M parameters, {size.active / 1e6:.2f} M active per token")
    screen.print(table)


def _show_completions(screen: Console, results: dict[str, Any], config: DemoConfig) -> None:
    holes = held_out.held_out_holes(config.held_out())[held_out.LINE_ENDS][: config.num_shown]
    answers = results[held_out.TRAINED]["completions"][held_out.LINE_ENDS]
    screen.print(
        f"the first {len(holes)} of these holes (a hash chooses them), line ends filled by the trained model"
    )
    for hole, answer in zip(holes, answers, strict=False):
        screen.print(f"\n{hole.name}  ", style="bold", end="")
        screen.print(
            "exact" if answer["exact"] else f"the file has: {hole.answer.strip()}",
            soft_wrap=True,
            markup=False,
        )
        screen.print(
            render_in_context(hole.prefix, answer["completion"], "\n" + hole.suffix, num_lines=4),
            soft_wrap=True,
        )
