"""Runs an answer in Python apart from its tests. This file is the main program inside the sandbox.

Two processes. The one that this file starts in holds the tests and the mark that says that they ended; its
child holds the answer. A test that calls a function of the answer sends the arguments over a pipe, and what
comes back is data, built anew from types of the standard library: no code of the answer ever runs where its
results are compared. The parent reads tests and mark after the fork, deletes their files and hides its memory
before it lets the child go on.

It imports nothing but the standard library, and is read as text by `ending.py`.
"""

from __future__ import annotations

import builtins
import importlib
import io
import operator
import os
import signal
import sys
import types
from _pickle import Pickler, Unpickler, UnpicklingError

try:
    import ctypes
except ImportError:  # a Python built without it cannot hide its memory
    ctypes = None  # type: ignore[assignment]

# Every program starts here, so what only a type checker reads is not imported: that would take milliseconds.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from typing import Any, NoReturn

NOTE = "note: the tests compared an object of the answer's own class "

_PR_SET_DUMPABLE = 4
_SIZE = 8  # bytes that say how long a message is
_CHUNK = 1 << 20

_EXACT = frozenset({type(None), bool, int, float, complex, str, bytes, tuple, list, dict, set, frozenset})
# Types, by module and name, whose values are built in the process of the tests; there are no others.
_KNOWN = {
    *(("builtins", kind.__name__) for kind in (*_EXACT, bytearray, range, slice)),
    *(("collections", name) for name in ("Counter", "OrderedDict", "defaultdict", "deque")),
    *(("datetime", name) for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(("decimal", "Decimal"), ("fractions", "Fraction")),
}
# A value of a type that is made from one of these travels as that: what counts is what it holds.
_PLAIN: dict[type, Callable[[Any], Any]] = {
    int: int.__int__,
    float: float.__float__,
    str: str.__str__,
    bytes: lambda value: bytes.__getitem__(value, slice(None)),
    tuple: lambda value: tuple(tuple.__iter__(value)),
    list: lambda value: list(list.__iter__(value)),
    dict: lambda value: dict(dict.items(value)),
    set: lambda value: set(set.__iter__(value)),
    frozenset: lambda value: frozenset(frozenset.__iter__(value)),
    type({}.keys()): set,
}
# The opcodes that `_Sender` writes: the size of what follows, and whether that is but the length of the rest.
# BUILD, which sets attributes, is none of them.
_FIXED = {1: b"\x80Kh", 2: b"M", 4: b"Jj", 8: b"G\x95"}
_PREFIXED = {1: b"C\x8a\x8c", 4: b"BX\x8b", 8: b"\x96"}
_OPCODES = dict.fromkeys(b"N\x88\x89)\x85\x86\x87(t]ae}su\x8f\x90\x91\x93\x94QR01", (0, False))
_OPCODES |= {code: (size, False) for size, codes in _FIXED.items() for code in codes}
_OPCODES |= {code: (size, True) for size, codes in _PREFIXED.items() for code in codes}

_OPERATIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (operator.call, operator.getitem, bool, getattr, len, list, next, setattr, str)
}


def _read(file: int, size: int) -> bytes:
    chunks: list[bytes] = []
    while size:
        chunk = os.read(file, min(size, _CHUNK))
        if not chunk:
            raise EOFError
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def receive(file: int) -> bytes:
    """One message; EOFError where the other side is gone."""
    return _read(file, int.from_bytes(_read(file, _SIZE), "little"))


def send(file: int, message: bytes) -> None:
    """Write one message."""
    view = memoryview(len(message).to_bytes(_SIZE, "little") + message)
    while view:
        view = view[os.write(file, view) :]


# ---- the answer's process ----


def _is_known(kind: type) -> bool:
    return (kind.__module__, kind.__qualname__) in _KNOWN


class _Sender(Pickler):
    """Data as it is; whatever else the answer made stays here, and a number goes out for it."""

    def __init__(self, file: io.BytesIO, number: Callable[[Any], int]) -> None:
        super().__init__(file, protocol=5)
        self._number = number

    def persistent_id(self, value: Any) -> tuple[Any, ...] | None:
        kind = type(value)
        if kind in _EXACT or _is_known(kind) or isinstance(value, tuple(_PLAIN)):
            return None
        if isinstance(value, type) and _is_known(value):
            return None
        has_equal = any("__eq__" in vars(base) for base in kind.__mro__[:-1])
        return ("own", self._number(value), kind.__qualname__, has_equal)

    def reducer_override(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, type) or _is_known(kind):
            return NotImplemented
        plain = next(plain(value) for base, plain in _PLAIN.items() if isinstance(value, base))
        return type(plain), (list(plain) if type(plain) in (set, frozenset, tuple) else plain,)


