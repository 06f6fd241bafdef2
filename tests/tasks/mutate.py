"""One small fault put into the body of a Python function, the same one every time."""

import ast

_OPPOSITE: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.GtE,
    ast.GtE: ast.Lt,
    ast.Gt: ast.LtE,
    ast.LtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OTHER_OPERATOR: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}


def _negate_comparison(node: ast.AST) -> bool:
    if not isinstance(node, ast.Compare):
        return False
    node.ops[0] = _OPPOSITE[type(node.ops[0])]()
    return True


def _swap_operator(node: ast.AST) -> bool:
    if not isinstance(node, ast.BinOp) or type(node.op) not in _OTHER_OPERATOR:
        return False
    node.op = _OTHER_OPERATOR[type(node.op)]()
    return True


def _shift_number(node: ast.AST) -> bool:
    if not isinstance(node, ast.Constant) or type(node.value) is not int:
        return False
    node.value += 1
    return True


def _return_nothing(node: ast.AST) -> bool:
    if not isinstance(node, ast.Return):
        return False
    node.value = ast.Constant(None)
    return True


def mutated(body: str) -> str:
    """The indented body with one fault: the first of these that it has room for, nearest to its start.

    The opposite of a comparison, another operator, a number plus one, a return of nothing.
    """
    function = ast.parse(f"def function():\n{body}").body[0]
    for fault in (_negate_comparison, _swap_operator, _shift_number, _return_nothing):
        if any(fault(node) for node in ast.walk(function)):
            return ast.unparse(function).partition("\n")[2]
    raise ValueError(f"mutated: the body must have something to change, got {body!r}")
