"""Answers in Python that run apart from their tests: honest ones must not notice."""

import ast
import textwrap
from pathlib import Path

import pytest

from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Limits, Program
from dscoder.tasks import driver
from dscoder.tasks.ending import grade_ended, python_program
from dscoder.tasks.problem import Grade

pytestmark = pytest.mark.usefixtures("sandbox")
LIMITS = Limits(time=20.0)


def grade(code: str, tests: str, *, given: str = "", asked: tuple[str, ...] = ()) -> Grade:
    code, tests = textwrap.dedent(code), textwrap.dedent(tests)
    verdict = run(python_program(code, tests, given=given, asked=asked), LIMITS)
    return grade_ended(code, verdict, tests=tests)


HONEST = [
    ("7", "f() == 7"),
    ("True", "f() is True"),
    ("None", "f() is None"),
    ("-0.0", "str(f()) == '-0.0'"),
    ("float('nan')", "f() != f()"),
    ("1e308 * 10", "f() == float('inf')"),
    ("2 ** 300", "f() == 1 << 300"),
    ("3 + 4j", "abs(f()) == 5"),
    ("[1, (2.5, 'x'), {3: {4}}, None]", "f() == [1, (2.5, 'x'), {3: {4}}, None]"),
    ("(1, 2)", "f() != [1, 2]"),
    ("'\\ud800'", "f() == '\\ud800'"),
    ("b'\\0\\xff'", "f() == b'\\0\\xff'"),
    ("bytearray(b'x')", "f() == b'x'"),
    ("range(3)", "f() == range(3) and f() != [0, 1, 2]"),
    ("collections.namedtuple('P', 'x y')(1, 2)", "f() == (1, 2)"),
    ("enum.IntEnum('E', 'A B').B", "f() == 2"),
    ("type('Text', (str,), {})('x')", "f() == 'x'"),
    ("type('Number', (float,), {})(0.5)", "f() == 0.5"),
    ("type('Number', (int,), {})(5)", "f() == 5"),
    ("type('Items', (list,), {})([1])", "f() == [1]"),
    ("type('Keys', (dict,), {})(a=1)", "f() == {'a': 1}"),
    ("type('Some', (set,), {})('ab')", "f() == {'a', 'b'}"),
    ("collections.Counter('aab')", "f() == {'a': 2, 'b': 1}"),
    ("collections.OrderedDict(a=1)", "f() == {'a': 1}"),
    ("collections.defaultdict(lambda: 0, a=1)", "f() == {'a': 1}"),
    ("collections.defaultdict(list, a=[1])", "f() == {'a': [1]}"),
    ("collections.deque([1, 2])", "list(f()) == [1, 2]"),
    ("fractions.Fraction(1, 2)", "f() == 0.5"),
    ("decimal.Decimal('1.5')", "f() == 1.5"),
    ("datetime.date(2024, 2, 29)", "str(f()) == '2024-02-29'"),
    ("{'a': 1}.keys()", "f() == {'a'}"),
    ("{'a': 1}.values()", "list(f()) == [1] and len(f()) == 1"),
    ("(x * x for x in range(3))", "tuple(f()) == (0, 1, 4)"),
    ("iter('ab')", "next(f()) == 'a'"),
    ("map(str, [1, 2])", "sorted(f()) == ['1', '2'] and [1] != f()"),
    ("zip([1], [2])", "(1, 2) in f()"),
    ("re.match('a', 'abc')", "f()"),
    ("re.match('b', 'abc')", "not f()"),
    ("lambda x: x + 1", "f()(1) == 2"),
    ("print('some text')", "f() is None"),
    ("NotImplemented", "f() != 1"),
]
IMPORTS = "import collections, datetime, decimal, enum, fractions, re\n"


@pytest.fixture(scope="module")
def held() -> dict[str, list[str]]:
    """Which of the tests of HONEST hold, one line each: in one process, and apart."""
    code = "import collections, datetime, decimal, enum, fractions, re\n"
    code += "".join(f"def f{n}():\n    return {result}\n" for n, (result, _) in enumerate(HONEST))
    tests = "".join(f"f = f{n}\nprint({n}, not not ({test}))\n" for n, (_, test) in enumerate(HONEST))
    joined = run(Program(source=code + tests), LIMITS)
    found = grade(code, tests)
    assert found.is_passed
    assert found.verdict is not None
    return {"joined": joined.stdout.splitlines(), "apart": found.verdict.stdout.splitlines()}


@pytest.mark.parametrize("number", range(len(HONEST)), ids=[result for result, _ in HONEST])
def test_a_result_counts_as_it_does_in_one_process(held: dict[str, list[str]], number: int) -> None:
    assert f"{number} True" in held["joined"]
    assert f"{number} True" in held["apart"]


