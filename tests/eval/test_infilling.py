"""Single-line holes: which lines are taken, how answers are compared."""

from collections import Counter

import pytest

from dscoder.eval.infilling import (
    Hole,
    HoleRule,
    InfillingScore,
    is_exact,
    line_end_holes,
    score_infilling,
    single_line_holes,
)

MODULE = '''"""Two lines of

prose about alpha."""
import os
# a comment that is long enough

class Thing:
    def first(self):
        """One line."""
        return os.getcwd()

    def second(self):
        text = """
        alpha = beta
        """
        x =\\
            text
        return text.upper()
last = Thing()
'''


def answers(text: str, **rule: int) -> set[str]:
    holes = single_line_holes([("m", text)], num_holes=99, max_per_document=99, rule=HoleRule(**rule))
    return {hole.answer.strip() for hole in holes}


# ---- choosing ----


def test_only_lines_of_code_are_taken() -> None:
    assert answers(MODULE, min_context=0, min_length=1) == {
        *("import os", "class Thing:", "def first(self):", "return os.getcwd()", "def second(self):"),
        *("x =\\", "text", "return text.upper()", "last = Thing()"),
    }


def test_lengths_and_context_bound_the_choice() -> None:
    assert answers(MODULE, min_context=0, min_length=10, max_length=15) == {"class Thing:", "last = Thing()"}
    assert "last = Thing()" not in answers(MODULE, min_context=1)
    assert "last = Thing()" in answers(MODULE, min_context=0)


def test_text_that_is_not_python_has_holes_too() -> None:
    text = "int main() {\n  // say it\n  char *s = '''\n  return 0;\n}\n"
    assert answers(text, min_context=0) == {"int main() {", "char *s = '''", "return 0;"}


def test_the_parts_put_together_are_the_document() -> None:
    for hole in single_line_holes([("m", MODULE)], num_holes=99, max_per_document=99):
        assert hole.prefix + hole.answer + hole.suffix == MODULE
        assert hole.prefix.endswith("\n")
        assert hole.answer.endswith("\n")
        assert hole.name == f"m:{hole.prefix.count(chr(10)) + 1}"


def documents(count: int) -> list[tuple[str, str]]:
    return [(f"d{i}", "".join(f"value_{i}_{j} = {j}\n" for j in range(12))) for i in range(count)]


def test_the_choice_depends_neither_on_order_nor_on_names() -> None:
    chosen = single_line_holes(documents(20), num_holes=10)
    renamed = [("x" + name, text) for name, text in reversed(documents(20))]
    assert [h.answer for h in single_line_holes(renamed, num_holes=10)] == [h.answer for h in chosen]


def test_fewer_holes_are_the_first_of_more() -> None:
    assert single_line_holes(documents(20), num_holes=4) == single_line_holes(documents(20), num_holes=30)[:4]


def test_another_seed_chooses_other_lines() -> None:
    first, second = (single_line_holes(documents(20), num_holes=10, seed=seed) for seed in (0, 1))
    assert {h.answer for h in first} != {h.answer for h in second}


def test_no_document_has_more_than_its_share() -> None:
    holes = single_line_holes(documents(5), num_holes=99, max_per_document=3)
    assert sorted(hole.name.split(":")[0] for hole in holes) == [f"d{i}" for i in range(5) for _ in range(3)]


def test_a_line_end_is_taken_out_from_inside_the_code_on() -> None:
    lines = single_line_holes([("m", MODULE)], num_holes=99, max_per_document=99)
    ends = line_end_holes(lines)
    for line, end in zip(lines, ends, strict=True):
        assert end.prefix + end.answer + end.suffix == MODULE
        taken, code = end.answer.strip(), line.answer.strip()
        assert 1 <= len(taken) < len(code)
        assert end.prefix.removeprefix(line.prefix).strip()
    assert line_end_holes(lines, seed=1) != ends


def test_line_ends_begin_anywhere_in_the_code() -> None:
    lines = [Hole(name=str(i), prefix="", suffix="", answer="    abcd\n") for i in range(300)]
    counts = Counter(hole.answer for hole in line_end_holes(lines))
    assert counts.keys() == {"bcd\n", "cd\n", "d\n"}
    assert min(counts.values()) > 60  # 100 each on average, 5 sigma is 41


# ---- comparing ----


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("    return x\n", True),
        ("return x", True),
        ("\treturn x  \n    and more\n", True),
        ("\n    return x", False),  # the first generated line counts, and it is empty
        ("    return  x\n", False),
        ("", False),
    ],
)
def test_the_first_generated_line_must_equal_the_answer_stripped(completion: str, expected: bool) -> None:
    assert is_exact(completion, "    return x\n") is expected


def test_a_score_counts_exact_holes() -> None:
    holes = [Hole(name=str(i), prefix="", suffix="", answer=f"line {i}\n") for i in range(4)]
    score = score_infilling(["line 0", "line 2", " line 2\n", ""], holes)
    assert score == InfillingScore(num_exact=2, num_holes=4)
    assert score.exact_match == 0.5
    assert score_infilling([], []).exact_match == 0.0


def test_a_score_needs_one_completion_per_hole() -> None:
    with pytest.raises(ValueError, match="completions must be 1, one a hole, got 0"):
        score_infilling([], [Hole(name="", prefix="", suffix="", answer="")])
