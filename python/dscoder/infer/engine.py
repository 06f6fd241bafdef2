"""Generation in continuous batches: prompts of any lengths in, text as it comes and completions out.

Requests join the batch as rows and pages of the cache become free and leave it when they end
(`scheduler.py`); the model computes them by chunks of prompts and steps of one token (`runner.py`). What a
request gets does not depend on the others: rows never mix, and the sampler draws by the request's own seed
and step.
"""

import math
import sys
from collections.abc import Iterator, Sequence

import torch

from dscoder.checkpoint import load_pretrained
from dscoder.config import MlaConfig
from dscoder.config.generate import DEFAULT_BATCH, BatchConfig, EngineConfig
from dscoder.infer.pages import PagePool, Room, plan_room
from dscoder.infer.request import Completion, Event, Request
from dscoder.infer.runner import Runner, cuda_graphs, waits_for_device
from dscoder.infer.sampler import draw_numbers
from dscoder.infer.scheduler import Job, Scheduler
from dscoder.infer.written_text import WrittenText
from dscoder.models.cache import cache_token_bytes
from dscoder.models.transformer import Transformer
from dscoder.runtime.device import resolve_device
from dscoder.text.tokenizer import Tokenizer

_DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _job(text: WrittenText) -> Job:
    """What the scheduler has to know; the last token drawn is never read back."""
    num_tokens = len(text.request.prompt)
    return Job(request_idx=text.request_idx, num_tokens=num_tokens, most_tokens=num_tokens + text.budget - 1)


