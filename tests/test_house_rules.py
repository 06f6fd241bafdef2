"""The rules of the house, as tests: layers, sizes, names, where each fact lives.

Every rule is a function of source text, and each is shown at the end to catch a planted fault.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from dscoder.runtime.native import _C

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "python" / "dscoder"
CSRC = ROOT / "csrc"

# A package imports only those before it.
LAYERS = [
    *("config", "runtime", "text", "sandbox", "tasks", "data", "ops", "models", "checkpoint", "infer"),
    *("train", "eval", "cli", "testing"),
]
# A C++ family includes only itself and the families named here.
FAMILIES: dict[str, set[str]] = {
    "core": {"host"},  # device.h takes the executor's header instead of the CUDA toolkit's
    "host": {"core"},
    "text": set(),
    "moe": {"core"},
    "gemm": {"core"},
    "comm": {"core"},
    "attention": {"core"},
    "layer": {"core"},
    "sandbox": set(),
    "bind": {"core", "text", "moe", "gemm", "comm", "attention", "layer"},
}
MAX_LINES = {".py": 400, ".cpp": 450, ".cu": 450, ".cuh": 450, ".h": 450}
MAX_FUNCTION_LINES = 60
MAX_KERNEL_LINES = 250
MAX_NESTING = 3
MAX_PARAMETERS = 8
MAX_FIELDS = 20
MAX_DUPLICATE_SHARE = 0.03
DUPLICATE_WINDOW = 8

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
TREE_PYTHON_FILES = sorted(
    path for folder in ("python", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
CPP_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in MAX_LINES)

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def functions(tree: ast.AST) -> Iterator[FunctionNode]:
    return (node for node in ast.walk(tree) if isinstance(node, FunctionNode))


# ---- the rules, as functions of source ----


def layer_of(module: str) -> str | None:
    """The layer a dotted module name belongs to; None for dscoder itself and for other packages."""
    parts = module.split(".")
    return parts[1] if parts[0] == "dscoder" and len(parts) > 1 and parts[1] in LAYERS else None


def upward_imports(tree: ast.Module, layer: str) -> list[str]:
    allowed = set(LAYERS[: LAYERS.index(layer) + 1])
    found = []
    for node in ast.walk(tree):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module:
            modules = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        found += [m for m in modules if (seen := layer_of(m)) is not None and seen not in allowed]
    return found


def hidden_imports(tree: ast.Module) -> list[str]:
    """Relative imports, star imports, and imports that are not at the top of the file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append(f"line {node.lineno}: relative import")
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            found.append(f"line {node.lineno}: star import")
    for function in functions(tree):
        inner = [n for n in ast.walk(function) if isinstance(n, ast.Import | ast.ImportFrom)]
        found += [f"line {node.lineno}: import inside {function.name}" for node in inner]
    return found


def nesting(node: ast.AST, depth: int = 0) -> int:
    """How many blocks stand inside one another below `node`; an elif counts as its if."""
    deepest = depth
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode | ast.ClassDef):
            continue
        is_elif = isinstance(node, ast.If) and isinstance(child, ast.If) and child in node.orelse
        is_block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try)
        deepest = max(deepest, nesting(child, depth + (is_block and not is_elif)))
    return deepest


def parameter_names(function: FunctionNode) -> list[str]:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in named if argument.arg not in ("self", "cls")]


def oversized_functions(tree: ast.Module) -> list[str]:
    found = []
    for function in functions(tree):
        num_lines = (function.end_lineno or function.lineno) - function.lineno + 1
        if num_lines > MAX_FUNCTION_LINES:
            found.append(f"{function.name}: {num_lines} lines, at most {MAX_FUNCTION_LINES}")
        if nesting(function) > MAX_NESTING:
            found.append(f"{function.name}: {nesting(function)} levels, at most {MAX_NESTING}")
        if len(parameter_names(function)) > MAX_PARAMETERS:
            found.append(f"{function.name}: {len(parameter_names(function))} parameters")
    return found


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions, methods and classes without a docstring, functions without a return type.

    Only the return type: mypy --strict, which `make lint` runs, refuses a parameter without one.
    """
    found = []
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    while scopes:
        for node in scopes.pop().body:
            name = getattr(node, "name", "_")
            if name.startswith("_") or not isinstance(node, FunctionNode | ast.ClassDef):
                continue
            if ast.get_docstring(node) is None:
                found.append(f"{name}: no docstring")
            if isinstance(node, ast.ClassDef):
                scopes.append(node)
            elif node.returns is None:
                found.append(f"{name}: no return type")
    return found


def shape_letters(names: str) -> set[str]:
    """The letters that docs/names.md explains under "Shape letters"."""
    section = names.partition("## Shape letters")[2].partition("\n## ")[0]
    return set(re.findall(r"`([A-Za-z])`", section))


def unexplained_shapes(tree: ast.Module, letters: set[str]) -> list[str]:
    """Variables, arguments and fields with a shape (logits_TE) of which a letter is not in `letters`."""
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    suffixes = {
        name: re.search(r"[a-z0-9]_([0-9]*[A-Z][A-Za-z0-9]{0,4})$", name)
        for name in names
        if not name.isupper()
    }
    return sorted(
        name
        for name, found in suffixes.items()
        if found is not None and set(re.sub(r"\d", "", found[1])) - letters
    )


def environment_reads(tree: ast.Module) -> list[str]:
    return [
        f"line {node.lineno}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]


def loose_configs(tree: ast.Module) -> list[str]:
    """Classes of config/ that are not frozen, keyword-only, slotted dataclasses of few fields."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef) or any(ast.unparse(b).endswith("Enum") for b in node.bases):
            continue
        decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
        missing = [w for w in ("frozen=True", "kw_only=True", "slots=True") if w not in decorators]
        num_fields = sum(isinstance(line, ast.AnnAssign) for line in node.body)
        if missing:
            found.append(f"{node.name}: wants {', '.join(missing)}")
        if num_fields > MAX_FIELDS:
            found.append(f"{node.name}: {num_fields} fields, at most {MAX_FIELDS}")
    return found


def cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """(opening line, number of lines) of each function at column 0 of clang-formatted C++."""
    lines = text.splitlines()
    start = None
    for number, line in enumerate(lines):
        if start is None and re.match(r"^[A-Za-z_].*\)( const)?( noexcept)?( ->.*)? \{$|^    .*\) \{$", line):
            start = number
        if line.startswith("}") and start is not None:
            yield lines[start], number - start + 1
            start = None


def wrong_includes(text: str, family: str) -> list[str]:
    found = re.findall(r"^#include [<\"]((?:torch|ATen|c10)/[^>\"]+)", text, flags=re.MULTILINE)
    for target in re.findall(r'^#include "([^"]+)"', text, flags=re.MULTILINE):
        folder = target.split("/")[0]
        if folder in FAMILIES and folder != family and folder not in FAMILIES[family]:
            found.append(target)
    return found


def duplicate_share(texts: list[str]) -> float:
    """Share of code lines that stand in a window of eight lines found more than once."""
    files = []
    for text in texts:
        lines = [line.strip() for line in text.splitlines()]
        files.append([line for line in lines if len(line) > 3 and not line.startswith(("#", "//", "import"))])
    windows = Counter(
        tuple(lines[i : i + DUPLICATE_WINDOW])
        for lines in files
        for i in range(len(lines) - DUPLICATE_WINDOW + 1)
    )
    num_repeated = 0
    for lines in files:
        repeated = set()
        for i in range(len(lines) - DUPLICATE_WINDOW + 1):
            if windows[tuple(lines[i : i + DUPLICATE_WINDOW])] > 1:
                repeated.update(range(i, i + DUPLICATE_WINDOW))
        num_repeated += len(repeated)
    return num_repeated / max(1, sum(len(lines) for lines in files))


# ---- the tree obeys them ----


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_imports_point_down_the_layers(path: Path) -> None:
    layer = layer_of("dscoder." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts))
    tree = parse(path)
    assert hidden_imports(tree) == []
    if layer is not None:
        assert upward_imports(tree, layer) == []


