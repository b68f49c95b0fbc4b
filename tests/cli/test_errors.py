"""Wrong input ends a command with one line on standard error and exit code 2."""

import pytest

from tests.shared.command_line import run


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
