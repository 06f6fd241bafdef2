"""All layouts of a run with what they take, the quickest of those that fit first."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from dscoder.config.plan import GPUS, PlanConfig, parse_count
from dscoder.models import count_parameters
from dscoder.train.plan.activations import Tokens
from dscoder.train.plan.layout import Batch, Layout, layouts
from dscoder.train.plan.memory import Memory, memory
from dscoder.train.plan.question import Question, batch_of, question_of
from dscoder.train.plan.rates import Rates
from dscoder.train.plan.time import Time, step_time, utilisation
from dscoder.train.plan.traffic import StepTraffic, step_traffic

_BF16 = 2  # bytes of what is computed and gathered, in every precision that is planned


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    """One layout and the memory that it takes."""

    layout: Layout
    num_rounds: int  # micro-batches of the busiest rank in a step
    memory: Memory


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate(Sized):
    """One layout and all that it takes."""

    traffic: StepTraffic
    time: Time
    mfu: float
    missing: int  # bytes of memory that it lacks; 0: it fits


AnySized = TypeVar("AnySized", bound=Sized)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """A whole run on the quickest layout."""

    num_steps: int
    days: float
    gpu_hours: float
    price: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """The answer of `dscoder plan`."""

    num_parameters: int
    num_active: int
    batch: Batch
    gpu_memory: int  # bytes
    rates: Rates
    num_layouts: int
    num_fitting: int
    fitting: tuple[Candidate, ...]  # the quickest first; of layouts alike but for micro-batch and memory one
    missing: tuple[Candidate, ...]  # likewise, of those that do not fit; those that lack the least first
    run: Run | None  # None: nothing fits, or no number of tokens was given


def plan(config: PlanConfig) -> Plan:
    """Everything there is to say; ValueError for what cannot be planned."""
    question = question_of(config)
    sized = list(_sized(question))
    fits = [_candidate(question, one) for one in sized if one.memory.total <= question.gpu_memory]
    fits.sort(key=lambda one: (round(one.time.total, 3), one.layout.is_exact, one.memory.total))
    rest = [one for one in sized if one.memory.total > question.gpu_memory]
    rest.sort(key=lambda one: one.memory.total)
    nearest = [_candidate(question, one) for one in _first_of_each(rest)[: config.show]]
    count = count_parameters(question.model)
    return Plan(
        num_parameters=count.total,
        num_active=count.active,
        batch=question.batch,
        gpu_memory=question.gpu_memory,
        rates=question.rates,
        num_layouts=len(sized),
        num_fitting=len(fits),
        fitting=tuple(_first_of_each(fits)[: config.show]),
        missing=tuple(nearest),
        run=_run(config, question.batch, fits[0]) if fits and config.tokens is not None else None,
    )


def _sized(question: Question) -> Iterator[Sized]:
    config, batch = question.config, question.batch
    for layout in layouts(question.model, batch, num_ranks=config.gpus, fixed=question.fixed):
        num_rounds = batch.rounds(layout)
        needed = memory(
            question.model,
            layout,
            question.weights,
            _tokens(question, layout),
            precision=config.precision,
            num_rounds=num_rounds,
            per_node=config.gpus_per_node,
            slack=config.slack,
        )
        yield Sized(layout=layout, num_rounds=num_rounds, memory=needed)


def _tokens(question: Question, layout: Layout) -> Tokens:
    return Tokens(sequences=layout.micro, length=question.batch.length, item=_BF16)


def _first_of_each(candidates: Iterable[AnySized]) -> list[AnySized]:
    """The first of every way to share the parameters out, so that near relatives do not fill the table."""
    found: dict[tuple[int, int, int], AnySized] = {}
    for candidate in candidates:
        layout = candidate.layout
        found.setdefault((layout.replicate, layout.expert_shard, layout.expert), candidate)
    return list(found.values())


def _candidate(question: Question, sized: Sized) -> Candidate:
    config, model, layout = question.config, question.model, sized.layout
    tokens = _tokens(question, layout)
    traffic = step_traffic(
        model,
        layout,
        question.weights,
        per_node=config.gpus_per_node,
        num_rounds=sized.num_rounds,
        num_tokens=tokens.count,
        item=tokens.item,
    )
    time = step_time(
        model,
        layout,
        question.weights,
        tokens,
        traffic,
        rates=question.rates,
        num_rounds=sized.num_rounds,
    )
    mfu = utilisation(
        model,
        sequences=question.batch.sequences,
        length=question.batch.length,
        seconds=time.total,
        flops=config.gpus * GPUS[config.gpu].flops,
    )
    return Candidate(
        layout=layout,
        num_rounds=sized.num_rounds,
        memory=sized.memory,
        traffic=traffic,
        time=time,
        mfu=mfu,
        missing=max(0, sized.memory.total - question.gpu_memory),
    )


def _run(config: PlanConfig, batch: Batch, best: Candidate) -> Run:
    assert config.tokens is not None
    num_tokens = parse_count("tokens", config.tokens)
    num_steps = -(-num_tokens // (batch.sequences * batch.length))
    hours = num_steps * best.time.total / 3600
    gpu_hours = hours * config.gpus
    price = None if config.price is None else gpu_hours * config.price
    return Run(num_steps=num_steps, days=hours / 24, gpu_hours=gpu_hours, price=price)


def _fits(config: PlanConfig) -> bool:
    question = question_of(config)
    return any(one.memory.total <= question.gpu_memory for one in _sized(question))


def advice(config: PlanConfig) -> list[str]:
    """What would make a run fit that does not, each tried: other layouts, less precision, more GPUs."""
    free = replace(config, expert=None, replicate=None, micro=None, recompute=None)
    found = []
    if free != config and _fits(free):
        found.append("another layout, micro-batch or recomputation")
    if _fits(replace(config, precision="bf16_stochastic")):
        found.append("bfloat16 weights without masters (--precision bf16_stochastic)")
    for num_gpus in (2 * config.gpus, 4 * config.gpus, 8 * config.gpus):
        if num_gpus <= batch_of(config).sequences and _fits(replace(config, gpus=num_gpus)):
            found.append(f"more GPUs (--gpus {num_gpus})")
            break
    return found
