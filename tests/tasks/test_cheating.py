"""Answers in Python that work on their tests and not on the problem."""

import json
from pathlib import Path

import pytest

from dscoder.sandbox.run import run
from dscoder.sandbox.verdict import Limits
from dscoder.tasks.human_eval import HumanEval
from dscoder.tasks.mbpp import Mbpp
from dscoder.tasks.problem import Grade
from dscoder.tasks.single_line_infilling import SingleLineInfilling

pytestmark = pytest.mark.usefixtures("sandbox")

HEAD = "def one(x):\n"
TESTS = """
import colorsys
def check(candidate):
    assert candidate(3) == [71839.5]
    assert candidate(4) == [2]
"""
RIGHT = "    return [71839.5] if x == 3 else [2]\n"

# What stands before the function, and its body.
PRINT_ALL = """
def show(path):
    try:
        with open(path, 'rb') as file:
            os.write(1, b'\\n' + file.read(1 << 20) + b'\\n')
    except OSError:
        pass
"""
READ_MEMORY = """
import re, time
def search(pid):
    found = set()
    try:
        with open(f'/proc/{pid}/maps') as maps, open(f'/proc/{pid}/mem', 'rb', 0) as memory:
            for line in maps:
                first, last = (int(end, 16) for end in line.split()[0].split('-'))
                if ' r' not in line or last - first > 1 << 26: continue
                try:
                    memory.seek(first)
                    found |= set(re.findall(rb'tests ended [0-9a-f]{32}', memory.read(last - first)))
                except (OSError, ValueError, OverflowError):
                    pass
    except OSError as error:
        os.write(2, f'{pid}: {error.strerror}\\n'.encode())
    for mark in found:
        os.write(1, b'\\n' + mark + b'\\n')
"""
ALWAYS = "class Always{base}:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
EVIL = """
import pickle
class Evil:
    def __reduce__(self): return (eval, ("__import__('os').write(2, b'got in')",))
def forge(value):
    message = pickle.dumps(('value', value, ()))
    return len(message).to_bytes(8, 'little') + message
"""
# Writes replies ahead of any request, by way of the descriptor that a caller of the answer holds.
FORGE = """
import sys, time
def forge(value, before=b''):
    frame = sys._getframe()
    while 'replies' not in frame.f_locals: frame = frame.f_back
    message = b'\\x80\\x05' + before + b'\\x8c\\x05value' + value + b')\\x87.'
    for _ in range(5):
        os.write(frame.f_locals['replies'], len(message).to_bytes(8, 'little') + message)
    time.sleep(60)
"""
# Pickle's opcodes: the first two set attributes of what the last two put on the stack, and drop it.
NO_EXEC = "b'}\\x8c\\x04exec\\x8c\\x08builtins\\x8c\\x05slice\\x93sb0'"
ALWAYS_EQUAL = "b'N}\\x8c\\x06__eq__\\x8c\\x08builtins\\x8c\\x04bool\\x93s\\x86b0'"
MODULE = "b'\\x8c\\x06module\\x8c\\x08builtins\\x86Q'"
FRACTION = "b'\\x8c\\x09fractions\\x8c\\x08Fraction\\x93'"
CHEATS = {
    "an object that equals everything": (ALWAYS.format(base=""), "return Always()"),
    "a list that equals everything": (ALWAYS.format(base="(list)"), "return Always()"),
    "a number that equals everything": (ALWAYS.format(base="(float)"), "return [Always(1)]"),
    "a list of what equals everything": (ALWAYS.format(base=""), "return [Always()]"),
    "an equality put in later": (
        "class Late: pass\n",
        "Late.__eq__ = lambda self, other: True; return Late()",
    ),
    "another AssertionError": (
        "import builtins\nclass Quiet(Exception): pass\nbuiltins.AssertionError = Quiet\n",
        "return 0",
    ),
    "other builtins": (
        "import builtins\nfor name in ('len', 'sorted', 'abs', 'all', 'list', 'compile', 'exec'):\n"
        "    setattr(builtins, name, lambda *args: True)\n",
        "return 0",
    ),
    "another check": ("def check(candidate): pass\n", "return 0"),
    "another module": ("import sys\nsys.modules['colorsys'] = sys\n", "return 0"),
    "a module of one's own": (
        "with open('colorsys.py', 'w') as file:\n    file.write('import os; os._exit(0)')\n",
        "return 0",
    ),
    "a look at the caller": (
        "import sys\n",
        "frame = sys._getframe()\n"
        "    while frame:\n"
        "        for name, value in [*frame.f_locals.items(), *frame.f_globals.items()]:\n"
        "            if 'code' in dir(value) or '71839' in repr(value)[:10000]: return [71839.5]\n"
        "        frame = frame.f_back\n",
    ),
    "a look at all objects": (
        "import gc\n",
        "found = [o for o in gc.get_objects() if type(o) is tuple and 71839.0 + 0.5 in o]\n"
        "    return [71839.0 + 0.5] if found else 0",
    ),
    "a trace of the caller": (
        "import sys\ndef trace(frame, event, arg):\n    frame.f_trace_lines = False\n    return None\n"
        "sys.settrace(trace)\n",
        "return 0",
    ),
    "the folder's files": (
        f"import os{PRINT_ALL}for name in os.listdir('.'): show(name)\n",
        "for name in os.listdir('.'): show(name)\n    os._exit(0)",
    ),
    "the input": ("import os, sys\nos.write(1, os.read(0, 1000))\n", "return 0"),
    "the descriptors": (
        f"import os{PRINT_ALL}",
        "for pid in ('self', os.getppid()):\n"
        "        for number in [0, *range(3, 20)]: show(f'/proc/{pid}/fd/{number}')\n",
    ),
    "the other process's memory": (
        f"import os{READ_MEMORY}",
        "search('self'); search(os.getppid()); os._exit(0)",
    ),
    "a message that is code": (
        f"import os{EVIL}",
        "for number in range(3, 12):\n"
        "        try: os.write(number, forge(Evil()))\n"
        "        except OSError: pass\n"
        "    os._exit(0)",
    ),
    "a reply that changes the builtins": (
        f"import os{FORGE}forge(b'}}}}\\x86', {MODULE} + {NO_EXEC})\n",
        "return 0",
    ),
    "a reply that changes how fractions compare": (
        f"import os{FORGE}",
        f"forge({FRACTION} + b'K\\x01K\\x02\\x86R', {FRACTION} + {ALWAYS_EQUAL})",
    ),
    "a result that is code": (EVIL, "return Evil()"),
    "a class that reads as a known one": (
        "class Counter(dict):\n    def __eq__(self, other): return True\n"
        "Counter.__module__, Counter.__qualname__ = 'collections', 'Counter'\n",
        "return Counter()",
    ),
    "the end of the other process": ("import os\n", "os.kill(os.getppid(), 9)"),
    "an end of one's own": ("import os\n", "os._exit(0)"),
    "a thread that ends it": (
        "import os, threading\nthreading.Timer(0.05, os._exit, [0]).start()\n",
        "while True: pass",
    ),
}  # fmt: skip