class _Answer:
    """The answer's names, and its objects that the tests hold, by their numbers."""

    def __init__(self) -> None:
        self._module = sys.modules["answer"] = types.ModuleType("answer")
        self._kept: list[Any] = []
        self._numbers: dict[int, int] = {}  # by id, which stays an object's own while it is kept

    def reply(self, message: bytes) -> bytes:
        """What a request comes to: ("value", it, the arguments after it) or ("error", ...)."""
        opener = Unpickler(io.BytesIO(message))
        opener.persistent_load = self._kept.__getitem__  # type: ignore[method-assign]
        operation, args, named = opener.load()
        try:
            return self._packed(("value", *self._run(operation, args, named)))
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            return self._packed(("error", kinds, str(error), _traceback(error)))

    def _run(self, operation: str, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Any, Any]:
        if operation == "load":
            names = vars(self._module)
            with open("answer.py", "rb") as file:
                exec(compile(file.read(), "answer.py", "exec"), names)
            found = {name: names[name] for name in args if name in names}
            modules = {n: v.__name__ for n, v in found.items() if isinstance(v, types.ModuleType)}
            return (found, modules), ()
        value = _OPERATIONS[operation](*args, **named)
        return value, args[1:] if operation == "call" else ()

    def _packed(self, value: Any) -> bytes:
        packed = io.BytesIO()
        _Sender(packed, self._number).dump(value)
        return packed.getvalue()

    def _number(self, value: Any) -> int:
        number = self._numbers.setdefault(id(value), len(self._kept))
        if number == len(self._kept):
            self._kept.append(value)
        return number


def _traceback(error: Exception) -> str:
    """What Python would write of it, without the module for that, which takes long to import."""
    standard, sys.stderr = sys.stderr, io.StringIO()
    try:
        sys.__excepthook__(type(error), error, error.__traceback__)
        return sys.stderr.getvalue()
    finally:
        sys.stderr = standard


def serve(requests: int, replies: int) -> None:
    """Run the answer, request by request. Where it leaves, or the tests did, this process leaves."""
    sys.excepthook = lambda kind, *rest: None if kind is EOFError else sys.__excepthook__(kind, *rest)
    answer = _Answer()
    while True:
        reply = answer.reply(receive(requests))
        if sys.__stdout__ is not None and not sys.__stdout__.closed:
            sys.__stdout__.flush()
        send(replies, reply)


# ---- the tests' process ----


class Own:
    """An object of the answer, which stays where it is. It equals nothing but itself."""

    __slots__ = ("_handle", "_has_equal", "_kind", "_link")

    def __init__(self, link: Link, handle: int, kind: str, has_equal: bool) -> None:
        for name, value in zip(self.__slots__, (handle, has_equal, kind, link), strict=True):
            object.__setattr__(self, name, value)

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._link.ask("call", self, *args, **named)

    def __getattr__(self, name: str) -> Any:
        return self._link.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._link.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._link.ask("getitem", self, key)

    def __bool__(self) -> bool:
        return bool(self._link.ask("bool", self))

    def __len__(self) -> int:
        return int(self._link.ask("len", self))

    def __iter__(self) -> Iterator[Any]:
        return iter(self._link.ask("list", self))

    def __next__(self) -> Any:
        return self._link.ask("next", self)

    def __str__(self) -> str:
        return str(self._link.ask("str", self))

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Own) and other._handle == self._handle:
            return True
        if self._has_equal:
            sys.stderr.write(f"{NOTE}{ascii(self._kind)[:80]}\n")
        return False

    def __hash__(self) -> int:
        return hash(self._handle)


class _Requester(Pickler):
    def persistent_id(self, value: Any) -> int | None:
        return value._handle if isinstance(value, Own) else None


class _Receiver(Unpickler):
    """Reads what a hostile process wrote."""

    def __init__(self, file: io.BytesIO, link: Link) -> None:
        super().__init__(file)
        self._link = link

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise UnpicklingError(f"the answer sent a {module}.{name}")
        return super().find_class(module, name)

    def persistent_load(self, sent: Any) -> Any:
        match sent:
            case ("own", int(handle), str(kind), bool(has_equal)):
                return Own(self._link, handle, kind, has_equal)
        raise UnpicklingError("the answer sent what is no data")


