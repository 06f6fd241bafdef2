"""Checkpoints in the published Hugging Face layout: config.json and safetensors, both ways."""

from dscoder.checkpoint.config_hf import config_from_hf, config_to_hf
from dscoder.checkpoint.pretrained import load_config, load_pretrained, load_scalar_model, save_pretrained
from dscoder.checkpoint.target import check_replaceable

__all__ = [
    "check_replaceable",
    "config_from_hf",
    "config_to_hf",
    "load_config",
    "load_pretrained",
    "load_scalar_model",
    "save_pretrained",
]
