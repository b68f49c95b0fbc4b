"""``fpsim --help`` is quick and complete."""

import re
import resource
import subprocess
import sys

import pytest

from tests.shared.command_line import run

#: The options of every command, and words of its help.
HELP = {
    (): (
        "formats", "round", "verify", "demo", "recipes", "evaluate", "sensitivity", "accuracy", "sharpness", "study",
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
    ("demo",): ("--steps", "--format", "--text", "--out", "--loss-scale", "Needs fpsim[paper]"),
    ("recipes",): ("NAME", "default: (all recipes)", "--json", "--markdown"),
    ("evaluate",): (
        "MODEL_OR_SCRIPT", "TEXT", "--policy", "--weights", "--windows", "--context", "--backend", "--csv",
        "required",
    ),
    ("sensitivity",): (
        "MODEL_OR_SCRIPT", "TEXT", "--policy", "--by", "--gradients", "--no-gradients", "--weights", "--windows",
        "--context", "--backend", "--csv",
    ),
    ("accuracy",): ("MODULE:FUNCTION", "--format", "--range", "LOW HIGH", "--exact", "--samples", "--worst", "--plot"),
    ("sharpness",): (
        "MODEL_OR_SCRIPT", "TEXT", "--weights", "--format", "--epsilon", "--method", "--windows", "--context",
        "--gradients", "--no-gradients",
    ),
    ("study",): (
        "run", "experiment", "report", "list", "claims", "pareto", "generation", "attention", "rules", "train",
        "Needs fpsim[paper]",
    ),
    ("study", "run"): (
        "--model", "--data", "--formats", "--recipes", "--seeds", "default: 3", "--first-seed", "--learning-rates",
        "--steps", "--batch", "--context", "--vocabulary", "--loss-scale", "--clip", "--quality", "--level",
        "--measure-every", "--hessian-every", "--attention-every", "--z-loss", "--qk-norm", "--device", "--interpret", "--out", "--executor", "--workers",
        "--address", "--gpus", "--cpus", "--retries",
    ),
    ("study", "experiment"): (
        "number", "--size", "--conditions", "--model", "--data", "--seeds", "--first-seed", "--learning-rates",
        "--steps", "--device", "--interpret", "--out", "--executor", "--workers", "--address", "--gpus", "--cpus",
        "--retries",
    ),
    ("study", "report"): ("folder", "--out"),
    ("study", "list"): (),
    ("study", "rules"): (),
    ("study", "attention"): ("--seed", "--out"),
    ("study", "claims"): ("names", "--out", "--list"),
    ("study", "generation"): ("--formats", "--size", "--out"),
    ("study", "pareto"): ("--families", "--formats", "--size", "--interpret", "--out"),
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
        options = set(re.findall(r"(?<![\w-])--[a-z-]+", run(*command, "--help"))) - {"--help", "--nproc-per-node"}
        listed = {word for word in words if word.startswith("--")}
        assert options <= listed | {"--all"}, command


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
