"""The verb `dscoder infill`."""

import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from dscoder.cli.context import render_in_context
from dscoder.cli.options import add_generation_options, engine_config, generate_config
from dscoder.infer.engine import Engine
from dscoder.infer.infill import infill_request, match_line_breaks, split_at_position


def main(argv: Sequence[str]) -> None:
    """Fill a hole at a position in a file.

    Lines and columns count from 1, as editors and compilers show them; the hole is before the character at
    the column, and the column after the last one is the end of the line. A tab is one column.
    """
    options = _parse(argv)
    path = Path(options.file)
    text = _read_text(path)
    prefix, suffix = split_at_position(text, line=options.line, column=options.column)
    engine = Engine.load(engine_config(options))
    request = infill_request(
        engine.tokenizer,
        prefix,
        suffix,
        max_positions=engine.max_positions,
        config=generate_config(options),
    )
    [answer] = engine.generate([request])
    completion = match_line_breaks(answer.text, text)
    filled = (prefix + completion + suffix).encode()
    if options.in_place:
        _replace(path, filled)
    if options.output == "-":
        sys.stdout.buffer.write(filled)
    elif options.output is not None:
        Path(options.output).write_bytes(filled)
    if options.output != "-":
        shown = render_in_context(prefix, completion, suffix, num_lines=options.context)
        Console().print(shown, soft_wrap=True)


def _parse(argv: Sequence[str]) -> Namespace:
    parser = ArgumentParser(prog="dscoder infill", description=main.__doc__)
    parser.add_argument("file", type=str, help="the file with the hole, UTF-8")
    parser.add_argument("--line", type=int, required=True, help="line of the hole, from 1")
    parser.add_argument(
        "--column", type=int, help="column of the hole, from 1; the end of the line if not given"
    )
    parser.add_argument("--in_place", action="store_true", help="write the completion into the file")
    parser.add_argument("--output", type=str, help="write the filled file there (-: the standard output)")
    parser.add_argument("--context", type=int, default=5, help="lines shown before and after the completion")
    add_generation_options(parser)
    return parser.parse_args(list(argv))


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, got {error}") from error


def _replace(path: Path, content: bytes) -> None:
    """Write the whole file or nothing, with its permissions, through a link if it is one."""
    target = path.resolve()
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
