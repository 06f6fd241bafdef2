"""The ranks of a run under torchrun: the groups they work in, and a common end when one of them is lost.

World = replicate x expert_shard x expert ranks, the expert ranks being neighbours. Dense parameters are
sharded over all ranks of a replica ("shard" = expert_shard x expert), an expert rank's experts over
"expert_shard". These groups have the timeout of the mesh. Those for agreement on the host wait for hours,
while one rank alone hashes or fetches a large model; heartbeats find a rank that died meanwhile.
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _abort_process_group

from dscoder.runtime.device import resolve_device
from dscoder.runtime.heartbeat import Heartbeat, LostRankError, is_communication_error
from dscoder.runtime.log import get_logger

T = TypeVar("T")

_RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_STORE_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
_HOST_PATIENCE = timedelta(hours=24)  # what one rank does alone on the host may last
_LOG = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mesh:
    """This rank's place among all ranks, and what it talks to them through.

    Every method is a collective: all ranks call it, in the same order.
    """

    rank: int
    world_size: int
    local_rank: int
    replicate: int  # sizes; their product is world_size
    expert_shard: int
    expert: int
    device: torch.device
    timeout: float  # seconds, of all groups but `control` and `background`
    devices: DeviceMesh  # ("replicate", "expert_shard", "expert")
    shard_devices: DeviceMesh  # ("replicate", "shard"): the same ranks, the last two dimensions as one
    expert_devices: DeviceMesh  # ("replicate", "expert", "expert_shard"): experts are cut in this order
    expert_group: ProcessGroup  # this rank's expert-parallel group
    control: ProcessGroup  # gloo, all ranks: host-side agreement
    background: ProcessGroup  # gloo, all ranks: for one other thread, as that of asynchronous checkpoints
    heartbeat: Heartbeat

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def all_sum(self, values: Tensor) -> Tensor:
        """`values`, which lie on the mesh's device, summed over all ranks in place."""
        dist.all_reduce(values)
        return values

    def agree_max(self, value: int) -> int:
        """The largest `value` of all ranks."""
        largest = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.control)
        return int(largest)

    def share(self, value: T) -> T:
        """Rank 0's picklable `value`."""
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control, device=torch.device("cpu"))
        return values[0]

    def gather(self, value: T) -> list[T]:
        """Every rank's picklable `value`, by rank."""
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here, on the host."""
        self.agree_max(0)

    def lost_ranks(self) -> list[int]:
        """The ranks that are gone; not a collective. Takes a few seconds."""
        return sorted(self.heartbeat.lost())


def _launch() -> Mapping[str, str] | None:
    """torchrun's variables; None outside it, ValueError where some are missing."""
    variables = (*_RANK_VARIABLES, *_STORE_VARIABLES)
    found = {name: os.environ[name] for name in variables if os.environ.get(name)}
    # Clusters set the store's address on their own.
    if not any(name in found for name in _RANK_VARIABLES):
        return None
    missing = [name for name in variables if name not in found]
    if missing:
        raise ValueError(
            f"mesh: either all or none of torchrun's variables {', '.join(variables)} must be set, "
            f"got no {', '.join(missing)}; start the command with torchrun"
        )
    numbers = [name for name in variables if name != "MASTER_ADDR" and not found[name].isdecimal()]
    if numbers:
        raise ValueError(f"mesh: {numbers[0]} must be a number, got {found[numbers[0]]!r}")
    return found


def launched_ranks() -> int:
    """How many ranks torchrun started; 1 without torchrun."""
    launch = _launch()
    return 1 if launch is None else int(launch["WORLD_SIZE"])


def launched_rank() -> int:
    """Which of them this process is; 0 without torchrun."""
    launch = _launch()
    return 0 if launch is None else int(launch["RANK"])


def set_launch(*, rank: int, world_size: int, host: str, port: int) -> None:
    """Tell this process what torchrun would, where something else started it; all ranks on one machine."""
    values = (rank, world_size, rank, world_size, host, port)
    os.environ.update(zip((*_RANK_VARIABLES, *_STORE_VARIABLES), map(str, values), strict=True))


