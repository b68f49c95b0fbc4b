"""Wrong input ends a command with one line on standard error and exit code 2."""

import pytest
import typer
from typer.testing import CliRunner

from fpsim.cli.errors import OneLineErrors, plain_errors
from tests.shared.command_line import run

SCRIPT = """
import torch

def build(vocabulary):
    return torch.nn.Embedding(vocabulary, vocabulary)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verify", "--format", "e4m3fn", "--markdown", "{tmp}"], "is a folder: name a file to write"),
        (["verify", "--format", "e4m3fn", "--json", "{tmp}/none/x.json"], "there is no folder"),
        (["verify", "--format", "e4m3fn", "--device", "xpu:7"], "torch cannot use the device 'xpu:7' here"),
        (["demo", "--text", "{tmp}/none.txt", "--out", "{tmp}/out"], "no text file at"),
        (["demo", "--text", "{tmp}", "--out", "{tmp}/out"], "is a folder: name one text file"),
        (["demo", "--text", "{tmp}/text.txt", "--out", "{tmp}/text.txt"], "text.txt: File exists"),
        (["sharpness", "{tmp}/own.py:build", "{tmp}/none.txt"], "no text file at"),
        (["sharpness", "{tmp}/own.py:build", "{tmp}"], "is a folder: name one text file"),
        (["sharpness", "{tmp}/own.py:build", "{tmp}/binary.txt"], "binary.txt is not UTF-8"),
        (["sharpness", "{tmp}/own.py:build", "{tmp}/text.txt", "--weights", "{tmp}/text.txt"], "is not a state dict"),
        (["sharpness", "{tmp}/syntax.py:build", "{tmp}/text.txt"], "syntax.py fails when it is executed, line 2: Synt"),
        (["sharpness", "{tmp}", "{tmp}/text.txt"], "no Hugging Face checkpoint at"),
        (["sharpness", "{tmp}/broken", "{tmp}/text.txt"], "is not a valid JSON file"),
        (["sharpness", "{tmp}/strange", "{tmp}/text.txt"], "strange cannot be read: ValueError: "),
        (["sharpness", "{tmp}/empty", "{tmp}/text.txt"], "empty cannot be read: OSError: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_files_end_with_code_2_and_one_line(arguments, message, tmp_path):
    (tmp_path / "own.py").write_text(SCRIPT)
    (tmp_path / "syntax.py").write_text("import torch\ndef build(:\n")
    (tmp_path / "text.txt").write_text("It was the best of times. " * 10)
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    for name, content in {
        "broken": "{",
        "strange": '{"model_type": "none"}',
        "empty": '{"model_type": "llama"}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    error = run(*(argument.format(tmp=tmp_path) for argument in arguments), code=2)
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (OSError(28, "No space left on device", "/full/x"), 2, "error: /full/x: No space left on device"),
        (OSError(28, "No space left on device"), 2, "error: No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), 2, "error: /x: Permission denied"),
        (ValueError("two\nlines"), 2, "error: two lines"),
        (ValueError(), 2, "error: ValueError"),
        (KeyboardInterrupt("interrupted: go on"), 130, "interrupted: go on"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_of_the_system_and_ctrl_c_are_one_line(raised, code, line):
    @plain_errors
    def command():
        raise raised

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app)
    assert (result.exit_code, result.stderr.strip()) == (code, line)


@pytest.mark.parametrize("raised", [RuntimeError("a bug"), BrokenPipeError()])
def test_other_errors_are_bugs_and_keep_their_traceback(raised):
    @plain_errors
    def command():
        raise raised

    with pytest.raises(type(raised)):
        command()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["round", "1", "--format", "e4m3fm"], "error: unknown format 'e4m3fm': did you mean e4m3fn"),
        (["round", "one", "--format", "e4m3fn"], "error: cannot read 'one' as a number"),
        (["round", "1", "--fromat", "2", "--format", "e4m3fn"], "error: no such option: --fromat"),
        (
            ["round", "1", "--format", "e4m3fn", "--rounding", "nearest"],
            "error: unknown rounding 'nearest': use one of",
        ),
        (["round", "1", "--format", "e2m1fn", "--overflow", "ovf_inf"], "use overflow='sat_finite'"),
        (["formats", "e99m1"], "error: no such format 'e99m1'"),
        (["verify", "--format", "e4m3fn", "--rounding", "nearest"], "error: unknown rounding 'nearest'"),
        (["verify", "--format", "fp32", "--exhaustive", "--path", "eager"], "exhaustive=False"),
        (["verify", "--format", "e4m3fn", "--carrier", "int8"], "error: unknown carrier 'int8': use one of float64,"),
        (["verify", "--format", "e4m3fn", "--path", "fast"], "error: unknown path 'fast'"),
        (["verify", "--format", "bf16", "--carrier", "float16", "--path", "eager"], "convert it to torch.float32"),
        (["verify"], "error: nothing to verify: give --format, such as --format e4m3fn, or --all"),
        (["verify", "--all", "--exhaustive"], "error: --all takes samples: leave out --exhaustive"),
        (["verify", "--format", "e4m3fn", "--jobs", "2"], "error: --jobs is for --all"),
        (["verify", "--format", "e4m3fn", "--device", "cuda:99"], "CUDA devices here: use device='cpu'"),
        (["verify", "--format", "e4m3fn", "--rounding", "stochastic:0"], "random bits are 1 to 32, got '0'"),
    ],
)
def test_wrong_input_ends_with_code_2_and_one_line(arguments, message):
    error = run(*arguments, code=2)
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["roudn", "1"], "error: no such command 'roudn'. Did you mean 'round'?; see root --help"),
        (["round", "1"], "error: missing option '--format'; see root round --help"),
        (["round", "--format", "bf16"], "error: missing argument 'VALUE'; see root round --help"),
        (["verify", "--frmat", "e4m3fn"], "error: no such option: --frmat (Possible options: --format, --path); see "),
        (["verify", "--all", "--samples", "x"], "error: invalid value for '--samples': "),
        (["verify", "--all", "--jobs", "0"], "error: invalid value for '--jobs': "),
        (["study", "rum"], "error: no such command 'rum'. Did you mean 'run'?; see root study --help"),
    ],
)
def test_arguments_that_no_command_takes_are_one_line(arguments, message):  # typer's runner calls the program root
    error = run(*arguments, code=2)
    assert error.startswith(message)
    assert len(error.splitlines()) == 1


def test_errors_of_the_backend_are_one_line():
    class UnroundedError(RuntimeError):
        pass

    class BackendCompilerFailed(RuntimeError):
        inner_exception = UnroundedError("aten.x cannot be rounded")

    @plain_errors
    def command():
        raise BackendCompilerFailed("a page of text")

    program = typer.Typer(cls=OneLineErrors)
    program.command()(command)
    program.command()(test_errors_of_the_backend_are_one_line)  # a program of one command is no group
    result = CliRunner().invoke(program, ["command"])
    assert (result.exit_code, result.stderr) == (2, "error: aten.x cannot be rounded\n")