CATCHES = "try: f('x')\nexcept ValueError as error: assert str(error) == 'no x'\nelse: assert False"
CATCHES_ANY = "try: f('x')\nexcept Exception: pass\nelse: assert False"
NODE = """
class Node:
    def __init__(self, value):
        self.value, self.left = value, None
def f(node):
    return 0 if node is None else node.value + f(node.left)
"""
USES_NODE = """
root = Node(1)
root.left = Node(2)
root.left.left = Node(4)
assert f(root) == 7
assert root.left == root.left and root.left.value == 2 and root != root.left
assert f([root][0]) == 7
"""
OWN_CLASSES = """
from __future__ import annotations
import dataclasses, pickle, typing
@dataclasses.dataclass
class Place:
    x: int
    kind: "typing.ClassVar[int]" = 0
class Pair(typing.NamedTuple):
    first: "int"
class Text:
    def __init__(self, text):
        self.text = text
def f():
    assert typing.get_type_hints(Pair) == {"first": int} and typing.get_type_hints(Text) == {}
    return [Place(1).x, pickle.loads(pickle.dumps(Pair(2))), pickle.loads(pickle.dumps(Text(3))).text]
"""
COUNTS = "count = 0\ndef f():\n    global count\n    count += 1\n    return count"


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        ("def f(xs):\n    xs.sort()", "xs = [3, 1]\nassert f(xs) is None and xs == [1, 3]"),
        ("def f(d):\n    d['b'] = d.pop('a')", "d = {'a': 1}\nf(d)\nassert d == {'b': 1}"),
        ("def f(*xs, by=1):\n    return sum(xs) * by", "assert f(1, 2, by=3) == 9"),
        ("def f(x):\n    raise ValueError('no ' + x)", CATCHES),
        ("class E(ValueError): pass\ndef f(x):\n    raise E('no ' + x)", CATCHES),
        ("def f(x):\n    return b'\\xff'.decode('ascii')", CATCHES_ANY),
        ("import math\ndef f():\n    return 0.1 + 0.2", "assert math.isclose(f(), 0.3)"),
        ("def sum(a, b):\n    return a * b", "assert sum(3, 4) == 12"),
        ("LIMIT = [1, 2]\ndef f():\n    return LIMIT", "assert f() == LIMIT"),
        ("def f(g):\n    return g(2)\ndef g(x):\n    return x + 1", "assert f(g) == 3"),
        (OWN_CLASSES, "assert f() == [1, (2,), 3]"),
        (COUNTS, "assert [f(), f()] == [1, 2]"),
        ("import fractions, math\ndef f():\n    return 1", "assert math.floor(f()) == fractions.Fraction(1)"),
        ("import math\ndef f():\n    return [math]", "assert f()[0].floor(2.5) == 2"),
        ("from fractions import Fraction\ndef f():\n    return 0.5", "assert Fraction(1, 2) == f()"),
        (NODE, USES_NODE),
    ],
)
def test_what_tests_do_beside_comparing_works(code: str, tests: str) -> None:
    found = grade(code, tests, asked=("sum",) if "def sum" in code else ())
    assert found.is_passed, found.verdict.stderr
    assert not grade(code, tests + "\nassert False").is_passed


def test_names_that_were_given_are_the_tests_own() -> None:
    given = "import math\ndef half(x):\n    return x / 2\n"
    tests = "assert math.floor(half(f())) == 2"
    code = f"{given}def f():\n    return 5\n"
    assert grade(code, tests, given=given, asked=("f",)).is_passed
    cheat = "class math:\n    floor = int\ndef half(x):\n    return 2\ndef f():\n    return 0\n"
    assert not grade(cheat, tests, given=given, asked=("f",)).is_passed


LATE = """
import threading
def late():
    while True: print('late', flush=True)
threading.Thread(target=late).start()
"""


@pytest.mark.parametrize("ending", [LATE, "import atexit\natexit.register(print, 'bye')"])
def test_what_an_answer_leaves_running_does_not_matter(ending: str) -> None:
    assert grade(f"{ending}\ndef f():\n    return 1", "assert f() == 1").is_passed


@pytest.mark.parametrize(
    ("code", "outcome", "stderr"),
    [
        ("def f():\n    return 2", "failed", "AssertionError"),
        ("def f():\n    assert False, 'mine'", "failed", "AssertionError: mine"),
        ("def f():\n    return 1 / 0", "runtime_error", 'File "answer.py", line 2, in f'),
        ("def f(:", "runtime_error", "SyntaxError"),
        ("x = 1", "runtime_error", "NameError: name 'f' is not defined"),
        ("def f():\n    while True: pass", "time_limit", ""),
        ("def f():\n    return [0] * 10**10", "memory_limit", "MemoryError"),
        ("def f():\n    print('x' * 10**7, flush=True)", "output_limit", ""),
        ("import os, signal\ndef f():\n    os.kill(os.getpid(), signal.SIGSEGV)", "runtime_error", ""),
        ("import os\ndef f():\n    os._exit(3)", "runtime_error", ""),
        ("def f():\n    return f()", "runtime_error", "RecursionError"),
    ],
)
def test_a_failure_looks_as_it_does_in_one_process(code: str, outcome: str, stderr: str) -> None:
    program = python_program(code, "assert f() == 1")
    verdict = run(program, Limits(time=2.0))
    assert (verdict.outcome, stderr in verdict.stderr) == (outcome, True), verdict


def test_a_block_for_the_main_program_does_not_run() -> None:
    code = "def f():\n    return 1\nif __name__ == '__main__':\n    raise SystemExit(f())"
    assert grade(code, "assert f() == 1").is_passed


def test_the_driver_needs_the_standard_library_alone() -> None:
    tree = ast.parse(Path(driver.__file__).read_text())
    froms = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert not [module for module in froms if module is not None and module.startswith("dscoder")]


def test_what_failed_is_the_last_that_is_said() -> None:
    found = grade("def f():\n    return 1", "assert f() == 2, 'one and two'", asked=("f",))
    assert found.verdict is not None
    assert found.verdict.stderr.rstrip().endswith("AssertionError: one and two")
    assert found.verdict.stderr.count("Traceback") == 1  # the answer's process has nothing to add