def check_world(*, world_size: int, expert: int, replicate: int) -> None:
    """ValueError unless `world_size` ranks can be laid out with these sizes."""
    if expert < 1 or replicate < 1:
        raise ValueError(f"mesh: expert and replicate must be >= 1, got {expert} and {replicate}")
    if world_size % (expert * replicate):
        raise ValueError(
            f"mesh: the number of ranks must be a multiple of expert * replicate = {expert * replicate}, "
            f"got {world_size}"
        )


def _rank_device(name: str, *, local_rank: int, local_ranks: int) -> torch.device:
    device = resolve_device(name)
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(
            f"mesh: device must be auto, cpu or cuda, as every rank has its own GPU, got {name!r}"
        )
    num_gpus = torch.cuda.device_count()
    if num_gpus < local_ranks:
        raise ValueError(f"mesh: every rank needs a GPU, got {num_gpus} GPUs for {local_ranks} ranks here")
    return torch.device("cuda", local_rank)


@dataclass(frozen=True, kw_only=True, slots=True)
class _World:
    """What a mesh has whatever its layout."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    timeout: float
    control: ProcessGroup
    background: ProcessGroup
    heartbeat: Heartbeat


def _lay_out(world: _World, *, expert: int, replicate: int) -> Mesh:
    """Make the groups of a layout; a collective."""
    ranks = torch.arange(world.world_size).view(replicate, -1, expert)
    by_shard = ranks.flatten(1)

    limit = timedelta(seconds=world.timeout)
    alone: ProcessGroup | None = None
    if 1 in (replicate, expert, ranks.shape[1], by_shard.shape[1]):
        # Every rank makes its own at once: made one by one, those of a thousand ranks take minutes.
        alone = dist.new_group([world.rank], timeout=limit, use_local_synchronization=True)

    def own_group(lines: Tensor) -> ProcessGroup:
        own: ProcessGroup
        if lines.shape[1] == 1:
            assert alone is not None
            return alone
        own, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
            lines.tolist(), timeout=limit
        )
        return own

    groups = {
        "replicate": own_group(by_shard.t()),
        "expert_shard": own_group(ranks.transpose(1, 2).flatten(0, 1)),
        "expert": own_group(ranks.flatten(0, 1)),
        "shard": own_group(by_shard),
    }

    def device_mesh(grid: Tensor, *names: str) -> DeviceMesh:
        return DeviceMesh.from_group(
            [groups[name] for name in names], world.device.type, mesh=grid, mesh_dim_names=names
        )

    return Mesh(
        rank=world.rank,
        world_size=world.world_size,
        local_rank=world.local_rank,
        replicate=replicate,
        expert_shard=ranks.shape[1],
        expert=expert,
        device=world.device,
        timeout=world.timeout,
        devices=device_mesh(ranks, "replicate", "expert_shard", "expert"),
        shard_devices=device_mesh(by_shard, "replicate", "shard"),
        expert_devices=device_mesh(ranks.transpose(1, 2), "replicate", "expert", "expert_shard"),
        expert_group=groups["expert"],
        control=world.control,
        background=world.background,
        heartbeat=world.heartbeat,
    )


def arrange(mesh: Mesh, *, expert: int, replicate: int) -> Mesh:
    """The ranks of `mesh` in another layout; a collective."""
    check_world(world_size=mesh.world_size, expert=expert, replicate=replicate)
    world = _World(
        rank=mesh.rank,
        world_size=mesh.world_size,
        local_rank=mesh.local_rank,
        device=mesh.device,
        timeout=mesh.timeout,
        control=mesh.control,
        background=mesh.background,
        heartbeat=mesh.heartbeat,
    )
    return _lay_out(world, expert=expert, replicate=replicate)


def _meet(
    launch: Mapping[str, str], store: Store, heartbeat: Heartbeat, *, device: torch.device, timeout: float
) -> _World:
    """Wait for all ranks and make the groups that hold them all."""
    rank, world_size = int(launch["RANK"]), int(launch["WORLD_SIZE"])
    limit = timedelta(seconds=timeout)
    heartbeat.meet(timeout)
    is_gpu = device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if is_gpu else "gloo",
        store=PrefixStore("groups", store),
        rank=rank,
        world_size=world_size,
        timeout=limit,
        device_id=device if is_gpu else None,
    )
    return _World(
        rank=rank,
        world_size=world_size,
        local_rank=int(launch["LOCAL_RANK"]),
        device=device,
        timeout=timeout,
        control=dist.new_group(backend="gloo", timeout=max(limit, _HOST_PATIENCE)),
        background=dist.new_group(backend="gloo", timeout=max(limit, _HOST_PATIENCE)),
        heartbeat=heartbeat,
    )


def _end_groups(device: torch.device) -> None:
    """Let go of all groups, so that whoever waits for this rank gets an error, not a timeout."""
    if not dist.is_initialized():
        return
    try:
        if device.type == "cuda":
            # Destroying would wait for kernels that wait for other ranks.
            _abort_process_group()
        else:
            dist.destroy_process_group()
    except Exception as error:  # what ended the run is to be told, not this
        _LOG.warning("the groups of a run that failed could not be ended: %s", error)


def _explained(error: BaseException, heartbeat: Heartbeat) -> BaseException:
    """LostRankError where `error` comes from the links and ranks are gone, else `error`."""
    if isinstance(error, LostRankError) or not is_communication_error(error):
        return error
    try:
        lost = heartbeat.lost()
    except LostRankError as unreachable:
        return unreachable
    if not lost:
        error.add_note("every rank's heartbeat goes on: the ranks may wait for different things")
        return error
    return LostRankError(list(lost), "; ".join(f"rank {rank} {loss}" for rank, loss in lost.items()))


def _open_store(host: str, port: int, *, is_master: bool, timeout: float) -> TCPStore:
    return TCPStore(
        host,
        port,
        is_master=is_master,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,
    )


def hold_termination() -> None:
    """Let the next SIGTERM inside `open_mesh` wait until the error that is under way there is explained.

    torchrun sends it to all ranks as soon as one has died, and SIGKILL 30 s later.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may handle signals

    def note(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        _LOG.warning("SIGTERM: ending as soon as the error under way is explained")

    signal.signal(signal.SIGTERM, note)


@contextmanager
def _termination_back() -> Iterator[None]:
    """SIGTERM does after the block what it did before."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread() and handler is not None:
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def open_mesh(*, expert: int, replicate: int, device: str, timeout: float) -> Iterator[Mesh]:
    """Meet the other ranks that torchrun started; the groups end with the block.

    Args:
        expert: ranks of an expert-parallel group.
        replicate: whole copies of the sharded model.
        device: auto, cpu or cuda, where rank i of a machine takes GPU i.
        timeout: seconds before a wait for other ranks ends with an error; hours later where they agree on the
            host, since one of them may have long work of its own.

    Raises:
        ValueError: not started by torchrun, sizes that do not fit, or too few GPUs.
        LostRankError: in place of an error of communication, inside the block or at its start, where ranks
            are gone; it names them.
    """
    launch = _launch()
    if launch is None:
        raise ValueError(f"mesh: torchrun must set {', '.join(_RANK_VARIABLES)}, got none of them")
    rank, world_size = int(launch["RANK"]), int(launch["WORLD_SIZE"])
    check_world(world_size=world_size, expert=expert, replicate=replicate)
    own_device = _rank_device(
        device, local_rank=int(launch["LOCAL_RANK"]), local_ranks=int(launch["LOCAL_WORLD_SIZE"])
    )
    host, port = launch["MASTER_ADDR"], int(launch["MASTER_PORT"])
    # torchrun's agent keeps a store that outlives the ranks; without it rank 0 does.
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # What ranks left there that torchrun started before these is not for these to read.
    prefix = f"dscoder/attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    server = _open_store(host, port, is_master=rank == 0 and not has_agent, timeout=timeout)
    store = PrefixStore(prefix, server)
    heartbeat = Heartbeat(
        host=host,
        port=port,
        prefix=prefix,
        host_rank=None if has_agent else 0,
        rank=rank,
        world_size=world_size,
    )
    with _termination_back():
        try:
            world = _meet(launch, store, heartbeat, device=own_device, timeout=timeout)
            mesh = _lay_out(world, expert=expert, replicate=replicate)
            yield mesh
            mesh.barrier()
        except BaseException as error:
            hold_termination()
            explained = _explained(error, heartbeat)
            heartbeat.leave(explained)
            _end_groups(own_device)
            if explained is error:
                raise
            raise explained from error
    heartbeat.leave(None)
    mesh.barrier()  # nobody asks the store any more
    dist.destroy_process_group()
