"""vLLM as a sampler, over a stand-in that has its signatures: weights, ends of texts, caches, failures."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dscoder.checkpoint import save_pretrained
from dscoder.config.generate import SamplingConfig
from dscoder.config.grpo import GrpoConfig, PolicyLossConfig, RolloutConfig
from dscoder.infer.request import Request
from dscoder.models import Transformer
from dscoder.testing.sampler_contract import check_sampler, complete
from dscoder.train.samplers import open_sampler
from tests.train import vllm_stand_in
from tests.train.grpo_stand_in import TOKENIZER, config_for, policy

MODULE = "dscoder.train.vllm_sampler"
EOS = TOKENIZER.require_id("eos")


@pytest.fixture
def vllm_sampler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module over the stand-in."""
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    yield import_module(MODULE)
    sys.modules.pop(MODULE, None)


def saved_policy(directory: Path, name: str = "tiny_dense") -> Transformer:
    """A policy with rows that stand for no token, as the published models have; and on disk in `policy`."""
    TOKENIZER.save(directory / "tokenizer")
    torch.manual_seed(0)
    model = Transformer(replace(policy(name).config, vocab_size=TOKENIZER.vocab_size + 6)).eval()
    save_pretrained(model, directory / "policy", tokenizer=directory / "tokenizer")
    return model


class Made:
    """A policy and a sampler for it."""

    def __init__(self, module: Any, directory: Path, name: str = "tiny_dense", **rollout: Any) -> None:
        self.model = saved_policy(directory, name)
        config = config_for(directory / "policy", directory / "run")
        self.config: GrpoConfig = replace(config, rollout=replace(config.rollout, **rollout))
        self.sampler = module.open_sampler(self.config, self.model, TOKENIZER)
        self.engine = vllm_stand_in.LLMEngine.last

    def complete(self, requests: list[Request]) -> Any:
        return complete(self.sampler, requests, model=self.model, tokenizer=TOKENIZER)


@pytest.fixture
def made(vllm_sampler: Any, tmp_path: Path) -> Made:
    return Made(vllm_sampler, tmp_path)


def asked(text: str = "an apple", *, seed: int = 0, **fields: Any) -> Request:
    request = Request(
        prompt=tuple(TOKENIZER.encode(text)),
        max_new_tokens=6,
        sampling=SamplingConfig(temperature=1.0, seed=seed),
        keep_logprobs=True,
    )
    return replace(request, **fields)


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_it_keeps_the_contract_of_a_sampler(vllm_sampler: Any, tmp_path: Path, name: str) -> None:
    made = Made(vllm_sampler, tmp_path, name)
    check_sampler(
        made.sampler,
        model=made.model,
        tokenizer=TOKENIZER,
        prompts=["an apple", "def f(x):"],
        max_new_tokens=8,
        tolerance=1e-5,
    )


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_weights_are_handed_over_as_a_checkpoint_has_them_without_a_copy(
    vllm_sampler: Any, tmp_path: Path, name: str
) -> None:
    model = policy(name)
    save_pretrained(model, tmp_path / "saved")
    storages = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    num_seen = 0
    with safe_open(tmp_path / "saved" / "model.safetensors", framework="pt") as stored:
        names = list(stored.keys())
        for name_there, weight in vllm_sampler.policy_weights(model, num_ids=model.config.vocab_size):
            assert torch.equal(weight, stored.get_tensor(name_there))
            assert weight.untyped_storage().data_ptr() in storages
            assert not weight.requires_grad
            num_seen += 1
    assert num_seen == len(names)


def test_rows_without_a_token_are_left_out(vllm_sampler: Any) -> None:
    weights = dict(vllm_sampler.policy_weights(policy(), num_ids=280))
    assert weights["model.embed_tokens.weight"].shape[0] == weights["lm_head.weight"].shape[0] == 280


def test_a_round_wakes_loads_forgets_and_sleeps(made: Made) -> None:
    made.complete([asked()])
    assert made.engine.calls == [
        "sleep",
        "wake_up weights",
        "reload_weights",
        "wake_up kv_cache",
        "reset_prefix_cache",
        "sleep",
    ]


def test_no_cache_of_old_weights_is_used_even_if_sleep_keeps_it(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_stand_in.LLMEngine, "sleep_clears", False)
    made.complete([asked()])
    with torch.no_grad():
        made.model.head.weight.mul_(-1)
    (answer,) = made.complete([asked()])
    with torch.no_grad():
        logits_V = made.model(torch.tensor([asked().prompt]))[0, -1, : TOKENIZER.vocab_size]
    assert answer.logprobs[0] == pytest.approx(float(logits_V.log_softmax(-1)[answer.tokens[0]]), abs=1e-5)


