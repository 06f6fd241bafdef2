"""Answers written by vLLM, in this process and on the trainer's GPU (`dscoder[vllm]`).

vLLM draws tokens and says how likely each was; where a text ends and what it says is decided here, by the
rules of our own engine. A round begins with the policy's weights, handed over out of the trainer's memory
under their published names; between rounds vLLM sleeps and the trainer has its memory. Written against vLLM
0.33.0. Nobody else imports this module, so nothing else needs vLLM.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
import vllm  # type: ignore[import-not-found]
from torch import Tensor
from vllm.inputs import tokens_input  # type: ignore[import-not-found]
from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]
from vllm.v1.executor import Executor  # type: ignore[import-not-found]

from dscoder.checkpoint.names import pieces
from dscoder.config.grpo import GrpoConfig, RolloutConfig
from dscoder.infer.request import Completion, Request
from dscoder.infer.written_text import WrittenText
from dscoder.models import Transformer
from dscoder.models.cache import cache_token_bytes
from dscoder.runtime.log import get_logger
from dscoder.text.tokenizer import Tokenizer

_DTYPE = torch.bfloat16  # vLLM has no latent attention in float32
_TEMPERATURES = 0.01, 2.0  # vLLM moves lower ones to the first and refuses higher ones
_PER_TOKEN = ("embed.weight", "head.weight")  # parameters with a row a token
_LONGEST_THAT_FITS = -1
_DISCARD = 2  # the level of sleep that keeps neither weights nor cache
_LOG = get_logger(__name__)


class Output(Protocol):
    """What vLLM has written of a request since it was last asked: a `vllm.RequestOutput`."""

    request_id: str
    outputs: Sequence[Any]  # one `vllm.CompletionOutput`
    finished: bool


class VllmEngine(Protocol):
    """What is asked of a `vllm.LLMEngine`."""

    model_config: Any

    def add_request(self, request_id: str, prompt: Any, params: Any) -> str:
        """Queue a request."""
        ...

    def step(self) -> Sequence[Output]:
        """Compute once for all that run; what was written by those that wrote something."""
        ...

    def abort_request(self, request_ids: list[str]) -> None:
        """Forget requests; ids that are not known are passed over."""
        ...

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> list[Any]:
        """Call a method of each worker, the arguments as they are: the one worker is in this process."""
        ...

    def reset_prefix_cache(self) -> bool:
        """Forget what was computed for prompts; False if something still runs."""
        ...

    def sleep(self, level: int) -> None:
        """Abort what runs, empty the cache and give memory back."""
        ...

    def wake_up(self, tags: list[str]) -> bool:
        """Take memory again, of "weights" or "kv_cache"."""
        ...


def policy_weights(model: Transformer, *, num_ids: int) -> Iterator[tuple[str, Tensor]]:
    """The weights under their published names, layer by layer: views of the model's memory, not copies.

    Args:
        num_ids: rows of embedding and head from there on stand for no token, and are left out.
    """
    parameters = dict(model.named_parameters())
    for piece in pieces(model.config):
        weight = piece.view(parameters[piece.parameter].detach())
        yield piece.name, weight[:num_ids] if piece.parameter in _PER_TOKEN else weight


def logprobs_mode(rollout: RolloutConfig) -> str:
    """Which of vLLM's log-probabilities are those of our engine: at the temperature, before the filters."""
    least, most = _TEMPERATURES
    if not least <= rollout.temperature <= most:
        raise ValueError(
            f"grpo: rollout.temperature must be in [{least}, {most}] for vLLM, got {rollout.temperature}"
        )
    if rollout.temperature == 1:
        return "raw_logprobs"
    if rollout.top_p < 1 or rollout.top_k:
        raise ValueError(
            "grpo: rollout.temperature must be 1 beside top_p or top_k for vLLM, whose probabilities are "
            f"else those after filtering, got {rollout.temperature}"
        )
    return "processed_logprobs"


def open_engine(config: GrpoConfig, *, model: Transformer, num_ids: int) -> VllmEngine:
    """An engine in this process for a model of the policy's form, without the policy's weights."""
    batch = config.rollout.batch
    token_bytes = cache_token_bytes(model.config, _DTYPE)
    arguments = vllm.EngineArgs(
        model=config.model,
        load_format="dummy",
        skip_tokenizer_init=True,
        generation_config="vllm",
        # Ids from there on are never drawn, and the others' probabilities add up to 1, as for the trainer.
        hf_overrides={"vocab_size": num_ids},
        dtype=str(_DTYPE).removeprefix("torch."),
        max_model_len=_LONGEST_THAT_FITS,
        max_num_seqs=batch.max_batch,
        max_num_batched_tokens=max(batch.prefill_chunk, batch.max_batch),
        gpu_memory_utilization=batch.memory_share,
        kv_cache_memory_bytes=batch.cache_tokens * token_bytes or None,
        enforce_eager=not batch.cuda_graphs,
        enable_prefix_caching=True,  # the answers of a group share their prompt
        enable_sleep_mode=True,
        async_scheduling=False,  # nothing is under way when a request is aborted
        logprobs_mode=logprobs_mode(config.rollout),
        disable_log_stats=True,
    )
    vllm_config = arguments.create_engine_config()
    # Not by a factory: those start another process, and weights would have to be sent there.
    engine: VllmEngine = vllm.LLMEngine(
        vllm_config=vllm_config,
        executor_class=Executor.get_class(vllm_config),
        log_stats=False,
        multiprocess_mode=False,
    )
    return engine


