"""The options that `generate` and `infill` share: which model, how to draw, when to stop."""

from dataclasses import fields

from jsonargparse import ArgumentParser, Namespace

from dscoder.config.generate import BatchConfig, EngineConfig, GenerateConfig, SamplingConfig

_HELP = {
    "model": "directory in the published layout (such as RUN/model), or a Hugging Face hub id",
    "dtype": "auto (as stored), float32, bfloat16 or float16",
    "device": "auto (a GPU if there is one), cpu, cuda, cuda:1 ...",
    "max_batch": "prompts answered together, at most",
    "prefill_chunk": "tokens of prompts computed at once; the answers under way wait for no more",
    "cache_tokens": "tokens that the cache holds, all prompts together; 0: as many as they need",
    "memory_share": "share of a GPU's free memory that the cache may take",
    "cuda_graphs": "on a GPU, decode by replaying CUDA graphs",
    "temperature": "0 always takes the likeliest token",
    "top_p": "draw from the likeliest tokens that together have this probability",
    "top_k": "draw from so many of the likeliest tokens; 0: all",
    "seed": "of the draws",
    "max_new_tokens": "length of a completion, at most",
    "fim_order": "how the model learnt to fill holes: psm (the published models) or spm",
    "prefix_share": "share of the context for the text before a hole, when both sides are too long",
}
_SINGLE_VALUES = (bool, float, int, str)
_FLAGS = ("single_line",)  # given without a value


def add_generation_options(parser: ArgumentParser) -> None:
    """--model, --temperature, --stop ... with the defaults of the config classes."""
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    for record in (EngineConfig, BatchConfig, SamplingConfig, GenerateConfig):
        for field in fields(record):
            if field.type not in _SINGLE_VALUES or field.name in _FLAGS:
                continue
            is_required = field.name == "model"
            default = None if is_required else field.default
            parser.add_argument(
                f"--{field.name}",
                type=field.type,
                required=is_required,
                default=default,
                help=_HELP[field.name],
            )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        help=r"text that ends a completion and is not part of it; may be repeated (a line break: $'\n')",
    )
    parser.add_argument("--single_line", action="store_true", help="stop at the end of the line")


def engine_config(options: Namespace) -> EngineConfig:
    """What `--model`, `--device` ... say."""
    return EngineConfig(
        model=options.model,
        dtype=options.dtype,
        device=options.device,
        batch=BatchConfig(**{field.name: options[field.name] for field in fields(BatchConfig)}),
    )


def generate_config(options: Namespace) -> GenerateConfig:
    """What `--temperature`, `--stop` ... say."""
    return GenerateConfig(
        max_new_tokens=options.max_new_tokens,
        stop=tuple(options.stop),
        single_line=options.single_line,
        fim_order=options.fim_order,
        prefix_share=options.prefix_share,
        sampling=SamplingConfig(**{field.name: options[field.name] for field in fields(SamplingConfig)}),
    )
