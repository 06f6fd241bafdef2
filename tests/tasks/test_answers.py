import pytest

from dscoder.tasks.answers import (
    Dialect,
    complete_function,
    cut_at,
    cut_function,
    first_block,
    first_line,
    split_signature,
)

PYTHON = Dialect(fence="python")
JAVA = Dialect(fence="java", main="public static void main", indent=4)


def test_a_text_ends_before_the_first_stop_string():
    assert cut_at("body\nclass A\ndef f", ("\ndef", "\nclass")) == "body"
    assert cut_at("body", ("\ndef",)) == "body"
    assert cut_at("body", ()) == "body"


@pytest.mark.parametrize(
    ("text", "line"), [("a\nb", "a"), ("a", "a"), ("\na", ""), ("a\x0cb\r\n", "a\x0cb\r")]
)
def test_the_first_line_ends_before_the_first_line_break(text, line):
    assert first_line(text) == line


def test_the_first_block_of_the_language_counts():
    text = "First\n```text\nno\n```\n```Python\nyes = 1\n```\n```python\nno = 2\n```"
    assert first_block(text, "python") == "yes = 1\n"
    assert first_block(text, "cpp") is None
    assert first_block("```python\nnever closed", "python") is None


def test_pythons_signature_is_the_last_def_at_the_margin():
    code = 'import math\n\ndef helper():\n    pass\n\n\ndef f(x: int):\n    """Doc."""\n'
    assert split_signature(code, fence="python") == ("import math\ndef helper():\n    pass", "def f")
    with pytest.raises(ValueError, match="must have a line that starts with 'def '"):
        split_signature("x = 1", fence="python")


def test_elsewhere_the_signature_is_the_last_line_up_to_its_brace():
    code = "class Problem {\n    // Doc.\n    public static long add(long x) {\n"
    assert split_signature(code, fence="java") == (
        "class Problem {\n    // Doc.",
        "public static long add(long x)",
    )


def test_a_function_ends_before_the_last_brace_at_its_own_indentation():
    block = "class Problem {\n  long f() {\n    if (x) {\n    }\n    return 1;\n  }\n}\n"
    assert cut_function(block, "long f()", JAVA) == "long f() {\n    if (x) {\n    }\n    return 1;"


def test_a_main_function_is_dropped():
    block = "long f() {\n    return 1;\n}\nint main() {\n    f();\n}\n"
    assert cut_function(block, "long f()", Dialect(fence="cpp", main="int main()")) == (
        "long f() {\n    return 1;"
    )


def test_a_block_without_the_signature_is_taken_from_its_start():
    block = "    long g() {\n        return 1;\n    }\n}\n"
    assert cut_function(block, "long f()", JAVA) == "    long g() {\n        return 1;"


def test_capitals_of_a_signature_do_not_count():
    assert cut_function("x\nDEF F():\n    pass\n", "def f", PYTHON) == "DEF F():\n    pass\n"


def test_the_closing_brace_is_given_back_where_the_tests_have_none():
    dialect = Dialect(fence="javascript", adds_brace=True)
    assert cut_function("function f(){\n  return 1;\n}\nf();\n", "function f()", dialect) == (
        "function f(){\n  return 1;\n}"
    )
    assert cut_function("function f(){ return 1;", "function f()", dialect).endswith("return 1;\n}")


def test_a_completed_function_stands_under_what_was_given_before_it():
    code = 'import math\n\ndef f(x):\n    """Doc."""\n'
    answer = "Sure:\n```python\nimport os\n\ndef f(x):\n    return x\n```\nDone."
    assert complete_function(code, answer, PYTHON) == "import math\ndef f(x):\n    return x\n\n"


def test_an_answer_without_a_block_continues_the_code():
    assert complete_function("def f():\n", "    return 1", PYTHON) == "def f():\n\n    return 1"
