"""Changes one place of the source at a time and asks whether a test notices it.

    python -m tests.mutation fpsim/scaling/*.py --tests tests/scaling --out build/scaling.jsonl

The parent process imports torch, and nothing of fpsim. It forks a child that says which lines each test runs. Then it
forks a child for each change: there the loader of modules compiles the changed file, and the tests of the changed line
run, the fastest first, until one fails. No file on disk changes, so that neither a hash of the source nor a process
that a test starts sees the change. Inductor's caches are off, and no test finds code of another change.

Changes are drawn with a seed, as many for each file, from bodies of functions. `--out` gets a line of JSON for each;
a later run leaves those out. The results:

- killed: a test failed;
- broken: a module or a test could not be imported;
- died: the process ended without a result;
- slow: the tests took more than twice their time and a minute;
- survived: the tests that run the line passed, as many of them as `--seconds` allows;
- unstable: a test failed, and in the same order it fails without the change too;
- unseen: no test that takes less than `--limit` runs the line.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import importlib
import importlib.machinery
import json
import os
import pickle
import random
import resource
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"

import pytest
import torch
import torch._inductor.compile_fx

OTHER_COMPARISON = {
    ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OTHER_OPERATION = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
    ast.BitXor: ast.BitOr,
}  # fmt: skip
#: Calls whose first two arguments in the other order mean the same or only crash.
NOT_SWAPPED = {"isinstance", "cast", "max", "min", "getattr", "hasattr", "zip", "larger", "maximum"}


def changes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may stand in the place of a node."""

    def changed(**fields: object) -> ast.AST:
        new = copy.copy(node)
        for name, value in fields.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=[operation, *others]) if type(operation) in OTHER_COMPARISON:
            yield changed(ops=[OTHER_COMPARISON[type(operation)](), *others])
        case ast.BinOp(op=operation) if type(operation) in OTHER_OPERATION:
            yield changed(op=OTHER_OPERATION[type(operation)]())
        case ast.BoolOp(op=operation, values=values):
            yield changed(op=ast.And() if isinstance(operation, ast.Or) else ast.Or())
            for at in range(len(values)):
                others = values[:at] + values[at + 1 :]
                yield changed(values=others) if len(others) > 1 else others[0]
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
            yield changed(test=ast.UnaryOp(ast.Not(), test))
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield changed(value=not value)
        case ast.Constant(value=int(value) | float(value)):
            yield changed(value=value + 1)
        case ast.comprehension(ifs=[_, *others]):
            yield changed(ifs=others)
        case ast.Call(func=function, args=[first, second, *others]):
            if ast.unparse(function).split(".")[-1] not in NOT_SWAPPED and ast.dump(first) != ast.dump(second):
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
    """The nodes in bodies of functions, in order, without annotations, assertions and texts of messages."""
    if isinstance(node, ast.JoinedStr | ast.Assert):
        return
    if inside:
        yield node
    if isinstance(node, ast.Raise):  # it may go, but no part of it changes
        return
    children: list[ast.AST] = list(ast.iter_child_nodes(node))
    if isinstance(node, ast.FunctionDef):
        children, inside = list(node.body), True
    elif isinstance(node, ast.AnnAssign):
        children = [node.value] if node.value is not None else []
    for child in children:
        yield from changeable(child, inside)


class Replacing(ast.NodeTransformer):
    """Puts one node in the place of another."""

    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return ast.copy_location(self.new, node) if node is self.old else self.generic_visit(node)


@dataclass(frozen=True)
class Mutant:
    """A file in which a node has another one in its place."""

    path: Path
    tree: ast.Module
    old: ast.AST
    new: ast.AST

    @property
    def line(self) -> int:
        return next(node.lineno for node in ast.walk(self.old) if hasattr(node, "lineno"))

    @property
    def name(self) -> str:
        old, new = (" ".join(ast.unparse(node).split())[:120] for node in (self.old, self.new))
        return f"{self.path.relative_to(Path.cwd())}:{self.line}: {old} -> {new}"

    def install(self) -> None:
        """Let this process import the changed file in place of the file."""
        tree = ast.fix_missing_locations(Replacing(self.old, self.new).visit(self.tree))
        code, get_code = compile(tree, str(self.path), "exec"), importlib.machinery.SourceFileLoader.get_code

        def changed(loader: Any, name: str) -> Any:
            return code if os.path.realpath(loader.path) == str(self.path) else get_code(loader, name)

        importlib.machinery.SourceFileLoader.get_code = changed  # type: ignore[method-assign]


def mutants(path: Path, count: int, seed: int) -> list[Mutant]:
    """Changes of a file, drawn without repetition."""
    tree = ast.parse(path.read_text())
    places = [Mutant(path, tree, node, new) for node in changeable(tree) for new in changes(node)]
    return random.Random(f"{seed} {path.name}").sample(places, min(count, len(places)))


