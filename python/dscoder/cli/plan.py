"""The verb `dscoder plan`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from dscoder.cli.arguments import parse
from dscoder.config import PRESETS
from dscoder.config.plan import PlanConfig
from dscoder.train.plan.search import Candidate, Plan, advice, plan

_GB = 1e9
_JSON = "--json"
_UNBOUNDED = 1000  # columns where no terminal cuts lines; more than any table has

# Units, largest first; a number is told in the first one that it reaches.
_COUNTS = {"B": 1e9, "M": 1e6, "K": 1e3, "": 1.0}
_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_BYTES = {"GB": _GB, "MB": 1e6, "KB": 1e3}


def main(argv: Sequence[str]) -> None:
    """Plan a training run: memory, traffic, time and cost of every layout on a cluster (--json: as JSON)."""
    config = parse(
        [word for word in argv if word != _JSON], PlanConfig, verb="plan", description=main.__doc__
    )
    found = plan(config)
    if not found.fitting:
        raise ValueError(_nothing_fits(config, found))
    if _JSON in argv:
        print(json.dumps(_as_json(config, found), indent=2))
    else:
        _show(config, found)


def _nothing_fits(config: PlanConfig, found: Plan) -> str:
    nearest = found.missing[0]
    memory = nearest.memory
    parts = {field.name: getattr(memory, field.name) for field in fields(memory) if field.name != "moment"}
    largest = sorted(parts, key=lambda name: parts[name], reverse=True)[:3]
    shares = ", ".join(f"{name} {parts[name] / _GB:.1f} GB" for name in largest)
    helps = advice(config) or ["nothing that was tried: more GPUs, less precision, other layouts"]
    return (
        f"none of {found.num_layouts} layouts fits {found.gpu_memory / _GB:.1f} GB. The nearest, "
        f"{_layout(nearest)}, lacks {nearest.missing / _GB:.1f} GB of {memory.total / _GB:.1f} GB "
        f"({shares}). What would help: {'; '.join(helps)}"
    )


def _layout(candidate: Candidate) -> str:
    layout = candidate.layout
    return (
        f"{layout.replicate} x {layout.expert_shard} x {layout.expert}, micro-batch {layout.micro}, "
        f"recompute {layout.recompute}"
    )


# ---- JSON ----


def _as_json(config: PlanConfig, found: Plan) -> dict[str, Any]:
    basis = found.rates.basis
    return {
        "question": asdict(config),
        "parameters": {"total": found.num_parameters, "active": found.num_active},
        "batch": asdict(found.batch),
        "gpu_memory_bytes": found.gpu_memory,
        "rates": asdict(found.rates),
        "basis": basis,
        "num_layouts": found.num_layouts,
        "num_fitting": found.num_fitting,
        "fitting": [_candidate_json(candidate, basis) for candidate in found.fitting],
        "missing": [_candidate_json(candidate, basis) for candidate in found.missing],
        "run": None if found.run is None else {**asdict(found.run), "basis": basis},
    }


def _candidate_json(candidate: Candidate, basis: str) -> dict[str, Any]:
    return {
        "layout": asdict(candidate.layout),
        "num_rounds": candidate.num_rounds,
        "memory_bytes": {**asdict(candidate.memory), "total": candidate.memory.total},
        "missing_bytes": candidate.missing,
        "traffic_bytes": asdict(candidate.traffic),
        "seconds": {**asdict(candidate.time), "total": candidate.time.total, "basis": basis},
        "mfu": {"value": candidate.mfu, "basis": basis},
    }


# ---- tables ----


def _show(config: PlanConfig, found: Plan) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=_UNBOUNDED)
    batch = found.batch
    nodes = -(-config.gpus // config.gpus_per_node)
    console.print(
        f"[bold]{config.model}[/]: {_count(found.num_parameters)} parameters, "
        f"{_count(found.num_active)} active a token; {config.gpus} {config.gpu} on {nodes} "
        f"node{'s' if nodes > 1 else ''}, {found.gpu_memory / _GB:.4g} GB each; "
        f"steps of {batch.sequences} windows of {batch.length} tokens, {config.precision}",
        highlight=False,
    )
    console.print(_fitting_table(console, found), "", _memory_table(found.fitting[0]), "")
    console.print(_time_table(found), "", _traffic_table(found.fitting[0]), "", _rates_table(found))
    if found.missing:
        console.print("", _missing_table(console, found))
    _show_run(console, config, found)


def _unit(value: float, units: Mapping[str, float]) -> str:
    return next((unit for unit, size in units.items() if value >= size), list(units)[-1])


def _count(number: int) -> str:
    unit = _unit(number, _COUNTS)
    return f"{number / _COUNTS[unit]:.4g}{unit}"


def _table(title: str, *columns: str, text: str | None = None) -> Table:
    """A table of numbers, which stay on one line; those of the column `text` are words, which may not."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for idx, column in enumerate(columns):
        is_left = idx == 0 or column == text
        table.add_column(column, justify="left" if is_left else "right", no_wrap=column != text)
    return table


