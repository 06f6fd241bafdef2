"""The published layout from and to many ranks: the bytes of one process, and errors on every rank."""

import errno
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dscoder import ops
from dscoder.checkpoint import load_pretrained, save_pretrained, sharded
from dscoder.checkpoint import replace as replace_module
from dscoder.checkpoint.sharded import load_sharded, save_sharded
from dscoder.config import ModelConfig
from dscoder.config.parallel import ParallelConfig
from dscoder.models import Transformer
from dscoder.models.sharding import materialise_shards, parts, shard_model
from dscoder.runtime.mesh import Mesh, arrange, open_mesh
from dscoder.testing.ranks import run_ranks
from tests.checkpoint.conftest import CONFIGS, EXPERTS, LATENT, LITE, build
from tests.whole import whole_of

pytestmark = pytest.mark.dist

# Over four ranks one has nothing of the latent's norm, and three experts a rank are cut by their rows.
UNEVEN = replace(
    LITE,
    vocab_size=67,
    mlp_width=23,
    attention=replace(LATENT, kv_lora_rank=5),
    moe=replace(EXPERTS, num_experts=6, expert_width=11),
)
TIED = replace(CONFIGS["tied_dense"], vocab_size=67)
MAX_SHARD_BYTES = 20_000
LAYOUTS = {2: [(1, 1), (2, 1), (1, 2)], 4: [(1, 1), (2, 1), (2, 2)]}  # (expert, replicate)


def empty_model(config: ModelConfig, mesh: Mesh, dtype: torch.dtype) -> Transformer:
    """A sharded model with memory and no values."""
    group = None
    if mesh.expert > 1 and config.moe is not None:
        group = ops.ExpertParallel(
            mesh.expert_group,
            num_experts=config.moe.num_experts,
            hidden=config.width,
            max_tokens=16,
            num_topk=config.moe.num_topk,
            dtype=dtype,
        )
    model = Transformer(config, device="meta", dtype=dtype, expert_parallel=group)
    shard_model(model, mesh, dtype=dtype, config=ParallelConfig())
    materialise_shards(model, device=mesh.device)
    for part in parts(model, mesh).values():
        part.local.fill_(torch.nan)
    return model


def assert_holds(model: Transformer, mesh: Mesh, whole: Transformer) -> None:
    """The parts of all ranks are `whole`."""
    wanted = dict(whole.named_parameters())
    found = parts(model, mesh)
    assert found.keys() == wanted.keys()
    for name, part in found.items():
        assert torch.equal(part.local, part.take(wanted[name].detach().to(part.local.dtype))), name
        whole_tensor = whole_of(part.whole(part.local))
        assert torch.equal(whole_tensor, wanted[name].detach().to(part.local.dtype)), name


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def round_trips(root: Path, num_ranks: int) -> None:
    """Every kind of checkpoint through every layout."""
    with open_mesh(expert=1, replicate=1, device="cpu", timeout=60) as world:
        for expert, replicate in LAYOUTS[num_ranks]:
            mesh = arrange(world, expert=expert, replicate=replicate)
            there_and_back(root, "uneven", mesh, max_shard_bytes=MAX_SHARD_BYTES)
            if expert == 1:
                there_and_back(root, "tied", mesh, max_shard_bytes=10**9)
        narrow_copy_of_wide_weights(root, mesh)
        stacks_are_read(root, mesh)


def there_and_back(root: Path, kind: str, mesh: Mesh, *, max_shard_bytes: int) -> None:
    whole = load_pretrained(root / kind)
    model = empty_model(whole.config, mesh, torch.float32)
    num_read = sum(mesh.gather(counting_what_is_read(lambda: load_sharded(model, root / kind, mesh=mesh))))
    assert num_read == mesh.replicate * sum(parameter.numel() for parameter in whole.parameters())
    assert_holds(model, mesh, whole)
    out = root / "out"
    for _ in range(2):  # into nothing, and in place of what is there
        save_sharded(
            model,
            out,
            mesh=mesh,
            max_shard_bytes=max_shard_bytes,
            tokenizer=root / "tokenizer",
            overwrite=True,
        )
        assert files_of(out) == files_of(root / kind)
    assert [path.name for path in root.iterdir() if "partial" in path.name] == []
    mesh.barrier()


