"""The engine on a GPU: captured steps answer as others do, wait for nothing, and give their memory back."""

import gc
from dataclasses import replace

import pytest
import torch

from dscoder.config import MlaConfig, ModelConfig, MoeConfig, preset
from dscoder.config.generate import BatchConfig, SamplingConfig
from dscoder.infer.engine import Engine
from dscoder.infer.pages import Room
from dscoder.infer.request import Completion, Request
from dscoder.infer.runner import Capture, Runner, cuda_graphs
from dscoder.infer.sampler import draw_numbers
from dscoder.infer.scheduler import Job
from dscoder.models.cache import PAGE_SIZE
from dscoder.models.transformer import Transformer
from dscoder.testing import gpu
from tests.infer.stand_in import ByteTokenizer

NUM_IDS = 256
# The attention of V2-Lite, which its kernels are made for, in a small model.
LATENT = ModelConfig(
    vocab_size=NUM_IDS,
    width=256,
    num_layers=2,
    mlp_width=512,
    attention=MlaConfig(
        num_heads=16, q_lora_rank=None, kv_lora_rank=512, nope_dim=128, rope_dim=64, value_dim=128
    ),
    moe=MoeConfig(num_experts=16, num_shared_experts=1, num_topk=4, expert_width=128),
    max_positions=1024,
)
GROUPED = replace(preset("tiny_dense"), vocab_size=NUM_IDS, max_positions=1024)
# Latents as their kernels want them; keys and values so exact that no batch size can change a token.
MODELS = {"latents": (LATENT, torch.bfloat16), "keys and values": (GROUPED, torch.float32)}


class Endless(ByteTokenizer):
    """Every token is text, so that all requests write as much as they may."""

    eos_id = None
    vocab_size = NUM_IDS


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Transformer:
    """Weights so wide that the logits are far apart."""
    config, dtype = MODELS[request.param]
    built = Transformer(config, device=gpu.DEVICE, dtype=dtype).eval()
    for index, parameter in enumerate(built.parameters()):
        if parameter.ndim > 1:
            generator = torch.Generator(gpu.DEVICE).manual_seed(index)
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return built


def prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(torch.randint(NUM_IDS, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def answers(model: Transformer, requests: list[Request], *, cuda_graphs: bool) -> list[Completion]:
    engine = Engine(model, Endless(), batch=BatchConfig(cuda_graphs=cuda_graphs))
    # Twice, the second time with all that the first one kept.
    first, second = engine.generate(requests), engine.generate(requests)
    assert first == second
    assert (engine._kept is not None) is cuda_graphs
    return first


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_captured_steps_draw_the_tokens_of_others(model: Transformer, temperature: float) -> None:
    """Requests that keep a batch of four rows to the end, across a page."""
    requests = [
        Request(
            prompt=prompt(i, 20),
            max_new_tokens=70,
            sampling=SamplingConfig(temperature=temperature * (i % 2), seed=i),
        )
        for i in range(4)
    ]
    with_graphs = answers(model, requests, cuda_graphs=True)
    assert with_graphs == answers(model, requests, cuda_graphs=False)
    assert len({completion.tokens for completion in with_graphs}) == 4


def test_batches_that_grow_and_shrink_change_nothing() -> None:
    config, dtype = MODELS["keys and values"]
    model = Transformer(config, device=gpu.DEVICE, dtype=dtype).eval()
    requests = [Request(prompt=prompt(i, 1 + 40 * i), max_new_tokens=5 + 9 * (i % 4)) for i in range(9)]
    assert answers(model, requests, cuda_graphs=True) == answers(model, requests, cuda_graphs=False)


def build(model: Transformer, capture: Capture | None) -> Runner:
    num_pages = None if model.config.moe is None else 16
    room = Room(num_rows=4, max_positions=4 * PAGE_SIZE, num_pages=num_pages)
    runner = Runner(model, room=room, num_ids=NUM_IDS, capture=capture)
    for row in range(4):
        runner.cache.assign(row, [(7 * (4 * row + i)) % 16 for i in range(4)] if num_pages else [])
    return runner


def job(row: int, num_cached: int) -> Job:
    return Job(request_idx=row, num_tokens=num_cached + 1, most_tokens=999, num_cached=num_cached, row=row)


@pytest.mark.sanitize("memcheck", "synccheck")
def test_a_replay_sees_other_tokens_lengths_and_rows(model: Transformer) -> None:
    captured, plain = build(model, cuda_graphs()), build(model, None)
    lengths = {0: 5, 1: 0, 2: 63, 3: 100}
    for runner in (captured, plain):
        for row, length in lengths.items():
            if length:
                runner.prefill([job(row, 0)], [prompt(row, length)])
    for step in range(6):
        rows = [row for row in lengths if (step + row) % 3]
        tokens = [(7 * step + 13 * row) % NUM_IDS for row in rows]
        jobs = [job(row, lengths[row]) for row in rows]
        peaks, wanted = (runner.step(jobs, tokens, None)[0].tolist() for runner in (captured, plain))
        for row in rows:
            lengths[row] += 1
            assert peaks[row] == pytest.approx(wanted[row], rel=0.05)
    assert captured.cache.seq_lens_B.tolist() == [lengths[row] for row in range(4)]


def test_a_step_keeps_its_input_until_the_gpu_gets_to_it(model: Transformer) -> None:
    answers = []
    for is_busy in (False, True):
        runner = build(model, cuda_graphs())
        runner.step([job(0, 0)], [1], None)  # captures
        if is_busy:
            torch.cuda._sleep(100_000_000)
        asked = []
        for step in range(4):
            asked.append(runner.step([job(0, 1 + step)], [50 * step + 7], None).clone())
            if not is_busy:
                torch.cuda.synchronize()
        answers.append(torch.stack(asked))
    assert answers[0].equal(answers[1])


@pytest.mark.parametrize("is_drawn", [False, True])
def test_a_step_never_waits_for_the_gpu(model: Transformer, is_drawn: bool) -> None:
    runner = build(model, cuda_graphs())
    how = [draw_numbers(SamplingConfig(temperature=0.5), 0)] * 2 if is_drawn else None
    lengths = [0, 0]

    def step() -> tuple[torch.Tensor]:
        answer_2B = runner.step([job(row, lengths[row]) for row in (0, 1)], [1, 2], how)
        lengths[:] = [length + 1 for length in lengths]
        return (answer_2B,)

    step()  # captures
    for _ in range(3):
        gpu.assert_never_waits(step)
    torch.cuda.synchronize()
    assert runner.cache.seq_lens_B.tolist() == [4, 4, 0, 0]


def test_released_memory_is_free(model: Transformer) -> None:
    engine = Engine(model, Endless())
    requests = [Request(prompt=prompt(i, 30), max_new_tokens=20) for i in range(3)]

    def held() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    engine.generate(requests)
    engine.release()
    before = held()  # with the workspaces that libraries keep
    engine.generate(requests)
    assert held() > before
    engine.release()
    assert held() == before


def test_the_cache_keeps_to_its_share_of_the_memory(model: Transformer) -> None:
    """A share too small for one request is told before anything runs."""
    engine = Engine(model, Endless(), batch=BatchConfig(memory_share=1e-9))
    with pytest.raises(ValueError, match="room for the 29 tokens of the longest request, got room for 0"):
        engine.generate([Request(prompt=prompt(0, 20), max_new_tokens=10)])
