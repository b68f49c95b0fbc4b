"""``fpsim --help`` is quick and complete."""

import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from importlib import metadata

import pytest
import typer
from rich.markup import escape

from fpsim.cli.examples import EXAMPLES
from fpsim.cli.main import app
from tests.shared.command_line import run

#: The options of every command, and words of its help.
HELP = {
    (): (
        "formats", "round", "verify", "demo", "recipes", "explain", "profile", "audit", "evaluate", "sensitivity",
        "accuracy", "sharpness", "study", "--version", "--install-completion", "--show-completion",
    ),
    ("formats",): ("NAME", "default: (all names)"),
    ("round",): (
        "VALUE", "--format", "--rounding", "stochastic_c[:BITS]", "default: (a table of them all)", "--overflow",
        "default: (the usual one of the format)",
    ),
    ("verify",): (
        "--format", "--rounding", "--overflow", "--scale", "--all", "--exhaustive", "--samples", "--seed", "--path",
        "--carrier", "--device", "--jobs", "default: (one per core, at most 4)", "--markdown", "--json",
    ),
    ("demo",): ("--steps", "--format", "--text", "--out", "--loss-scale", "Needs fpsim-torch[paper]"),
    ("recipes",): ("NAME", "default: (all recipes)", "--json", "--markdown"),
    ("explain",): (
        "MODEL_OR_SCRIPT", "TEXT", "--policy", "default: fp8_hybrid", "--gradients", "--no-gradients", "--weights",
        "--windows", "--context", "default: (the script's function inputs)",
    ),
    ("profile",): (
        "MODEL_OR_SCRIPT", "TEXT", "--policy", "--gradients", "--no-gradients", "--sort", "--limit", "--html", "--json",
        "--weights", "--windows", "--context",
    ),
    ("audit",): (
        "MODEL_OR_SCRIPT", "TEXT", "--policy", "--gradients", "--no-gradients", "--weights", "--windows", "--context",
    ),
    ("evaluate",): (
        "MODEL_OR_SCRIPT", "TEXT", "--policy", "--weights", "--windows", "--context", "--backend", "--csv",
        "required",
    ),
    ("sensitivity",): (
        "MODEL_OR_SCRIPT", "TEXT", "--policy", "--by", "--gradients", "--no-gradients", "--estimates",
        "--no-estimates", "--weights", "--windows", "--context", "--backend", "--csv",
    ),
    ("accuracy",): ("MODULE:FUNCTION", "--format", "--range", "LOW HIGH", "--exact", "--samples", "--worst", "--plot"),
    ("sharpness",): (
        "MODEL_OR_SCRIPT", "TEXT", "--weights", "--format", "--epsilon", "--method", "--windows", "--context",
        "--gradients", "--no-gradients",
    ),
    ("study",): (
        "run", "experiment", "report", "list", "claims", "pareto", "generation", "attention", "rules", "train",
        "cost", "sensitivity", "search", "Needs fpsim-torch[paper]",
    ),
    ("study", "run"): (
        "--model", "--data", "--formats", "--recipes", "--seeds", "default: 3", "--first-seed", "--learning-rates",
        "--steps", "--batch", "--context", "--vocabulary", "--loss-scale", "--clip", "--quality", "--level",
        "--measure-every", "--hessian-every", "--attention-every", "--z-loss", "--qk-norm",
        "--device", "--interpret", "--out", "--executor", "--workers",
        "--address", "--gpus", "--cpus", "--retries",
    ),
    ("study", "experiment"): (
        "number", "--size", "--conditions", "--model", "--data", "--seeds", "--first-seed", "--learning-rates",
        "--steps", "--device", "--interpret", "--out", "--executor", "--workers", "--address", "--gpus", "--cpus",
        "--retries",
    ),
    ("study", "cost"): (
        "number", "--size", "default: paper", "--conditions", "--model", "--device", "--windows", "--steps",
    ),
    ("study", "report"): ("folder", "--out"),
    ("study", "list"): (),
    ("study", "rules"): (),
    ("study", "attention"): ("--seed", "--out"),
    ("study", "claims"): ("names", "--out", "--list"),
    ("study", "generation"): ("--formats", "--size", "--out"),
    ("study", "pareto"): ("--families", "--formats", "--size", "--interpret", "--out"),
    ("study", "sensitivity"): (
        "CHECKPOINT", "--policy", "default: (that of the run)", "--by", "--gradients", "--no-gradients", "--estimates",
        "--no-estimates", "--batches", "--backend", "--csv",
    ),
    ("study", "search"): (
        "CHECKPOINT", "--format", "--tolerance", "--budget", "--cost", "--trials", "--batches", "--backend", "--out",
        "--csv",
    ),
    ("study", "train"): ("config", "out", "--parallel", "--checkpoint"),
}  # fmt: skip


