"""The verb `dscoder prepare`."""

from collections.abc import Sequence

from dscoder.cli.arguments import parse
from dscoder.config.data import PrepareConfig
from dscoder.data import prepare
from dscoder.runtime import log


def main(argv: Sequence[str]) -> None:
    """Turn source files into packed windows of tokens, with FIM."""
    log.configure()
    prepare.run(parse(argv, PrepareConfig, verb="prepare", description=main.__doc__))
