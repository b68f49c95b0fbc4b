"""The proof: its judge agrees with the reference, and it finds every planted error."""

import json
from fractions import Fraction
from importlib import metadata

import numpy as np
import pytest
import torch

from fpsim import reference
from fpsim.formats import NAMED_FORMATS, OVERFLOWS, ROUNDINGS, parse_format, resolve_overflow
from fpsim.rounding.carriers import CARRIERS
from fpsim.source import proven_hash
from fpsim.verify import run
from fpsim.verify.cases import random_numbers
from fpsim.verify.codes import code_of, differences, tensor_of
from fpsim.verify.judges import judge
from fpsim.verify.modes import STOCHASTIC_SAMPLES, Group, mode_of, plan
from fpsim.verify.run import verify, verify_groups, verify_together
from fpsim.verify.verdict import MAX_EXAMPLES

FLOAT32 = CARRIERS[torch.float32]
DTYPES = list(CARRIERS)
SMALL = (
    "e5m2",
    "e5m2fnuz",
    "e4m3fn",
    "e4m3",
    "e4m3fnuz",
    "e3m4",
    "e3m2fn",
    "e2m1fn",
    "e3m2:nosubnormals",
    "e4m2:unsigned",
)
EAGER = ("eager",)


def random_codes(count: int, dtype: torch.dtype, seed: int = 0) -> np.ndarray:
    bits = dtype.itemsize * 8
    return np.random.default_rng(seed).integers(0, 1 << bits, count, dtype=f"uint{bits}", endpoint=False)


def exactly(code: int, dtype: torch.dtype) -> reference.Value:
    return reference.as_value(tensor_of(np.array([code], f"uint{dtype.itemsize * 8}"), dtype).item())


# -- codes of exact values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_code_of_a_floats_value_is_its_own(dtype):
    carrier = CARRIERS[dtype]
    codes = [0, 1, 2, carrier.max_code - 1, carrier.max_code, carrier.max_code + 1, 1 << carrier.mantissa_bits]
    codes += [code | carrier.sign_code for code in codes]
    for code in [*codes, *random_codes(300, dtype).tolist()]:
        value = exactly(code, dtype)
        want = carrier.nan_code if value is reference.NAN else code
        assert code_of(value, carrier) == (want, True), hex(code)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_code_of_a_value_between_two_floats_is_that_of_the_one_nearer_to_zero(dtype):
    carrier = CARRIERS[dtype]
    magnitudes = random_codes(100, dtype) % np.array(carrier.max_code, f"uint{carrier.bits}")
    for code in [0, carrier.max_code - 1, (1 << carrier.mantissa_bits) - 1, *magnitudes.tolist()]:
        below, above = Fraction(exactly(code, dtype)), Fraction(exactly(code + 1, dtype))
        for part in (Fraction(1, 10**9), Fraction(1, 3), Fraction(1, 2), Fraction(10**9 - 1, 10**9)):
            between = below + part * (above - below)
            assert code_of(between, carrier) == (code, False), hex(code)
            assert code_of(-between, carrier) == (code | carrier.sign_code, False), hex(code)


def test_values_beyond_the_carrier_have_the_code_of_its_largest():
    assert code_of(Fraction(2) ** 128, FLOAT32) == (FLOAT32.max_code, False)
    assert code_of(-(Fraction(10) ** 400), FLOAT32) == (FLOAT32.sign_code | FLOAT32.max_code, False)


