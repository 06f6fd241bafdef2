"""The verb `dscoder reward-model`."""

from collections.abc import Sequence

from dscoder.cli.arguments import parse
from dscoder.config.reward import RewardModelConfig
from dscoder.runtime import log
from dscoder.train import reward_model


def main(argv: Sequence[str]) -> None:
    """Train a model that scores answers, on preference pairs or pass rates."""
    log.configure()
    reward_model.run(parse(argv, RewardModelConfig, verb="reward-model", description=main.__doc__))
