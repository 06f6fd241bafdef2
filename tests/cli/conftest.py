"""A model directory as `dscoder pretrain` leaves it: random weights, a real tokenizer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dscoder.checkpoint import save_pretrained
from dscoder.config import preset
from dscoder.models.transformer import Transformer
from dscoder.text.tokenizer import Tokenizer

TEXTS = ["def add(a, b):\n    return a + b\n", "for name in names:\n    print(name, \u4e2d, 12)\n"] * 20


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(TEXTS, vocab_size=300)
    tokenizer.save(root / "tokenizer")
    config = replace(
        preset("tiny_moe"),
        vocab_size=tokenizer.vocab_size,
        width=64,
        num_layers=2,
        mlp_width=96,
        max_positions=96,
        bos_id=tokenizer.require_id("bos"),
        eos_id=tokenizer.require_id("eos"),
    )
    model = Transformer(config)
    # Wide enough that the likeliest token is far ahead: rounding must not decide it.
    for index, parameter in enumerate(model.parameters()):
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(index))
    save_pretrained(model, root / "model", tokenizer=root / "tokenizer")
    return root / "model"