# -- the judge ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in (*SMALL, "e8m0fnu", "e8m3", "e5m0", "e5m4:nosubnormals")]
    + [("e4m3fn", torch.float64), ("e9m2", torch.float64), ("e5m2", torch.float16), ("e4m3", torch.bfloat16)],
    ids=str,
)
def test_the_judge_agrees_with_the_reference(name, dtype, rounding):
    fmt = parse_format(name)
    for overflow in OVERFLOWS:
        if overflow != "sat_finite" and not (fmt.has_infinity or fmt.has_nan):
            continue
        judged = judge(fmt, rounding, overflow, dtype)
        probes = judged.probes()
        codes = np.concatenate([probes[:: 1 + len(probes) // 100], random_codes(50, dtype)])
        for code, expected in zip(codes.tolist(), judged.expected(codes).tolist(), strict=True):
            rounded = reference.round(exactly(code, dtype), fmt, rounding, overflow)
            assert (expected, True) == code_of(rounded, judged.carrier), (hex(code), overflow)


@pytest.mark.parametrize(("name", "overflow"), [("e4m3fn", "sat_finite"), ("e4m3fn", "ovf_inf"), ("e5m2", "ovf_inf")])
def test_a_slice_of_the_expansion_is_what_the_judge_expects(name, overflow):
    judged = judge(name, "nearest_even", overflow)
    buffer = np.empty(3001, np.uint32)
    nan = FLOAT32.nan_code
    for middle in [1501, *judged.starts[1:].tolist(), 0x80000000, 0xFFFFFFFF - 1501]:
        first = max(middle - 1500, 0)
        out = buffer[: (1 << 32) - first]
        ranges = judged.expand(first, out)
        expected = judged.expected(np.arange(first, first + len(out), dtype=np.uint32))
        np.testing.assert_array_equal(out, expected)
        nans = [np.arange(start, end) for start, end in ranges]
        np.testing.assert_array_equal(np.concatenate([np.empty(0, int), *nans]), np.flatnonzero(expected == nan))


def test_the_runs_cover_every_code_and_neighbouring_runs_differ():
    judged = judge("e4m3fn")
    assert judged.starts[0] == 0
    assert (np.diff(judged.starts.astype(np.int64)) > 0).all()
    assert (judged.results[1:] != judged.results[:-1]).all()
    assert judged.ends[-1] == 1 << 32


def test_probes_hold_boundaries_values_and_specials_with_their_neighbours():
    probes = set(judge("e2m1fn", "nearest_even").probes(radius=2).tolist())
    for centre in (0, 1 << 31, 0x3E800000, 0x3FC00000, 0xBFC00000, 0x40C00000, 0x7F800000, 0xFF800000, 0x7FC00000):
        assert probes.issuperset((centre + offset) % (1 << 32) for offset in range(-2, 3)), hex(centre)


def test_expected_takes_signed_codes_of_any_shape():
    codes = np.array([[0x3F800001, -1, 0]], np.int32)
    assert judge("e2m1fn").expected(codes).tolist() == [[0x3F800000, 0x40C00000, 0]]


def test_differences_are_bits_but_for_nan():
    got = np.array([0x7FC00001, 0x7F800000, 0, 0x3F800000, 0xFF800001], np.uint32)
    want = np.array([0xFFC00000, 0x7FC00000, 0x80000000, 0x3F800000, 0x7F800000], np.uint32)
    assert differences(got, want, FLOAT32).tolist() == [1, 2, 4]


# -- the proof finds what is planted -------------------------------------------------------------------------------


def plant(monkeypatch, wrong_codes, *, change=lambda codes: codes ^ 1, when=lambda: True):
    """Make the rounding that `verify` checks wrong for the inputs ``wrong_codes`` alone."""
    original = run.round_tensor

    def round_wrongly(x, *args, **kwargs):
        rounded = original(x, *args, **kwargs)
        if not when():
            return rounded
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
        bits = x.dtype.itemsize * 8
        codes, results = x.view(integer), rounded.view(integer)
        for code in wrong_codes:
            signed = code - (1 << bits) if code >> (bits - 1) else code
            results = torch.where(codes == signed, change(results), results)
        return results.view(x.dtype)

    monkeypatch.setattr(run, "round_tensor", round_wrongly)


@pytest.mark.parametrize("code", [0x0000, 0x8000, 0x0001, 0x3C7F, 0x7BFF, 0x7C00, 0xFC00])
def test_one_wrong_input_of_all_is_reported_alone(monkeypatch, code):
    plant(monkeypatch, [code])
    verdict = verify("e5m2", dtype=torch.float16, exhaustive=True, paths=EAGER)
    assert not verdict.ok
    assert verdict.mismatches == 1
    want = int(judge("e5m2", dtype=torch.float16).expected(np.array([code], np.uint16))[0])
    [mismatch] = verdict.examples
    assert mismatch == ("eager", f"{code:#06x}", f"{want ^ 1:#06x}", f"{want:#06x}", "")
    assert str(mismatch) == f"{code:#06x} became {want ^ 1:#06x}, not {want:#06x} (eager)"


def test_a_wrong_sign_of_zero_is_an_error_and_a_nan_payload_is_none(monkeypatch):
    plant(monkeypatch, [0x0000], change=lambda codes: codes ^ -0x8000)
    verdict = verify("e5m2", dtype=torch.float16, exhaustive=True, paths=EAGER)
    assert verdict.examples == (("eager", "0x0000", "0x8000", "0x0000", ""),)
    monkeypatch.undo()
    plant(monkeypatch, [0x7E00, 0xFFFF, 0x7C01])
    assert verify("e5m2", dtype=torch.float16, exhaustive=True, paths=EAGER).ok


def test_nan_where_a_number_is_due_and_a_number_where_nan_is_due_are_errors(monkeypatch):
    plant(monkeypatch, [0x3C00], change=lambda codes: codes | 0x7E00)
    assert verify("e5m2", dtype=torch.float16, exhaustive=True, paths=EAGER).mismatches == 1
    monkeypatch.undo()
    plant(monkeypatch, [0x7E00], change=lambda codes: codes & 0x3C00)
    verdict = verify("e5m2", dtype=torch.float16, exhaustive=True, paths=EAGER)
    assert [(found.input, found.got, found.want) for found in verdict.examples] == [("0x7e00", "0x3c00", "0x7e00")]


def test_many_errors_are_counted_and_the_first_are_shown(monkeypatch):
    wrong = [3 + 1000 * i for i in range(25)]
    plant(monkeypatch, wrong)
    verdict = verify("e5m2", dtype=torch.float16, exhaustive=True, paths=EAGER)
    assert verdict.mismatches == 25
    assert [int(found.input, 16) for found in verdict.examples] == wrong[:MAX_EXAMPLES]
    assert "25 MISMATCHES in 65,536 inputs" in str(verdict)


def test_a_sample_holds_the_boundaries(monkeypatch):
    tie_above_one = 0x3F880000
    for code in (tie_above_one - 1, tie_above_one, tie_above_one + 1):
        plant(monkeypatch, [code])
        verdict = verify("e4m3fn", samples=0, paths=EAGER)
        assert [found.input for found in verdict.examples] == [f"{code:#010x}"]
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("name", "dtype", "tie"), [("tf32", torch.float32, 0x3F801000), ("fp32", torch.float64, 0x3FF0 << 48 | 1 << 28)]
)
def test_a_sample_of_a_format_without_table_holds_ties(monkeypatch, name, dtype, tie):
    plant(monkeypatch, [tie, tie + 1])
    verdict = verify(name, dtype=dtype, samples=0, paths=EAGER)
    assert {int(found.input, 16) for found in verdict.examples} == {tie, tie + 1}


def test_an_error_of_compiled_code_alone_is_found(monkeypatch):
    plant(monkeypatch, [0xBC01], when=torch.compiler.is_compiling)
    verdict = verify("e5m2", dtype=torch.float16, exhaustive=True)
    assert verdict.paths == ("eager", "compiled")
    assert [(found.path, found.input) for found in verdict.examples] == [("compiled", "0xbc01")]


# -- stochastic rounding ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rounding", ["stochastic", "stochastic:1", "stochastic_b:5", "stochastic_c:12"])
def test_stochastic_rounding_agrees_with_the_reference_for_the_same_random_number(rounding, dtype):
    verdict = verify("e4m3fn", rounding=rounding, dtype=dtype, samples=2000, seed=5, paths=EAGER)
    assert verdict.ok, (str(verdict), verdict.examples)
    assert verdict.rounding == {"stochastic": "stochastic:23"}.get(rounding, rounding)


def test_an_error_of_stochastic_rounding_is_shown_with_its_random_number(monkeypatch):
    plant(monkeypatch, [0x3F900000])  # 1.125: half of the way from 1 to 1.25
    verdict = verify("e4m2fn", rounding="stochastic:4", samples=0, paths=EAGER)
    [found] = verdict.examples
    up = int(found.random, 16) >= 8
    want = 0x3FA00000 if up else 0x3F800000
    assert (found.input, found.got, found.want) == ("0x3f900000", f"{want ^ 1:#010x}", f"{want:#010x}")
    assert f"input 0x3f900000 = 1.125 with random number {found.random} became" in verdict.describe(found)
    assert verdict.describe(found).endswith("e4m2fn stochastic:4 sat_finite, float32 eager")


def test_a_stochastic_rounding_that_ignores_the_seed_is_found(monkeypatch):
    original = run.round_tensor
    monkeypatch.setattr(run, "round_tensor", lambda x, *a, seed, **k: original(x, *a, seed=7, **k))
    verdict = verify("e4m3fn", rounding="stochastic:8", samples=1000, paths=EAGER)
    assert verdict.mismatches > 100


def test_random_numbers_are_the_topmost_bits_of_the_words_whatever_their_number():
    full = random_numbers(3, 100, 32, salt=2)
    assert (full >= 0).all() and full.max() > 1 << 31
    assert (random_numbers(3, 100, 5, salt=2) == full >> 27).all()
    assert (random_numbers(3, 100, 32, salt=1) != full).all()
    assert (random_numbers(4, 100, 32, salt=2) != full).all()


# -- many modes at once ----------------------------------------------------------------------------------------------


def test_the_plan_holds_every_direction_with_every_overflow_mode_of_every_named_format():
    groups = plan()
    eager = {(*mode, group.dtype) for group in groups for mode in group.modes if "eager" in group.paths}
    compiled = {(*mode, group.dtype) for group in groups for mode in group.modes if "compiled" in group.paths}
    assert compiled < eager
    for fmt in map(parse_format, NAMED_FORMATS):
        dtype = torch.float64 if fmt.name == "e11m52" else torch.float32
        modes = {
            (rounding, overflow)
            for rounding in ROUNDINGS
            for overflow in (OVERFLOWS if fmt.has_infinity or fmt.has_nan else ["sat_finite"])
        }
        usual = resolve_overflow(fmt, None)
        assert eager >= {(fmt, *mode, dtype) for mode in modes}
        assert compiled >= {(fmt, *mode, dtype) for mode in modes if usual in mode or mode[0] in ("nearest_even", "up")}
        assert compiled >= {(fmt, rounding, usual, dtype) for rounding in STOCHASTIC_SAMPLES}
    assert {dtype for *_, dtype in compiled} == set(CARRIERS)


def test_the_plan_takes_what_it_is_asked_for():
    [group] = plan(["e5m2"], roundings=["up", "stochastic"], overflows=["sat_finite"], dtypes=[torch.float16])
    assert [str(mode) for mode in group.modes] == ["e5m2 up sat_finite", "e5m2 stochastic:23 sat_finite"]
    assert str(group) == "e5m2 on float16"
    assert [g.paths for g in plan(["e5m2"], dtypes=[torch.float32], paths=["eager"])] == [("eager",)]
    with pytest.raises(ValueError, match="nothing to verify: none of e8m7 takes"):
        plan(["bf16"], dtypes=[torch.float16])
    with pytest.raises(ValueError, match="unknown overflow mode 'wrap'"):
        plan(["bf16"], overflows=["wrap"])
    with pytest.raises(ValueError, match="jobs=0: use 1"):
        list(verify_groups([group], jobs=0))


@pytest.mark.parametrize("name", NAMED_FORMATS)
def test_named_formats_are_rounded_right_in_every_mode_of_the_plan(name):
    group = plan([name], paths=EAGER)[0]
    if name in ("fp64", "fp32", "tf32", "bf16", "fp16"):  # judged one by one: a few of the modes
        group = group._replace(modes=group.modes[::5])
    for verdict in verify_together(group, samples=4096):
        assert verdict.ok, (str(verdict), verdict.examples)


def test_many_modes_are_compiled_as_one_function_and_an_error_is_told_of_the_right_mode(monkeypatch):
    original = run.round_tensor

    def wrong_downwards(x, *args, rounding, **kwargs):
        rounded = original(x, *args, rounding=rounding, **kwargs)
        return torch.where(x == 3, 4.0, rounded) if rounding == "down" and torch.compiler.is_compiling() else rounded

    monkeypatch.setattr(run, "round_tensor", wrong_downwards)
    modes = [mode_of("e5m2", rounding) for rounding in ("up", "down", "stochastic:8")]
    verdicts = verify_together(Group(tuple(modes), torch.float32), samples=1000)
    assert [verdict.ok for verdict in verdicts] == [True, False, True]
    assert [found[:4] for found in verdicts[1].examples] == [("compiled", "0x40400000", "0x40800000", "0x40400000")]


def test_groups_in_processes_side_by_side_give_the_same_verdicts():
    groups = plan(["e2m1fn", "e3m2fn"], dtypes=[torch.float32], paths=EAGER)

    def facts(jobs: int) -> list:
        every = [verdict for several in verify_groups(groups, jobs=jobs, samples=100) for verdict in several]
        return [(v.format, v.rounding, v.overflow, v.inputs, v.mismatches) for v in every]

    assert facts(2) == facts(1)


# -- verdicts, and what may go wrong --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_every_input_of_the_16_bit_carriers_is_rounded_right(name, dtype):
    fmt = parse_format(name)
    for rounding in ROUNDINGS:
        for overflow in OVERFLOWS if fmt.has_infinity or fmt.has_nan else ["sat_finite"]:
            verdict = verify(fmt, rounding=rounding, overflow=overflow, dtype=dtype, exhaustive=True, paths=EAGER)
            assert verdict.ok, (str(verdict), verdict.examples)


def test_a_verdict_says_what_was_checked():
    steps = []
    verdict = verify(
        "e4m3fn", rounding="up", samples=1000, paths=EAGER, progress=lambda done, total: steps.append((done, total))
    )
    assert verdict.ok
    assert (verdict.format, verdict.rounding, verdict.overflow) == ("e4m3fn", "up", "sat_finite")
    assert (verdict.carrier, verdict.device, verdict.paths, verdict.exhaustive) == ("float32", "cpu", EAGER, False)
    assert verdict.inputs >= 1000 + len(judge("e4m3fn", "up").probes())
    assert steps[-1] == (verdict.inputs, verdict.inputs)
    assert steps == sorted(steps)
    assert str(verdict).startswith(
        f"e4m3fn up sat_finite: no mismatch in {verdict.inputs:,} inputs (sampled float32, eager)"
    )


def test_a_record_is_json_with_examples_as_bits_and_numbers(monkeypatch):
    plant(monkeypatch, [0x4200], change=lambda codes: codes + 0x400)
    verdict = verify("e5m2", dtype=torch.float16, exhaustive=True, paths=EAGER)
    record = json.loads(json.dumps(verdict.record()))
    seconds = [record.pop(name) for name in ("seconds", "cpu_seconds")]
    assert all(isinstance(each, float) for each in seconds)
    three = {"bits": "0100001000000000", "hex": "0x4200", "decimal": "3.0"}
    assert record == {
        "format": "e5m2",
        "rounding": "nearest_even",
        "overflow": "ovf_inf",
        "carrier": "float16",
        "device": "cpu",
        "paths": ["eager"],
        "exhaustive": True,
        "inputs": 65536,
        "mismatches": 1,
        "ok": False,
        "examples": [
            {
                "path": "eager",
                "input": three,
                "got": {"bits": "0100011000000000", "hex": "0x4600", "decimal": "6.0"},
                "want": three,
            }
        ],
        "torch": torch.__version__,
        "fpsim": metadata.version("fpsim-torch"),
        "source": proven_hash(),
    }
    [found] = verdict.examples
    assert verdict.describe(found) == (
        "input 0x4200 = 3.0 became 0x4600 = 6.0, not 0x4200 = 3.0: e5m2 nearest_even ovf_inf, float16 eager"
    )


def test_torch_keeps_its_number_of_threads(monkeypatch):
    threads = torch.get_num_threads()
    verify("e2m1fn", samples=0, paths=EAGER)
    assert torch.get_num_threads() == threads

    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(run, "round_tensor", fail)
    with pytest.raises(ZeroDivisionError):
        verify("e2m1fn", samples=0, paths=EAGER)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "fp32", "exhaustive": True}, "fp32|e8m23 has too many values.*exhaustive=False"),
        ({"format": "e4m3fn", "exhaustive": True, "dtype": torch.float64}, r"2\*\*64 bit patterns.*exhaustive=False"),
        ({"format": "e4m3fn", "paths": ["fast"]}, "unknown path 'fast': use eager or compiled"),
        ({"format": "e4m3fn", "paths": []}, "no path to verify"),
        ({"format": "e4m3fn", "rounding": "nearest"}, "unknown rounding 'nearest'"),
        ({"format": "e4m3fm"}, "did you mean e4m3fn"),
        ({"format": "e2m1fn", "overflow": "ovf_inf"}, "use overflow='sat_finite'"),
        ({"format": "e4m3fn", "dtype": torch.bfloat16, "exhaustive": True, "rounding": "stochastik"}, "stochastik"),
        ({"format": "bf16", "dtype": torch.float16}, "convert it to torch.float32"),
        ({"format": "e4m3fn", "device": "gpu0"}, "unknown device 'gpu0': use cpu, cuda or cuda:N"),
        ({"format": "e4m3fn", "device": "cuda:99"}, r"sees \d+ CUDA devices here: use device='cpu'"),
        ({"format": "e4m3fn", "rounding": "stochastic:8", "exhaustive": True}, "random numbers: use a sample"),
        ({"format": "e4m3fn", "rounding": "stochastic:33"}, "random bits are 1 to 32, got '33'"),
    ],
)
def test_wrong_arguments_are_errors_that_say_what_to_do(arguments, message):
    with pytest.raises(ValueError, match=message):
        verify(**arguments)


@pytest.mark.exhaustive
def test_every_float32_is_rounded_right_to_e4m3fn():
    verdict = verify("e4m3fn", exhaustive=True)
    assert verdict.ok, (str(verdict), verdict.examples)
    assert verdict.inputs == 1 << 32
