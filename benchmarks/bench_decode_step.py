"""A whole model that decodes, beside transformers' DeepseekV2ForCausalLM: its step, and all of generate.

Random weights, the same ones for both. A step goes from the embedding to the token: every row holds a context
of random latents and gets one more. On a GPU V2-Lite as it is, in bfloat16: the clock captures the step in a
CUDA graph, ours, and theirs if it can be, and `call_us` is ours without one. On a CPU a tiny model, and a
slice of V2-Lite.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.decode_bytes import decode_bytes, experts_hit
from benchmarks.peers.transformers_model import HAS_TRANSFORMERS, cache_of, decode_step, their_model
from benchmarks.shapes import DEVICE, DTYPE, IS_ON_GPU
from dscoder.config import ModelConfig, preset
from dscoder.config.generate import BatchConfig
from dscoder.infer.engine import Engine
from dscoder.infer.pages import Room
from dscoder.infer.request import Request
from dscoder.infer.runner import Runner, cuda_graphs
from dscoder.infer.scheduler import Job
from dscoder.models import Transformer
from dscoder.models.cache import PAGE_SIZE, LatentCache, allocate_cache
from dscoder.models.init import init_weights, materialise
from dscoder.testing import cases
from dscoder.testing.launches import launches_of, num_kernels
from dscoder.testing.measure import Problem
from dscoder.testing.peer import Peer, Run
from dscoder.testing.results import Case

CONTEXT = 1024  # tokens of a row, the new one among them
NEW_TOKENS = 32  # that generate makes of a prompt of the rest
GPU_BYTES = 60e9  # weights, caches of 128 rows for each contender, what they compute with
# Of the logits, by their lengths: in bfloat16 27 layers err by percents, and near-ties choose other experts.
MODEL_TOLERANCE = 0.1 if IS_ON_GPU else 0.0
ROTATED_STD = 0.3  # of the cached keys; the latents come out of a norm
# Whose kernels a step on a GPU stands on.
KERNELS = ("latent_append", "mla_decode", "moe_gate", "moe_experts")
# One dense and one expert layer at V2-Lite's widths; a small vocabulary.
V2_LITE_SLICE = replace(preset("v2_lite"), num_layers=2, vocab_size=8192, bos_id=0, eos_id=1)
MODELS: dict[str, tuple[ModelConfig, tuple[int, ...]]] = (  # and the numbers of rows
    {"v2_lite": (preset("v2_lite"), (1, 128))}
    if IS_ON_GPU
    else {"tiny_moe": (preset("tiny_moe"), (1, 128)), "v2_lite_slice": (V2_LITE_SLICE, (1, 8))}
)
CASES = [(name, num_rows) for name, (_, batches) in MODELS.items() for num_rows in batches]
TEXTS = [(name, num_rows) for name in MODELS for num_rows in (1, 8)]


class Subject:
    """A model with random weights, made on the device, and transformers' on the same ones."""

    def __init__(self, name: str) -> None:
        if IS_ON_GPU and torch.cuda.mem_get_info()[0] < GPU_BYTES:
            pytest.skip(f"needs {GPU_BYTES / 1e9:.0f} GB of free GPU memory")
        begin = time.perf_counter()
        self.name = name
        self.model = Transformer(MODELS[name][0], device="meta").eval()
        materialise(self.model, dtype=DTYPE, device=DEVICE)
        self.model.requires_grad_(False)
        init_weights(self.model, seed=0)
        if IS_ON_GPU:
            torch.cuda.synchronize()
        self.seconds = time.perf_counter() - begin  # that making the weights took

    @cached_property
    def theirs(self) -> nn.Module:
        """Made when a peer asks for it: a run of ours alone does not."""
        return their_model(self.model).eval()

    def cache(self, num_rows: int) -> LatentCache:
        """Rows of CONTEXT - 1 tokens that nobody wrote."""
        config = self.model.config
        cache = allocate_cache(
            config, num_sequences=num_rows, max_positions=CONTEXT, dtype=DTYPE, device=DEVICE
        )
        assert isinstance(cache, LatentCache)
        generator = torch.Generator(DEVICE).manual_seed(0)
        for pool in cache.pages:
            pool.normal_(generator=generator)
            pool[..., config.attention.kv_lora_rank :] *= ROTATED_STD
        cache.seq_lens_B.fill_(CONTEXT - 1)
        return cache