def in_child(work: Callable[[], Any], seconds: float) -> Any:
    """The result of a call in a forked process: "died" where it ends without one, "slow" where it takes too long.

    Args:
        seconds: of CPU. On a busy machine three times as many may pass.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        limit = int(time.process_time() + seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
        try:
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(work(), pipe)
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        in_time = bool(select.select([pipe], [], [], 3 * seconds)[0])
        result = pickle.load(pipe) if in_time and pipe.peek(1) else "died"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return "slow" if not in_time or os.WTERMSIG(status) == signal.SIGXCPU else result


#: How the names of modules of this project begin.
OURS = ("fpsim", "tests", "__editable__", "conftest")
#: For each test that passes: its seconds, and the files and lines that it runs.
TestLines = dict[str, tuple[float, set[tuple[str, int]]]]


class Lines:
    """Plugin of pytest that runs each test in a child, and keeps its seconds and the lines of files that it runs."""

    def __init__(self, files: list[Path], limit: float) -> None:
        self.files, self.limit = {str(path) for path in files}, limit
        self.found: TestLines = {}
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed or report.skipped

    def run(self, item: pytest.Item) -> tuple[float, set[tuple[str, int]]] | None:
        seen: set[tuple[str, int]] = set()

        def line(frame: Any, event: str, argument: object) -> Any:
            seen.add((frame.f_code.co_filename, frame.f_lineno))
            return line

        start = time.process_time()
        sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename in self.files else None)
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        sys.settrace(None)
        return None if self.failed else (time.process_time() - start, seen)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        for item in session.items:
            result = in_child(lambda item=item: self.run(item), self.limit)
            if isinstance(result, tuple):
                self.found[item.nodeid] = result
        return True


class FirstFailure:
    """Plugin of pytest that runs some tests in the given order, and keeps the name of the first that fails."""

    def __init__(self, tests: list[str]) -> None:
        self.tests = {test: at for at, test in enumerate(tests)}
        self.failure = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((item for item in items if item.nodeid in self.tests), key=lambda i: self.tests[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.failure:
            self.failure = report.nodeid


def run_pytest(options: argparse.Namespace, plugin: object, *arguments: str) -> int:
    temporary = f"--basetemp={options.out.with_suffix('.tmp')}"
    fixed = ("-p", "no:cacheprovider", "-m", "not exhaustive", "--hypothesis-seed=0", temporary)
    return pytest.main([*fixed, *arguments], plugins=[plugin])


def lines_of_tests(options: argparse.Namespace) -> tuple[TestLines, list[str]]:
    """The lines that each test runs, and the modules of other projects that all tests together import."""
    plugin, before = Lines(options.files, options.limit), set(sys.modules)
    run_pytest(options, plugin, *options.tests)
    return plugin.found, [name for name in sys.modules if name not in before and not name.startswith(OURS)]


def first_failure(mutant: Mutant | None, tests: list[str], options: argparse.Namespace) -> tuple[str, str]:
    """The result of a change or of none, and the test that failed."""
    if mutant is not None:
        mutant.install()
    plugin = FirstFailure(tests)
    status = run_pytest(options, plugin, "-x", *sorted({test.partition("::")[0] for test in tests}))
    if plugin.failure:
        return "killed", plugin.failure
    return ("survived" if status == pytest.ExitCode.OK else "broken"), ""


def result_of(mutant: Mutant, lines: TestLines, options: argparse.Namespace) -> dict[str, object]:
    """The result of a change, as `--out` gets it."""
    tests, expected = [], 0.0
    for test, (took, seen) in sorted(lines.items(), key=lambda entry: entry[1][0]):
        if (str(mutant.path), mutant.line) in seen and (expected + took < options.seconds or not tests):
            tests.append(test)
            expected += took
    seconds = 2 * expected + 60
    found = in_child(lambda: first_failure(mutant, tests, options), seconds) if tests else "unseen"
    result, by = found if isinstance(found, tuple) else (found, "")
    if result == "killed" and in_child(lambda: first_failure(None, tests[: tests.index(by) + 1], options), seconds)[1]:
        result = "unstable"
    return {"name": mutant.name, "result": result, "by": by, "tests": len(tests)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tests", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=8, help="changes of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="leave out changes whose name does not contain this")
    parser.add_argument("--seconds", type=float, default=20, help="seconds of CPU that the tests of a change may take")
    parser.add_argument("--limit", type=float, default=4, help="seconds of CPU that a test may take, with its tracing")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.files, options.out = [path.resolve() for path in options.files], options.out.resolve()
    terminal = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(options.out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    torch.set_num_threads(1)
    torch.compile(torch.nn.Linear(2, 2), backend="eager")(torch.ones(1, 2))  # imports what all compilations need
    lines, modules = in_child(lambda: lines_of_tests(options), 3600)
    for name in modules:  # imported once, not in each child
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    if not lines or any(name.startswith("fpsim") for name in sys.modules):
        raise SystemExit(f"no test passes, or fpsim is imported already: read {options.out.with_suffix('.log')}")
    print(f"{len(lines)} tests pass", file=terminal)
    before = options.out.read_text().splitlines() if options.out.exists() else []
    done, counts = {json.loads(line)["name"] for line in before}, Counter[str]()
    for mutant in (mutant for path in options.files for mutant in mutants(path, options.count, options.seed)):
        if options.only in mutant.name and mutant.name not in done:
            record = result_of(mutant, lines, options)
            counts[str(record["result"])] += 1
            with options.out.open("a") as out:
                out.write(json.dumps(record) + "\n")
    print(dict(counts), file=terminal)


if __name__ == "__main__":
    main()
