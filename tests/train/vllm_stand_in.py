"""A package `vllm` in small: what `dscoder.train.vllm_sampler` asks of vLLM 0.33.0, by its signatures.

Tokens come from our own model, whose weights are whatever was handed over last. It keeps what vLLM keeps (a
cache of prompts) and loses what it loses (weights and cache in sleep), so stale and missing weights show.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dscoder.checkpoint import load_config
from dscoder.checkpoint.names import pieces
from dscoder.models import Transformer


class RequestOutputKind(Enum):
    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


@dataclass(kw_only=True)
class SamplingParams:
    """Of the fields of vLLM's those that anybody asked for, with vLLM's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    logprobs: int | None = None
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE


@dataclass(kw_only=True)
class EngineArgs:
    """Likewise."""

    model: str
    load_format: str = "auto"
    skip_tokenizer_init: bool = False
    generation_config: str = "auto"
    hf_overrides: dict[str, Any] = field(default_factory=dict)
    dtype: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.92
    kv_cache_memory_bytes: int | None = None
    enforce_eager: bool = False
    enable_prefix_caching: bool | None = None
    enable_sleep_mode: bool = False
    async_scheduling: bool | None = None
    logprobs_mode: str = "raw_logprobs"
    disable_log_stats: bool = False

    def create_engine_config(self, usage_context: Any = None, headless: bool = False) -> "EngineArgs":
        return self


class Executor:
    @staticmethod
    def get_class(vllm_config: EngineArgs) -> type["Executor"]:
        return Executor