class VllmSampler:
    """vLLM as a `Sampler` for the policy: awake while it writes, with the weights of that moment."""

    def __init__(self, engine: VllmEngine, model: Transformer, tokenizer: Tokenizer) -> None:
        """`engine`: of `open_engine`, awake."""
        self._engine = engine
        self._model = model
        self._tokenizer = tokenizer
        self._num_ids = min(model.config.vocab_size, tokenizer.vocab_size)
        self._whole_tokens: dict[int, str] = {}
        self._engine.sleep(_DISCARD)

    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """As `Sampler` says.

        Raises:
            ValueError: before anything runs, a request longer than vLLM's cache; while it runs,
                log-probabilities that are not finite, or a request that vLLM gave up.
        """
        texts = [self._text(request_idx, request) for request_idx, request in enumerate(requests)]
        for text in texts:
            self._check(text)
        return self._run(texts)

    def _text(self, request_idx: int, request: Request) -> WrittenText:
        return WrittenText(
            request_idx,
            request,
            tokenizer=self._tokenizer,
            max_positions=self._model.config.max_positions,
            whole_tokens=self._whole_tokens,
        )

    def _check(self, text: WrittenText) -> None:
        num_tokens, num_new = len(text.request.prompt), max(text.budget, 0)
        most = self._model.config.max_positions
        if num_new:
            most = min(most, self._engine.model_config.max_model_len)
        if num_tokens + num_new > most:
            raise ValueError(
                f"vllm: request {text.request_idx} must have <= {most} tokens with its answer, what the "
                f"model and vLLM's cache hold, got {num_tokens} and {num_new}"
            )

    def _run(self, texts: Sequence[WrittenText]) -> Iterator[tuple[int, Completion]]:
        for text in texts:
            if text.budget == 0 and (done := text.finish().completion):
                yield text.request_idx, done
        writing = {str(text.request_idx): text for text in texts if text.budget > 0}
        if not writing:
            return
        try:
            self._wake_up()
            for name, text in writing.items():
                self._engine.add_request(name, tokens_input(list(text.request.prompt)), self._params(text))
            while writing:
                yield from self._advance(writing)
        finally:
            self._engine.abort_request(list(writing))
            self._engine.sleep(_DISCARD)

    @torch.no_grad()
    def _wake_up(self) -> None:
        """Have vLLM take the policy's weights, and forget all that it computed by others."""
        torch.cuda.empty_cache()  # what the trainer holds and does not use
        self._engine.wake_up(["weights"])
        # Not `load_weights` of its model: what was derived from the old weights would stay.
        weights = policy_weights(self._model, num_ids=self._num_ids)
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        self._engine.wake_up(["kv_cache"])
        if not self._engine.reset_prefix_cache():
            raise ValueError("vllm: no request may hold cache of other weights, got some that do")

    def _params(self, text: WrittenText) -> Any:
        """How vLLM writes it. Stop strings are left to `WrittenText`, which sees every token at once."""
        request = text.request
        eos_id = self._tokenizer.eos_id
        return vllm.SamplingParams(
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=request.sampling.top_k,
            seed=request.sampling.seed,
            max_tokens=text.budget,
            ignore_eos=True,
            stop_token_ids=[*request.stop_ids, *([] if eos_id is None else [eos_id])],
            logprobs=0 if request.keep_logprobs else None,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _advance(self, writing: dict[str, WrittenText]) -> list[tuple[int, Completion]]:
        """One step of vLLM; what ended by it is no longer among `writing`."""
        found, surplus = [], []
        for output in self._engine.step():
            text = writing[output.request_id]
            (part,) = output.outputs
            completion = _accept(text, part)
            if completion is None and output.finished:
                raise ValueError(
                    f"vllm: request {text.request_idx} must be written to its end, got {part.finish_reason} "
                    f"after {len(text.tokens)} tokens"
                )
            if completion is None:
                continue
            del writing[output.request_id]
            found.append((text.request_idx, completion))
            if not output.finished:
                surplus.append(output.request_id)
        self._engine.abort_request(surplus)
        return found


def _accept(text: WrittenText, part: Any) -> Completion | None:
    """Add the tokens of a `vllm.CompletionOutput`; the completion if the text ends by one of them."""
    for place, token in enumerate(part.token_ids):
        if text.request.keep_logprobs:
            logprob = part.logprobs[place][token].logprob
            if not math.isfinite(logprob):
                raise ValueError(
                    f"vllm: the log-probabilities of request {text.request_idx} must be finite, "
                    f"got {logprob} at token {len(text.tokens)}"
                )
            text.logprobs.append(logprob)
        completion = text.accept(token).completion
        if completion is not None:
            return completion
    return None


def open_sampler(config: GrpoConfig, model: Transformer, tokenizer: Tokenizer) -> VllmSampler:
    """vLLM for the policy of a run, asleep."""
    if config.loss.correction == "none":
        _LOG.warning(
            "vLLM computes other probabilities than the trainer, and loss.correction is none: see mismatch "
            "in the metrics, and set loss.correction to token or sequence"
        )
    num_ids = min(model.config.vocab_size, tokenizer.vocab_size)
    return VllmSampler(open_engine(config, model=model, num_ids=num_ids), model, tokenizer)
