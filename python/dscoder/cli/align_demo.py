"""`dscoder demo --align`: a tiny model learns from tests of its own answers, and from a model of them."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dscoder.cli.arguments import parse
from dscoder.cli.progress import sparkline, step
from dscoder.config.align_demo import SIGNALS, AlignDemoConfig, Signal
from dscoder.data import generated, prepare, tokenizer
from dscoder.eval import task_score
from dscoder.eval.pass_at_k import Interval
from dscoder.eval.signals import Curve, compare, draw_signals
from dscoder.eval.task_score import Answered, TaskScore, score_of
from dscoder.models.count import count_parameters
from dscoder.runtime import log
from dscoder.runtime.artifact import read_json, write_json
from dscoder.sandbox.pool import Pool
from dscoder.tasks.by_name import open_task
from dscoder.tasks.problem import Problem
from dscoder.text.tokenizer import Tokenizer
from dscoder.train import grpo, preferences, pretrain, reward_model, sft
from dscoder.train.metrics import METRICS, read_metrics
from dscoder.train.rollout import read_rollouts

PICTURE = "pass_at_1.png"
RESULTS = "results.json"
_BASE = "sft"
_NAMES: Mapping[Signal, str] = {"tests": "raw tests", "reward_model": "reward model"}
_MODELS = {_BASE: "SFT"} | {f"grpo_{signal}": name for signal, name in _NAMES.items()}
_SPARK_WIDTH = 50


def main(argv: Sequence[str]) -> None:
    """Teach a tiny DeepSeek-Coder-V2 small functions, then improve it by GRPO with sandboxed tests.

    It is pre-trained and fine-tuned on generated problems, and then learns from what its own answers to
    others are worth: once by raw test results, once by a reward model. pass@1 is measured on problems whose
    compositions none of the stages saw.
    """
    log.configure()
    config = parse(argv, AlignDemoConfig, verb="demo --align", description=main.__doc__)
    screen = Console()
    begin = time.perf_counter()
    _teach(screen, config)
    _align(screen, config)
    with step(screen, "11/11 test problems"):
        answered = {
            stage: task_score.read_answered(task_score.run(config.score(stage, "test")))
            for stage in (_BASE, *(f"grpo_{signal}" for signal in SIGNALS))
        }
    screen.rule("results", align="left")
    _show_learning(screen, config)
    scores = {stage: score_of(found) for stage, found in answered.items()}
    gains = _gains(answered)
    _show_scores(screen, config, scores, gains)
    _show_problem(screen, config, answered)
    _leave(screen, config, scores, gains)
    screen.print(f"{time.perf_counter() - begin:.0f} s in all. Look at what was tried with")
    screen.print(f"  dscoder rollouts {config.directory('grpo_tests')}", soft_wrap=True)


def _teach(screen: Console, config: AlignDemoConfig) -> None:
    """All that comes before the policy learns from its own answers."""
    with step(screen, "1/11 problems"):
        generated.run(config.generated())
    with step(screen, "2/11 tokenizer"):
        tokenizer.run(config.tokenizer())
    with step(screen, "3/11 prepare"):
        prepare.run(config.prepare())
    with step(screen, "4/11 pretrain"):
        pretrain.run(config.pretrain_run())
    with step(screen, "5/11 sft"):
        sft.run(config.sft_run())
    with step(screen, "6/11 validation problems"):
        task_score.run(config.score(_BASE, "validation"))
    with step(screen, "7/11 prefer"):
        preferences.run(config.prefer())
    with step(screen, "8/11 reward model"):
        reward_model.run(config.reward_model())


def _align(screen: Console, config: AlignDemoConfig) -> None:
    """GRPO by each signal, watched on the validation problems."""
    watched = config.score(_BASE, "validation")
    task = open_task(watched.task)
    words = Tokenizer.load(watched.model)
    for number, signal in enumerate(SIGNALS, start=9):
        with (
            step(screen, f"{number}/11 grpo by {_NAMES[signal]}"),
            Pool(isolation=config.isolation) as pool,
        ):
            grpo.run(config.grpo(signal), evaluate=task_score.watch(task, words, pool, watched))


def _curve(config: AlignDemoConfig, signal: Signal) -> Curve:
    """pass@1 on the validation problems, from before the first step on."""
    before = score_of(task_score.read_answered(Path(config.score(_BASE, "validation").out))).sampled
    assert before is not None  # the stage fails where nothing was judged
    steps, rates = [0], [before]
    name = task_score.PASS_RATE
    for report in read_metrics(Path(config.directory(f"grpo_{signal}")) / METRICS):
        if name in report:
            steps.append(int(report["step"]))
            rates.append(Interval(mean=report[name], low=report[f"{name}_low"], high=report[f"{name}_high"]))
    return Curve(steps=tuple(steps), rates=tuple(rates))


def _passing(config: AlignDemoConfig, signal: Signal) -> list[float]:
    """Share of a step's answers that pass the few tests, whatever they were rewarded for."""
    shares = []
    for number in range(1, config.policy.num_steps + 1):
        rollouts = read_rollouts(Path(config.directory(f"grpo_{signal}")), number)
        judged = [rollout.is_passed for rollout in rollouts if rollout.is_passed is not None]
        shares += [sum(judged) / len(judged)] if judged else []
    return shares


