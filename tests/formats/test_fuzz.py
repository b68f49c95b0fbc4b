"""Every text that stands for a format, a cast or a policy gives a value, or an error that says what is wrong."""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fpsim
from fpsim import Policy, parse_format
from fpsim.casts import Cast, parse_cast
from fpsim.compile_backend.report.profiles import Profile
from fpsim.formats import OVERFLOWS, ROUNDINGS, SPECIALS, STOCHASTIC_ROUNDINGS, FloatFormat
from fpsim.formats.names import NAMED_FORMATS
from fpsim.json_text import MOST_LEVELS, parse_json
from fpsim.policy.shorthand import parse_shorthand

CASES = 400
WORDS = (
    "e m e4m3 e11m52 e12m3 e2m60 e0m0 float8_ float4_ torch. _x2 binary binary15p2se 8p3 p u s f bias= :bias=7 "
    ":bias=-0 :bias=99999999999999999999 :nosubnormals :unsigned :nozero : :: / // + - = :8 :33 :0 power_of_two "
    "unscaled none paper: fp8_hybrid fp32 int8 \u0663 \xb2 \xe9 0 1 53 * { \" ' %s {0}"
)
PARTS = [
    *NAMED_FORMATS, *SPECIALS, *ROUNDINGS, *OVERFLOWS, *STOCHASTIC_ROUNDINGS, *WORDS.split(" "), "9" * 5000, " ", "\n",
    "\0", "\ud800",
]  # fmt: skip


def texts() -> list[str]:
    rng = random.Random(0)
    joined = ["".join(rng.choices(PARTS, k=rng.randint(0, 5))) for _ in range(CASES // 2)]
    changed = []
    for _ in range(CASES // 2):
        name = list(rng.choice([*NAMED_FORMATS, "e4m3fn/up/sat_finite", "e5m2:bias=3:unsigned", "binary8p4ue"]))
        place = rng.randrange(len(name) + 1)
        name[place : place + rng.randint(0, 2)] = rng.choices(string.printable, k=rng.randint(0, 2))
        changed.append("".join(name))
    return [*joined, *changed]


def refused_clearly(call: Callable[[Any], object], given: Any) -> object:
    """The result, or None for an error that users are meant to see."""
    try:
        return call(given)
    except (ValueError, TypeError) as error:
        assert str(error), repr(given)
        return None


def test_texts_are_formats_casts_and_policies_or_errors() -> None:
    for text in texts():
        fmt = refused_clearly(parse_format, text)
        if isinstance(fmt, FloatFormat):
            assert parse_format(fmt.name) == fmt, text
            assert fmt.is_subset_of(parse_format("fp64")) or not fmt.signed, text
        cast = refused_clearly(parse_cast, text)
        if isinstance(cast, Cast):
            assert parse_cast(str(cast)) == cast, text
        policy = refused_clearly(lambda text: Policy(format=text), text)
        if isinstance(policy, Policy):
            assert Policy.from_json(policy.to_json()) == policy, text
        for call in (
            Policy.preset,
            Policy.from_json,
            Profile.from_json,
            parse_shorthand,
            parse_json,
            fpsim.formats.full_rounding,
        ):
            refused_clearly(call, text)


THINGS = [
    None, 0, -1, 2**70, 1.5, float("nan"), True, b"bf16", [], ["bf16"], {}, {"bf16": "bf16"}, (), object(), {1, 2},
    torch.ones(2), torch.float16, len, Policy,
]  # fmt: skip


def nested(levels: int, kind: type) -> Any:
    thing: Any = "bf16"
    for _ in range(levels):
        thing = {"modules": thing} if kind is dict else [thing]
    return thing


def policies(field: str) -> Callable[[Any], object]:
    return lambda thing: Policy(**{field: thing})


def roundings(argument: str) -> Callable[[Any], object]:
    return lambda thing: fpsim.round(torch.ones(2), "bf16", **{argument: thing})


def stochastic_roundings(argument: str) -> Callable[[Any], object]:
    return lambda thing: fpsim.round(torch.ones(2), "bf16", rounding="stochastic", **{"seed": 1, argument: thing})


@pytest.mark.parametrize(
    "thing", [*THINGS, nested(100_000, dict), nested(100_000, list)], ids=lambda t: type(t).__name__
)
def test_other_things_are_refused_too(thing: Any) -> None:
    for call in (
        parse_format,
        parse_cast,
        Policy.from_options,
        Policy.from_json,
        parse_json,
        *map(policies, ("format", "fprop", "modules", "skip", "scale", "rounding", "overflow")),
        *map(roundings, ("rounding", "overflow", "scale", "gradient", "salt", "seed")),
        *map(stochastic_roundings, ("seed", "salt", "random_bits")),
        lambda t: fpsim.round(torch.ones(2), t),
        lambda t: fpsim.encode(t, "bf16"),
        lambda t: fpsim.decode(t, "bf16"),
        lambda t: fpsim.power_of_two_scale(t, "bf16"),
        lambda t: fpsim.pack(t, "e2m1fn"),
        lambda t: fpsim.reference.round(1, t),
        lambda t: fpsim.reference.round(t, "bf16"),
        lambda t: fpsim.reference.round(1, "bf16", t),
        lambda t: fpsim.reference.decode(t, "bf16"),
        lambda t: FloatFormat(t, 3),
        lambda t: FloatFormat(4, 3, t),
        lambda t: FloatFormat(4, 3, specials=t),
        lambda t: Cast(t, "up", "sat_finite"),
    ):  # fmt: skip
        refused_clearly(call, thing)


@pytest.mark.parametrize(
    "text", ["[" * 100_000 + "]" * 100_000, '{"modules":' * 100_000 + "1" + "}" * 100_000, "[" * 100_000]
)
def test_json_that_is_nested_deeply_is_a_value_error(text: str) -> None:
    for parse in (parse_json, Policy.from_json, Profile.from_json):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse(text)


def test_json_may_be_nested_as_deeply_as_the_message_says() -> None:
    assert parse_json("[" * MOST_LEVELS + "]" * MOST_LEVELS)
    with pytest.raises(ValueError, match=f"at most {MOST_LEVELS} levels"):
        parse_json("[" * (MOST_LEVELS + 1) + "]" * (MOST_LEVELS + 1))


def test_a_key_that_stands_twice_in_json_is_an_error() -> None:
    with pytest.raises(ValueError, match="the key 'format' stands twice in one object"):
        Policy.from_json('{"format": "bf16", "format": "fp16"}')