def test_every_package_is_a_layer() -> None:
    packages = {path.parent.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*/*.py")}
    assert packages <= set(LAYERS)


@pytest.mark.parametrize("path", TREE_PYTHON_FILES, ids=relative)
def test_python_keeps_within_its_budgets(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_LINES[".py"]
    assert oversized_functions(parse(path)) == []


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_public_names_are_documented_and_typed(path: Path) -> None:
    tree = parse(path)
    assert ast.get_docstring(tree) is not None
    assert undocumented(tree) == []


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_every_shape_letter_is_in_the_legend(path: Path) -> None:
    letters = shape_letters((ROOT / "docs" / "names.md").read_text(encoding="utf-8"))
    assert {"T", "E", "d"} <= letters
    assert unexplained_shapes(parse(path), letters) == []


@pytest.mark.parametrize("path", PYTHON_FILES, ids=relative)
def test_the_environment_is_read_in_runtime_only(path: Path) -> None:
    if path.parent.name != "runtime":
        assert environment_reads(parse(path)) == []


@pytest.mark.parametrize("path", sorted((PACKAGE / "config").glob("*.py")), ids=relative)
def test_configs_are_frozen_and_keyword_only(path: Path) -> None:
    assert loose_configs(parse(path)) == []


@pytest.mark.parametrize("path", CPP_FILES, ids=relative)
def test_cpp_keeps_within_its_budgets(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES[path.suffix]
    for opening, num_lines in cpp_functions(text):
        limit = MAX_KERNEL_LINES if "__global__" in opening else MAX_FUNCTION_LINES
        assert num_lines <= limit or "PYBIND11_MODULE" in opening, opening


@pytest.mark.parametrize("path", CPP_FILES, ids=relative)
def test_includes_point_down_and_never_to_torch(path: Path) -> None:
    assert wrong_includes(path.read_text(encoding="utf-8"), path.relative_to(CSRC).parts[0]) == []


@pytest.mark.parametrize("path", [*TREE_PYTHON_FILES, *CPP_FILES], ids=relative)
def test_sources_are_ascii(path: Path) -> None:
    assert path.read_text(encoding="utf-8").isascii()


def test_every_op_has_its_test_and_its_benchmark() -> None:
    files = (PACKAGE / "ops").glob("*.py")
    ops = {path.stem for path in files if "\ndefine_op(" in path.read_text(encoding="utf-8")}
    assert ops
    for op in sorted(ops):
        assert (ROOT / "tests" / "ops" / f"test_{op}.py").exists(), f"ops/{op}.py has no test"
        assert (ROOT / "benchmarks" / f"bench_{op}.py").exists(), f"ops/{op}.py has no benchmark"


def test_the_stub_lists_exactly_the_bindings() -> None:
    stub = ast.parse((PACKAGE / "_C.pyi").read_text(encoding="utf-8"))
    listed = {node.name for node in stub.body if isinstance(node, FunctionNode | ast.ClassDef)}
    listed |= {ast.unparse(node.target) for node in stub.body if isinstance(node, ast.AnnAssign)}
    assert {name for name in vars(_C) if not name.startswith("_")} == listed


def test_the_source_does_not_repeat_itself() -> None:
    python_files = [path for path in PYTHON_FILES if path.name != "__init__.py"]  # those list names twice
    texts = [path.read_text(encoding="utf-8") for path in [*python_files, *CPP_FILES]]
    assert duplicate_share(texts) < MAX_DUPLICATE_SHARE


# ---- each rule catches a planted fault ----


def test_an_upward_import_is_found() -> None:
    assert upward_imports(ast.parse("from dscoder.train import loop"), "models")
    assert upward_imports(ast.parse("from dscoder import cli"), "models")
    assert not upward_imports(ast.parse("from dscoder import ops"), "models")


def test_lazy_relative_and_star_imports_are_found() -> None:
    for text in ("def f():\n    import os", "from . import x", "from os import *"):
        assert hidden_imports(ast.parse(text)), text


def test_deep_nesting_is_found() -> None:
    source = "def f(x):\n if x:\n  for i in x:\n   while i:\n    with i: pass"
    assert oversized_functions(ast.parse(source)) == ["f: 4 levels, at most 3"]
    flat = "def f(x):\n if x: pass\n elif x: pass\n elif x: pass\n elif x: pass"
    assert oversized_functions(ast.parse(flat)) == []


def test_a_missing_docstring_is_found() -> None:
    assert undocumented(ast.parse("def f() -> None: ...")) == ["f: no docstring"]
    assert undocumented(ast.parse("class A:\n 'a'\n def f(self) -> None: ...")) == ["f: no docstring"]


def test_an_unexplained_shape_letter_is_found() -> None:
    source = "def f(idx_BJ, ok_TE): x_T1 = self.key_THq; MAX_LR = V2_LR = begin_W1"
    assert unexplained_shapes(ast.parse(source), set("TEBH")) == ["begin_W1", "idx_BJ", "key_THq"]


def test_a_mutable_config_is_found() -> None:
    assert loose_configs(ast.parse("@dataclass(kw_only=True, slots=True)\nclass A: ...")) == [
        "A: wants frozen=True"
    ]


def test_an_environment_read_is_found() -> None:
    assert environment_reads(ast.parse("import os\nos.environ['X']")) == ["line 2"]


def test_a_wrong_include_is_found() -> None:
    assert wrong_includes("#include <torch/all.h>", "moe") == ["torch/all.h"]
    assert wrong_includes('#include "bind/tensor.h"', "moe") == ["bind/tensor.h"]
    assert wrong_includes('#include "core/check.h"', "moe") == []


def test_a_long_cpp_function_is_measured() -> None:
    assert list(cpp_functions("int f(int x) {\n    return x;\n}\n")) == [("int f(int x) {", 3)]


def test_repeated_code_is_measured() -> None:
    block = "\n".join(f"value_{i} = {i}" for i in range(10))
    assert duplicate_share([block, block]) == 1.0
    assert duplicate_share([block]) == 0.0
