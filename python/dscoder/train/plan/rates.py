"""How fast a GPU is at what a step does: measured where a record says so, else assumed.

An assumed rate is a figure from a data sheet times a share that others have reached; docs/plan.md says who.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dscoder.config.plan import GpuConfig

# Shares of the data sheet's figure.
PRODUCT_SHARE = 0.65  # dense products
EXPERT_SHARE = 0.5  # products of routed experts, hundreds of rows each
FORWARD_SHARE = 0.48  # attention
BACKWARD_SHARE = 0.32
BANDWIDTH_SHARE = 0.85
LINK_SHARE = 0.8
NETWORK_SHARE = 0.85
ASSUMED, MEASURED = "assumed", "measured"

_KERNELS = {
    "experts": ("moe_experts", "forward + backward"),
    "attention_forward": ("mla_prefill", "forward"),
    "attention_backward": ("mla_prefill", "backward"),
}
_CEILINGS = {"product": ("ceiling_TFLOP/s", 1e12), "bandwidth": ("ceiling_GB/s", 1e9)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """Operations or bytes per second."""

    value: float
    basis: str  # "assumed" or "measured"
    source: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Rates:
    """All that the time of a step is computed from."""

    product: Rate  # dense matrix products, operations
    experts: Rate  # products of routed experts
    attention_forward: Rate
    attention_backward: Rate
    bandwidth: Rate  # the GPU's memory, bytes
    link: Rate  # between GPUs of a node, bytes in each direction
    network: Rate  # a GPU's part of the node's network, bytes in each direction

    @property
    def basis(self) -> str:
        """What a time computed from them is worth: "assumed" if any of them is."""
        return ASSUMED if any(rate.basis == ASSUMED for _, rate in self.by_name()) else "from measured rates"

    def by_name(self) -> list[tuple[str, Rate]]:
        """Every rate with what it is called."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def assumed_rates(gpu: GpuConfig, *, node_network: float, gpus_per_node: int) -> Rates:
    """From the data sheet of `gpu` and the network of its node."""

    def share_of(figure: float, share: float) -> Rate:
        return Rate(value=figure * share, basis=ASSUMED, source=f"{share:g} of {figure:.4g} per second")

    return Rates(
        product=share_of(gpu.flops, PRODUCT_SHARE),
        experts=share_of(gpu.flops, EXPERT_SHARE),
        attention_forward=share_of(gpu.flops, FORWARD_SHARE),
        attention_backward=share_of(gpu.flops, BACKWARD_SHARE),
        bandwidth=share_of(gpu.bandwidth, BANDWIDTH_SHARE),
        link=share_of(gpu.link, LINK_SHARE),
        network=share_of(node_network / gpus_per_node, NETWORK_SHARE),
    )


def read_records(path: Path) -> list[Mapping[str, Any]]:
    """The records of a stored run, of `make bench` or `make gpu-check`; ValueError if it is neither."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"plan: rates must be a file that can be read, got {path}: {error.strerror}"
        ) from error
    except ValueError as error:
        raise ValueError(f"plan: rates must hold JSON, got {path}: {error}") from error
    benchmarks = stored.get("benchmarks") if isinstance(stored, dict) else None
    if not isinstance(benchmarks, list):
        raise ValueError(f"plan: rates must be a stored run of benchmarks, got {path} without any")
    records = [entry.get("extra_info", entry) for entry in benchmarks if isinstance(entry, dict)]
    return [record for record in records if "op" in record and "us" in record]


def measured_rates(rates: Rates, records: Iterable[Mapping[str, Any]], *, model: str, source: str) -> Rates:
    """`rates` with those that the records of a GPU tell instead.

    A kernel's rate is that of its quickest bfloat16 record for this model, its own kernels having run; a
    ceiling is the copy or product that the benchmarks measure beside every op.
    """
    found = {}
    usable = [record for record in records if record.get("has_kernel") and record.get("dtype") == "bfloat16"]
    for name, (op, step) in _KERNELS.items():
        speeds = [
            record["TFLOP/s"] * 1e12
            for record in usable
            if (record["op"], record.get("step"), record.get("model")) == (op, step, model)
            and "TFLOP/s" in record
        ]
        if speeds:
            found[name] = Rate(value=max(speeds), basis=MEASURED, source=f"{op} {step}, {model}, in {source}")
    for name, (key, unit) in _CEILINGS.items():
        values = [record[key] * unit for record in usable if key in record]
        if values:
            found[name] = Rate(value=max(values), basis=MEASURED, source=f"{key} in {source}")
    return replace(rates, **found)
