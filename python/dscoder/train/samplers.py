"""What writes a policy's answers, as the config of a run names it."""

from importlib import import_module

from dscoder.config.grpo import GrpoConfig
from dscoder.infer.engine import Engine
from dscoder.models import Transformer
from dscoder.text.tokenizer import Tokenizer
from dscoder.train.explore import EngineSampler, Sampler

_VLLM = "dscoder.train.vllm_sampler"
_INSTALL = "pip install 'dscoder[vllm]'"


def open_sampler(config: GrpoConfig, model: Transformer, tokenizer: Tokenizer) -> Sampler:
    """Our own engine over the policy itself, or vLLM, which is imported here and nowhere else."""
    if config.rollout.engine == "own":
        return EngineSampler(Engine(model, tokenizer, batch=config.rollout.batch))
    try:
        module = import_module(_VLLM)
    except ImportError as error:
        raise ValueError(
            f"grpo: vLLM must be installed for rollout.engine = vllm ({_INSTALL}): {error}"
        ) from error
    sampler: Sampler = module.open_sampler(config, model, tokenizer)
    return sampler