@dataclass(frozen=True)
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: Sequence[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    request_id: str
    outputs: list[CompletionOutput]
    finished: bool


@dataclass(frozen=True)
class ModelConfig:
    max_model_len: int


@dataclass
class _Running:
    """A request, what it has written and its own randomness."""

    prompt: tuple[int, ...]
    params: SamplingParams
    tokens: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert self.params.seed is not None
        self.generator = torch.Generator().manual_seed(self.params.seed)


def tokens_input(
    prompt_token_ids: list[int], *, prompt: str | None = None, cache_salt: str | None = None
) -> dict[str, Any]:
    return {"type": "token", "prompt_token_ids": prompt_token_ids}


class LLMEngine:
    """Answers by our model; a worker by itself too, for `collective_rpc`.

    Attributes (class):
        last: the engine made last.
        max_model_len: what its cache holds.
        sleep_clears: whether the cache of prompts is emptied by sleep, as vLLM's is.
        spoil: called with every output before it is given away.
    """

    last: "LLMEngine"
    max_model_len = 24
    sleep_clears = True
    spoil = staticmethod(lambda output: output)

    def __init__(
        self,
        vllm_config: EngineArgs,
        executor_class: type[Executor],
        log_stats: bool,
        multiprocess_mode: bool = False,
    ) -> None:
        assert not multiprocess_mode, "tensors are not sent to other processes"
        assert vllm_config.load_format == "dummy"
        assert vllm_config.enable_sleep_mode
        LLMEngine.last = self
        config = load_config(vllm_config.model)
        config = replace(config, vocab_size=vllm_config.hf_overrides.get("vocab_size", config.vocab_size))
        self.arguments = vllm_config
        self.model_config = ModelConfig(min(self.max_model_len, config.max_positions))
        self.model = Transformer(config).eval()
        self.running: dict[str, _Running] = {}
        self.unfinished: set[str] = set()  # whose output is waited for, in another place than they run
        self.params: list[SamplingParams] = []
        self.calls: list[str] = []
        self._asleep: set[str] = set()
        self._prompts: dict[tuple[int, ...], Tensor] = {}  # logits after prompts, by whatever weights

    # ---- as vllm.LLMEngine ----

    def add_request(self, request_id: str, prompt: dict[str, Any], params: SamplingParams) -> str:
        assert not self._asleep
        assert params.output_kind is RequestOutputKind.DELTA
        tokens = tuple(prompt["prompt_token_ids"])
        assert max(tokens) < self.model.config.vocab_size
        assert len(tokens) < self.model_config.max_model_len
        self.params.append(params)
        self.running[request_id] = _Running(tokens, params)
        self.unfinished.add(request_id)
        return f"{request_id}-1a2b3c4d"

    def has_unfinished_requests(self) -> bool:
        return bool(self.unfinished)

    def abort_request(self, request_ids: list[str], internal: bool = False) -> None:
        self.unfinished -= set(request_ids)
        for request_id in request_ids:
            self.running.pop(request_id, None)

    @torch.no_grad()
    def step(self) -> list[RequestOutput]:
        assert not self._asleep
        assert self.arguments.max_num_seqs is not None
        turn = list(self.running)[: self.arguments.max_num_seqs]
        return [self.spoil(self._write(request_id)) for request_id in reversed(turn)]

    def collective_rpc(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        return [{"reload_weights": self.reload_weights}[method](*args, **kwargs or {})]

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        self.calls.append("reset_prefix_cache")
        if self.running:
            return False
        self._prompts.clear()
        return True

    @torch.no_grad()
    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        assert level == 2
        self.calls.append("sleep")
        self.running.clear()
        self._asleep = {"weights", "kv_cache"}
        if self.sleep_clears:
            self._prompts.clear()
        for parameter in self.model.parameters():
            parameter.fill_(float("nan"))

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.calls += [f"wake_up {tag}" for tag in tags or ("weights", "kv_cache")]
        self._asleep -= set(tags or self._asleep)
        return not self._asleep

    # ---- as its worker ----

    @torch.no_grad()
    def reload_weights(
        self,
        weights_iterator: Iterable[tuple[str, Tensor]] | None = None,
        weights_path: str | None = None,
        is_checkpoint_format: bool = True,
    ) -> None:
        self.calls.append("reload_weights")
        assert weights_iterator is not None
        assert "weights" not in self._asleep
        parameters = dict(self.model.named_parameters())
        places = {piece.name: piece.view(parameters[piece.parameter]) for piece in pieces(self.model.config)}
        for name, weight in weights_iterator:
            place = places.pop(name)
            assert place.shape == weight.shape, name
            place.copy_(weight)
        assert not places

    # ---- a token of a request ----

    def _write(self, request_id: str) -> RequestOutput:
        running = self.running[request_id]
        params = running.params
        logits_V = self._logits(running)
        cold_V = logits_V / (params.temperature or 1.0)
        if params.temperature == 0:
            token = int(logits_V.argmax())
        else:
            token = int(torch.multinomial(cold_V.nan_to_num().softmax(-1), 1, generator=running.generator))
        running.tokens.append(token)
        told_V = logits_V if self.arguments.logprobs_mode == "raw_logprobs" else cold_V
        reason = self._finish_reason(running, token)
        if reason is not None:
            del self.running[request_id]
            self.unfinished.remove(request_id)
        found = {token: Logprob(float(told_V.log_softmax(-1)[token]))}
        part = CompletionOutput(
            index=0,
            text="",
            token_ids=[token],
            cumulative_logprob=None,
            logprobs=None if params.logprobs is None else [found],
            finish_reason=reason,
        )
        return RequestOutput(request_id, [part], finished=reason is not None)

    def _logits(self, running: _Running) -> Tensor:
        if not running.tokens and running.prompt in self._prompts:
            return self._prompts[running.prompt]
        logits_V: Tensor = self.model(torch.tensor([[*running.prompt, *running.tokens]]))[0, -1]
        if not running.tokens and self.arguments.enable_prefix_caching:
            self._prompts[running.prompt] = logits_V
        return logits_V

    def _finish_reason(self, running: _Running, token: int) -> str | None:
        if token in (running.params.stop_token_ids or ()):
            return "stop"
        num_tokens = len(running.prompt) + len(running.tokens)
        is_long = len(running.tokens) == running.params.max_tokens
        return "length" if is_long or num_tokens >= self.model_config.max_model_len else None


def modules() -> dict[str, ModuleType]:
    """The package and those of its modules that are imported, by name."""
    contents: dict[str, dict[str, Any]] = {
        "vllm": {"EngineArgs": EngineArgs, "LLMEngine": LLMEngine, "SamplingParams": SamplingParams},
        "vllm.inputs": {"tokens_input": tokens_input},
        "vllm.sampling_params": {"RequestOutputKind": RequestOutputKind},
        "vllm.v1": {},
        "vllm.v1.executor": {"Executor": Executor},
    }
    made = {name: ModuleType(name) for name in contents}
    for name, module in made.items():
        vars(module).update(contents[name])
    return made