@pytest.fixture(scope="module")
def subjects() -> Iterator[Callable[[str], Subject]]:
    """One model at a time: a second one of V2-Lite's size would be in the way."""
    kept: list[Subject] = []

    def subject(name: str) -> Subject:
        if not kept or kept[0].name != name:
            kept.clear()
            kept.append(Subject(name))
        return kept[0]

    yield subject
    kept.clear()


class NoText:
    """A tokenizer for texts that nobody reads, and that never end by themselves."""

    eos_id = None

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def decode(self, tokens: list[int], *, skip_special: bool) -> str:
        return " " * len(tokens)


def our_step(model: Transformer, cache: LatentCache) -> Peer:
    """Timed too: one launch that sets the lengths back, so that every call is the same."""

    def prepare(tokens_B1: Tensor) -> Run:
        @torch.inference_mode()
        def call() -> tuple[Tensor, Tensor]:
            rows = cache.rows(0, len(tokens_B1), max_len=CONTEXT - 1)
            logits_BV = model(tokens_B1, cache=rows)[:, -1]
            token_B = logits_BV.argmax(dim=-1)
            cache.seq_lens_B.fill_(CONTEXT - 1)
            return token_B, logits_BV

        return Run(call=call, read=lambda raw: raw[1])

    return Peer(prepare=prepare)


def agreed(logits_BV: Tensor, wanted_BV: Tensor) -> Tensor:
    """What was wanted, if it is near that in all; else what is there, and the difference is reported."""
    distance = torch.linalg.vector_norm(logits_BV.float() - wanted_BV.float())
    is_near = distance <= MODEL_TOLERANCE * torch.linalg.vector_norm(wanted_BV.float())
    return wanted_BV if is_near else logits_BV


def their_steps(
    subject: Subject, cache: LatentCache, wanted_BV: Tensor, *, has_compiled: bool
) -> dict[str, Peer]:
    """Those of transformers' expert implementations that fit: "batched_mm" copies weights for every token.

    `wanted_BV` are our logits.
    """
    if not HAS_TRANSFORMERS:
        return {}
    num_rows = cache.num_sequences
    experts = ["grouped_mm", *(["batched_mm"] if num_rows == 1 else []), *([] if IS_ON_GPU else ["eager"])]
    names = {f"transformers {name}": (name, False) for name in experts}
    if has_compiled:
        names |= {f"transformers {name} compiled": (name, True) for name in experts[-1:]}

    def prepare(experts: str, is_compiled: bool) -> Callable[[Tensor], Run]:
        def run(tokens_B1: Tensor) -> Run:
            # The last page belongs to no row; those of a row lie one after the other.
            rows = [pool[:-1].view(num_rows, -1, pool.shape[-1]) for pool in cache.pages]
            latent_width = subject.model.config.attention.kv_lora_rank
            theirs = cache_of(subject.theirs, rows, latent_width=latent_width, length=CONTEXT - 1)
            call = decode_step(subject.theirs, theirs, tokens_B1, experts=experts, is_compiled=is_compiled)
            return Run(call=call, read=lambda raw: agreed(raw[1], wanted_BV))

        return run

    return {name: Peer(prepare=prepare(*names[name])) for name in names}


Measure = Callable[..., None]
Subjects = Callable[[str], Subject]


