"""A batch of ours against transformers' generate, one prompt at a time, on the same weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from dscoder.checkpoint import save_pretrained
from dscoder.config import preset
from dscoder.config.generate import BatchConfig
from dscoder.infer.engine import Engine
from dscoder.infer.request import Request
from dscoder.models.transformer import Transformer

NUM_NEW = 40


@pytest.mark.parametrize("name", ["tiny_dense", "tiny_moe"])
def test_greedy_tokens_of_a_batch_are_those_of_transformers(tokenizer, tmp_path: Path, name: str) -> None:
    config = replace(preset(name), vocab_size=tokenizer.vocab_size, width=64, num_layers=3, mlp_width=96)
    model = Transformer(replace(config, eos_id=tokenizer.eos_id, bos_id=tokenizer.bos_id))
    for index, parameter in enumerate(model.parameters()):
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    save_pretrained(model, tmp_path / "model")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompts = [
        tuple(torch.randint(256, (n,), generator=torch.Generator().manual_seed(n)).tolist())
        for n in (1, 9, 70)
    ]
    requests = [Request(prompt=prompt, max_new_tokens=NUM_NEW) for prompt in prompts]
    for prompt, completion in zip(
        prompts, Engine(model, tokenizer, batch=BatchConfig(prefill_chunk=32)).generate(requests), strict=True
    ):
        answer = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=tokenizer.eos_id
        )
        assert answer[0, len(prompt) :].tolist() == list(completion.tokens)
