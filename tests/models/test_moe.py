"""Experts against a plain loop; token dropping by hand; balance terms only while trained on."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dscoder import ops
from dscoder.config import BalanceConfig, MoeConfig, preset
from dscoder.models import Transformer, allocate_cache
from dscoder.models.moe import DROPPED, Moe, count_choices, drop_over_capacity, gate_logits
from dscoder.models.placement import chosen_sequences, place

CONFIG = MoeConfig(
    num_experts=6,
    num_shared_experts=2,
    num_topk=2,
    expert_width=5,
    num_groups=3,
    num_groups_kept=2,
    scale=16.0,
    balance=BalanceConfig(expert=0.1, device=0.2, communication=0.3),
)


def build(config):
    moe = Moe(8, config)
    generator = torch.Generator().manual_seed(3)
    for parameter in moe.parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    return moe


def place_tokens(num_rows, length, *, drops_tokens=False):
    tokens_BS = torch.arange(num_rows * length).view(num_rows, length)
    return place(
        preset("tiny_moe"), tokens_BS, cu_seqlens=None, cache=None, num_new_B=None, drops_tokens=drops_tokens
    )


def gated(x, gate_up, down):
    gate, up = gate_up.chunk(2)
    return (F.silu(x @ gate.t()) * (x @ up.t())) @ down.t()


def by_loop(moe, x_TD):
    """Eqs 20-22 with device-limited routing, one token and one expert at a time."""
    config, out = moe.config, []
    for x in x_TD:
        probs = (moe.gate.weight @ x).softmax(dim=0)
        groups = probs.view(config.num_groups, -1).amax(dim=1).topk(config.num_groups_kept).indices
        members = [e for e in range(config.num_experts) if e // 2 in groups.tolist()]
        chosen = sorted(members, key=lambda e: -probs[e])[: config.num_topk]
        terms = [
            probs[e] * config.scale * gated(x, moe.experts.gate_up[e], moe.experts.down[e]) for e in chosen
        ]
        if moe.shared is not None:
            terms.append(gated(x, moe.shared.gate_up.weight, moe.shared.down.weight))
        out.append(sum(terms))
    return torch.stack(out)


@pytest.mark.parametrize("num_shared_experts", [0, 1, 2])
def test_output_is_the_papers_sum(num_shared_experts):
    moe = build(replace(CONFIG, num_shared_experts=num_shared_experts)).eval()
    x_TD = torch.randn(11, 8, generator=torch.Generator().manual_seed(4))
    out_TD, terms = moe(x_TD, place_tokens(1, 11))
    torch.testing.assert_close(out_TD, by_loop(moe, x_TD), rtol=1e-4, atol=1e-5)
    assert terms is None


def test_balance_terms_come_with_a_weight_training_and_a_gradient():
    moe, x_TD = build(CONFIG), torch.randn(4, 8)
    assert moe.train()(x_TD, place_tokens(2, 2))[1].shape == (3,)
    with torch.no_grad():
        assert moe(x_TD, place_tokens(2, 2))[1] is None
    assert moe.eval()(x_TD, place_tokens(2, 2))[1] is None
    unweighted = build(replace(CONFIG, balance=BalanceConfig())).train()
    assert unweighted(x_TD, place_tokens(2, 2))[1] is None


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_balance_terms_are_those_of_the_choice_and_train_the_gate(renormalize):
    moe = build(replace(CONFIG, renormalize=renormalize)).train()
    x_TD = torch.randn(12, 8, generator=torch.Generator().manual_seed(5))
    out_TD, terms_3 = moe(x_TD, place_tokens(3, 4))
    weight = moe.gate.weight.detach().clone().requires_grad_()
    logits_TE = x_TD @ weight.t()
    routing = {"num_groups": CONFIG.num_groups, "num_groups_kept": CONFIG.num_groups_kept}
    idx_TK, _ = ops.moe_gate(logits_TE, num_topk=CONFIG.num_topk, **routing)
    wanted = ops.moe_balance_terms(logits_TE.softmax(dim=-1), idx_TK, num_sequences=3, **routing)
    torch.testing.assert_close(terms_3, wanted)
    (grad,) = torch.autograd.grad(terms_3.sum(), moe.gate.weight, retain_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(wanted.sum(), weight)[0])
    assert torch.autograd.grad(out_TD.sum(), moe.gate.weight)[0].abs().max() > 0
    torch.testing.assert_close(moe.eval()(x_TD, place_tokens(3, 4))[0], out_TD)


DROPPING = MoeConfig(
    num_experts=4, num_shared_experts=0, num_topk=2, expert_width=1, num_groups=2, num_groups_kept=2
)
# Devices hold experts 0, 1 and 2, 3. Of 8 choices device 0 got 5, device 1 got 3.
IDX_TK = torch.tensor([[0, 1], [0, 2], [1, 3], [0, 3]], dtype=torch.int32)
AFFINITY_TK = torch.tensor([[0.5, 0.1], [0.4, 0.3], [0.1, 0.2], [0.6, 0.3]])


def drop(*, capacity_factor=1.0, never=(False, False, False, False)):
    return drop_over_capacity(
        IDX_TK,
        AFFINITY_TK,
        config=DROPPING,
        capacity_factor=capacity_factor,
        never_dropped_T=torch.tensor(never),
    ).tolist()


def test_a_device_over_its_even_share_drops_its_lowest_affinity():
    # Even share: 4 choices. Device 0 drops one of the two at 0.1: the later token's.
    assert drop() == [[0, 1], [0, 2], [-1, 3], [0, 3]]


def test_capacity_factor_scales_the_share_of_every_device():
    # 2 choices a device: 0 keeps 0.6 and 0.5; 1 keeps 0.3 and 0.3.
    assert drop(capacity_factor=0.5) == [[0, -1], [-1, 2], [-1, -1], [0, 3]]


def test_ample_capacity_drops_nothing():
    assert drop(capacity_factor=1.25) == IDX_TK.tolist()


def test_protected_tokens_stay_and_push_others_out():
    assert drop(capacity_factor=0.5, never=(False, False, True, False)) == [
        [-1, -1],
        [-1, 2],
        [1, 3],
        [0, -1],
    ]


def test_protected_tokens_stay_even_over_capacity():
    assert drop(capacity_factor=0.125, never=(True, True, True, True)) == IDX_TK.tolist()


def test_no_device_exceeds_its_share():
    config = replace(CONFIG, num_experts=24, num_groups=4, num_groups_kept=2)
    generator = torch.Generator().manual_seed(6)
    probs_TE = (4 * torch.randn(301, 24, generator=generator)).softmax(dim=-1)
    affinity_TK, idx_TK = probs_TE.topk(2)
    kept = drop_over_capacity(
        idx_TK.int(),
        affinity_TK,
        config=config,
        capacity_factor=1.0,
        never_dropped_T=torch.zeros(301, dtype=torch.bool),
    )
    sent = (idx_TK // 6).flatten().bincount(minlength=4)
    done = (kept[kept >= 0] // 6).bincount(minlength=4)
    assert torch.equal(done, sent.clamp(max=301 * 2 // 4))
    for device in range(4):
        on_device = idx_TK // 6 == device
        dropped, stayed = affinity_TK[on_device & (kept < 0)], affinity_TK[on_device & (kept >= 0)]
        assert not len(dropped) or dropped.max() <= stayed.min()


class Softmaxes(TorchDispatchMode):
    """Counts them; those of an op's own are not seen."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten._softmax.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("scale", "renormalize", "num_softmaxes"),
    [(1.0, False, 0), (16.0, False, 0), (2.446, False, 1), (0.5, False, 1), (16.0, True, 1)],
)
def test_dropping_takes_the_gates_weights_where_they_order_as_the_probabilities(
    scale, renormalize, num_softmaxes
):
    config = replace(CONFIG, scale=scale, renormalize=renormalize, capacity_factor=0.5)
    moe = build(config).train()
    x_TD = torch.randn(101, 8, generator=torch.Generator().manual_seed(9))
    logits_TE = F.linear(x_TD, moe.gate.weight)
    gate = {"num_topk": 2, "num_groups": 3, "num_groups_kept": 2, "scale": scale, "renormalize": renormalize}
    idx_TK, weight_TK = ops.moe_gate(logits_TE, **gate)
    with Softmaxes() as softmaxes:
        affinity_TK = moe._affinity(logits_TE, idx_TK, weight_TK)
    assert softmaxes.num == num_softmaxes
    options = {"config": config, "capacity_factor": 0.5, "never_dropped_T": torch.arange(101) % 7 == 0}
    kept = drop_over_capacity(idx_TK, affinity_TK, **options)
    wanted = drop_over_capacity(idx_TK, logits_TE.softmax(dim=-1).gather(1, idx_TK.long()), **options)
    assert torch.equal(kept, wanted)
    assert bool((kept < 0).any())