def _show_learning(screen: Console, config: AlignDemoConfig) -> None:
    size = count_parameters(config.model)
    screen.print(f"{size.total / 1e6:.2f} M parameters, {size.active / 1e6:.2f} M active per token")
    held_out = read_json(Path(config.directory("reward_model")) / reward_model.HELD_OUT)
    screen.print(
        f"reward model: {100 * held_out['accuracy']:.0f} % of {held_out['num_pairs']} held-out pairs in "
        f"order (the shorter answer: {100 * held_out['shorter_accuracy']:.0f} %)"
    )
    screen.print("share of the answers that pass the few tests of practised problems, over the steps of GRPO")
    for signal in SIGNALS:
        shares = _passing(config, signal)
        picture = sparkline(shares, width=_SPARK_WIDTH)
        screen.print(f"{_NAMES[signal]:>12} {shares[0]:.2f} {picture} {shares[-1]:.2f}")


def _gains(answered: Mapping[str, Sequence[Answered]]) -> dict[str, Interval]:
    """By what is compared: each signal with the model before it, and one signal with the other."""
    gains = {f"{_BASE} to {stage}": compare(answered[_BASE], found) for stage, found in answered.items()}
    del gains[f"{_BASE} to {_BASE}"]
    first, second = (f"grpo_{signal}" for signal in SIGNALS)
    return gains | {f"{first} to {second}": compare(answered[first], answered[second])}


def _percent(rate: Interval | None) -> str:
    if rate is None:
        return "not judged"
    return f"{100 * rate.mean:.1f} [{100 * rate.low:.1f}, {100 * rate.high:.1f}]"


def _points(gain: Interval) -> str:
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]"


def _show_scores(
    screen: Console,
    config: AlignDemoConfig,
    scores: Mapping[str, TaskScore],
    gains: Mapping[str, Interval],
) -> None:
    num = scores[_BASE].num_problems
    title = f"pass@1 in % [95 % interval]: {num} test problems, {config.problems.many_tests} tests each"
    table = Table(title=title, title_justify="left")
    for heading in ("model", f"{config.num_samples} draws", "greedy", "gain of draws"):
        table.add_column(heading, justify="left" if heading == "model" else "right", no_wrap=True)
    for stage, score in scores.items():
        gain = gains.get(f"{_BASE} to {stage}")
        cells = (_percent(score.sampled), _percent(score.greedy), "" if gain is None else _points(gain))
        table.add_row(_MODELS[stage], *map(escape, cells))
    screen.print(table)
    first, second = (f"grpo_{signal}" for signal in SIGNALS)
    gap = gains[f"{first} to {second}"]
    is_sure = gap.low > 0 or gap.high < 0
    screen.print(
        f"reward model against raw tests: {_points(gap)} points; "
        + ("the interval leaves out 0" if is_sure else "the interval holds 0: no difference is shown"),
        markup=False,
    )


def _show_problem(
    screen: Console, config: AlignDemoConfig, answered: Mapping[str, Sequence[Answered]]
) -> None:
    """The first test problem whose greedy answer GRPO put right; where there is none, the first problem."""
    after = {item.problem: item for item in answered["grpo_tests"]}
    pairs = [(item, after[item.problem]) for item in answered[_BASE] if item.problem in after]
    chosen = next((pair for pair in pairs if not pair[0].passed[0] and pair[1].passed[0]), pairs[0])
    problems: dict[str, Problem] = {p.id: p for p in open_task(config.task("test")).problems()}
    screen.print(f"\n{problems[chosen[0].problem].prompt}", style="bold", markup=False, soft_wrap=True)
    for name, item in zip(("before", "after GRPO by raw tests"), chosen, strict=True):
        grade = {True: "passes", False: "fails", None: "not judged"}[item.passed[0]]
        screen.print(f"{name}: {grade}", style="dim")
        screen.print(item.texts[0].strip(), markup=False, highlight=False, soft_wrap=True)


def _leave(
    screen: Console,
    config: AlignDemoConfig,
    scores: Mapping[str, TaskScore],
    gains: Mapping[str, Interval],
) -> None:
    """Write the figures and the picture."""
    root = Path(config.out)
    curves = {_NAMES[signal]: _curve(config, signal) for signal in SIGNALS}
    write_json(
        root / RESULTS,
        {
            "scores": {name: asdict(score) for name, score in scores.items()},
            "gains": {name: asdict(gain) for name, gain in gains.items()},
            "curves": {name: asdict(curve) for name, curve in curves.items()},
        },
    )
    drawn = draw_signals(curves, {_MODELS[stage]: score for stage, score in scores.items()}, root / PICTURE)
    screen.print()
    if drawn:
        screen.print(f"picture: {root / PICTURE}", soft_wrap=True)
    screen.print(f"figures: {root / RESULTS}", soft_wrap=True)
