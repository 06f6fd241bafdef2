"""What each rank holds: cut alike by FSDP, by `take` and for checkpoints, and summed without being asked."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.utils._python_dispatch import TorchDispatchMode

from dscoder.config import ModelConfig
from dscoder.config.parallel import ParallelConfig
from dscoder.models.sharding import Part, is_counted, parts, shard_model
from dscoder.runtime.mesh import Mesh, arrange, open_mesh
from dscoder.testing.ranks import run_ranks
from tests.models.sharded import full, loss_of, sharded_model, tiny, tokens_of, whole_gradients, whole_model

dist = pytest.mark.dist


def uneven() -> ModelConfig:
    """Three experts on up to four ranks, gate and up with an odd number of rows a rank."""
    config = tiny("tiny_moe")
    assert config.moe is not None
    moe = replace(config.moe, num_experts=3, expert_width=17, num_groups=1, num_groups_kept=1, num_topk=2)
    return replace(config, moe=moe, tie_embeddings=True)


class CountCollectives(TorchDispatchMode):
    """Writes down the names of the collectives."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    @property
    def calls(self) -> Counter[str]:
        """How many of each."""
        return Counter(self.names)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.__name__.split(".")[0].strip("_"))
        return func(*args, **(kwargs or {}))


def norm_of(found: dict[str, Part], mesh: Mesh) -> float:
    """The norm of all gradients, from what each rank holds."""
    squares = [part.gradient().square().sum() for part in found.values() if is_counted(part)]  # type: ignore[union-attr]
    return float(mesh.all_sum(torch.stack([*squares, torch.zeros(())]).sum().reshape(1)).sqrt())


def look_at_layouts(config: ModelConfig, layouts: list[tuple[int, int]]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"weights": [], "norms": [], "moved": [], "sizes": []}
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for expert, replicate in layouts:
            mesh = arrange(world, expert=expert, replicate=replicate)
            model, by_name = sharded_model(config, mesh)
            found["weights"].append({name: full(part, part.local) for name, part in by_name.items()})
            before = {name: part.local.data_ptr() for name, part in by_name.items()}
            loss_of(model, tokens_of(mesh.rank, config), num_batches=mesh.world_size).backward()
            after = {name: part.local.data_ptr() for name, part in parts(model, mesh).items()}
            found["moved"].append([name for name in before if before[name] != after[name]])
            found["norms"].append(norm_of(by_name, mesh))
            found["sizes"].append(mesh.gather(sum(part.local.numel() for part in by_name.values())))
    return found


@dist
@pytest.mark.parametrize(
    ("num_ranks", "config", "layouts"),
    [
        (2, tiny("tiny_moe"), [(2, 1), (1, 2)]),
        (4, uneven(), [(1, 1), (1, 2)]),
        (4, tiny("tiny_moe"), [(2, 2), (2, 1)]),
    ],
    ids=["2_ranks", "uneven", "4_ranks"],
)
def test_parts_make_up_the_whole(num_ranks: int, config: ModelConfig, layouts: list[tuple[int, int]]) -> None:
    wanted = dict(whole_model(config).named_parameters())
    gradients = whole_gradients(config, num_ranks)
    norm = float(torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum().sqrt())
    num_weights = sum(weight.numel() for weight in wanted.values())
    for found in run_ranks(look_at_layouts, config, layouts, num_ranks=num_ranks):
        for weights in found["weights"]:
            assert weights.keys() == wanted.keys()
            assert all(torch.equal(weights[name], wanted[name]) for name in wanted)
        assert found["norms"] == pytest.approx([norm] * len(layouts), rel=1e-5)
        # The optimizer holds on to the memory of the parts before the first forward.
        assert found["moved"] == [[]] * len(layouts)
        for sizes, (_, replicate) in zip(found["sizes"], layouts, strict=True):
            assert sum(sizes) == replicate * num_weights


def save_and_load(config: ModelConfig, directory: str, layouts: list[tuple[int, int]]) -> list[Any]:
    """Save in the first layout, load in the others, where every weight was cleared; the wholes."""
    found = []
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for turn, (expert, replicate) in enumerate(layouts):
            mesh = arrange(world, expert=expert, replicate=replicate)
            _, by_name = sharded_model(config, mesh)
            state = {name: part.whole(part.local) for name, part in by_name.items()}
            if turn == 0:
                dcp.save(state, checkpoint_id=directory, process_group=mesh.control)
                continue
            for part in by_name.values():
                part.local.fill_(torch.nan)
            dcp.load(state, checkpoint_id=directory, process_group=mesh.control)
            found.append({name: full(part, part.local) for name, part in by_name.items()})
    return found


