"""What `dscoder plan` is asked: a model, a cluster, a batch; and the published figures of GPUs."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from dscoder.config.parallel import Recompute

_BYTES = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_COUNTS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_NUMBER = r"(\d+(?:\.\d+)?)"


def parse_bytes(name: str, text: str) -> int:
    """Bytes of a size such as 80GB (80 * 10^9) or 80GiB (80 * 2^30); `name` is for the error."""
    return _parse(name, text, _BYTES, "a size such as 80GB or 80GiB")


def parse_rate(name: str, text: str) -> int:
    """Bytes per second of a rate such as 400GB/s or 3200Gbit/s."""
    units: dict[str, float] = {f"{unit}/s": size for unit, size in _BYTES.items()}
    units |= {f"{unit[0]}bit/s": size / 8 for unit, size in _BYTES.items() if len(unit) == 2}
    return _parse(name, text, units, "a rate such as 400GB/s or 3200Gbit/s")


def parse_count(name: str, text: str) -> int:
    """A number such as 4096, 4M, 225B or 10.2T."""
    return _parse(name, text, _COUNTS, "a number such as 4096, 4M, 225B or 10.2T")


def _parse(name: str, text: str, units: Mapping[str, float], wanted: str) -> int:
    found = re.fullmatch(_NUMBER + r" ?([A-Za-z/]*)", text)
    value = round(float(found[1]) * units[found[2]]) if found and found[2] in units else 0
    if value <= 0:
        raise ValueError(f"plan: {name} must be {wanted}, got {text!r}")
    return value


# Of `dscoder pretrain`; its fp32 has no kernels, so nobody would rent GPUs for it.
Precision = Literal["bf16", "bf16_stochastic"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """What its maker says of one GPU; nothing here was measured."""

    memory: int  # bytes
    flops: float  # dense bfloat16 operations per second
    bandwidth: float  # bytes per second of its own memory
    link: float  # bytes per second to the other GPUs of a node, in each direction
    node_network: float  # bytes per second between nodes, per node and direction, as such nodes are built


# Data sheets. H800 and A800 are H100 and A100 with fewer links. A node has 8 network cards of 400 Gbit/s
# beside Hopper GPUs and of 200 Gbit/s beside Ampere GPUs.
GPUS: dict[str, GpuConfig] = {
    "h800": GpuConfig(memory=80 * 10**9, flops=989e12, bandwidth=3.35e12, link=200e9, node_network=400e9),
    "h100": GpuConfig(memory=80 * 10**9, flops=989e12, bandwidth=3.35e12, link=450e9, node_network=400e9),
    "h200": GpuConfig(memory=141 * 10**9, flops=989e12, bandwidth=4.8e12, link=450e9, node_network=400e9),
    "a100": GpuConfig(memory=80 * 10**9, flops=312e12, bandwidth=2.039e12, link=300e9, node_network=200e9),
    "a800": GpuConfig(memory=80 * 10**9, flops=312e12, bandwidth=2.039e12, link=200e9, node_network=200e9),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig:
    """One question to `dscoder plan`; fields left at None are tried in every form or taken from `gpu`."""

    model: str  # a preset, or a directory in the published layout
    gpus: int  # in all
    gpu: str = "h800"  # h800, h100, h200, a100 or a800
    memory: str | None = None  # of a GPU, such as 80GB or 80GiB
    gpus_per_node: int = 8  # a cluster of fewer is one node
    node_bandwidth: str | None = None  # of a node's network in each direction, such as 400GB/s
    seq: int = 4096  # tokens of a window
    batch: int | None = None  # windows of a step; where it is not given the paper's
    batch_tokens: str | None = None  # the same in tokens, such as 4194304
    tokens: str | None = None  # of the whole run, such as 10.2T; its cost is told
    precision: Precision = "bf16"  # bf16: with float32 masters; bf16_stochastic: without
    recompute: Recompute | None = None  # none, selective or full
    micro: int | None = None  # windows that a GPU computes at once
    expert: int | None = None  # ranks that hold different experts
    replicate: int | None = None  # whole copies of the sharded model
    rates: str | None = None  # file of benchmark records; without one rates are assumed
    price: float | None = None  # of a GPU for an hour, in any currency
    slack: float = 1.1  # what fragmentation makes of memory that comes and goes
    show: int = 8  # layouts in the table

    def __post_init__(self) -> None:
        counts = {"gpus": self.gpus, "gpus_per_node": self.gpus_per_node, "seq": self.seq, "show": self.show}
        optional = {
            "batch": self.batch,
            "micro": self.micro,
            "expert": self.expert,
            "replicate": self.replicate,
        }
        counts |= {name: value for name, value in optional.items() if value is not None}
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"plan: {name} must be >= 1, got {value}")
        if self.gpu not in GPUS:
            raise ValueError(f"plan: gpu must be one of {', '.join(GPUS)}, got {self.gpu!r}")
        if self.gpus > self.gpus_per_node and self.gpus % self.gpus_per_node:
            raise ValueError(
                f"plan: gpus must be a multiple of gpus_per_node = {self.gpus_per_node}, got {self.gpus}"
            )
        if self.batch is not None and self.batch_tokens is not None:
            raise ValueError(
                "plan: batch and batch_tokens must not both be given, "
                f"got {self.batch} and {self.batch_tokens}"
            )
        if self.price is not None and not (math.isfinite(self.price) and self.price > 0):
            raise ValueError(f"plan: price must be positive, got {self.price}")
        if not (math.isfinite(self.slack) and self.slack >= 1):
            raise ValueError(f"plan: slack must be >= 1, got {self.slack}")
        # Said here, before any work, and read where they are used.
        for name, text, parse in (
            ("memory", self.memory, parse_bytes),
            ("node_bandwidth", self.node_bandwidth, parse_rate),
            ("batch_tokens", self.batch_tokens, parse_count),
            ("tokens", self.tokens, parse_count),
        ):
            if text is not None:
                parse(name, text)
