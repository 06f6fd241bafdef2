"""What an actor of dscoder.testing.weak_memory can do, a step at a time."""

from dataclasses import dataclass

Value = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Write:
    """A plain store."""

    word: str
    value: int


@dataclass(frozen=True, slots=True)
class Load:
    """A plain load, which must find `value`, if there is one."""

    word: str
    value: int | None = None


@dataclass(frozen=True, slots=True)
class Set:
    """Stores to flags by threads side by side; releases unless they are relaxed."""

    flags: tuple[str, ...]
    values: tuple[Value, ...]
    is_release: bool = True


@dataclass(frozen=True, slots=True)
class Await:
    """Threads side by side spin until flag p's first number is that of values[p], for every peer p at once.

    The other numbers must then be its too. The program goes on at `if_failed` once the flag `failed` is seen
    set; a wait for a peer that lasts too long sets it, and the first of a rank is recorded. Without `failed`
    there is no limit.
    """

    flags: tuple[str, ...]
    values: tuple[Value, ...]
    failed: str | None = None
    if_failed: int = 0
    is_acquire: bool = True


@dataclass(frozen=True, slots=True)
class Count:
    """An atomic addition of one; who does not bring the counter to `last` goes on at `if_not_last`.

    Who does may take it back to 0.
    """

    flag: str
    last: int
    if_not_last: int
    is_ordered: bool = True  # acquire and release, or relaxed
    resets: bool = True


@dataclass(frozen=True, slots=True)
class Meet:
    """All actors of the stream come here before any goes on: the boundary between two kernels."""


Step = Write | Load | Set | Await | Count | Meet


@dataclass(frozen=True, slots=True)
class Actor:
    """A block, the rank and the stream it belongs to, and all that it does."""

    name: str
    rank: int
    stream: str
    program: tuple[Step, ...]


def flags_of(step: Step) -> tuple[str, ...]:
    """All flags that the step looks at or sets."""
    match step:
        case Count():
            return (step.flag,)
        case Set():
            return step.flags
        case Await():
            return (*step.flags, *filter(None, [step.failed]))
    return ()


def told(step: Step) -> str:
    """In words."""
    match step:
        case Write(word, value):
            return f"writes {value} to {word}"
        case Load(word, value):
            return f"reads {word}" + ("" if value is None else f" for {value}")
        case Set(flags, values):
            pairs = zip(flags, values, strict=True)
            return "sets " + ", ".join(f"{flag} to {value}" for flag, value in pairs)
        case Await(flags, values):
            pairs = zip(flags, values, strict=True)
            return "waits until " + ", ".join(f"{flag} is {value}" for flag, value in pairs)
        case Count(flag):
            return f"is counted in {flag}"
    return "meets the others"
