"""The verb `dscoder sft`."""

from collections.abc import Sequence

from dscoder.cli.arguments import parse, shortcut
from dscoder.config.sft import SftConfig, sft_recipe
from dscoder.runtime import log
from dscoder.train import sft

_SHORTCUTS = {"recipe": "one of a paper's runs, to start from: coder or coder_v2 (see docs/sft.md)"}


def parse_config(argv: Sequence[str]) -> SftConfig:
    """The config that the words describe: a recipe's fields, then what is given."""
    name = shortcut(argv, "recipe")
    start = None if name is None else sft_recipe(name)
    return parse(argv, SftConfig, verb="sft", description=main.__doc__, start=start, shortcuts=_SHORTCUTS)


def main(argv: Sequence[str]) -> None:
    """Fine-tune a model on dialogues and holes, or go on where a run was stopped."""
    log.configure()
    sft.run(parse_config(argv))
