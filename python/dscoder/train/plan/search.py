"""All layouts of a run with what they take, the quickest of those that fit first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dscoder.checkpoint import load_config
from dscoder.config import PRESETS, ModelConfig, preset
from dscoder.config.plan import GPUS, PlanConfig, parse_bytes, parse_count, parse_rate
from dscoder.models import count_parameters
from dscoder.train.plan.activations import Tokens
from dscoder.train.plan.layout import Batch, Choices, Layout, layouts
from dscoder.train.plan.memory import Memory, memory, weight_bytes
from dscoder.train.plan.rates import Rates, assumed_rates, measured_rates, read_records
from dscoder.train.plan.time import Time, step_time, utilisation
from dscoder.train.plan.traffic import StepTraffic, step_traffic
from dscoder.train.plan.weights import Weights, weights_of
from dscoder.train.recipes import RECIPES


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One layout and what it takes."""

    layout: Layout
    num_rounds: int  # micro-batches of the busiest rank in a step
    memory: Memory
    traffic: StepTraffic
    time: Time
    mfu: float
    missing: int  # bytes of memory that it lacks; 0: it fits


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

    model: ModelConfig
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


def read_model(name: str) -> ModelConfig:
    """A preset, or the config of a model directory; ValueError says what there is."""
    if name in PRESETS:
        return preset(name)
    if Path(name).is_dir():
        return load_config(name)
    raise ValueError(f"plan: model must be a directory or one of {', '.join(sorted(PRESETS))}, got {name!r}")


def batch_of(config: PlanConfig) -> Batch:
    """The windows of a step: those given, or the paper's."""
    if config.batch_tokens is not None:
        tokens = parse_count("batch_tokens", config.batch_tokens)
        if tokens % config.seq:
            raise ValueError(f"plan: batch_tokens must be a multiple of seq = {config.seq}, got {tokens}")
        return Batch(sequences=tokens // config.seq, length=config.seq)
    if config.batch is not None:
        return Batch(sequences=config.batch, length=config.seq)
    if config.model not in RECIPES:
        raise ValueError(
            f"plan: batch or batch_tokens must be given for a model without a published recipe, "
            f"got neither for {config.model!r}"
        )
    return Batch(sequences=RECIPES[config.model].batch.sequences, length=config.seq)


def rates_of(config: PlanConfig) -> Rates:
    """Assumed rates, with those of the records at `config.rates` instead where they tell any."""
    gpu = GPUS[config.gpu]
    network = gpu.node_network
    if config.node_bandwidth is not None:
        network = parse_rate("node_bandwidth", config.node_bandwidth)
    rates = assumed_rates(gpu, node_network=network, gpus_per_node=config.gpus_per_node)
    if config.rates is None:
        return rates
    path = Path(config.rates)
    return measured_rates(rates, read_records(path), model=config.model, source=path.name)


def plan(config: PlanConfig) -> Plan:
    """Everything there is to say; ValueError for what cannot be planned."""
    model = read_model(config.model)
    if config.seq > model.max_positions:
        raise ValueError(
            f"plan: seq must be <= the model's max_positions = {model.max_positions}, got {config.seq}"
        )
    batch, rates, weights = batch_of(config), rates_of(config), weights_of(model)
    gpu_memory = GPUS[config.gpu].memory
    if config.memory is not None:
        gpu_memory = parse_bytes("memory", config.memory)
    fixed = Choices(
        expert=config.expert,
        replicate=config.replicate,
        micro=config.micro,
        recompute=config.recompute,
    )
    candidates = [
        _candidate(config, model, weights, batch, rates, layout, gpu_memory)
        for layout in layouts(model, batch, num_ranks=config.gpus, fixed=fixed)
    ]
    fitting = [candidate for candidate in candidates if not candidate.missing]
    missing = [candidate for candidate in candidates if candidate.missing]
    fitting.sort(key=lambda one: (round(one.time.total, 3), one.layout.is_exact, one.memory.total))
    missing.sort(key=lambda one: (one.missing, one.time.total))
    count = count_parameters(model)
    return Plan(
        model=model,
        num_parameters=count.total,
        num_active=count.active,
        batch=batch,
        gpu_memory=gpu_memory,
        rates=rates,
        num_layouts=len(candidates),
        num_fitting=len(fitting),
        fitting=_first_of_each(fitting, config.show),
        missing=_first_of_each(missing, config.show),
        run=_run(config, batch, fitting[0]) if fitting and config.tokens is not None else None,
    )


def _first_of_each(candidates: Sequence[Candidate], num_shown: int) -> tuple[Candidate, ...]:
    """The first of every way to share the parameters out, so that near relatives do not fill the table."""
    found: dict[tuple[int, int, int], Candidate] = {}
    for candidate in candidates:
        layout = candidate.layout
        found.setdefault((layout.replicate, layout.expert_shard, layout.expert), candidate)
    return tuple(found.values())[:num_shown]


def _candidate(
    config: PlanConfig,
    model: ModelConfig,
    weights: Weights,
    batch: Batch,
    rates: Rates,
    layout: Layout,
    gpu_memory: int,
) -> Candidate:
    item = weight_bytes(config.precision)
    num_rounds = batch.rounds(layout)
    tokens = Tokens(sequences=layout.micro, length=batch.length, item=item)
    needed = memory(
        model,
        layout,
        weights,
        tokens,
        precision=config.precision,
        num_rounds=num_rounds,
        per_node=config.gpus_per_node,
        slack=config.slack,
    )
    traffic = step_traffic(
        model,
        layout,
        weights,
        per_node=config.gpus_per_node,
        num_rounds=num_rounds,
        num_tokens=tokens.count,
        item=item,
    )
    time = step_time(model, layout, weights, tokens, traffic, rates=rates, num_rounds=num_rounds)
    mfu = utilisation(
        model,
        sequences=batch.sequences,
        length=batch.length,
        seconds=time.total,
        flops=config.gpus * GPUS[config.gpu].flops,
    )
    return Candidate(
        layout=layout,
        num_rounds=num_rounds,
        memory=needed,
        traffic=traffic,
        time=time,
        mfu=mfu,
        missing=max(0, needed.total - gpu_memory),
    )


def _run(config: PlanConfig, batch: Batch, best: Candidate) -> Run:
    assert config.tokens is not None
    num_tokens = parse_count("tokens", config.tokens)
    num_steps = -(-num_tokens // (batch.sequences * batch.length))
    hours = num_steps * best.time.total / 3600
    gpu_hours = hours * config.gpus
    price = None if config.price is None else gpu_hours * config.price
    return Run(num_steps=num_steps, days=hours / 24, gpu_hours=gpu_hours, price=price)


def advice(config: PlanConfig) -> list[str]:
    """What would make a run fit that does not, each tried: other precision, more GPUs, larger GPUs."""
    tries = {
        "bfloat16 weights without masters (--precision bf16_stochastic)": replace(
            config, precision="bf16_stochastic"
        ),
        **{
            f"{factor} times as many GPUs (--gpus {factor * config.gpus})": replace(
                config, gpus=factor * config.gpus
            )
            for factor in (2, 4, 8)
        },
        "any layout, micro-batch and recomputation": replace(
            config, expert=None, replicate=None, micro=None, recompute=None
        ),
    }
    found = [text for text, other in tries.items() if other != config and plan(other).num_fitting]
    more = [text for text in found if "times" in text]
    return [text for text in found if text not in more[1:]]  # the fewest GPUs are enough