def test_requests_that_still_run_when_weights_change_are_an_error(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made.engine, "reset_prefix_cache", lambda: False)
    with pytest.raises(ValueError, match=r"^vllm: no request may hold cache of other weights, got some"):
        made.complete([asked()])
    assert made.engine.calls[-1] == "sleep"


def test_vllm_is_asked_for_what_a_request_says(made: Made) -> None:
    sampling = SamplingConfig(temperature=1.0, top_p=0.5, top_k=7, seed=2**62)
    made.complete([asked(sampling=sampling, stop=("zz",), stop_ids=(5,), max_new_tokens=4)])
    assert made.engine.params == [
        vllm_stand_in.SamplingParams(
            temperature=1.0,
            top_p=0.5,
            top_k=7,
            seed=2**62,
            stop_token_ids=[5, EOS],
            ignore_eos=True,
            max_tokens=4,
            logprobs=0,
            detokenize=False,
            output_kind=vllm_stand_in.RequestOutputKind.DELTA,
        )
    ]


def test_the_engine_is_made_as_the_config_says(vllm_sampler: Any, tmp_path: Path) -> None:
    made = Made(vllm_sampler, tmp_path, "tiny_moe")
    batch = replace(
        made.config.rollout.batch, max_batch=3, prefill_chunk=2, cache_tokens=100, cuda_graphs=False
    )
    config = replace(made.config, rollout=replace(made.config.rollout, batch=batch))
    vllm_sampler.open_sampler(config, made.model, TOKENIZER)
    arguments = vllm_stand_in.LLMEngine.last.arguments
    attention = made.model.config.attention
    assert arguments.model == config.model
    assert arguments.hf_overrides == {"vocab_size": TOKENIZER.vocab_size}
    assert (arguments.dtype, arguments.max_model_len) == ("bfloat16", -1)
    assert (arguments.max_num_seqs, arguments.max_num_batched_tokens) == (3, 3)
    assert arguments.gpu_memory_utilization == batch.memory_share
    # A page row of one layer, in bfloat16.
    assert arguments.kv_cache_memory_bytes == 100 * 2 * attention.cache_dim  # type: ignore[union-attr]
    assert arguments.enforce_eager
    assert arguments.skip_tokenizer_init
    assert arguments.async_scheduling is False


def test_answers_come_as_they_end(made: Made) -> None:
    found = list(made.sampler.sample([asked(max_new_tokens=6), asked(max_new_tokens=1)]))
    assert [idx for idx, _ in found] == [1, 0]


def test_a_text_that_a_stop_string_ended_is_not_written_on(made: Made) -> None:
    (whole,) = made.complete([asked()])
    word = whole.text[2]
    (cut,) = made.complete([asked(stop=(word,))])
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.tokens == whole.tokens[: len(cut.tokens)]
    assert cut.logprobs == whole.logprobs[: len(cut.tokens)]
    assert not made.engine.has_unfinished_requests()


def test_ends_have_our_names(made: Made) -> None:
    (whole,) = made.complete([asked()])
    assert whole.finish_reason == "length"
    (stopped,) = made.complete([asked(stop_ids=(whole.tokens[1],))])
    assert (stopped.finish_reason, stopped.tokens) == ("stop", whole.tokens[:2])
    with torch.no_grad():  # nothing but the end is likely
        made.model.head.weight.zero_()
        made.model.head.weight[EOS] = 1e4 * made.model.norm.weight.sign()
    ends = made.complete([asked("an apple", seed=seed) for seed in range(16)])
    assert "eos" in {end.finish_reason for end in ends}
    assert all(end.tokens[-1] == EOS and end.text == "" for end in ends if len(end.tokens) == 1)


def test_an_answer_that_fills_the_context_says_so(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made.engine, "model_config", vllm_stand_in.ModelConfig(32))
    length = made.model.config.max_positions
    (answer,) = made.complete([asked(prompt=tuple([60] * (length - 3)))])
    assert (answer.finish_reason, len(answer.tokens)) == ("context", 3)
    (none,) = made.complete([asked(prompt=tuple([60] * length))])
    assert (none.finish_reason, none.tokens) == ("context", ())


def test_an_answer_of_no_tokens_asks_vllm_nothing(made: Made) -> None:
    (answer,) = made.complete([asked(max_new_tokens=0)])
    assert (answer.finish_reason, answer.tokens, answer.text) == ("length", (), "")
    assert made.engine.calls == ["sleep"]


def test_log_probabilities_are_left_out_where_nobody_asks(made: Made) -> None:
    ((_, answer),) = made.sampler.sample([asked(keep_logprobs=False)])
    assert answer.logprobs is None
    assert made.engine.params[0].logprobs is None


@pytest.mark.parametrize(("length", "most"), [(20, 24), (33, 32)])
def test_what_is_too_long_is_refused_before_anything_runs(made: Made, length: int, most: int) -> None:
    wanted = (
        f"^vllm: request 1 must have <= {most} tokens with its answer, what the model and vLLM's cache hold"
    )
    with pytest.raises(ValueError, match=wanted):
        made.sampler.sample([asked(), asked(prompt=tuple([60] * length))])
    assert made.engine.calls == ["sleep"]


