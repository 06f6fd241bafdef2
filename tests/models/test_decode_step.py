"""A forward into a filled cache as a CUDA graph needs it: nothing waits, no shape depends on data, and what
was recorded once goes on being right when rows, pages and lengths have changed.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from dscoder.config import MlaConfig, preset
from dscoder.models import Transformer, allocate_cache
from dscoder.models.cache import Cache

NAMES = ["tiny_dense", "tiny_moe"]
MAX_POSITIONS = 150
# torch marks the ops that bring a value to the host, and those whose result is as long as the data says.
WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the op needs to know values; indices do as masks, which become lists of their ones."""
    if str(func.overloadpacket) in ("aten.index", "aten.index_put", "aten.index_put_"):
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    return not WAITING.isdisjoint(func.tags)


class Listener(TorchDispatchMode):
    """Refuses ops that wait, and notes all others."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        op = str(func.overloadpacket)
        if waits(func, args):
            raise AssertionError(f"{op} waits for the device")
        self.ops.append(op)
        return func(*args, **(kwargs or {}))


def small(name: str) -> Transformer:
    config = replace(preset(name), num_layers=2, vocab_size=64)
    model = Transformer(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(10.0)
    return model


def tokens(num_rows: int, length: int, *, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (num_rows, length), generator=torch.Generator().manual_seed(seed))


def empty_cache(model: Transformer, num_rows: int, **options: Any) -> Cache:
    return allocate_cache(model.config, num_sequences=num_rows, max_positions=MAX_POSITIONS, **options)


def test_the_listener_hears_what_waits():
    waiting = (
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        torch.nonzero,
        lambda x: bool(x.any()),
        torch.unique,
    )
    for wait in waiting:
        with pytest.raises(AssertionError, match="waits for the device"), torch.no_grad(), Listener():
            wait(torch.ones(3))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", [1, 3, 80])  # the last is worth expanding latents
def test_a_forward_into_a_filled_cache_waits_for_nothing(name, length):
    model = small(name)
    cache = empty_cache(model, 4)
    model(tokens(4, 7), cache=cache)
    num_new_B = torch.tensor([1, 0, length, 1], dtype=torch.int32)
    new_BS = tokens(4, length)
    # Without a gradient ops arrive as their primitive parts; our own arrive whole, whose kernels wait for
    # nothing: what a reference does on the host is not seen.
    with torch.no_grad(), Listener() as listener:
        model(new_BS, cache=cache.rows(0, 4, max_len=MAX_POSITIONS - length), num_new_B=num_new_B)
    latent = "dscoder.mla_prefill" if length == 80 else "dscoder.mla_decode"
    attention = [op for op in listener.ops if op == latent or "dot_product" in op]
    assert len(attention) == model.config.num_layers


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_that_is_used_whole_waits_only_when_it_may_be_full(name):
    model = small(name)
    cache = empty_cache(model, 2)
    model(tokens(2, MAX_POSITIONS - 2), cache=cache, num_new_B=torch.tensor([9, 5]))
    new_B1 = tokens(2, 1)
    with torch.no_grad(), Listener():
        for _ in range(2):
            model(new_B1, cache=cache)
    with torch.no_grad(), Listener(), pytest.raises(AssertionError, match="waits for the device"):
        model(new_B1, cache=cache)
    model(new_B1, cache=cache)
    assert cache.seq_lens_B.tolist() == [12, 8]


@pytest.mark.parametrize("name", NAMES)
def test_shapes_follow_from_shapes_alone(name):
    with FakeTensorMode():  # holds no values that could be asked for
        model = Transformer(replace(preset(name), num_layers=2, vocab_size=64)).eval()
        cache = empty_cache(model, 3)
        view = cache.rows(0, 3, max_len=MAX_POSITIONS - 1)
        with torch.no_grad():
            logits = model(
                torch.zeros(3, 1, dtype=torch.int32),
                cache=view,
                num_new_B=torch.ones(3, dtype=torch.int32),
            )
    assert logits.shape == (3, 1, 64)


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_step_serves_rows_that_come_later(name):
    """The record is a list of ops over fixed tensors, as a CUDA graph is."""
    model = small(name)
    is_paged = isinstance(model.config.attention, MlaConfig)
    cache = empty_cache(model, 3, num_pages=9 if is_paged else None)
    # Inputs and the answer lie where the record has them.
    token_B1, num_new_B = torch.zeros(3, 1, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)

    def step(token_B1: Tensor, num_new_B: Tensor) -> Tensor:
        return model(token_B1, cache=cache.rows(0, 3, max_len=MAX_POSITIONS - 1), num_new_B=num_new_B)

    with torch.no_grad():
        recorded = make_fx(step)(token_B1, num_new_B)
    assert cache.seq_lens_B.tolist() == [0, 0, 0]  # recorded with no live row

    histories = {0: tokens(1, 63, seed=1)[0], 2: tokens(1, 100, seed=2)[0]}
    pages = {0: [4, 8], 2: [1, 7]}
    for row, history in histories.items():
        cache.assign(row, pages[row] if is_paged else [])
        model(history[None], cache=cache.rows(row, row + 1, max_len=0))
    for seed in (3, 4, 5):
        if seed == 5:  # row 2 goes on as row 1
            cache.move(2, 1, num_tokens=len(histories[2]))
            cache.clear(2)
            histories[1] = histories.pop(2)
        token_B1.copy_(tokens(3, 1, seed=seed))
        num_new_B.copy_(torch.tensor([row in histories for row in range(3)]))
        got_B1V = recorded(token_B1, num_new_B)
        for row, history in histories.items():
            histories[row] = torch.cat([history, token_B1[row]])
            alone_V = model(histories[row][None])[0, -1]
            torch.testing.assert_close(got_B1V[row, 0], alone_V, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_rows_come_and_go_without_tensors_of_the_host(name):
    """A GPU would be waited for before it has read them; pages alone are a list that the host makes."""
    cache = empty_cache(small(name), 3)
    with Listener() as heard:
        cache.move(2, 0, num_tokens=7)
        cache.clear(2)
    assert cache.seq_lens_B.tolist() == [7, 0, 0]
    assert heard.ops
    assert "aten.lift_fresh" not in heard.ops


@pytest.mark.parametrize("name", NAMES)
def test_with_a_cache_nothing_is_differentiated_and_no_weight_changes(name):
    model = small(name).requires_grad_(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cache = empty_cache(model, 2)
    for length in (5, 1):
        hidden_BSD = model.features(tokens(2, length), cache=cache).hidden_BSD
        assert not hidden_BSD.requires_grad
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_decoding_under_autocast_is_the_forward_under_autocast(name):
    model = small(name)
    cache = empty_cache(model, 2, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted_B1V = model(tokens(2, 10))[:, 9:]
        model(tokens(2, 10)[:, :9], cache=cache)
        got_B1V = model(tokens(2, 10)[:, 9:], cache=cache)
    assert got_B1V.dtype == torch.bfloat16
    cosine = torch.nn.functional.cosine_similarity(got_B1V.float().flatten(), wanted_B1V.float().flatten(), 0)
    assert cosine > 0.999
