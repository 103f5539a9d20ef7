"""Mutants: one step of a function left out, as long as a block lasts.

A hunt that finds nothing proves something only if it finds every one of these.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Final, NamedTuple
from unittest import mock

STEPS: Final = frozenset(
    {"flush", "fence", "persist", "sync", "_fdatasync", "pmem_flush", "pmem_drain", "zero", "write"}
)
"""Methods whose calls are steps that durability or order may depend on."""


class Step(NamedTuple):
    """A call in a function, as a statement of its own."""

    owner: type | ModuleType
    function: str
    number: int
    """Which of the function's steps it is, from 0."""
    text: str

    def __str__(self) -> str:
        """Return it for people and for ids."""
        home = self.owner.__name__.rpartition(".")[2]
        return f"{home}.{self.function}-{self.number}: {self.text}"


def steps_of(owner: type | ModuleType, *functions: str) -> list[Step]:
    """Return the steps of some functions of a class or of a module."""
    found = []
    for name in functions:
        calls = _calls(_tree(getattr(owner, name)))
        found += [Step(owner, name, at, ast.unparse(call)) for at, call in enumerate(calls)]
    return found


@contextmanager
def left_out(step: Step) -> Iterator[None]:
    """Leave a step out."""
    function = getattr(step.owner, step.function)
    tree = _tree(function)
    wanted = _calls(tree)[step.number]
    tree = ast.fix_missing_locations(_LeaveOut(wanted).visit(tree))
    namespace: dict[str, Any] = {}
    exec(compile(tree, "<mutant>", "exec"), function.__globals__, namespace)
    with mock.patch.object(step.owner, step.function, namespace[step.function]):
        yield


def _tree(function: Callable[..., object]) -> ast.Module:
    return ast.parse(textwrap.dedent(inspect.getsource(function)))


def _calls(tree: ast.Module) -> list[ast.Expr]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr in STEPS
    ]


class _LeaveOut(ast.NodeTransformer):
    def __init__(self, wanted: ast.Expr) -> None:
        self._wanted = wanted

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if node is self._wanted else node