@pytest.mark.parametrize("command", HELP, ids=" ".join)
def test_help_lists_commands_arguments_options_and_defaults(command: tuple[str, ...], monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = re.sub(r"[\s│]+", " ", run(*command, "--help"))
    for word in HELP[command]:
        assert re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", shown), (word, shown)


def test_no_option_is_without_a_test(monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    for command, words in HELP.items():
        shown = run(*command, "--help").partition("Examples:")[0]
        options = set(re.findall(r"(?<![\w-])--[a-z-]+", shown)) - {"--help", "--nproc-per-node"}
        listed = {word for word in words if word.startswith("--")}
        assert options <= listed | {"--all"}, command


def commands(group=None, path=()):
    """The commands of the program, and the groups of commands, with the words that call them."""
    group = group or typer.main.get_command(app)
    yield path, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*path, name))


def test_every_help_page_has_examples_that_the_command_takes() -> None:
    root = typer.main.get_command(app)
    listed = dict(commands())
    assert set(EXAMPLES) == {" ".join(path) for path in listed}
    for path, command in listed.items():
        examples = EXAMPLES[" ".join(path)]
        assert all(escape(line) in command.epilog for line in examples) and command.epilog.startswith("Examples:")
        for line in examples:
            words = shlex.split(line.replace("torchrun --nproc-per-node 8 -m fpsim.cli.study", "fpsim study"))[1:]
            current, names = root, []
            while words and words[0] in getattr(current, "commands", {}):
                names.append(words.pop(0))
                current = current.commands[names[-1]]
            assert names[: len(path)] == list(path)
            if words != ["--install-completion"]:
                current.make_context(" ".join(names), list(words))  # raises an error for wrong arguments


def test_every_option_shows_its_default() -> None:
    for path, command in commands():
        for option in command.params:
            if option.required or option.name in ("help", "install_completion", "show_completion"):
                continue
            assert option.default not in (None, [], ()) or isinstance(option.show_default, str), (path, option.name)


def test_version() -> None:
    own, torch = metadata.version("fpsim-torch"), metadata.version("torch")
    assert run("--version") == f"fpsim {own}, torch {torch}, Python {platform.python_version()}\n"


def test_the_package_runs_as_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "fpsim", "formts"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no such command 'formts'. Did you mean 'formats'?; see fpsim --help\n"


def test_shells_complete_the_names_of_formats() -> None:
    words = {"COMP_WORDS": "fpsim round --format mxfp8", "COMP_CWORD": "3", "_FPSIM_COMPLETE": "complete_bash"}
    called = "from fpsim.cli.main import app; app(prog_name='fpsim')"
    done = subprocess.run(
        [sys.executable, "-c", called], env={**os.environ, **words}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["mxfp8", "mxfp8_e5m2"]


def imported_by(statement: str, arguments: str = "") -> set[str]:
    """The modules in a fresh process after ``statement``."""
    program = f"import sys; sys.argv = ['fpsim', *{arguments.split()!r}]\n{statement}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    return set(done.stdout.split())


SLOW = {"torch", "numpy", "scipy", "mpmath", "ray", "pyarrow", "transformers", "matplotlib", "fpsim.paper"}


def test_the_command_line_imports_neither_torch_nor_the_study() -> None:
    assert imported_by("import fpsim.cli.main") & SLOW == set()


@pytest.mark.parametrize("arguments", ["--help", "verify --help", "study run --help"])
def test_help_imports_neither_torch_nor_the_study(arguments: str) -> None:
    called = "from fpsim.cli.main import app\ntry: app()\nexcept SystemExit as end: assert end.code == 0"
    assert imported_by(called, arguments) & SLOW == set()


def test_help_takes_less_than_a_second_of_processor_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    called = "from fpsim.cli.main import app; app()"
    subprocess.run([sys.executable, "-c", called, "--help"], capture_output=True, check=True, timeout=300)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