def measure_step(
    measure: Measure, benchmark: BenchmarkFixture, subject: Subject, num_rows: int, *, has_compiled: bool
) -> None:
    model, cache = subject.model, subject.cache(num_rows)
    vocab_size = model.config.vocab_size
    rng = cases.generator(subject.name)
    tokens_B1 = torch.randint(0, vocab_size, (num_rows, 1), generator=rng).to(DEVICE)
    ours = our_step(model, cache)
    call = ours.prepare(tokens_B1).call
    case = Case(
        op="decode_step",
        step="forward",
        model=subject.name,
        shape=f"B={num_rows} context={CONTEXT}",
        dtype=DTYPE,
        num_tokens=num_rows,
        num_bytes=decode_bytes(
            model.config,
            num_rows=num_rows,
            context=CONTEXT,
            num_hit=experts_hit(call),
            dtype=DTYPE,
        ),
        kernels=KERNELS,
    )
    problem = Problem(args=(tokens_B1,), shared=(*model.parameters(), *cache.pages))
    measure(case, problem, ours, their_steps(subject, cache, call()[1], has_compiled=has_compiled))
    benchmark.extra_info["weights_s"] = round(subject.seconds, 2)
    if IS_ON_GPU:
        benchmark.extra_info["launches"] = num_kernels(launches_of(model, call))


@pytest.mark.parametrize(("name", "num_rows"), CASES)
def test_step(
    measure: Measure, benchmark: BenchmarkFixture, subjects: Subjects, name: str, num_rows: int
) -> None:
    if benchmark.disabled and name != "tiny_moe":
        pytest.skip("a large model is too long for a test run")
    measure_step(measure, benchmark, subjects(name), num_rows, has_compiled=False)


def runner_step(model: Transformer, num_rows: int, *, has_graphs: bool) -> Peer:
    """What the engine waits for: tokens from the host, a graph replayed, the answer back on the host.

    The largest logits are compared. Timed too: one launch that sets the lengths back.
    """

    def prepare(tokens_B1: Tensor) -> Run:
        num_pages = CONTEXT // PAGE_SIZE
        room = Room(num_rows=num_rows, max_positions=CONTEXT, num_pages=num_rows * num_pages)
        capture = cuda_graphs() if has_graphs else None
        runner = Runner(model, room=room, num_ids=model.config.vocab_size, capture=capture)
        generator = torch.Generator(DEVICE).manual_seed(0)
        for pool in runner.cache.pages:
            pool.normal_(generator=generator)
        jobs = [
            Job(
                request_idx=row,
                num_tokens=CONTEXT,
                most_tokens=CONTEXT,
                num_cached=CONTEXT - 1,
                row=row,
            )
            for row in range(num_rows)
        ]
        for row in range(num_rows):
            runner.cache.assign(row, range(row * num_pages, (row + 1) * num_pages))
        tokens = tokens_B1[:, 0].tolist()

        def call() -> Tensor:
            runner.cache.seq_lens_B.fill_(CONTEXT - 1)
            return runner.step(jobs, tokens, None).cpu()

        call()  # captures
        return Run(call=call, read=lambda answer_2B: answer_2B[0])

    return Peer(prepare=prepare)


@pytest.mark.parametrize(("name", "num_rows"), CASES)
def test_runner(
    measure: Measure, benchmark: BenchmarkFixture, subjects: Subjects, name: str, num_rows: int
) -> None:
    if benchmark.disabled and name != "tiny_moe":
        pytest.skip("a large model is too long for a test run")
    model = subjects(name).model
    tokens_B1 = torch.randint(0, model.config.vocab_size, (num_rows, 1), generator=cases.generator(name))
    case = Case(
        op="decode_step",
        step="runner",
        model=name,
        shape=f"B={num_rows} context={CONTEXT}",
        dtype=DTYPE,
        num_tokens=num_rows,
        kernels=KERNELS,
    )
    peers = {"without graphs": runner_step(model, num_rows, has_graphs=False)} if IS_ON_GPU else {}
    problem = Problem(args=(tokens_B1,), shared=tuple(model.parameters()))
    measure(case, problem, runner_step(model, num_rows, has_graphs=IS_ON_GPU), peers)


