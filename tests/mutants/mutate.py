"""The small faults of a source file, one at a time: what a tired hand might have typed.

Each is an edit of the text, so that its diff reads like one. Left alone are texts (what a message says is no
behaviour), annotations, decorators, constants with a name at the top of a module (a value to choose), numbers in what
is raised (advice), keywords that change nothing unless something else is wrong, and plain assignments in `__init__`,
without which nothing runs at all.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

SWAPPED_COMPARISONS: dict[type[ast.cmpop], tuple[str, str]] = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
NEGATIONS = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)  # their swap is the negated condition already
SWAPPED_ARITHMETIC: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.BitOr: ("|", "&"),
    ast.BitAnd: ("&", "|"),
}
SWAPPED_NAMES = {"min": "max", "max": "min", "all": "any", "any": "all", "reversed": "iter", "sorted": "list"}
SWAPPED_METHODS = {"popleft": "pop", "appendleft": "append", "find": "rfind"}
SILENT_KEYWORDS = ("device", "strict")  # say something only on a GPU, or where a length is wrong already
SWAPPED_STATEMENTS = {ast.Break: "continue", ast.Continue: "break"}

Edit = tuple[int, int, str]  # bytes [start, end) of the source, and what stands there instead


@dataclass(frozen=True)
class Mutant:
    """`name`: where, and what became of which line; stays the same where lines are added elsewhere in the file."""

    path: str
    name: str
    line: int
    source: str  # of the whole file


def mutants(path: str, source: str) -> list[Mutant]:
    """Every one of them once, in the order of the file."""
    text = source.encode()
    found: list[Mutant] = []
    seen, names = {source}, Counter[str]()
    for scope, (start, end, replacement) in sorted(_Finder(source).edits(), key=lambda found: found[1]):
        changed = (text[:start] + replacement.encode() + text[end:]).decode()
        if changed in seen:
            continue
        seen.add(changed)
        ast.parse(changed)
        first = text.rfind(b"\n", 0, start) + 1
        last = text.find(b"\n", end)
        before = _line(text[first:last])
        after = _line(text[first:start] + replacement.encode() + text[end:last])
        name = f"{scope}: {before} → {after}"
        names[name] += 1
        if names[name] > 1:
            name += f" ({names[name]})"
        found.append(Mutant(path, name, text.count(b"\n", 0, start) + 1, changed))
    return found


def _line(text: bytes) -> str:
    """As one line without its comments."""
    return " ".join(re.sub(r"\s\s# .*", "", text.decode()).split())


class _Finder:
    def __init__(self, source: str) -> None:
        self._tree = ast.parse(source)
        self._text = source.encode()
        self._starts = [0]
        for line in self._text.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def edits(self) -> Iterator[tuple[str, Edit]]:
        for node in self._tree.body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from self._in(node, "")

    def _in(self, node: ast.AST, scope: str) -> Iterator[tuple[str, Edit]]:
        """Of a node and all below it; `scope`: the dotted name of what it stands in."""
        if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg in SILENT_KEYWORDS):
            return
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            scope = f"{scope}.{node.name}".lstrip(".")
        for edit in self._of(node, scope):
            yield scope, edit
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list", "bases"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(node, ast.Raise) and isinstance(child, ast.Call):
                    for edit in self._without_keywords(child):
                        yield scope, edit
                elif isinstance(child, ast.AST):
                    yield from self._in(child, scope)

    def _of(self, node: ast.AST, scope: str) -> Iterator[Edit]:
        match node:
            case ast.Compare():
                for left, op, right in zip((node.left, *node.comparators), node.ops, node.comparators, strict=False):
                    yield self._between(left, right, *SWAPPED_COMPARISONS[type(op)])
            case ast.BoolOp(op=op, values=values):
                swap = ("and", "or") if isinstance(op, ast.And) else ("or", "and")
                for left, right in itertools.pairwise(values):
                    yield self._between(left, right, *swap)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPPED_ARITHMETIC:
                yield self._between(left, right, *SWAPPED_ARITHMETIC[type(op)])
            case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand) if not isinstance(operand, ast.Constant):
                yield self._start(node), self._start(operand) - self._num_opening(node, operand), ""
            case ast.Constant(value=bool(value)):
                yield *self._span(node), str(not value)
            case ast.Constant(value=int(value)):
                yield *self._span(node), str(value + 1)
            case ast.Constant(value=float(value)):
                yield *self._span(node), str(2 * value or 1.0)
            case ast.Call():
                yield from self._without_keywords(node)
                yield from self._swapped_call(node)
        match node:
            case ast.If(test=test) | ast.IfExp(test=test):
                yield from self._negated(test)
            case ast.comprehension(ifs=ifs):
                for test in ifs:
                    yield from self._negated(test)
            case ast.While(test=test) if not isinstance(test, ast.Constant):
                yield *self._span(test), "False"
            case ast.Return(value=None):
                yield *self._span(node), "pass"
            case ast.Return(value=value) if not (isinstance(value, ast.Constant) and value.value in (None, False)):
                yield *self._span(node), "return None"
            case ast.Break() | ast.Continue():
                yield *self._span(node), SWAPPED_STATEMENTS[type(node)]
            case ast.Raise() | ast.Delete():
                yield *self._span(node), "pass"
            case ast.Expr(value=value) if not isinstance(value, ast.Constant):
                yield *self._span(node), "pass"
            case ast.AugAssign(target=target, op=op, value=value):
                yield *self._span(node), "pass"
                if type(op) in SWAPPED_ARITHMETIC:
                    yield self._between(target, value, *SWAPPED_ARITHMETIC[type(op)])
            case ast.Assign(targets=targets) if not scope.endswith("__init__") and any(map(_lasts, targets)):
                yield *self._span(node), "pass"
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from self._second_assignments(node)

    def _negated(self, test: ast.expr) -> Iterator[Edit]:
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], NEGATIONS):
            return
        start, end = self._span(test)
        yield start, end, f"not ({self._text[start:end].decode()})"

    def _without_keywords(self, call: ast.Call) -> Iterator[Edit]:
        before = call.args[-1] if call.args else None
        for index, keyword in enumerate(call.keywords):
            start, end = self._span(keyword)
            if keyword.arg in SILENT_KEYWORDS:
                before = keyword
                continue
            if before is not None:
                yield self._span(before)[1], end, ""
            elif index + 1 < len(call.keywords):
                yield start, self._start(call.keywords[index + 1]), ""
            else:
                yield start, end, ""
            before = keyword

    def _swapped_call(self, call: ast.Call) -> Iterator[Edit]:
        match call.func:
            case ast.Name(id=name) if name in SWAPPED_NAMES:
                yield *self._span(call.func), SWAPPED_NAMES[name]
            case ast.Attribute(attr=name) if name in SWAPPED_METHODS:
                end = self._span(call.func)[1]
                yield end - len(name), end, SWAPPED_METHODS[name]

    def _second_assignments(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[Edit]:
        """Assignments to a local name that would have another value without them."""
        known = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}
        for node in ast.walk(function):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)]):
                    if name in known:
                        yield *self._span(node), "pass"
                    known.add(name)

    def _between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> Edit:
        """The operator between two operands, and nothing else there: brackets, line breaks and comments stay."""
        end = self._span(left)[1]
        pattern = re.escape(old).replace(r"\ ", r"\s+") if not old.isalpha() else rf"\b{old}\b"
        match = re.search(pattern.encode(), self._text[end : self._start(right)])
        assert match is not None, (old, self._text[end : self._start(right)])
        return end + match.start(), end + match.end(), new

    def _num_opening(self, node: ast.AST, operand: ast.AST) -> int:
        """How many bytes of brackets stand between a unary operator and its operand."""
        between = self._text[self._start(node) : self._start(operand)]
        return len(between) - between.index(b"(") if b"(" in between else 0

    def _start(self, node: ast.AST) -> int:
        return self._span(node)[0]

    def _span(self, node: ast.AST) -> tuple[int, int]:
        assert isinstance(node, ast.expr | ast.stmt | ast.keyword | ast.arg)
        assert node.end_lineno is not None and node.end_col_offset is not None
        return (
            self._starts[node.lineno - 1] + node.col_offset,
            self._starts[node.end_lineno - 1] + node.end_col_offset,
        )


def _lasts(target: ast.expr) -> bool:
    """Whether what is assigned there is seen outside the function."""
    if isinstance(target, ast.Tuple):
        return any(map(_lasts, target.elts))
    return isinstance(target, ast.Attribute | ast.Subscript)