def _fitted(
    console: Console, title: str, rows: Sequence[Mapping[str, str]], texts: Mapping[str, str]
) -> Table:
    """The table of `rows`, by column; a terminal too narrow for all columns gets fewer, and is told so.

    `texts` says what is in a column.
    """
    dropped: list[str] = []
    for spare in ("", *(name for name in _SPARE if name in rows[0])):
        dropped += filter(None, [spare])
        kept = [name for name in rows[0] if name not in dropped]
        table = _table(title, *kept)
        for row in rows:
            table.add_row(*(row[name] for name in kept))
        if console.measure(table, options=console.options.update(width=_UNBOUNDED)).maximum <= console.width:
            break
    said = [f"{name}: {text}." for name, text in texts.items() if name in kept]
    said += [f"Left out, for the terminal is narrow: {', '.join(dropped)}."] if dropped else []
    table.caption, table.caption_justify = " ".join(said) or None, "left"
    return table


def _names(candidate: Candidate) -> dict[str, str]:
    layout = candidate.layout
    return {
        "layout": f"{layout.replicate} x {layout.expert_shard} x {layout.expert}",
        "micro-batches": f"{layout.micro} x {candidate.num_rounds}",
        "recompute": layout.recompute,
        "weights": "freed" if layout.reshard else "kept",
        "sums": "each batch" if layout.sums_each_batch else "once",
        "slots": "-" if layout.expert == 1 else "exact" if layout.is_exact else "worst case",
    }


_SPARE = ("weights", "sums", "slots", "tokens/s", "recompute", "MFU")  # columns, the first to go first
_TEXTS = {
    "layout": "replicate x expert_shard x expert ranks",
    "micro-batches": "windows x rounds in a step",
    "weights": "gathered ones, behind the forward",
    "sums": "of gradients over ranks",
    "slots": "for tokens of other ranks",
}


def _fitting_table(console: Console, found: Plan) -> Table:
    basis = found.rates.basis
    title = (
        f"{found.num_fitting} of {found.num_layouts} layouts fit; the quickest of each grid, times {basis}"
    )
    num_tokens = found.batch.sequences * found.batch.length
    unit = _unit(min(candidate.time.total for candidate in found.fitting), _SECONDS)
    rows = [
        {
            **_names(candidate),
            "GB": f"{candidate.memory.total / _GB:.1f}",
            f"step {unit}": f"{candidate.time.total / _SECONDS[unit]:.2f}",
            "tokens/s": f"{num_tokens / candidate.time.total:,.0f}",
            "MFU": f"{candidate.mfu:.1%}",
        }
        for candidate in found.fitting
    ]
    return _fitted(console, title, rows, _TEXTS)


def _missing_table(console: Console, found: Plan) -> Table:
    rows = [
        {
            **_names(candidate),
            "GB": f"{candidate.memory.total / _GB:.1f}",
            "lacks GB": f"{candidate.missing / _GB:.1f}",
        }
        for candidate in found.missing
    ]
    return _fitted(console, "What does not fit, by how much", rows, {})


