"""The question to a plan, with its names and sizes looked up."""

from dataclasses import dataclass
from pathlib import Path

from dscoder.checkpoint import load_config
from dscoder.config import PRESETS, ModelConfig, preset
from dscoder.config.plan import GPUS, PlanConfig, parse_bytes, parse_count, parse_rate
from dscoder.train.plan.layout import Batch, Choices
from dscoder.train.plan.rates import Rates, assumed_rates, measured_rates, read_records
from dscoder.train.plan.weights import Weights, weights_of
from dscoder.train.recipes import RECIPES


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """All that an answer is computed from."""

    config: PlanConfig
    model: ModelConfig
    weights: Weights
    batch: Batch
    rates: Rates
    gpu_memory: int  # bytes

    @property
    def fixed(self) -> Choices:
        """What is asked for of the layout."""
        config = self.config
        return Choices(
            expert=config.expert,
            replicate=config.replicate,
            micro=config.micro,
            recompute=config.recompute,
        )


def question_of(config: PlanConfig) -> Question:
    """Everything looked up; ValueError for what cannot be planned."""
    model = read_model(config.model)
    if config.seq > model.max_positions:
        raise ValueError(
            f"plan: seq must be <= the model's max_positions = {model.max_positions}, got {config.seq}"
        )
    gpu_memory = GPUS[config.gpu].memory
    if config.memory is not None:
        gpu_memory = parse_bytes("memory", config.memory)
    return Question(
        config=config,
        model=model,
        weights=weights_of(model),
        batch=batch_of(config),
        rates=rates_of(config),
        gpu_memory=gpu_memory,
    )


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
