"""The task that a config names: one of ours, or whatever a function elsewhere makes."""

from collections.abc import Callable
from importlib import import_module

from dscoder.config.task import TaskConfig
from dscoder.tasks.generated import Generated
from dscoder.tasks.gsm8k_pal import Gsm8kPal
from dscoder.tasks.human_eval import HumanEval
from dscoder.tasks.mbpp import Mbpp
from dscoder.tasks.multipl_e import MultiPlE
from dscoder.tasks.problem import Task
from dscoder.tasks.single_line_infilling import SingleLineInfilling


def _mbpp(config: TaskConfig) -> Task:
    if config.asking == "instruct_v2":
        raise ValueError(f"open_task: asking of mbpp must be base or instruct, got {config.asking!r}")
    return Mbpp(config.sources, asking=config.asking)


def _multipl_e(config: TaskConfig) -> Task:
    assert config.language is not None
    return MultiPlE(config.sources, language=config.language, asking=config.asking)


_MAKERS: dict[str, Callable[[TaskConfig], Task]] = {
    "human_eval": lambda config: HumanEval(config.sources, asking=config.asking),
    "multipl_e": _multipl_e,
    "mbpp": _mbpp,
    "single_line_infilling": lambda config: SingleLineInfilling(
        config.sources, scoring=config.scoring or "first_line"
    ),
    "gsm8k_pal": lambda config: Gsm8kPal(config.sources, examples=config.examples),
    "generated": lambda config: Generated(config.sources, asking=config.asking),
}


def open_task(config: TaskConfig) -> Task:
    """The task called `config.name`, with its problems.

    A name with a dot is a function, by its module and name; it is called with the config and gives a task.
    """
    maker = _MAKERS[config.name] if config.name in _MAKERS else _find(config.name)
    if config.name in _MAKERS and not config.sources:
        raise ValueError(f"open_task: sources of {config.name} must name its records, got none")
    return maker(config)


def _find(path: str) -> Callable[[TaskConfig], Task]:
    module, _, name = path.rpartition(".")
    if not module:
        raise ValueError(
            f"open_task: name must be one of {', '.join(_MAKERS)} or package.module.function, got {path!r}"
        )
    try:
        found: Callable[[TaskConfig], Task] = vars(import_module(module))[name]
    except (ImportError, KeyError) as error:
        raise ValueError(
            f"open_task: {path} must be a function that can be imported, got: {error!r}"
        ) from error
    return found
