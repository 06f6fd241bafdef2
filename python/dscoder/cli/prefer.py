"""The verb `dscoder prefer`."""

from collections.abc import Sequence

from dscoder.cli.arguments import parse
from dscoder.config.reward import PreferConfig
from dscoder.runtime import log
from dscoder.train import preferences


def main(argv: Sequence[str]) -> None:
    """Run candidate answers through their tests, and pair better with worse ones."""
    log.configure()
    preferences.run(parse(argv, PreferConfig, verb="prefer", description=main.__doc__))