@dist
@pytest.mark.parametrize(
    ("config", "layouts"),
    [(tiny("tiny_moe"), [(2, 2), (4, 1), (1, 1), (2, 1)]), (uneven(), [(1, 1), (1, 2), (1, 4)])],
    ids=["even", "uneven"],
)
def test_a_checkpoint_loads_in_another_layout(
    config: ModelConfig, layouts: list[tuple[int, int]], tmp_path: Path
) -> None:
    wanted = dict(whole_model(config).named_parameters())
    for by_layout in run_ranks(save_and_load, config, str(tmp_path), layouts, num_ranks=4):
        for weights in by_layout:
            assert weights.keys() == wanted.keys()
            assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def count_collectives(recompute: str, expert: int) -> dict[str, Any]:
    """Of two backward passes without and one with a sum over ranks, on two ranks."""
    config = tiny("tiny_moe")
    with open_mesh(expert=expert, replicate=1, device="cpu", timeout=60) as mesh:
        model, by_name = sharded_model(config, mesh)
        for layer in model.layers:
            layer.recompute = recompute
        calls = []
        for turn in range(3):
            model.set_requires_gradient_sync(turn == 2)
            with CountCollectives() as counted:
                loss_of(model, tokens_of(turn, config), num_batches=3).backward()
            calls.append(counted.calls)
        gradients = {name: part.gradient() for name, part in by_name.items()}
    return {"calls": calls, "gradients": gradients}


@dist
# Sums of two layers and of the root; where the ranks have the same experts, of those too.
@pytest.mark.parametrize(("expert", "num_sums"), [(1, 4), (2, 3)])
def test_recomputation_moves_no_more_than_it_must(expert: int, num_sums: int) -> None:
    none, selective, whole = (
        run_ranks(count_collectives, mode, expert, num_ranks=2)[0] for mode in ("none", "selective", "full")
    )
    for mode in (none, selective, whole):
        assert [calls["reduce_scatter_base"] for calls in mode["calls"]] == [0, 0, num_sums]
        for name, gradient in mode["gradients"].items():
            assert torch.equal(gradient, none["gradients"][name])
    # Neither gathers a weight nor sends a token again.
    assert selective["calls"] == none["calls"]
    for again, once in zip(whole["calls"], none["calls"], strict=True):
        assert again["allgather_base"] == once["allgather_base"]
        assert (again["alltoall_base"] > once["alltoall_base"]) is (expert == 2)
        assert (once["alltoall_base"] > 0) is (expert == 2)


def order_of_collectives() -> tuple[list[str], list[str]]:
    """In the forward and in the backward pass, on four ranks of which one alone has tokens."""
    config = replace(tiny("tiny_moe"), num_layers=3)
    with open_mesh(expert=2, replicate=1, device="cpu", timeout=60) as mesh:
        model, _ = sharded_model(config, mesh)
        tokens_BS = tokens_of(0, config)[: 2 if mesh.is_first else 0]
        with CountCollectives() as forward:
            loss = loss_of(model, tokens_BS, num_batches=1)
        with CountCollectives() as backward:
            loss.backward()
    return forward.names, backward.names


@dist
def test_experts_are_gathered_before_tokens_travel_to_them() -> None:
    first, *others = run_ranks(order_of_collectives, num_ranks=4)
    assert others == [first] * 3  # else ranks would wait for each other for ever
    weights, tokens = "allgather_base", "alltoall_base"
    forward, _ = first
    # The root, the layer without experts, then twice a layer, its experts, and the ways of tokens.
    assert forward == [weights] * 4 + [tokens] * 4 + [weights] * 2 + [tokens] * 4


def test_without_a_mesh_a_part_is_the_parameter() -> None:
    model = whole_model(tiny("tiny_moe"))
    found = parts(model, None)
    assert list(found) == [name for name, _ in model.named_parameters()]
    part = found["embed.weight"]
    assert part.gradient() is None
    assert part.local.data_ptr() == model.embed.weight.data_ptr()
    tensor = torch.ones(1)
    assert part.whole(tensor) is tensor
    assert is_counted(part)


def test_a_whole_of_another_shape_is_refused() -> None:
    part = parts(whole_model(tiny("tiny_dense")), None)["norm.weight"]
    with pytest.raises(ValueError, match=r"norm.weight: the whole must have shape \(32,\), got \(31,\)"):
        part.take(torch.ones(31))


def test_a_model_with_the_experts_of_another_layout_is_refused() -> None:
    model = whole_model(tiny("tiny_moe"))
    mesh = SimpleNamespace(expert=2)
    wanted = r"the model must hold 8 / 2 experts of each layer, got 8; build it with expert_parallel"
    with pytest.raises(ValueError, match=wanted):
        shard_model(model, mesh, dtype=torch.float32, config=ParallelConfig())  # type: ignore[arg-type]