def our_generate(model: Transformer) -> Peer:
    def prepare(prompts_BS: Tensor) -> Run:
        batch = BatchConfig(max_batch=len(prompts_BS))
        engine = Engine(model, NoText(model.config.vocab_size), batch=batch)
        requests = [
            Request(prompt=tuple(prompt), max_new_tokens=NEW_TOKENS) for prompt in prompts_BS.tolist()
        ]

        def call() -> Tensor:
            return torch.tensor([completion.tokens for completion in engine.generate(requests)])

        call()  # captures
        return Run(call=call, read=comparable)

    return Peer(prepare=prepare)


def their_generate(subject: Subject, *, cache: str) -> Peer:
    """With a static cache on a GPU it compiles the steps and captures them, before it is timed."""

    def prepare(prompts_BS: Tensor) -> Run:
        prompts_BS = prompts_BS.to(DEVICE)
        theirs = subject.theirs

        def call() -> Tensor:
            theirs.set_attn_implementation("sdpa")
            theirs.set_experts_implementation("grouped_mm")
            tokens = theirs.generate(
                prompts_BS,
                attention_mask=torch.ones_like(prompts_BS),
                do_sample=False,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                cache_implementation=cache,
                pad_token_id=0,
                eos_token_id=None,
            )
            return tokens[:, prompts_BS.shape[1] :].cpu()

        return Run(call=call, read=comparable)

    return Peer(prepare=prepare)


def comparable(tokens_BS: Tensor) -> Tensor:
    """In bfloat16 two tokens may be as likely, and the texts part: how many there are is what is compared."""
    return torch.tensor(tokens_BS.shape) if IS_ON_GPU else tokens_BS


def measure_generate(measure: Measure, subject: Subject, num_rows: int, *, has_compiled: bool) -> None:
    model, length = subject.model, CONTEXT - NEW_TOKENS
    rng = cases.generator(subject.name)
    prompts_BS = torch.randint(0, model.config.vocab_size, (num_rows, length), generator=rng)
    case = Case(
        op="decode_step",
        step="generate",
        model=subject.name,
        shape=f"B={num_rows} prompt={length} new={NEW_TOKENS}",
        dtype=DTYPE,
        num_tokens=num_rows * NEW_TOKENS,
        kernels=KERNELS,
    )
    peers = {}
    if HAS_TRANSFORMERS:
        peers["transformers"] = their_generate(subject, cache="dynamic")
        if has_compiled:
            peers["transformers static"] = their_generate(subject, cache="static")
    problem = Problem(args=(prompts_BS,), shared=tuple(model.parameters()))
    measure(case, problem, our_generate(model), peers)


@pytest.mark.parametrize(("name", "num_rows"), TEXTS)
def test_generate(
    measure: Measure, benchmark: BenchmarkFixture, subjects: Subjects, name: str, num_rows: int
) -> None:
    if benchmark.disabled:
        pytest.skip("a text is too long for a test run")
    measure_generate(measure, subjects(name), num_rows, has_compiled=False)


@pytest.fixture
def beside_compiled(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> None:
    """Skips where nothing is compiled, or where ours alone is measured, which it has been already."""
    if benchmark.disabled or not IS_ON_GPU:
        pytest.skip("compiling a model takes minutes")
    if request.config.getoption("--check-ours", default=False):
        pytest.skip("ours is measured already")


# Last, since compiling takes minutes: their records replace those of the tests above.
@pytest.mark.usefixtures("beside_compiled")
@pytest.mark.parametrize(("name", "num_rows"), CASES)
def test_step_beside_compiled(
    measure: Measure, benchmark: BenchmarkFixture, subjects: Subjects, name: str, num_rows: int
) -> None:
    measure_step(measure, benchmark, subjects(name), num_rows, has_compiled=True)


@pytest.mark.usefixtures("beside_compiled")
@pytest.mark.parametrize(("name", "num_rows"), TEXTS)
def test_generate_beside_compiled(measure: Measure, subjects: Subjects, name: str, num_rows: int) -> None:
    measure_generate(measure, subjects(name), num_rows, has_compiled=True)
