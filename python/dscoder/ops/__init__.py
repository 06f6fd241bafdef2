"""The kernel library: one op a file, each with its public function, reference, fake and gradient."""

from dscoder.ops.exchange_statistics import ExchangeStatistics
from dscoder.ops.expert_parallel import DispatchHandle, ExchangeOptions, ExpertParallel, Travel
from dscoder.ops.grouped_gemm import grouped_gemm, grouped_gemm_weight_gradient
from dscoder.ops.grouped_gemm_plan import grouped_gemm_plan
from dscoder.ops.latent_append import AppendTarget, latent_append
from dscoder.ops.latent_rope import latent_rope
from dscoder.ops.mla_decode import mla_decode, mla_decode_plan
from dscoder.ops.mla_prefill import mla_prefill
from dscoder.ops.moe_balance_loss import moe_balance_loss, moe_balance_terms
from dscoder.ops.moe_experts import moe_experts
from dscoder.ops.moe_gate import moe_gate, moe_gate_with_balance
from dscoder.ops.moe_permute import PermuteHandle, moe_permute, moe_permute_maps
from dscoder.ops.moe_unpermute import moe_unpermute
from dscoder.ops.roll_call import ExchangeError
from dscoder.ops.rope import rope

__all__ = [
    "AppendTarget",
    "DispatchHandle",
    "ExchangeError",
    "ExchangeOptions",
    "ExchangeStatistics",
    "ExpertParallel",
    "PermuteHandle",
    "Travel",
    "grouped_gemm",
    "grouped_gemm_plan",
    "grouped_gemm_weight_gradient",
    "latent_append",
    "latent_rope",
    "mla_decode",
    "mla_decode_plan",
    "mla_prefill",
    "moe_balance_loss",
    "moe_balance_terms",
    "moe_experts",
    "moe_gate",
    "moe_gate_with_balance",
    "moe_permute",
    "moe_permute_maps",
    "moe_unpermute",
    "rope",
]
