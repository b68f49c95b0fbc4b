"""Changes one place of a function at a time and asks whether a test notices it.

One process imports torch and collects the tests. It forks a child for each test, which says the lines of FILES that the
test runs, and a child for each changed function, which runs the fastest tests of the changed line. Changes are drawn
with a seed, as many for each file. `--out` gets a line of JSON for each, and a later run leaves those out. What stands
outside functions (tables) is not changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import functools
import gc
import json
import os
import pickle
import random
import resource
import select
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest
import torch

CHANGED_COMPARISON = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
CHANGED_OPERATION = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
# Functions of which a change of the first two arguments means nothing or only crashes.
ORDERLESS = {"isinstance", "cast", "max", "min", "getattr", "hasattr", "zip"}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node, one change each."""

    def changed(**fields: object) -> ast.AST:
        new = copy.deepcopy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[operation, *others]) if type(operation) in CHANGED_COMPARISON:
            yield changed(ops=[CHANGED_COMPARISON[type(operation)](), *others])
        case ast.BinOp(op=operation) if type(operation) in CHANGED_OPERATION:
            yield changed(op=CHANGED_OPERATION[type(operation)]())
        case ast.BoolOp(op=operation, values=values):
            yield changed(op=ast.And() if isinstance(operation, ast.Or) else ast.Or())
            yield from (
                values
                if len(values) == 2
                else (changed(values=values[:at] + values[at + 1 :]) for at in range(len(values)))
            )
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield changed(test=ast.UnaryOp(ast.Not(), test))
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            yield ast.Call(ast.Name("bool", ast.Load()), [operand], [])
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield changed(value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield changed(value=value + 1)
        case ast.comprehension(ifs=[_, *others]):
            yield changed(ifs=others)
        case ast.Call(func=function, args=[first, second, *others]) if ast.unparse(function).split(".")[
            -1
        ] not in ORDERLESS and ast.unparse(first) != ast.unparse(second):
            yield changed(args=[second, first, *others])
        case ast.Return(value=ast.AST() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield changed(value=ast.Constant(None))
        case ast.Expr(value=ast.Call()) | ast.Continue() | ast.Break() | ast.Raise() | ast.AugAssign():
            yield ast.Pass()
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield ast.Pass()
    if isinstance(node, ast.Call):
        for at, keyword in enumerate(node.keywords):
            if keyword.arg is not None:
                yield changed(keywords=node.keywords[:at] + node.keywords[at + 1 :])


def changeable(node: ast.AST, inside: bool = False) -> Iterator[ast.AST]:
    """The nodes of functions, in order, without annotations, messages and docstrings."""
    if isinstance(node, (ast.JoinedStr, ast.Assert)):
        return
    if inside:
        yield node
    if isinstance(node, ast.Raise):  # A raise may go; its message is no matter.
        return
    if isinstance(node, ast.FunctionDef):
        children: list[ast.AST] = list(node.body)
        inside = True
    elif isinstance(node, ast.AnnAssign):
        children = [node.value] if node.value is not None else []
    else:
        children = list(ast.iter_child_nodes(node))
    for child in children:
        yield from changeable(child, inside)


class Replace(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


def codes(code: CodeType) -> Iterator[CodeType]:
    """A code object and all that stand in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from codes(constant)


def place(code: CodeType) -> tuple[str, int]:
    """What a code object of a file is known by."""
    return code.co_qualname, code.co_firstlineno


class Mutant:
    """One change: the lines of its statement, and the file's code with it."""

    def __init__(self, path: Path, at: int, which: int) -> None:
        tree = ast.parse(path.read_text())
        nodes = list(changeable(tree))
        old = nodes[at]
        new = list(changes(old))[which]
        self.path = str(path)
        self.line = next(node.lineno for node in [old, *ast.walk(old)] if hasattr(node, "lineno"))
        self.name = f"{path.relative_to(Path.cwd())}:{self.line}: {show(old)} -> {show(new)}"
        tree = ast.fix_missing_locations(Replace(old, new).visit(tree))
        self.code = {place(code): code for code in codes(compile(tree, self.path, "exec"))}

    def apply(self) -> int:
        """Put the changed code into all functions of the file, empty all caches; how many functions changed."""
        changed = 0
        gc.unfreeze()  # Frozen objects are not listed.
        for found in gc.get_objects():
            if type(found) is FunctionType and found.__code__.co_filename == self.path:
                new = self.code.get(place(found.__code__))
                if new is not None and new != found.__code__ and new.co_freevars == found.__code__.co_freevars:
                    found.__code__ = new
                    changed += 1
            elif type(found) is functools._lru_cache_wrapper and found.__module__.startswith("fpsim"):
                found.cache_clear()
        return changed


def show(node: ast.AST) -> str:
    return " ".join(ast.unparse(node).split())[:90]


def mutants(path: Path, count: int, seed: int) -> Iterator[Mutant]:
    """Changes of a file, drawn without repetition."""
    nodes = enumerate(changeable(ast.parse(path.read_text())))
    places = [(at, which) for at, node in nodes for which, _ in enumerate(changes(node))]
    for at, which in random.Random(f"{seed} {path.name}").sample(places, min(count, len(places))):
        yield Mutant(path, at, which)


def in_child(work: Callable[[], object], seconds: int) -> Any:
    """What a call returns in a forked process; None where it dies or takes more seconds of CPU."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        spent = sum(os.times()[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(spent) + seconds, int(spent) + seconds + 1))
        try:
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        # Grandchildren may hold the pipe open: whatever is left after ten times as long is ended.
        answer = pickle.load(pipe) if select.select([pipe], [], [], 10 * seconds)[0] and pipe.peek(1) else None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return answer


class Mutation:
    """A plugin of pytest that runs tests in children instead of the session's own run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    def passes(self, item: pytest.Item) -> bool:
        self.failed = False
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return not self.failed

    def lines(self, item: pytest.Item) -> tuple[float, set[tuple[str, int]], bool]:
        """The seconds that a test takes, the lines that it runs, and whether it passes."""
        files = {str(path) for path in self.options.files}
        seen: set[tuple[str, int]] = set()

        def line(frame: Any, event: str, argument: object) -> Any:
            seen.add((frame.f_code.co_filename, frame.f_lineno))
            return line

        sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename in files else None)
        start = time.process_time()
        passed = self.passes(item)
        return time.process_time() - start, seen, passed

    def first_failure(self, mutant: Mutant, items: list[pytest.Item]) -> str:
        if not mutant.apply():
            return "unchanged"
        return next((item.nodeid for item in items if not self.passes(item)), "survived")

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        options, covering, took = self.options, defaultdict(list), {}
        gc.freeze()
        for item in session.items:
            seconds, seen, passed = in_child(functools.partial(self.lines, item), options.limit) or (0, (), False)
            if passed:
                took[item] = seconds
                for where in seen:
                    covering[where].append(item)
        print(f"{len(took)} of {len(session.items)} tests pass in time", file=options.terminal, flush=True)
        gc.unfreeze()
        done = (
            {json.loads(line)["name"] for line in options.out.read_text().splitlines()} if options.out.exists() else ()
        )
        counts: Counter[str] = Counter()
        for path in options.files:
            for mutant in mutants(path, options.count, options.seed):
                if mutant.name in done:
                    continue
                items = sorted(covering[mutant.path, mutant.line], key=lambda item: took[item])[: options.most]
                by = in_child(functools.partial(self.first_failure, mutant, items), 20) if items else "no test runs it"
                result = by if by in ("survived", "unchanged", "no test runs it") else "killed"
                counts[result] += 1
                with options.out.open("a") as out:
                    out.write(json.dumps({"name": mutant.name, "result": result, "by": by, "tests": len(items)}) + "\n")
        print(dict(counts), file=options.terminal, flush=True)
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tests", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=8, help="changes of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=12, help="tests for each change")
    parser.add_argument("--limit", type=int, default=3, help="seconds of CPU that a test may take")
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    options = parser.parse_args()
    options.files = [path.resolve() for path in options.files]
    options.terminal = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(options.out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    torch.set_num_threads(1)
    # What the first compilation imports is imported once, not in each child.
    torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))
    pytest.main(["-p", "no:cacheprovider", "-m", "not exhaustive", *options.tests], plugins=[Mutation(options)])


if __name__ == "__main__":
    main()