_MEMORY_TEXTS = {
    "weights": "this GPU's part, as the optimizer moves it",
    "moments": "AdamW's two, float32",
    "gradients": "float32: this GPU's part, or whole ones where micro-batches add up first",
    "exchange": "slots for tokens of other GPUs",
    "gathered": "weights of the layers at work, and of embedding and head",
    "activations": "kept by the forward",
    "working": "of the layer at work: computed again, its gradients",
    "slack": "fragmentation of what comes and goes (assumed)",
    "context": "CUDA, NCCL, cuBLAS (assumed)",
}


def _memory_table(best: Candidate) -> Table:
    title = f"Memory of the quickest, at its fullest moment: {best.memory.moment}"
    table = _table(title, "part", "GB", "what", text="what")
    for name, text in _MEMORY_TEXTS.items():
        table.add_row(name, f"{getattr(best.memory, name) / _GB:.2f}", text)
    table.add_row("total", f"{best.memory.total / _GB:.2f}", "", style="bold")
    return table


def _time_table(found: Plan) -> Table:
    best = found.fitting[0].time
    unit = _unit(best.total, _SECONDS)
    table = _table(f"Its step ({found.rates.basis})", "part", unit, "share")
    for name, seconds in asdict(best).items():
        is_exposed = name in ("exchange", "collectives")
        part = f"{name}, not hidden" if is_exposed else name
        table.add_row(part, f"{seconds / _SECONDS[unit]:.2f}", f"{seconds / best.total:.1%}")
    table.add_row("total", f"{best.total / _SECONDS[unit]:.2f}", "", style="bold")
    return table


def _traffic_table(best: Candidate) -> Table:
    rows = asdict(best.traffic)
    unit = _unit(max(max(traffic["link"], traffic["network"]) for traffic in rows.values()), _BYTES)
    table = _table(f"What a GPU receives in a step, {unit}", "what", "inside a node", "across nodes")
    for name, traffic in rows.items():
        sizes = (traffic[kind] / _BYTES[unit] for kind in ("link", "network"))
        table.add_row(name, *(f"{size:,.1f}" for size in sizes))
    return table


def _rates_table(found: Plan) -> Table:
    table = _table("Rates", "of", "per second", "basis", "from", text="from")
    for name, rate in found.rates.by_name():
        table.add_row(name, f"{rate.value:.3g}", rate.basis, rate.source)
    return table


def _show_run(console: Console, config: PlanConfig, found: Plan) -> None:
    run, layout = found.run, found.fitting[0].layout
    if run is not None:
        price = "" if run.price is None else f", {run.price:,.0f} at {config.price:g} an hour"
        console.print(
            f"\n{config.tokens} tokens ({found.rates.basis}): {run.num_steps:,} steps, {run.days:,.0f} days, "
            f"{run.gpu_hours:,.0f} GPU-hours{price}",
            highlight=False,
        )
    options = {
        "batch.sequences": found.batch.sequences,
        "batch.micro": layout.micro,
        "precision": config.precision,
        "parallel.expert": layout.expert,
        "parallel.replicate": layout.replicate,
        "parallel.recompute": layout.recompute,
        "parallel.reshard_after_forward": str(layout.reshard).lower(),
        "parallel.sums_each_batch": str(layout.sums_each_batch).lower(),
        "parallel.exact": str(layout.is_exact).lower(),
    }
    words = " ".join(f"--{name} {value}" for name, value in options.items())
    model = "model.preset" if config.model in PRESETS else "init_from"
    console.print(
        f"\nThe quickest, with windows of {config.seq} tokens in DATA:\n{_launch(config)} pretrain "
        f"--{model} {config.model} --data DATA --out OUT {words}",
        highlight=False,
        soft_wrap=True,
    )


def _launch(config: PlanConfig) -> str:
    """What starts a verb on all GPUs; on many nodes it is given on each."""
    if config.gpus == 1:
        return "dscoder"
    per_node = min(config.gpus, config.gpus_per_node)
    num_nodes = config.gpus // per_node
    nodes = f"--nnodes {num_nodes} --rdzv-backend c10d --rdzv-endpoint HOST:29500 " if num_nodes > 1 else ""
    return f"torchrun {nodes}--nproc-per-node {per_node} -m dscoder"
