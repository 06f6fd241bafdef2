"""The verb `dscoder generate`."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jsonargparse import ArgumentParser, Namespace

from dscoder.cli.options import add_generation_options, engine_config, generate_config
from dscoder.config.generate import GenerateConfig
from dscoder.infer.engine import Engine
from dscoder.infer.infill import infill_request, split_at_marker, text_request
from dscoder.infer.request import Completion, Event, Request

FILL_ME = "<FILL_ME>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """Text to continue or, with a suffix, a hole to fill."""

    name: str
    prefix: str
    suffix: str | None
    record: dict[str, Any]  # what a line of --output repeats


def main(argv: Sequence[str]) -> None:
    """Continue prompts, or fill the hole that a marker shows in them."""
    options = _parse(argv)
    prompts = list(_prompts(options))
    config = generate_config(options)
    engine = Engine.load(engine_config(options))
    requests = [_request(engine, prompt, config) for prompt in prompts]
    with ExitStack() as stack:
        if options.output is None:
            _print_in_order(engine, requests, prompts)
        else:
            is_stdout = options.output == "-"
            sink = (
                sys.stdout if is_stdout else stack.enter_context(open(options.output, "w", encoding="utf-8"))
            )
            _write_records(engine, requests, prompts, sink)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="dscoder generate", description=main.__doc__)
    parser.add_argument(
        "files", nargs="*", default=[], help="files with a prompt each; - is the standard input"
    )
    parser.add_argument("--prompt", action="append", default=[], help="a prompt; may be repeated")
    parser.add_argument("--jsonl", type=str, help='file with {"prompt": ..., "suffix": ... or none} a line')
    parser.add_argument("--marker", type=str, default=FILL_ME, help="stands where the hole is in a prompt")
    parser.add_argument("--output", type=str, help="write JSON lines to this file (-: the standard output)")
    add_generation_options(parser)
    return parser.parse_args(list(argv))


def _prompts(options: Namespace) -> Iterator[Prompt]:
    files = list(options.files)
    if not (files or options.prompt or options.jsonl):
        if sys.stdin.isatty():
            raise ValueError(
                "a prompt must be given by --prompt, a file, --jsonl or the standard input, got none"
            )
        files = ["-"]
    for number, text in enumerate(options.prompt, 1):
        yield _marked_prompt(f"prompt {number}", text, options.marker)
    for name in files:
        yield _marked_prompt(name, _read_text(name), options.marker)
    if options.jsonl:
        for number, line in enumerate(_read_text(options.jsonl).split("\n"), 1):
            if line.strip():
                yield _recorded_prompt(f"{options.jsonl}:{number}", line)


def _read_text(name: str) -> str:
    content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} must be UTF-8 text, got {error}") from error


def _marked_prompt(name: str, text: str, marker: str) -> Prompt:
    prefix, suffix = split_at_marker(text, marker) or (text, None)
    return Prompt(name=name, prefix=prefix, suffix=suffix, record={"name": name})


def _recorded_prompt(name: str, line: str) -> Prompt:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{name} must be a JSON object, got {error}") from error
    wanted = 'an object with a text "prompt" and, for a hole, a text "suffix"'
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise ValueError(f"{name} must be {wanted}, got {line[:80]}")
    suffix = record.get("suffix")
    if suffix is not None and not isinstance(suffix, str):
        raise ValueError(f"{name} must be {wanted}, got a suffix of type {type(suffix).__name__}")
    return Prompt(name=name, prefix=record["prompt"], suffix=suffix, record=record)


def _request(engine: Engine, prompt: Prompt, config: GenerateConfig) -> Request:
    if prompt.suffix is None:
        return text_request(engine.tokenizer, prompt.prefix, config=config)
    return infill_request(
        engine.tokenizer, prompt.prefix, prompt.suffix, max_positions=engine.max_positions, config=config
    )


def _in_order(events: Iterator[Event], num_requests: int) -> Iterator[Event]:
    """Events of the first unfinished request at once, those of later ones when it is their turn."""
    waiting: list[list[Event]] = [[] for _ in range(num_requests)]
    turn = 0
    for event in events:
        waiting[event.request_idx].append(event)
        while turn < num_requests and waiting[turn]:
            ready, waiting[turn] = waiting[turn], []
            yield from ready
            if ready[-1].completion is None:
                break
            turn += 1


def _print_in_order(engine: Engine, requests: Sequence[Request], prompts: Sequence[Prompt]) -> None:
    headed = -1
    for event in _in_order(engine.stream(requests), len(requests)):
        if len(prompts) > 1 and headed < event.request_idx:
            headed = event.request_idx
            print(f"==> {prompts[headed].name} <==")
        print(event.text, end="", flush=True)
        if event.completion is not None and (len(prompts) > 1 or sys.stdout.isatty()):
            print()


def _write_records(
    engine: Engine, requests: Sequence[Request], prompts: Sequence[Prompt], sink: IO[str]
) -> None:
    for event in _in_order(engine.stream(requests), len(requests)):
        if event.completion is not None:
            record = {**prompts[event.request_idx].record, **_as_record(event.completion)}
            sink.write(json.dumps(record, ensure_ascii=False) + "\n")
            sink.flush()  # what is finished stays when the run is interrupted


def _as_record(completion: Completion) -> dict[str, Any]:
    return {
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "num_tokens": len(completion.tokens),
    }
