"""DeepSeek-Coder and DeepSeek-Coder-V2: kernels, models, training and generation."""

from importlib.metadata import version

__version__ = version("dscoder")
