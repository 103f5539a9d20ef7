"""Mutants: one step of a function left out or done wrongly, as long as a block lasts.

A hunt that finds nothing proves something only if it finds every one of these.
"""

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType, ModuleType
from typing import Any, Final, NamedTuple
from unittest import mock

STEPS: Final = frozenset(
    {
        "_clear",
        "_fdatasync",
        "_msync",
        "_zero",
        "clear",
        "fence",
        "flush",
        "persist",
        "pmem_drain",
        "pmem_flush",
        "sync",
        "write",
        "zero",
    }
)
"""Methods whose calls are steps that durability or order may depend on."""


class Mutant(NamedTuple):
    """A function of a class or module, and its source as it should not be."""

    owner: type | ModuleType
    function: str
    change: str
    """What was done to it."""
    source: str

    def __str__(self) -> str:
        """Return it for people and for ids."""
        home = self.owner.__name__.rpartition(".")[2]
        return f"{home}.{self.function}: {self.change}"


def without_steps(owner: type | ModuleType) -> list[Mutant]:
    """Return, for every step in the functions of a class or module, the mutant without it."""
    mutants = []
    for name, function in vars(owner).items():
        if isinstance(function, FunctionType) and function.__module__ == _module_of(owner):
            source = _source(function)
            seen: dict[str, int] = {}
            for call in _calls(ast.parse(source)):
                text = ast.unparse(call)
                seen[text] = seen.get(text, 0) + 1
                which = f" ({seen[text]})" if seen[text] > 1 else ""
                mutants.append(Mutant(owner, name, f"no {text}{which}", _without(source, call)))
    return mutants


def replaced(owner: type | ModuleType, function: str, *changes: str) -> Mutant:
    """Return the mutant of a function in which every second text stands for the one before it."""
    source = _source(vars(owner)[function])
    words = []
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert source.count(old) == 1, f"{old!r} is there {source.count(old)} times"
        source = source.replace(old, new)
        words.append(f"{_words(new)} for {_words(old)}")
    return Mutant(owner, function, ", ".join(words), source)


@contextmanager
def applied(mutant: Mutant) -> Iterator[None]:
    """Let a mutant stand in for its function."""
    original = vars(mutant.owner)[mutant.function]
    namespace: dict[str, Any] = {}
    exec(compile(mutant.source, "<mutant>", "exec"), original.__globals__, namespace)
    homes: list[type | ModuleType] = [mutant.owner]
    if isinstance(mutant.owner, ModuleType):  # others may have it under its own name
        modules = [module for name, module in sys.modules.items() if name.startswith("vfsmap")]
        homes = [*(home for home in modules if vars(home).get(mutant.function) is original)]
    with ExitStack() as stack:
        for home in homes:
            stack.enter_context(
                mock.patch.object(home, mutant.function, namespace[mutant.function])
            )
        yield


def _module_of(owner: type | ModuleType) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else owner.__module__


def _source(function: Callable[..., object]) -> str:
    return textwrap.dedent(inspect.getsource(function))


def _words(text: str) -> str:
    return " ".join(text.split())


def _calls(tree: ast.Module) -> list[ast.Expr]:
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr in STEPS
    ]


def _without(source: str, call: ast.Expr) -> str:
    lines = source.splitlines(keepends=True)
    assert call.end_lineno is not None
    first, last = call.lineno - 1, call.end_lineno
    return "".join([*lines[:first], " " * call.col_offset + "pass\n", *lines[last:]])