def _checked(message: bytes) -> bytes:
    """The message, which has no opcode but those that data needs."""
    place = 0
    while (code := message[place]) != b"."[0]:
        if code not in _OPCODES:
            raise UnpicklingError(f"the answer sent the opcode {code:#x}")
        size, is_length = _OPCODES[code]
        start, place = place + 1, place + 1 + size
        if is_length:
            place += int.from_bytes(message[start:place], "little")
    return message


class Link:
    """The way to the answer's process."""

    def __init__(self, requests: int, replies: int, worker: int) -> None:
        self._requests = requests
        self._replies = replies
        self.worker = worker

    def ask(self, operation: str, /, *args: Any, **named: Any) -> Any:
        """Have the answer's process do something; raises what was raised there."""
        packed = io.BytesIO()
        _Requester(packed, protocol=5).dump((operation, args, named))
        try:
            send(self._requests, packed.getvalue())
            reply = receive(self._replies)
        except (EOFError, BrokenPipeError):
            end_as(self.worker)
        match _Receiver(io.BytesIO(_checked(reply)), self).load():
            case ("value", value, tuple(after)):
                _write_back(args[1:], after)
                return value
            case ("error", list(kinds), str(text), str(origin)):
                raise _raised(kinds, text, origin)
        raise UnpicklingError("the answer sent no reply")


def _write_back(args: Sequence[Any], after: Sequence[Any]) -> None:
    """Change the lists, dicts and sets among the arguments as the answer changed its copies."""
    for before, now in zip(args, after, strict=False):
        if type(before) is not type(now) or before == now:
            continue
        if isinstance(before, list | bytearray):
            before[:] = now
        elif isinstance(before, dict | set):
            before.clear()
            before.update(now)


def _raised(kinds: Sequence[Any], text: str, origin: str) -> Exception:
    """The nearest built-in exception."""
    found = (vars(builtins).get(name) for name in kinds if isinstance(name, str))
    kind = next(
        (kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception)), RuntimeError
    )
    try:
        error: Exception = kind(text)
    except TypeError:  # one that wants more than a text
        error = RuntimeError(text)
    error.add_note(origin)
    return error


def end_as(worker: int) -> NoReturn:
    """End as the answer's process ended, but for one thing: to leave before the tests end is to fail."""
    sys.stdout.flush()
    sys.stderr.write("the answer left before its tests ended\n")
    _, status = os.waitpid(worker, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) or 1)


def _take(name: str) -> bytes:
    """What a file holds, which is no more after this."""
    with open(name, "rb") as file:
        content = file.read()
    os.remove(name)
    return content


def names_of(code: types.CodeType) -> set[str]:
    """All names that code asks for, in its functions too."""
    inner = [names_of(item) for item in code.co_consts if isinstance(item, types.CodeType)]
    return set(code.co_names).union(*inner)


def run_tests(link: Link, given: dict[str, Any], asked: Sequence[str]) -> None:
    """Run the tests to their end, or raise."""
    code = compile(_take("tests.py"), "tests.py", "exec")
    wanted = (names_of(code) - set(given) - set(vars(builtins))) | set(asked)
    found, modules = link.ask("load", *sorted(wanted))
    if type(found) is not dict or type(modules) is not dict or not wanted >= {*found, *modules}:
        raise UnpicklingError("the answer sent no names")
    for name, module in modules.items():
        if type(module) is str and module.partition(".")[0] in sys.stdlib_module_names:
            found[name] = importlib.import_module(module)
    exec(code, given | found)


def main() -> None:
    """Fork, run the tests, write the mark."""
    del sys.path[0]  # the working directory, where the answer may write modules
    with open("given.py", "rb") as file:
        given: dict[str, Any] = {}
        exec(compile(file.read(), "given.py", "exec"), given)
    (requests, requests_end), (replies, replies_end) = os.pipe(), os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(requests_end)
        os.close(replies)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        serve(requests, replies_end)
    os.close(requests)
    os.close(replies_end)
    if ctypes is not None:  # keep processes of the same user out of this one's memory and descriptors
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    mark = _take("mark")
    run_tests(Link(requests_end, replies, worker), given, sys.argv[1:])
    sys.stdout.flush()
    os.kill(worker, signal.SIGKILL)
    os.write(1, b"\n" + mark + b"\n")
    os._exit(0)


if __name__ == "__main__":
    main()
