"""Forwards of a model over a cache whose rows come and go: chunks of prompts, and steps of one token a row.

A step runs the rows 0 .. B - 1 of the cache, those that do not decode among them: they take part as padding,
which counts no token and whose output nobody reads. Its inputs and its answer are tensors that stay where
they are, so on a GPU a step of each batch size is captured once as a CUDA graph and then replayed: B is 1, 2,
4 ... there, whatever is needed elsewhere. One small block of numbers goes to the device before a step and
one comes back after it.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from dscoder.config import MlaConfig
from dscoder.infer.pages import Room
from dscoder.infer.sampler import NUM_DRAW_COLUMNS, add_logprobs, draw, has_filters, likeliest
from dscoder.infer.scheduler import Job
from dscoder.models.cache import PAGE_SIZE, KeyValueCache, allocate_cache
from dscoder.models.transformer import Transformer
from dscoder.ops.mla_decode import kernel_refusal
from dscoder.runtime import native

# A step: logits_BV and the greedy answer_2B, the same tensors at every call if captured.
Step = Callable[[], tuple[Tensor, Tensor]]
Capture = Callable[[Step], Step]

_NARROWEST = 256  # tokens that a captured step attends at the least, where the width is part of the graph


def waits_for_device(model: Transformer) -> bool:
    """Whether a step on a GPU has to read something back, so that it cannot be captured.

    The reference of latent decoding has to; it runs where the kernels cannot.
    """
    attention, weight = model.config.attention, model.head.weight
    if not isinstance(attention, MlaConfig):
        return False
    query = weight.new_empty(1, 1, attention.num_heads, attention.cache_dim)
    page = weight.new_empty(1, PAGE_SIZE, attention.cache_dim)
    return not native.has_kernels() or kernel_refusal(query, page, attention.kv_lora_rank) is not None


def cuda_graphs() -> Capture:
    """A `Capture` that makes CUDA graphs, which share their memory: one is replayed at a time."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Step) -> Step:
        step()  # loads kernels and sizes workspaces, which capturing forbids
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device, a loader's pinned memory say, is no part of the graph.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = step()

        def replay() -> tuple[Tensor, Tensor]:
            graph.replay()
            return outputs

        return replay

    return capture


