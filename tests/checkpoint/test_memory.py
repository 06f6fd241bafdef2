"""Peak memory, measured in a process of its own: the model and one tensor, not the model twice."""

import json
import subprocess
import sys

import pytest

MIB = 2**20
SHARD = 16 * MIB
EMBEDDING = 32 * MIB  # the largest tensor
SLACK = 24 * MIB  # the interpreter's own growth, buffers

PROGRAM = """
import json, resource, sys
from dataclasses import replace
import torch
from dscoder.checkpoint import load_pretrained, save_pretrained
from dscoder.config import preset
from dscoder.models import Transformer

act, directory = sys.argv[1:]

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

base = preset("tiny_moe")
moe = replace(base.moe, num_experts=32, expert_width=256)
config = replace(base, width=512, num_layers=5, vocab_size=16384, moe=moe)
if act == "load":
    before = peak()
    model = load_pretrained(directory)
elif act == "load_bfloat16":
    before = peak()
    model = load_pretrained(directory, dtype=torch.bfloat16)
else:
    model = Transformer(config)
    before = peak()
    save_pretrained(model, directory, max_shard_bytes=int(act))
size = sum(p.nbytes for p in model.parameters())
print(json.dumps({"size": size, "grown": peak() - before}))
"""


def measure(act, directory):
    command = [sys.executable, "-c", PROGRAM, act, str(directory)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.fixture(scope="module", params=[SHARD, 2**40], ids=["shards", "one_file"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint of a few hundred megabytes, and what saving it took."""
    directory = tmp_path_factory.mktemp("checkpoint") / "model"
    saving = measure(str(request.param), directory)
    assert saving["size"] > 250 * MIB
    assert (len(list(directory.glob("*.safetensors"))) > 10) == (request.param == SHARD)
    return directory, saving


@pytest.mark.slow
def test_saving_takes_nothing_beside_the_model(checkpoint):
    assert checkpoint[1]["grown"] < SLACK


@pytest.mark.slow
@pytest.mark.parametrize("act", ["load", "load_bfloat16"])
def test_loading_takes_the_model_and_one_tensor(checkpoint, act):
    loading = measure(act, checkpoint[0])
    assert loading["grown"] < loading["size"] + EMBEDDING + SLACK