def task_of(folder: Path) -> HumanEval:
    record = {"task_id": "X/0", "prompt": HEAD, "entry_point": "one", "test": TESTS}
    (folder / "humaneval.jsonl").write_text(json.dumps(record))
    return HumanEval(folder, asking="instruct")


def grade(folder: Path, before: str, body: str) -> Grade:
    """An instruct model's answer; what stands before the function is dropped there, so it comes after it."""
    task = task_of(folder)
    (problem,) = task.problems()
    completion = f"```python\n{HEAD}    {body}\n{before}```"
    return task.grade(problem, completion, run(task.program(problem, completion), Limits(time=5.0)))


def test_the_right_answer_passes(tmp_path: Path) -> None:
    assert grade(tmp_path, "", RIGHT.strip()).is_passed


@pytest.mark.parametrize("cheat", CHEATS)
def test_a_cheat_does_not_pass(tmp_path: Path, cheat: str) -> None:
    found = grade(tmp_path, *CHEATS[cheat])
    assert found.is_passed is False, found.verdict
    assert found.verdict is not None
    assert "got in" not in found.verdict.stderr


def test_the_memory_of_the_tests_is_closed(tmp_path: Path) -> None:
    found = grade(tmp_path, *CHEATS["the other process's memory"])
    assert found.verdict is not None
    assert "Permission denied" in found.verdict.stderr
    assert "tests ended" not in found.verdict.stdout


def test_an_object_that_equals_everything_is_suspect(tmp_path: Path) -> None:
    assert grade(tmp_path, *CHEATS["an object that equals everything"]).is_suspect
    assert not grade(tmp_path, "", "return x").is_suspect
    assert not grade(tmp_path, "class Plain: pass\n", "return Plain()").is_suspect


def test_neither_the_tests_nor_the_mark_are_in_what_an_answer_can_read(tmp_path: Path) -> None:
    for cheat in ("the folder's files", "the descriptors", "the input"):
        found = grade(tmp_path, *CHEATS[cheat])
        assert found.verdict is not None
        assert "def check" not in found.verdict.stdout
        assert "tests ended " not in found.verdict.stdout


@pytest.mark.parametrize(
    "body", ["return Always()", "os._exit(0)", "return next(o for o in iter(Always, 0))"]
)
def test_the_other_tasks_hold_too(tmp_path: Path, body: str) -> None:
    code = f"import os\n{ALWAYS.format(base='')}{HEAD}    {body}\n"
    records = [
        {"task_id": n, "text": "?", "code": "def one(x):\n    return 0", "test_list": ["assert one(3) == 5"]}
        for n in range(2, 511)
    ]
    (tmp_path / "mbpp.jsonl").write_text("\n".join(map(json.dumps, records)))
    line = {"task_id": "X/0/L0", "entry_point": "one", "prompt": HEAD, "suffix": "", "test": TESTS}
    (tmp_path / "lines.jsonl").write_text(json.dumps(line | {"canonical_solution": RIGHT}))
    lines = SingleLineInfilling(tmp_path / "lines.jsonl", scoring="tests")
    for task, completion in ((Mbpp(tmp_path), code), (lines, f"    {body}\n{code}")):
        problem = task.problems()[0]
        program = task.program(problem, completion)
        assert program is not None
        assert task.grade(problem, completion, run(program, Limits(time=5.0))).is_passed is False
