"""What a plan says of activations is what autograd keeps."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from dscoder import ops
from dscoder.config import BalanceConfig, ModelConfig, preset
from dscoder.config.parallel import Recompute
from dscoder.models import Transformer
from dscoder.models.moe import Experts
from dscoder.testing.ranks import run_ranks
from dscoder.train.plan import activations
from dscoder.train.plan.activations import Tokens, around_saved, layer_saved, placement_bytes
from dscoder.train.plan.layout import RECOMPUTES, Layout
from tests.train.saved_bytes import saved_bytes, saved_bytes_of_a_rank

DTYPES = {2: torch.bfloat16, 4: torch.float32}
V2_LITE = preset("v2_lite")
MODELS = {
    "tiny_dense": preset("tiny_dense"),
    "tiny_moe": preset("tiny_moe"),
    "tiny_moe_alike": replace(preset("tiny_moe"), num_layers=2, tie_embeddings=True),
    # True widths but for those of the MLPs, which a test cannot hold.
    "v2_lite": replace(
        V2_LITE,
        num_layers=2,
        vocab_size=512,
        bos_id=0,
        eos_id=1,
        mlp_width=1408,
        moe=replace(V2_LITE.moe, expert_width=16),
    ),
}


def with_query_latent(config: ModelConfig) -> ModelConfig:
    attention = replace(config.attention, q_lora_rank=40)
    moe = replace(config.moe, num_groups=4, num_groups_kept=2, balance=BalanceConfig())
    return replace(config, num_layers=2, attention=attention, moe=moe)


def planned(model: ModelConfig, tokens: Tokens, layout: Layout) -> int:
    kept = around_saved(model, tokens)
    kept += sum(layer_saved(model, idx, tokens, layout) for idx in range(model.num_layers))
    # What is computed again is given its placement as an argument, of which autograd knows nothing.
    return kept if layout.recompute == "none" else kept - placement_bytes(model, tokens)


@pytest.mark.parametrize("recompute", RECOMPUTES)
@pytest.mark.parametrize("item", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_what_a_forward_keeps_is_planned_to_the_byte(name: str, item: int, recompute: Recompute) -> None:
    model, tokens = MODELS[name], Tokens(sequences=2, length=24, item=item, gathers=False)
    kept = saved_bytes(Transformer(model, dtype=DTYPES[item]), tokens, recompute=recompute)
    assert kept == planned(model, tokens, Layout(recompute=recompute))


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_so_it_is_with_query_latents_and_without_balance_terms(recompute: Recompute) -> None:
    model, tokens = (
        with_query_latent(preset("tiny_moe")),
        Tokens(sequences=1, length=29, item=2, gathers=False),
    )
    kept = saved_bytes(Transformer(model, dtype=torch.bfloat16), tokens, recompute=recompute)
    assert kept == planned(model, tokens, Layout(recompute=recompute))


@pytest.mark.parametrize("recompute", RECOMPUTES)
def test_so_it_is_where_experts_read_tokens_in_place(
    recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops, "moe_experts", partial(ops.moe_experts, gathers=True))
    model, tokens = preset("tiny_moe"), Tokens(sequences=2, length=24, item=2, gathers=True)
    assert Experts.forward.__globals__["ops"] is ops
    kept = saved_bytes(Transformer(model, dtype=torch.bfloat16), tokens, recompute=recompute)
    assert kept == planned(model, tokens, Layout(recompute=recompute))


@pytest.mark.dist
def test_so_it_is_on_a_rank_with_half_of_the_experts() -> None:
    model = replace(preset("tiny_moe"), num_layers=2)
    tokens = Tokens(sequences=1, length=24, item=2, gathers=False)
    kept = run_ranks(saved_bytes_of_a_rank, model, tokens, RECOMPUTES, num_ranks=2)
    layouts = [Layout(expert=2, recompute=recompute) for recompute in RECOMPUTES]
    assert kept == [[planned(model, tokens, layout) for layout in layouts]] * 2


@pytest.mark.parametrize("term", ["_norm", "_swiglu", "_latent_attention", "experts_saved", "gate_saved"])
def test_a_wrong_term_is_seen(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = preset("tiny_moe"), Tokens(sequences=2, length=24, item=2, gathers=False)
    right = planned(model, tokens, Layout())
    true_term = getattr(activations, term)
    monkeypatch.setattr(activations, term, lambda *args, **kwargs: true_term(*args, **kwargs) + 1)
    assert planned(model, tokens, Layout()) != right


def test_a_dense_layer_by_hand() -> None:
    model = replace(preset("tiny_dense"), num_layers=1)
    tokens = Tokens(sequences=1, length=1, item=2)
    # Two norms: 256 * 2 in, 4 scale, 256 * 2 out. Query and out 4 * 64 * 2 each, key and value 2 * 64 * 2
    # each, log-sum-exp 4 * 4. Gate, up and their product: 3 * 688 * 2.
    assert layer_saved(model, 0, tokens, Layout()) == 2 * 1028 + 2 * 512 + 2 * 256 + 16 + 4128
    assert layer_saved(model, 0, tokens, Layout(recompute="full")) == 512


def test_the_worst_case_keeps_rows_for_every_token_of_every_rank() -> None:
    model = preset("v2")
    tokens = Tokens(sequences=1, length=4096, item=2)
    alone = activations.routed_saved(model.moe, model.width, tokens, Layout())
    spread = activations.routed_saved(model.moe, model.width, tokens, Layout(expert=8))
    exact = activations.routed_saved(model.moe, model.width, tokens, Layout(expert=8, is_exact=True))
    assert 8 < spread / alone < 9  # and the tokens themselves, which came from elsewhere
    assert exact / spread == pytest.approx(2.995 / 8, rel=1e-3)
