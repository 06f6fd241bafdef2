"""The dense parts compile whole, once for all layers, and compute what they computed."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from dscoder import ops
from dscoder.models.compiled import compile_dense
from tests.models.sharded import loss_of, tiny, tokens_of, whole_model


@pytest.fixture(autouse=True)
def _no_graphs_of_other_tests() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_compiled_model_has_the_gradients_of_the_eager_one(recompute: str) -> None:
    eager, compiled = whole_model(tiny("tiny_moe")), whole_model(tiny("tiny_moe"))
    compile_dense(compiled, backend="aot_eager")
    for layer in compiled.layers:
        layer.recompute = recompute
    for model in (eager, compiled):
        loss_of(model, tokens_of(0, model.config), num_batches=1).backward()
    wanted = {name: parameter.grad for name, parameter in eager.named_parameters()}
    got = {name: parameter.grad for name, parameter in compiled.named_parameters()}
    # The compiled norm is torch's, which rounds otherwise than the one for CPUs.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def test_layers_share_their_graphs_and_have_no_breaks() -> None:
    num_graphs = []
    for num_layers in (2, 4):
        torch.compiler.reset()
        counters.clear()
        model = whole_model(replace(tiny("tiny_moe"), num_layers=num_layers))
        counter = CompileCounterWithBackend("eager")
        compile_dense(model, backend=counter)
        loss_of(model, tokens_of(0, model.config), num_batches=1).backward()
        assert not counters["graph_break"]
        num_graphs.append(counter.frame_count)
    # One of the norms, one of attention, one each of the dense and of the shared experts' MLP.
    assert num_graphs == [4, 4]


def test_the_routed_experts_are_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = []
    experts = ops.moe_experts

    def look(*args: object, **kwargs: object) -> object:
        traced.append(torch.compiler.is_compiling())
        return experts(*args, **kwargs)

    monkeypatch.setattr(ops, "moe_experts", look)
    model = whole_model(tiny("tiny_moe"))
    compile_dense(model, backend="eager")
    model.features(tokens_of(0, model.config))
    assert traced == [False]


def test_no_tokens_are_not_compiled() -> None:
    model = whole_model(tiny("tiny_moe"))
    counter = CompileCounterWithBackend("eager")
    compile_dense(model, backend=counter)
    loss_of(model, tokens_of(0, model.config)[:0], num_batches=1).backward()
    assert counter.frame_count == 0
    assert all(parameter.grad is not None for parameter in model.parameters())
