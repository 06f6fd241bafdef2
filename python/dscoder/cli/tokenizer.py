"""The verb `dscoder tokenizer`."""

from collections.abc import Sequence

from dscoder.cli.arguments import parse
from dscoder.config.data import TokenizerConfig
from dscoder.data import tokenizer
from dscoder.runtime import log


def main(argv: Sequence[str]) -> None:
    """Train a tokenizer on source files."""
    log.configure()
    tokenizer.run(parse(argv, TokenizerConfig, verb="tokenizer", description=main.__doc__))