class Engine:
    """Runs requests through a model; between calls it keeps no more than memory and graphs to use again."""

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, batch: BatchConfig = DEFAULT_BATCH
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.max_positions = model.config.max_positions
        self._batch = batch
        self._whole_tokens: dict[int, str] = {}  # text of those that streams have seen
        # The embedding may have padding rows: ids that stand for no text are never drawn.
        self._num_ids = min(model.config.vocab_size, tokenizer.vocab_size)
        self._kept: Runner | None = None  # with captured graphs, while no stream has it
        self._max_tokens = 0  # that its cache was allowed to hold

    @classmethod
    def load(cls, config: EngineConfig) -> "Engine":
        """The model and the tokenizer of one directory or hub repository."""
        device = resolve_device(config.device)
        tokenizer = Tokenizer.load(config.model)
        model = load_pretrained(config.model, dtype=_DTYPES[config.dtype], device=device)
        return cls(model, tokenizer, batch=config.batch)

    def release(self) -> None:
        """Give back the memory that is kept on a GPU for the next call."""
        self._kept = None

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """The completion of each request, in the order of the requests."""
        done = {event.request_idx: event.completion for event in self.stream(requests) if event.completion}
        return [done[request_idx] for request_idx in range(len(requests))]

    def stream(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Events as they happen; those of one request put together are its text, the last has the whole.

        Raises:
            ValueError: before anything runs, a prompt too long for the model or with an id it lacks, or a
                request too long for the cache's memory; while it runs, logits that are not finite.
        """
        for request_idx, request in enumerate(requests):
            self._check(request_idx, request)
        return self._run(requests)

    def _check(self, request_idx: int, request: Request) -> None:
        if len(request.prompt) > self.max_positions:
            raise ValueError(
                f"generate: request {request_idx} must have <= {self.max_positions} prompt tokens, the "
                f"model's context, got {len(request.prompt)}"
            )
        vocab_size = self.model.config.vocab_size
        if not 0 <= min(request.prompt) <= max(request.prompt) < vocab_size:
            raise ValueError(
                f"generate: the token ids of request {request_idx} must be in [0, {vocab_size}), "
                f"got {min(request.prompt)} to {max(request.prompt)}"
            )

    def _run(self, requests: Sequence[Request]) -> Iterator[Event]:
        texts = [self._text(request_idx, request) for request_idx, request in enumerate(requests)]
        yield from (text.finish() for text in texts if text.budget == 0)
        jobs = [_job(text) for text in texts if text.budget > 0]
        if not jobs:
            return
        runner, is_sound = self._take_runner(jobs), True
        try:
            scheduler = Scheduler(
                jobs,
                pool=PagePool(runner.room.num_pages or 0),
                memory=runner.cache,
                num_rows=runner.room.num_rows,
                prefill_chunk=self._batch.prefill_chunk,
            )
            while not scheduler.is_done:
                yield from self._advance(scheduler, runner, texts)
        except Exception:
            is_sound = False  # its rows may hold NaN
            raise
        finally:
            self._kept = runner if is_sound and runner.is_captured else None

    def _text(self, request_idx: int, request: Request) -> WrittenText:
        return WrittenText(
            request_idx,
            request,
            tokenizer=self.tokenizer,
            max_positions=self.max_positions,
            whole_tokens=self._whole_tokens,
        )

    def _advance(self, scheduler: Scheduler, runner: Runner, texts: Sequence[WrittenText]) -> list[Event]:
        """Compute one chunk of prompts, if any wait, and one step of those that decode."""
        scheduler.admit()
        chunk = scheduler.next_chunk()
        if chunk:
            pieces = [texts[job.request_idx].piece(job.num_cached, length) for job, length in chunk]
            runner.prefill([job for job, _ in chunk], pieces)
        for job, length in chunk:
            job.num_cached += length
        jobs = scheduler.next_step()
        if not jobs:
            return []
        scheduler.compact(runner.batch_size(scheduler.num_running))
        writing = [texts[job.request_idx] for job in jobs]
        is_sampled = any(text.request.sampling.temperature > 0 for text in writing)
        answer = runner.step(
            jobs,
            [text.last_token for text in writing],
            [draw_numbers(text.request.sampling, len(text.tokens)) for text in writing]
            if is_sampled
            else None,
            keep_logprobs=any(text.request.keep_logprobs for text in writing),
        )
        # The one transfer of a step: the check and the result.
        peaks, tokens, *logprobs = answer.tolist()
        events = []
        for job, text in zip(jobs, writing, strict=True):
            if not math.isfinite(peaks[job.row]):
                raise ValueError(
                    f"generate: the logits of request {job.request_idx} at step {len(text.tokens)} must be "
                    f"finite, got a largest value of {peaks[job.row]}"
                )
            if text.request.keep_logprobs:
                text.logprobs.append(logprobs[0][job.row])
            event = text.accept(int(tokens[job.row]))
            job.num_cached += 1
            job.num_tokens += 1
            if event.completion is not None:
                scheduler.finish(job)
            events.append(event)
        return events

    def _take_runner(self, jobs: Sequence[Job]) -> Runner:
        """The kept one if it will do, else another; no other stream has it meanwhile."""
        lengths = [job.most_tokens for job in jobs]
        runner, self._kept = self._kept, None
        is_fit = runner is not None and runner.is_current and max(lengths) <= self._max_tokens
        if runner is not None and is_fit and runner.room.holds(self._plan(lengths)):
            runner.clear()
            return runner
        runner = None  # its memory is free
        self._max_tokens = self._measure_memory()
        capture = cuda_graphs() if self._uses_graphs else None
        return Runner(self.model, room=self._plan(lengths), num_ids=self._num_ids, capture=capture)

    @property
    def _uses_graphs(self) -> bool:
        is_wanted = self._batch.cuda_graphs and self.model.head.weight.is_cuda
        return is_wanted and not waits_for_device(self.model)

    def _plan(self, lengths: Sequence[int]) -> Room:
        return plan_room(
            lengths,
            max_batch=self._batch.max_batch,
            max_tokens=self._max_tokens,
            is_paged=isinstance(self.model.config.attention, MlaConfig),
            is_kept=self._uses_graphs,
        )

    def _measure_memory(self) -> int:
        """The most tokens that a cache may hold."""
        weight = self.model.head.weight
        if self._batch.cache_tokens:
            return self._batch.cache_tokens
        if not weight.is_cuda:
            return sys.maxsize
        torch.cuda.empty_cache()
        num_free, _ = torch.cuda.mem_get_info(weight.device)
        return int(self._batch.memory_share * num_free) // cache_token_bytes(self.model.config, weight.dtype)