def test_a_request_that_vllm_gives_up_is_an_error(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    def give_up(output: Any) -> Any:
        part = replace(output.outputs[0], finish_reason="abort")
        return replace(output, outputs=[part], finished=True)

    monkeypatch.setattr(made.engine, "spoil", give_up)
    with pytest.raises(
        ValueError, match=r"^vllm: request 0 must be written to its end, got abort after 1 tok"
    ):
        made.complete([asked()])
    assert not made.engine.has_unfinished_requests()
    assert made.engine.calls[-1] == "sleep"


def test_log_probabilities_that_are_not_finite_are_an_error(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(made.engine, "reload_weights", lambda weights_iterator: None)
    with pytest.raises(ValueError, match="log-probabilities of request 0 must be finite, got nan at token 0"):
        made.complete([asked()])


def test_whoever_stops_asking_leaves_nothing_running(made: Made) -> None:
    answers = made.sampler.sample([asked(max_new_tokens=1), asked()])
    next(answers)
    assert made.engine.has_unfinished_requests()
    answers.close()
    assert not made.engine.has_unfinished_requests()
    assert made.engine.calls[-1] == "sleep"


@pytest.mark.parametrize(
    ("fields", "mode"),
    [
        ({}, "raw_logprobs"),
        ({"top_p": 0.9, "top_k": 5}, "raw_logprobs"),
        ({"temperature": 0.7}, "processed_logprobs"),
    ],
)
def test_log_probabilities_are_at_the_temperature_and_before_the_filters(
    vllm_sampler: Any, fields: dict[str, Any], mode: str
) -> None:
    assert vllm_sampler.logprobs_mode(RolloutConfig(**fields)) == mode


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"temperature": 2.5}, r"rollout.temperature must be in \[0.01, 2.0\] for vLLM, got 2.5"),
        ({"temperature": 0.001}, r"rollout.temperature must be in \[0.01, 2.0\] for vLLM, got 0.001"),
        ({"temperature": 0.5, "top_p": 0.9}, "rollout.temperature must be 1 beside top_p .* got 0.5"),
        ({"temperature": 0.5, "top_k": 9}, "rollout.temperature must be 1 beside top_p .* got 0.5"),
    ],
)
def test_settings_whose_probabilities_vllm_cannot_tell_are_refused(
    vllm_sampler: Any, fields: dict[str, Any], wanted: str
) -> None:
    with pytest.raises(ValueError, match=wanted):
        vllm_sampler.logprobs_mode(RolloutConfig(**fields))


def test_answers_at_another_temperature_are_as_likely_as_the_policy_says(
    vllm_sampler: Any, tmp_path: Path
) -> None:
    made = Made(vllm_sampler, tmp_path, temperature=0.5)
    request = asked(sampling=SamplingConfig(temperature=0.5, seed=1))
    (answer,) = made.complete([request])
    with torch.no_grad():
        logits_SV = made.model(torch.tensor([[*request.prompt, *answer.tokens[:-1]]]))[0]
    rows_TV = logits_SV[len(request.prompt) - 1 :, : TOKENIZER.vocab_size] / 0.5
    wanted_T = rows_TV.log_softmax(-1).gather(1, torch.tensor(answer.tokens)[:, None])[:, 0]
    assert answer.logprobs == pytest.approx(wanted_T.tolist(), abs=1e-4)


@pytest.mark.parametrize(("correction", "num_warnings"), [("none", 1), ("token", 0)])
def test_probabilities_that_differ_uncorrected_are_warned_of_once(
    vllm_sampler: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    correction: Any,
    num_warnings: int,
) -> None:
    made = Made(vllm_sampler, tmp_path)
    caplog.clear()
    config = replace(made.config, loss=PolicyLossConfig(correction=correction))
    sampler = vllm_sampler.open_sampler(config, made.model, TOKENIZER)
    for _ in range(2):
        list(sampler.sample([asked()]))
    assert sum("loss.correction" in record.getMessage() for record in caplog.records) == num_warnings


@pytest.mark.gpu
@pytest.mark.slow
def test_vllm_itself_keeps_the_contract(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    pytest.importorskip("vllm.v1.executor", reason="vLLM is not installed: dscoder[vllm]")
    model = saved_policy(tmp_path).to("cuda", torch.bfloat16)
    config = config_for(tmp_path / "policy", tmp_path / "run")
    check_sampler(
        open_sampler(replace(config, rollout=replace(config.rollout, engine="vllm")), model, TOKENIZER),
        model=model,
        tokenizer=TOKENIZER,
        prompts=["an apple", "def f(x):"],
        max_new_tokens=8,
        tolerance=0.05,
    )
