"""Logging of the whole package: library code logs under "dscoder", the command decides where it goes."""

import functools
import logging

from rich.console import Console
from rich.logging import RichHandler


@functools.cache
def console() -> Console:
    """The terminal (standard error); one object, so that messages and progress bars do not overwrite."""
    return Console(stderr=True)


def get_logger(name: str) -> logging.Logger:
    """The logger of one module; pass `__name__`."""
    return logging.getLogger(name)


def configure(level: int = logging.INFO) -> None:
    """Send the package's messages to the terminal. Calling it again changes the level."""
    logger = logging.getLogger("dscoder")
    logger.setLevel(level)
    logger.propagate = False
    if logger.handlers:
        return
    if console().is_terminal:
        logger.addHandler(RichHandler(console=console(), show_path=False, show_level=False))
    else:  # a file or a pipe: one message a line, whatever its length
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
        logger.addHandler(handler)
