"""What the benchmark of a whole decoding step counts; its peers compute the same in the same memory."""

import pytest
import torch

from benchmarks import bench_decode_step
from benchmarks.bench_decode_step import CONTEXT, Subject, agreed, our_step, their_steps
from benchmarks.decode_bytes import decode_bytes, experts_hit
from dscoder.config import preset
from dscoder.models import Transformer
from dscoder.testing.compare import assert_close

TINY = preset("tiny_moe")
BF16 = torch.bfloat16


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("tiny_moe")


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.tensor([[5], [77], [4095]])


def test_with_every_expert_hit_all_weights_are_read_but_the_table() -> None:
    numels = {name: one.numel() for name, one in Transformer(TINY, device="meta").named_parameters()}
    weights = sum(numels.values()) - numels["embed.weight"]
    rows = 3 * TINY.width  # of the table
    latents = 3 * 100 * TINY.num_layers * (64 + 16)
    assert decode_bytes(TINY, num_rows=3, context=100, num_hit=[16] * 3, dtype=BF16) == 2 * (
        weights + rows + latents
    )


def test_an_expert_is_read_only_where_it_is_hit() -> None:
    counts = {"num_rows": 1, "context": 1, "dtype": torch.float32}
    less, more = (decode_bytes(TINY, num_hit=num_hit, **counts) for num_hit in ([4, 4, 4], [4, 6, 4]))
    assert more - less == 2 * 4 * 3 * 256 * 96


def test_a_dense_model_reads_keys_and_values() -> None:
    dense = preset("tiny_dense")
    one, two = (decode_bytes(dense, num_rows=1, context=n, num_hit=[], dtype=BF16) for n in (1, 2))
    assert two - one == 2 * 4 * 2 * 2 * 64  # bytes, layers, keys and values, heads, width


def test_v2_lite_reads_a_seventh_of_its_weights_for_one_row() -> None:
    lite = preset("v2_lite")
    one = decode_bytes(lite, num_rows=1, context=1024, num_hit=[6] * 26, dtype=BF16)
    many = decode_bytes(lite, num_rows=128, context=1024, num_hit=[64] * 26, dtype=BF16)
    assert one == pytest.approx(4.94e9, rel=0.01)  # 1.2 ms at 4.2 TB/s
    assert many == pytest.approx(35.1e9, rel=0.01)


@pytest.mark.parametrize("num_hit", [[], [4], [4] * 4])
def test_every_expert_layer_has_its_number(num_hit: list[int]) -> None:
    message = f"num_hit must have one number for each of 3 expert layers, got {len(num_hit)}"
    with pytest.raises(ValueError, match=message):
        decode_bytes(TINY, num_rows=1, context=1, num_hit=num_hit, dtype=BF16)


def test_the_experts_of_a_step_are_counted(subject: Subject, tokens: torch.Tensor) -> None:
    def hit(tokens: torch.Tensor) -> list[int]:
        return experts_hit(our_step(subject.model, subject.cache(len(tokens))).prepare(tokens).call)

    assert hit(tokens[:1]) == [4, 4, 4]
    assert all(4 < num_hit <= 12 for num_hit in hit(tokens))
    assert hit(torch.arange(64)[:, None]) == [16, 16, 16]


def test_a_step_can_be_repeated(subject: Subject, tokens: torch.Tensor) -> None:
    cache = subject.cache(3)
    run = our_step(subject.model, cache).prepare(tokens)
    first, again = run(), run()
    assert torch.equal(first, again)
    assert cache.seq_lens_B.tolist() == [CONTEXT - 1] * 3
    token_B, logits_BV = run.call()
    assert torch.equal(token_B, logits_BV.argmax(dim=-1))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_peers_step_over_the_same_weights_and_latents(
    subject: Subject, tokens: torch.Tensor, num_rows: int
) -> None:
    pytest.importorskip("transformers")
    cache, tokens = subject.cache(num_rows), tokens[:num_rows]
    ours = our_step(subject.model, cache).prepare(tokens)()
    peers = their_steps(subject, cache, ours, has_compiled=False)
    for name, peer in peers.items():
        run = peer.prepare(tokens)
        assert_close(run(), ours)
        assert torch.equal(run(), run()), name
    ours_too = dict(subject.model.named_parameters())
    theirs = dict(subject.theirs.named_parameters())
    shared = theirs["model.layers.1.mlp.experts.down_proj"]
    assert shared.data_ptr() == ours_too["layers.1.moe.experts.down"].data_ptr()
    assert not any(one.is_meta for one in (*theirs.values(), *subject.theirs.buffers()))


def test_compiled_peers_are_asked_for_by_name(subject: Subject) -> None:
    pytest.importorskip("transformers")

    def names(num_rows: int, *, has_compiled: bool = False) -> set[str]:
        cache = subject.cache(num_rows)
        return set(their_steps(subject, cache, torch.zeros(num_rows, 4096), has_compiled=has_compiled))

    assert len(names(1, has_compiled=True) - names(1)) == 1
    assert names(1) - names(2) == {"transformers batched_mm"}


def test_logits_agree_by_their_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_decode_step, "MODEL_TOLERANCE", 0.1)
    wanted = torch.ones(2, 50)
    near, far = wanted.clone(), wanted.clone()
    near[0, 0], far[0, 0] = 1.99, 2.01
    assert agreed(near, wanted) is wanted
    assert agreed(far, wanted) is far
    assert agreed(wanted * torch.nan, wanted) is not wanted
