"""The two model families as one Transformer, its caches, its scalar head, initial weights and counts."""

from dscoder.models.cache import (
    PAGE_SIZE,
    Cache,
    KeyValueCache,
    LatentCache,
    allocate_cache,
    cache_token_bytes,
)
from dscoder.models.count import ParameterCount, count_parameters
from dscoder.models.init import init_weights, materialise
from dscoder.models.scalar_head import ScalarModel, Scores
from dscoder.models.transformer import Features, Transformer

__all__ = [
    "PAGE_SIZE",
    "Cache",
    "Features",
    "KeyValueCache",
    "LatentCache",
    "ParameterCount",
    "ScalarModel",
    "Scores",
    "Transformer",
    "allocate_cache",
    "cache_token_bytes",
    "count_parameters",
    "init_weights",
    "materialise",
]
