"""The whole model: packing, causality, gradients, types, compilation, refusals."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from dscoder.config import MoeConfig, preset
from dscoder.models import Transformer, allocate_cache, init_weights

NAMES = ["tiny_dense", "tiny_moe"]


def small(name, **changes):
    return replace(preset(name), num_layers=2, vocab_size=64, init_std=0.1, **changes)


def tokens(num_rows, length):
    return torch.randint(0, 64, (num_rows, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_are_as_if_alone(name):
    model = Transformer(small(name)).eval().requires_grad_(False)
    tokens_BS = tokens(2, 30)
    cu_seqlens = torch.tensor([0, 7, 8, 30, 55, 60], dtype=torch.int32)
    got = model(tokens_BS, cu_seqlens=cu_seqlens).flatten(0, 1)
    flat = tokens_BS.flatten()
    for start, end in [(0, 7), (7, 8), (8, 30), (30, 55), (55, 60)]:
        alone = model(flat[None, start:end])[0]
        torch.testing.assert_close(got[start:end], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_gradient_reaches_another_document_or_the_future(name):
    model = Transformer(small(name)).eval()
    embedded = []
    model.embed.register_forward_hook(
        lambda _module, _args, out: embedded.append(out.requires_grad_().retain_grad() or out)
    )
    logits = model(tokens(1, 20), cu_seqlens=torch.tensor([0, 8, 20], dtype=torch.int32))
    logits[0, 14].sum().backward()
    reached = embedded[0].grad[0].abs().sum(dim=-1) > 0
    assert reached.tolist() == [8 <= position <= 14 for position in range(20)]


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_learns(name):
    model = Transformer(small(name)).train()
    features = model.features(tokens(2, 40))
    loss = F.cross_entropy(model.head(features.hidden_BSD).flatten(0, 1), tokens(2, 40).flatten())
    (loss + features.balance).backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.abs().sum() > 0, parameter_name


def test_balance_is_the_weighted_sum_over_layers():
    config = small("tiny_moe")
    weights = {"expert": 0.5, "device": 0.25, "communication": 0.125}
    balance = replace(config.moe.balance, **weights)
    config = replace(config, moe=replace(config.moe, num_groups=4, num_groups_kept=2, balance=balance))
    features = Transformer(config).train().features(tokens(3, 12))
    # Layer 0 is dense, so the mean over layers is layer 1's value.
    wanted = (features.balance_terms_3 * torch.tensor([0.5, 0.25, 0.125])).sum()
    torch.testing.assert_close(features.balance.detach(), wanted)
    assert features.balance.requires_grad
    assert not features.balance_terms_3.requires_grad
    assert (features.balance_terms_3 > 0.5).all()


@pytest.mark.parametrize("name", NAMES)
def test_balance_is_zero_outside_training(name):
    features = Transformer(small(name)).eval().features(tokens(1, 3))
    assert features.balance == 0
    assert features.balance_terms_3 is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_training_forward_compiles_as_one_graph(name, is_packed):
    config = small(name)
    if config.moe is not None:
        moe = replace(config.moe, num_groups=4, num_groups_kept=2, capacity_factor=1.0)
        config = replace(config, moe=moe)
    model = Transformer(config, dtype=torch.float64).train()
    cu_seqlens = torch.tensor([0, 5, 16, 32], dtype=torch.int32) if is_packed else None

    def loss_of(run):
        model.zero_grad()
        features = run(tokens(2, 16), cu_seqlens=cu_seqlens)
        loss = features.hidden_BSD.square().sum() + features.balance
        loss.backward()
        return loss.detach(), model.embed.weight.grad.clone()

    compiled = torch.compile(model.features, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(loss_of(compiled), loss_of(model.features), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_follows_float32(name):
    model = Transformer(small(name)).eval().requires_grad_(False)
    wanted = model(tokens(2, 50))
    half = Transformer(small(name), dtype=torch.bfloat16).eval().requires_grad_(False)
    half.load_state_dict(model.state_dict())
    got = half(tokens(2, 50))
    assert got.dtype == torch.bfloat16
    assert F.cosine_similarity(got.float().flatten(), wanted.flatten(), dim=0) > 0.99
    cache = allocate_cache(half.config, num_sequences=2, max_positions=50, dtype=torch.bfloat16)
    steps = [half(tokens(2, 50)[:, :49], cache=cache), half(tokens(2, 50)[:, 49:], cache=cache)]
    assert F.cosine_similarity(torch.cat(steps, dim=1).float().flatten(), wanted.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("name", NAMES)
def test_weights_come_from_the_seed_alone(name):
    config = small(name)
    models = [Transformer(config) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        torch.manual_seed(torch.seed())
        init_weights(model, seed=seed)
    first, same, other = (torch.cat([p.flatten() for p in m.parameters()]) for m in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_weights_have_the_papers_spread_and_norms_are_one():
    model = Transformer(replace(preset("tiny_moe"), num_layers=2))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.0006, name


def test_a_meta_model_can_be_filled_later():
    built, later = Transformer(small("tiny_moe")), Transformer(small("tiny_moe"), device="meta")
    later.to_empty(device="cpu")
    init_weights(later, seed=0)
    with torch.no_grad():
        assert torch.equal(later.eval()(tokens(1, 9)), built.eval()(tokens(1, 9)))


def test_tied_models_share_one_matrix():
    model = Transformer(small("tiny_dense", tie_embeddings=True))
    assert model.head.weight is model.embed.weight


def test_a_group_of_layers_may_be_dense():
    moe = MoeConfig(num_experts=4, num_shared_experts=0, num_topk=1, expert_width=8, num_dense_layers=2)
    names = [name for name, _ in Transformer(small("tiny_moe", moe=moe)).named_parameters()]
    assert not [name for name in names if ".moe." in name]


REFUSED = [
    ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens_BS must have 2 dimensions, got shape \(3,\)"),
    ({"cu_seqlens": True, "cache": True}, "cu_seqlens must be None with a cache"),
    ({"num_new_B": True}, "num_new_B must be None without a cache"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED, ids=[message[:20] for _, message in REFUSED])
def test_arguments_that_do_not_go_together_are_refused(given, message):
    model = Transformer(small("tiny_moe"))
    cache = allocate_cache(model.config, num_sequences=1, max_positions=4) if "cache" in given else None
    with pytest.raises(ValueError, match=message):
        model(
            given.get("tokens", tokens(1, 3)),
            cu_seqlens=torch.tensor([0, 3], dtype=torch.int32) if "cu_seqlens" in given else None,
            cache=cache,
            num_new_B=torch.tensor([3]) if "num_new_B" in given else None,
        )


def test_tokens_that_are_no_ids_are_refused():
    with pytest.raises(TypeError, match=r"^Transformer: tokens_BS must be int32 or int64, got float32$"):
        Transformer(small("tiny_moe"))(torch.zeros(1, 3))


# For two rows of four tokens.
WRONG_ENDS = [
    ([], "must have at least one element, got 0"),
    ([0], "must go from 0 to the 8 tokens, got 0 to 0"),
    ([0, 4], "must go from 0 to the 8 tokens, got 0 to 4"),
    ([1, 4, 8], "must go from 0 to the 8 tokens, got 1 to 8"),
    ([0, 4, 20], "must go from 0 to the 8 tokens, got 0 to 20"),
    ([0, 5, 3, 8], "must not descend, got 5 before 3"),
    ([0, 3, 8], "must hold the end of every row of 4 tokens, got none at 4"),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("ends", "message"), WRONG_ENDS, ids=[str(ends) for ends, _ in WRONG_ENDS])
def test_ends_that_are_not_those_of_documents_are_refused(name, ends, message):
    with pytest.raises(ValueError, match=f"^Transformer: cu_seqlens {message}$"):
        Transformer(small(name))(tokens(2, 4), cu_seqlens=torch.tensor(ends, dtype=torch.int32))


@pytest.mark.parametrize("name", NAMES)
def test_ends_of_the_wrong_kind_are_refused(name):
    model = Transformer(small(name))
    with pytest.raises(TypeError, match=r"^Transformer: cu_seqlens must be int32, got int64$"):
        model(tokens(2, 4), cu_seqlens=torch.tensor([0, 4, 8]))
    with pytest.raises(
        ValueError, match=r"^Transformer: cu_seqlens must have 1 dimensions, got shape \(1, 3\)$"
    ):
        model(tokens(2, 4), cu_seqlens=torch.tensor([[0, 4, 8]], dtype=torch.int32))


@pytest.mark.parametrize("name", NAMES)
def test_documents_of_no_tokens_change_nothing(name):
    model = Transformer(small(name)).eval().requires_grad_(False)
    ends, with_empty = ([0, 3, 4, 8], [0, 0, 3, 3, 4, 8, 8])
    wanted, got = (
        model(tokens(2, 4), cu_seqlens=torch.tensor(e, dtype=torch.int32)) for e in (ends, with_empty)
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_packed_forward_runs_on_fake_tensors(name):
    with FakeTensorMode():
        model = Transformer(small(name))
        logits = model(torch.zeros(2, 4, dtype=torch.int64), cu_seqlens=torch.zeros(4, dtype=torch.int32))
    assert logits.shape == (2, 4, 64)


EMPTY = [(0, 5), (2, 0), (0, 0)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_batch_without_tokens_trains(name, shape, is_packed):
    config = small(name)
    if config.moe is not None:
        moe = replace(config.moe, num_groups=4, num_groups_kept=2, capacity_factor=1.0)
        config = replace(config, moe=moe)
    model = Transformer(config).train()
    ends = torch.zeros(3, dtype=torch.int32) if is_packed else None
    features = model.features(torch.zeros(shape, dtype=torch.int64), cu_seqlens=ends)
    assert features.hidden_BSD.shape == (*shape, config.width)
    assert features.balance == 0
    (model.head(features.hidden_BSD).sum() + features.balance).backward()
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_a_batch_without_tokens_leaves_the_cache_as_it_is(name, shape):
    model = Transformer(small(name)).eval().requires_grad_(False)
    num_rows, _ = shape
    cache = allocate_cache(model.config, num_sequences=num_rows, max_positions=8)
    for length in (shape[1], 3, shape[1]):
        logits = model(tokens(num_rows, length), cache=cache)
        assert logits.shape == (num_rows, length, 64)
    assert cache.seq_lens_B.tolist() == [shape[1] * 2 + 3] * num_rows
