"""The sampler that a config names, and a run whose answers vLLM (a stand-in) writes."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dscoder.train import grpo
from dscoder.train.explore import EngineSampler
from dscoder.train.rollout import read_rollouts
from dscoder.train.samplers import open_sampler
from tests.train import vllm_stand_in
from tests.train.grpo_stand_in import TOKENIZER, Letters, config_for, policy, save_policy

MODULE = "dscoder.train.vllm_sampler"


def test_our_own_engine_writes_unless_the_config_says_otherwise() -> None:
    sampler = open_sampler(config_for(Path("model"), Path("out")), policy(), TOKENIZER)
    assert isinstance(sampler, EngineSampler)


def test_vllm_that_is_not_there_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    config = config_for(Path("model"), Path("out"))
    config = replace(config, rollout=replace(config.rollout, engine="vllm"))
    wanted = r"^grpo: vLLM must be installed for rollout.engine = vllm \(pip install 'dscoder\[vllm\]'\): "
    with pytest.raises(ValueError, match=wanted):
        open_sampler(config, policy(), TOKENIZER)


def test_a_run_hands_every_update_to_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in vllm_stand_in.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    seen: list[Mapping[str, float]] = []
    config = config_for(save_policy(tmp_path), tmp_path / "run", num_steps=3)
    config = replace(config, rollout=replace(config.rollout, engine="vllm"))
    out = grpo.run(config, Letters(), on_metrics=seen.append)
    sys.modules.pop(MODULE)
    # Weights of the step before would not agree: the rate of this config moves them far.
    assert [report["mismatch"] < 1e-5 for report in seen] == [True] * 3
    assert all(report["kl"] > 1e-5 for report in seen[1:])
    assert vllm_stand_in.LLMEngine.last.calls.count("reload_weights") == 3
    assert len(read_rollouts(out, 3)) == 8