class Runner:
    """A model, a cache, and the tensors through which steps get their inputs and give their answers."""

    # Whoever calls, in inference mode or not: the memory serves callers in the other one too.
    @torch.inference_mode(False)
    def __init__(self, model: Transformer, *, room: Room, num_ids: int, capture: Capture | None) -> None:
        """`num_ids`: tokens from there on are never drawn. `capture`: None runs every step afresh."""
        weight = model.head.weight
        self._model = model
        self._num_ids = num_ids
        self._capture = capture
        self._captured: dict[tuple[int, int], Step] = {}
        self._weights = _addresses(model)
        self.room = room
        self.cache = allocate_cache(
            model.config,
            num_sequences=room.num_rows,
            max_positions=room.max_positions,
            num_pages=room.num_pages,
            dtype=weight.dtype,
            device=weight.device,
        )
        self._on_device: AbstractContextManager[None] = nullcontext()
        if weight.is_cuda:
            self._on_device = torch.cuda.device(weight.device)
        # Row 0: each row's token. Row 1: 1 for rows that decode, 0 for padding.
        self._input_2B = torch.zeros(2, room.num_rows, dtype=torch.int32, device=weight.device)
        self._how_B4 = torch.zeros(room.num_rows, NUM_DRAW_COLUMNS, dtype=torch.float64, device=weight.device)

    @property
    def is_captured(self) -> bool:
        """Whether steps are captured, and worth keeping."""
        return self._capture is not None

    @property
    def is_current(self) -> bool:
        """Whether the weights still lie where captured steps read them."""
        return self._weights == _addresses(self._model)

    def clear(self) -> None:
        """Empty all rows."""
        for row in range(self.room.num_rows):
            self.cache.clear(row)

    def batch_size(self, num_rows: int) -> int:
        """B of a step that has to hold `num_rows` rows."""
        return num_rows if self._capture is None else min(_power_of_two(num_rows), self.room.num_rows)

    @torch.inference_mode()
    def prefill(self, jobs: Sequence[Job], pieces: Sequence[Sequence[int]]) -> None:
        """Append a piece of its prompt to each job; the jobs lie in neighbouring rows."""
        longest = max(map(len, pieces))
        device = self._input_2B.device
        # The last column says how many of a row's tokens count.
        host_BS = torch.zeros(len(jobs), longest + 1, dtype=torch.int32, pin_memory=device.type == "cuda")
        rows = host_BS.numpy()
        for row, piece in zip(rows, pieces, strict=True):
            row[: len(piece)] = piece
            row[longest] = len(piece)
        first = jobs[0].row
        with self._on_device, self._without_autocast():
            tokens_BS = host_BS.to(device, non_blocking=True)
            cache = self.cache.rows(first, first + len(jobs), max_len=max(job.num_cached for job in jobs))
            self._model.features(tokens_BS[:, :longest], cache=cache, num_new_B=tokens_BS[:, longest])

    @torch.inference_mode()
    def step(
        self,
        jobs: Sequence[Job],
        tokens: Sequence[int],
        how: Sequence[Sequence[float]] | None,
        *,
        keep_logprobs: bool = False,
    ) -> Tensor:
        """Feed each job its token; nothing waits for the device.

        Args:
            jobs: that decode; their tokens are appended to their rows.
            tokens: one for each job.
            how: `draw_numbers` of each job; None: all are greedy.
            keep_logprobs: whether the answer says how likely each token was.

        Returns:
            float64 [2, B]: by row, the largest logit and the token drawn, and with `keep_logprobs` a third
            line of `add_logprobs`; the next step may overwrite it.
        """
        rows = [job.row for job in jobs]
        batch, width = self.batch_size(max(rows) + 1), 1 + max(job.num_cached for job in jobs)
        with self._on_device, self._without_autocast():
            step = self._step(batch, width)
            host_input_2B = _on_host(self._input_2B)
            host_input = host_input_2B.numpy()
            host_input[0, rows], host_input[1, rows] = tokens, 1
            self._input_2B.copy_(host_input_2B, non_blocking=True)
            logits_BV, answer_2B = step()
            how_B4 = None
            if how is not None:
                host_how_B4 = _on_host(self._how_B4)
                host_how_B4.numpy()[rows] = how
                how_B4 = self._how_B4.copy_(host_how_B4, non_blocking=True)[:batch]
                answer_2B = draw(logits_BV, answer_2B, how_B4, is_filtered=has_filters(how))
            return add_logprobs(logits_BV, answer_2B, how_B4) if keep_logprobs else answer_2B

    def _without_autocast(self) -> torch.autocast:
        # Graphs would go on reading its copies of weights, and the cache has the type of the weights.
        return torch.autocast(self._input_2B.device.type, enabled=False)

    def _step(self, batch: int, width: int) -> Step:
        if self._capture is None:
            return partial(self._run, batch, width)
        # Pages are read as far as each row goes, rows with memory of their own as far as the graph says.
        most = self.room.max_positions
        is_wide = not isinstance(self.cache, KeyValueCache)
        width = most if is_wide else min(max(_power_of_two(width), _NARROWEST), most)
        if (batch, width) not in self._captured:
            self._input_2B.zero_()  # what runs while capturing counts no tokens
            self._captured[batch, width] = self._capture(partial(self._run, batch, width))
        return self._captured[batch, width]

    def _run(self, batch: int, width: int) -> tuple[Tensor, Tensor]:
        # A cache said to be empty would take the form for prompts.
        cache = self.cache.rows(0, batch, max_len=max(width - 1, 1))
        hidden_B1D = self._model.features(
            self._input_2B[0, :batch, None], cache=cache, num_new_B=self._input_2B[1, :batch]
        ).hidden_BSD
        logits_BV = self._model.head(hidden_B1D[:, 0])[:, : self._num_ids]
        return logits_BV, likeliest(logits_BV)


def _power_of_two(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _on_host(tensor: Tensor) -> Tensor:
    """Zeros in which the host writes what `tensor` gets: the tensor itself, or pinned memory.

    That is another one each time, since the device may not have copied the last one yet.
    """
    return torch.zeros_like(tensor, device="cpu", pin_memory=True) if tensor.is_cuda else tensor.zero_()


def _addresses(model: Transformer) -> list[int]:
    return [parameter.data_ptr() for parameter in model.parameters()]
