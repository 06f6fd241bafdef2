"""The verb `dscoder plan`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from dscoder.cli.arguments import parse
from dscoder.config.plan import PlanConfig
from dscoder.train.plan.search import Candidate, Plan, advice, plan

_GB = 1e9
_JSON = "--json"


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
    batch = found.batch
    nodes = -(-config.gpus // config.gpus_per_node)
    console.print(
        f"[bold]{config.model}[/]: {found.num_parameters / 1e9:.4g}B parameters, "
        f"{found.num_active / 1e9:.4g}B active a token; {config.gpus} {config.gpu} on {nodes} "
        f"node{'s' if nodes > 1 else ''}, {found.gpu_memory / _GB:.4g} GB each; "
        f"steps of {batch.sequences} windows of {batch.length} tokens, {config.precision}",
        highlight=False,
    )
    console.print(_fitting_table(found), "", _memory_table(found.fitting[0]), "")
    console.print(_time_table(found), "", _traffic_table(found.fitting[0]), "", _rates_table(found))
    if found.missing:
        console.print("", _missing_table(found))
    _show_run(console, config, found)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for idx, column in enumerate(columns):
        table.add_column(column, justify="left" if idx == 0 else "right")
    return table


def _names(candidate: Candidate) -> list[str]:
    layout = candidate.layout
    return [
        f"{layout.replicate} x {layout.expert_shard} x {layout.expert}",
        f"{layout.micro} x {candidate.num_rounds}",
        layout.recompute,
        "freed" if layout.reshard else "kept",
        "each batch" if layout.sums_each_batch else "once",
        "-" if layout.expert == 1 else "exact" if layout.is_exact else "worst case",
    ]


_NAMES = ("layout", "micro-batches", "recompute", "weights", "sums", "slots")
_CAPTION = (
    "layout: replicate x expert_shard x expert ranks. micro-batches: windows x rounds in a step. weights: "
    "gathered ones, behind the forward. sums: of gradients over ranks. slots: for tokens of other ranks."
)


def _fitting_table(found: Plan) -> Table:
    basis = found.rates.basis
    title = (
        f"{found.num_fitting} of {found.num_layouts} layouts fit; the quickest of each grid, times {basis}"
    )
    table = _table(title, *_NAMES, "GB", "step s", "tokens/s", "MFU")
    table.caption, table.caption_justify = _CAPTION, "left"
    num_tokens = found.batch.sequences * found.batch.length
    for candidate in found.fitting:
        seconds = candidate.time.total
        table.add_row(
            *_names(candidate),
            f"{candidate.memory.total / _GB:.1f}",
            f"{seconds:.2f}",
            f"{num_tokens / seconds:,.0f}",
            f"{candidate.mfu:.1%}",
        )
    return table


def _missing_table(found: Plan) -> Table:
    table = _table("What does not fit, by how much", *_NAMES, "GB", "lacks GB")
    for candidate in found.missing:
        table.add_row(
            *_names(candidate), f"{candidate.memory.total / _GB:.1f}", f"{candidate.missing / _GB:.1f}"
        )
    return table


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
    table = _table(
        f"Memory of the quickest, at its fullest moment: {best.memory.moment}", "part", "GB", "what"
    )
    table.columns[2].justify = "left"
    for name, text in _MEMORY_TEXTS.items():
        table.add_row(name, f"{getattr(best.memory, name) / _GB:.2f}", text)
    table.add_row("total", f"{best.memory.total / _GB:.2f}", "", style="bold")
    return table


def _time_table(found: Plan) -> Table:
    best = found.fitting[0].time
    table = _table(f"Its step, seconds ({found.rates.basis})", "part", "s", "share")
    for name, seconds in asdict(best).items():
        is_exposed = name in ("exchange", "collectives")
        table.add_row(
            f"{name}, not hidden" if is_exposed else name, f"{seconds:.2f}", f"{seconds / best.total:.1%}"
        )
    table.add_row("total", f"{best.total:.2f}", "", style="bold")
    return table


def _traffic_table(best: Candidate) -> Table:
    table = _table("What a GPU receives in a step, GB", "what", "inside a node", "across nodes")
    for name, traffic in asdict(best.traffic).items():
        table.add_row(name, f"{traffic['link'] / _GB:,.1f}", f"{traffic['network'] / _GB:,.1f}")
    return table


def _rates_table(found: Plan) -> Table:
    table = _table("Rates", "of", "per second", "basis", "from")
    table.columns[3].justify = "left"
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
    console.print(
        f"\nThe quickest, as options of `dscoder pretrain`:\n{words}", highlight=False, soft_wrap=True
    )