def test_about_a_tenth_of_the_sequences_is_never_dropped_whatever_their_row():
    tokens_BS = torch.randint(0, 1000, (4000, 16), generator=torch.Generator().manual_seed(7))
    chosen_B = chosen_sequences(tokens_BS, 0.1)
    assert 330 <= chosen_B.sum() <= 470
    assert torch.equal(chosen_sequences(tokens_BS.flip(0), 0.1), chosen_B.flip(0))
    assert not chosen_sequences(tokens_BS, 0.0).any()
    assert chosen_sequences(tokens_BS, 1.0).all()


def test_tokens_are_dropped_in_training_only():
    config = preset("tiny_moe")
    moe = replace(config.moe, num_groups=4, num_groups_kept=1, capacity_factor=0.5, never_dropped_share=0.0)
    dropping = Transformer(replace(config, moe=moe, num_layers=2, init_std=0.1))
    plain = Transformer(replace(config, moe=replace(moe, capacity_factor=None), num_layers=2, init_std=0.1))
    tokens_BS = torch.randint(0, 4096, (2, 24), generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        assert torch.equal(dropping.eval()(tokens_BS), plain.eval()(tokens_BS))
        assert not torch.allclose(dropping.train()(tokens_BS), plain.train()(tokens_BS), atol=1e-3)
        protected = Transformer(replace(dropping.config, moe=replace(moe, never_dropped_share=1.0))).train()
        assert torch.equal(protected(tokens_BS), plain(tokens_BS))
        # Whoever generates between training steps has no need to change the mode.
        caches = [allocate_cache(dropping.config, num_sequences=2, max_positions=24) for _ in range(2)]
        for part_BS in tokens_BS.split([20, 4], dim=1):
            got, wanted = (
                model(part_BS, cache=cache) for model, cache in zip((dropping, plain), caches, strict=True)
            )
            assert torch.equal(got, wanted)


def test_autocast_does_not_round_what_the_gate_decides_on(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, seen = build(CONFIG), []
    route = Moe._choose

    def look(moe, logits_TE, placement):
        seen.append(logits_TE)
        return route(moe, logits_TE, placement)

    monkeypatch.setattr(Moe, "_choose", look)
    x_TD = torch.randn(6, 8, generator=torch.Generator().manual_seed(5))
    moe(x_TD, place_tokens(1, 6))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moe(x_TD, place_tokens(1, 6))
    alone, under_autocast = seen
    assert under_autocast.dtype == torch.float32
    assert under_autocast.equal(alone)


def test_a_layer_without_memory_has_a_shape() -> None:
    moe = Moe(8, CONFIG, device=torch.device("meta"))
    assert moe(torch.empty(6, 8, device="meta"), place_tokens(1, 6))[0].shape == (6, 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_gate_decides_in_float32_or_wider(device: str, with_gradient: bool, dtype: torch.dtype) -> None:
    x_TD, weight_ED = (torch.ones(shape, device=device, dtype=dtype) for shape in ((6, 40), (4, 40)))
    with torch.set_grad_enabled(with_gradient):
        logits_TE = gate_logits(x_TD * 1.0078125, weight_ED)
    assert logits_TE.dtype == torch.promote_types(dtype, torch.float32)
    assert logits_TE.shape == (6, 4)
    if device == "cpu":
        assert (logits_TE == 40.3125).all()  # which bfloat16 does not hold


def test_choices_are_counted_by_expert_and_dropped_ones_nowhere() -> None:
    idx_TK = torch.tensor([[0, 2], [DROPPED, 0], [3, DROPPED]], dtype=torch.int32)
    assert count_choices(idx_TK, 4).tolist() == [2, 0, 1, 1]
    assert count_choices(idx_TK[:0], 4).tolist() == [0, 0, 0, 0]
