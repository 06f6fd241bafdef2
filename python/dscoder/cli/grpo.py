"""The verb `dscoder grpo`."""

from collections.abc import Sequence

from dscoder.cli.arguments import parse
from dscoder.config.grpo import GrpoConfig
from dscoder.runtime import log
from dscoder.train import grpo


def parse_config(argv: Sequence[str]) -> GrpoConfig:
    """The config that the words describe."""
    return parse(argv, GrpoConfig, verb="grpo", description=main.__doc__)


def main(argv: Sequence[str]) -> None:
    """Improve a model by what tests and other rewards say of its own answers (GRPO)."""
    log.configure()
    grpo.run(parse_config(argv))