def counting_what_is_read(load: Callable[[], None]) -> int:
    """How many weights this rank reads from the files while it loads."""
    num_read = 0
    read_tensors = sharded.read_tensors

    def count(*args: object) -> Iterator[tuple[str, Tensor]]:
        nonlocal num_read
        for name, tensor in read_tensors(*args):
            num_read += tensor.numel()
            yield name, tensor

    sharded.read_tensors = count
    try:
        load()
    finally:
        sharded.read_tensors = read_tensors
    return num_read


def narrow_copy_of_wide_weights(root: Path, mesh: Mesh) -> None:
    """Float32 masters of a run in bfloat16 begin and end as that run's weights on one process do."""
    half = load_pretrained(root / "uneven", dtype=torch.bfloat16)
    model = empty_model(half.config, mesh, torch.float32)
    load_sharded(model, root / "uneven", mesh=mesh, dtype=torch.bfloat16)
    assert_holds(model, mesh, half.float())
    out = root / "half_out"
    save_sharded(model, out, mesh=mesh, dtype=torch.bfloat16, max_shard_bytes=MAX_SHARD_BYTES)
    assert files_of(out) == files_of(root / "half")


def stacks_are_read(root: Path, mesh: Mesh) -> None:
    whole = load_pretrained(root / "uneven")
    model = empty_model(whole.config, mesh, torch.float32)
    load_sharded(model, root / "stacked", mesh=mesh)
    assert_holds(model, mesh, whole)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process wrote."""
    root = tmp_path_factory.mktemp("sharded")
    (root / "tokenizer").mkdir()
    (root / "tokenizer" / "tokenizer.json").write_text("{}")
    options = {"max_shard_bytes": MAX_SHARD_BYTES, "tokenizer": root / "tokenizer"}
    save_pretrained(build(UNEVEN), root / "uneven", **options)
    save_pretrained(build(TIED), root / "tied", tokenizer=root / "tokenizer")
    half = load_pretrained(root / "uneven", dtype=torch.bfloat16)
    save_pretrained(half, root / "half", max_shard_bytes=MAX_SHARD_BYTES)
    save_pretrained(build(UNEVEN), root / "stacked")
    stack_experts(root / "stacked" / "model.safetensors")
    assert len(list((root / "uneven").glob("*.safetensors"))) > 5
    return root


def stack_experts(path: Path) -> None:
    """Put the experts of each layer into one tensor, as transformers has them."""
    tensors = load_file(path)
    for i in (1, 2):
        prefix = f"model.layers.{i}.mlp.experts"
        pick = {
            name: [tensors.pop(f"{prefix}.{j}.{name}_proj.weight") for j in range(6)]
            for name in ("gate", "up", "down")
        }
        gate_ups = [torch.cat(pair) for pair in zip(pick["gate"], pick["up"], strict=True)]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack(gate_ups)
        tensors[f"{prefix}.down_proj"] = torch.stack(pick["down"])
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_what_ranks_load_and_save_is_what_one_process_does(root: Path, num_ranks: int) -> None:
    for name in ("out", "half_out"):
        shutil.rmtree(root / name, ignore_errors=True)
    run_ranks(round_trips, root, num_ranks, num_ranks=num_ranks)


# ---- errors ----


def error_of(action) -> tuple[str, str]:
    try:
        action()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def errors_of_ranks(root: Path) -> dict[str, tuple[str, str]]:
    """What each planted fault raises on this rank."""
    found = {}
    with open_mesh(expert=2, replicate=1, device="cpu", timeout=60) as mesh:
        model = empty_model(UNEVEN, mesh, torch.float32)
        for fault in ("absent", "cut", "misshapen", "other_head"):
            target = empty_model(TIED, arrange(mesh, expert=1, replicate=1), torch.float32)
            chosen = target if fault == "other_head" else model
            found[fault] = error_of(
                lambda chosen=chosen, fault=fault: load_sharded(chosen, root / fault, mesh=mesh)
            )
        own = root / ("uneven" if mesh.rank == 0 else "nowhere")
        found["one_rank"] = error_of(lambda: load_sharded(model, own, mesh=mesh))
        load_sharded(model, root / "uneven", mesh=mesh)
        found["strangers"] = error_of(
            lambda: save_sharded(model, root / "strangers", mesh=mesh, overwrite=True)
        )
        found["full_disk"] = error_of(lambda: save_on_a_full_disk(model, mesh, root))
        found["unmovable"] = error_of(lambda: save_where_it_cannot_be_moved(model, mesh, root))
        left = sorted(path.name for path in root.iterdir())
        found["left"] = ("", " ".join(left))
        mesh.barrier()
        # After all that, ranks agree as before.
        save_sharded(model, root / "fine", mesh=mesh)
    return found


def save_on_a_full_disk(model: Transformer, mesh: Mesh, root: Path) -> None:
    """Rank 1 cannot write its third box."""
    num_boxes = 0
    write_box = sharded.write_box

    def fail_on_the_third(*args, **kwargs) -> None:
        nonlocal num_boxes
        num_boxes += 1
        if num_boxes == 3:
            raise OSError(errno.ENOSPC, "no space left on device")
        write_box(*args, **kwargs)

    if mesh.rank == 1:
        sharded.write_box = fail_on_the_third
    try:
        save_sharded(model, root / "never", mesh=mesh, max_shard_bytes=MAX_SHARD_BYTES)
    finally:
        sharded.write_box = write_box


def save_where_it_cannot_be_moved(model: Transformer, mesh: Mesh, root: Path) -> None:
    """Rank 0 has all files and cannot put their directory into place."""
    put = replace_module._put

    def refuse(partial: Path, target: Path) -> None:
        raise PermissionError(errno.EACCES, "permission denied")

    replace_module._put = refuse
    try:
        save_sharded(model, root / "never", mesh=mesh)
    finally:
        replace_module._put = put


@pytest.fixture(scope="module")
def faulty(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good checkpoints and bad ones."""
    faulty = tmp_path_factory.mktemp("faulty")
    for name in ("absent", "cut", "uneven"):
        shutil.copytree(root / "uneven", faulty / name)
    shards = sorted((faulty / "absent").glob("*.safetensors"))
    shards[3].unlink()
    last = sorted((faulty / "cut").glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-8])
    save_pretrained(build(replace(UNEVEN, mlp_width=24)), faulty / "misshapen")
    save_pretrained(build(TIED), faulty / "other_head")
    weights = faulty / "other_head" / "model.safetensors"
    head = load_file(weights)["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1  # a row that the last rank alone holds
    save_file(load_file(weights) | {"lm_head.weight": head}, weights, metadata={"format": "pt"})
    shutil.copytree(root / "uneven", faulty / "strangers")
    (faulty / "strangers" / "thesis.tex").write_text("years of work")
    return faulty


def test_a_fault_on_one_rank_is_an_error_on_all(faulty: Path) -> None:
    before = {path.name for path in faulty.iterdir()}
    by_rank = run_ranks(errors_of_ranks, faulty, num_ranks=2)
    wanted = {
        "absent": ("ValueError", "model-00004-of-000"),
        "cut": ("ValueError", "it is cut off: tensor"),
        "misshapen": ("ValueError", "mlp.gate_proj.weight' must be (23, 32), got (24, 32)"),
        "other_head": ("ValueError", "'lm_head.weight' must equal the embedding"),
        "one_rank": ("ValueError", "nowhere"),
        "strangers": ("ValueError", "'thesis.tex' in it"),
        "full_disk": ("OSError", "no space left on device"),
        "unmovable": ("PermissionError", "permission denied"),
    }
    culprits = {"one_rank": 1, "full_disk": 1, "other_head": 1, "strangers": 0, "unmovable": 0}
    culprits |= {"absent": 0, "cut": 0}  # the first rank of a machine opens the files before the others
    for fault, (kind, text) in wanted.items():
        culprit = culprits.get(fault)  # None: both ranks find it
        for rank, found in enumerate(by_rank):
            is_own = culprit in (None, rank)
            assert found[fault][0] == (kind if is_own else "RankError"), (fault, rank, found[fault])
            assert text in found[fault][1], (fault, rank)
            assert is_own or f"rank {culprit} failed: {kind}: " in found[fault][1], (fault, rank)
    assert set(by_rank[0]["left"][1].split()) == before
    assert files_of(faulty / "fine").keys() == {"config.json", "model.safetensors"}
