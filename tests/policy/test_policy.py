"""Policies: their defaults, overrides, globs, JSON form and errors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pickle
import re
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import fpsim
from fpsim.casts import Cast, parse_cast
from fpsim.formats import OVERFLOWS, ROUNDINGS, FloatFormat, parse_format, resolve_overflow
from fpsim.policy.policy import ATTENTIONS, DIRECTIONS, HYBRID, KINDS, PRODUCTS, ROLES, Policy
from fpsim.scaling.scale import Scale

FIELDS = [field.name for field in dataclasses.fields(Policy)]
PLACES = list(itertools.product(KINDS, ROLES))


def casts(policy: Policy) -> dict[tuple[str, str], str | None]:
    """The cast of every pair of kind and role."""
    return {place: None if (cast := policy.cast(*place)) is None else str(cast) for place in PLACES}


def by_role(activation: str | None, weight: str | None, gradient: str | None) -> dict[tuple[str, str], str | None]:
    """The casts of a policy in which the kind of product makes no difference."""
    roles = {"activation": activation, "weight": weight, "gradient": gradient}
    return {(kind, role): roles[role] for kind, role in PLACES}


def hybrid(**fields: Any) -> Policy:
    """The FP8 hybrid with more fields."""
    return Policy.from_options({"policy": "fp8_hybrid", **fields})


E4M3 = "e4m3fn/nearest_even/sat_finite"
E5M2 = "e5m2/nearest_even/sat_finite"


# -- a policy does what its fields name --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"elementwise": "fp16"}, {}),
        ({"elementwise": {"forward": "fp16"}}, {}),
        ({"output": "bf16"}, {}),
        ({"saved": "e4m3fn/group:16"}, {}),
        ({"modules": {"2": "e4m3fn"}}, {}),
        ({"weight": "e4m3fn"}, {(kind, "weight"): E4M3 for kind in KINDS}),
        ({"dgrad": {"gradient": "e5m2"}}, {("dgrad", "gradient"): "e5m2/nearest_even/ovf_inf"}),
        ({"wgrad": {"gradient": "bf16"}, "skip": "head"}, {("wgrad", "gradient"): "e8m7/nearest_even/ovf_inf"}),
        ({"fprop": "e3m4", "rounding": "up"}, {("fprop", role): "e3m4/up/ovf_inf" for role in ROLES}),
    ],
)
def test_options_without_a_format_for_operands_round_no_operand(options: dict[str, Any], named: dict) -> None:
    policy = Policy.from_options(options)
    assert casts(policy) == by_role(None, None, None) | {
        place: cast for place, cast in named.items() if place in PLACES
    }
    policy.check_names_format()
    assert policy.overflow is None


def test_no_overflow_mode_reaches_a_cast_that_the_user_wrote() -> None:
    assert Policy(elementwise="fp16").elementwise_cast("forward") == parse_cast("fp16")
    assert Policy(output="fp16").output_cast("fprop") == parse_cast("fp16")
    assert hybrid(output="fp16").output_cast("fprop") == parse_cast("fp16")
    assert Policy(modules={"a": {"elementwise": "fp16"}}).at("a").elementwise_cast("backward") == parse_cast("fp16")


@pytest.mark.parametrize(
    "options",
    [
        {"skip": "lm_head"},
        {"rounding": "stochastic"},
        {"overflow": "ovf_inf", "attention": "keep"},
        {"scale": "power_of_two"},
        {"products": "weights"},
        {"gaps": "*"},
        {"weight": "none"},
        {"modules": {"lm_head": "none"}},
    ],
)
def test_a_policy_that_names_no_format_is_refused_by_name(options: dict[str, Any]) -> None:
    policy = Policy.from_options(options)
    assert casts(policy) == casts(Policy(format=options.get("format", "none")))
    named = ", ".join(options)
    with pytest.raises(ValueError, match=rf"^no option names a format \(given: {named}\), so that nothing would be"):
        policy.check_names_format()


@pytest.mark.parametrize("rule", [{"attention": "keep"}, {"modules": {"lm_head.proj": "none"}}])
def test_a_rule_for_modules_that_names_no_format_is_refused_by_name(rule: dict[str, Any]) -> None:
    policy = Policy(format="bf16", modules={"lm_head": rule})
    with pytest.raises(
        ValueError, match=rf"^in the rule for modules 'lm_head': no option names a format \(given: {next(iter(rule))}\)"
    ):
        policy.check_names_format()


@pytest.mark.parametrize("options", [{}, {"format": "none"}, dict.fromkeys(ROLES, "none"), {"policy": "paper:e8m3"}])
def test_a_policy_that_says_what_it_rounds_is_not(options: dict[str, Any]) -> None:
    Policy.from_options(options).check_names_format()


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "paper:e8m3", "rounding": "up"},
        {"policy": "paper:e8m3", "overflow": "ovf_inf"},
        {"policy": "fp8_hybrid", "overflow": "ovf_inf"},
        {"policy": "fp8_hybrid", "format": "e8m1"},
        {"policy": "fp8_hybrid", "format": "none"},
        {"policy": "fp8_hybrid", "format": "e8m1", "fprop": "bf16"},
    ],
)
def test_a_field_that_changes_nothing_beside_a_preset_is_an_error(options: dict[str, str]) -> None:
    name = next(iter(options.keys() - {"policy", "fprop"}))
    with pytest.raises(ValueError, match=f"{name}='.*' beside policy='{options['policy']}' would change nothing"):
        Policy.from_options(options)


@pytest.mark.parametrize(
    ("name", "overflow", "infinity"),
    [
        ("e8m3", "sat_propagate", math.inf),  # the bit mask of the paper
        ("bf16", "sat_propagate", math.inf),
        ("e7m7", "sat_finite", 2.0**64 - 2.0**56),  # a clipped range
        ("e7m7finite:bias=127", "sat_finite", 2 - 2.0**-7),
        ("e8m3finite", "sat_finite", 2.0**129 - 2.0**125),
        ("e4m3fn", "sat_finite", 448.0),
    ],
)
def test_infinities_pass_the_mask_of_the_paper_and_are_clipped_with_the_range(
    name: str, overflow: str, infinity: float
) -> None:
    cast = Policy.preset(f"paper:{name}").cast("fprop", "weight")
    assert cast is not None and (cast.rounding, cast.overflow) == ("toward_zero", overflow)
    x = torch.tensor([math.inf, -math.inf, 1e300], dtype=torch.float64)
    got = fpsim.round(x, cast.format, rounding=cast.rounding, overflow=cast.overflow)
    assert got.tolist()[:2] == [infinity, -infinity] and got[2] < math.inf


def test_modes_beside_a_preset_that_a_cast_takes() -> None:
    policy = Policy.from_options({"policy": "paper:e8m3", "rounding": "up", "modules": {"head": "bf16"}})
    assert str(policy.at("head").cast("fprop", "weight")) == "e8m7/up/ovf_inf"
    assert str(policy.cast("fprop", "weight")) == "e8m3/toward_zero/sat_propagate"
    assert str(hybrid(rounding="up").cast("dgrad", "gradient")) == "e5m2/up/sat_finite"
    assert casts(hybrid(overflow="sat_finite")) == casts(Policy())
    assert (
        Policy.from_options({"policy": "paper:e8m3", "rounding": "nearest_even", "weight": "bf16"}).weight
        == Policy(weight="bf16").weight
    )


def test_globs_in_a_rule_for_modules_match_only_where_the_rule_applies() -> None:
    policy = Policy(format="e8m1", modules={"head": {"format": "bf16", "modules": {"body": "e4m3fn"}}})
    assert policy.unmatched_globs({"head", "body"}) == ["body"]
    assert Policy(modules={"*": policy}).unmatched_globs({"head", "body"}) == ["body"]


def test_fields_beside_a_preset_replace_its_fields() -> None:
    assert Policy.from_options({"policy": "paper:e8m3", "attention": "round"}) == dataclasses.replace(
        Policy.preset("paper:e8m3"), attention="round"
    )
    assert Policy.from_options({"policy": "bf16", "format": "e4m3fn"}) == Policy(format="e4m3fn", output="bf16")


# -- casts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("e4m3fn", "e4m3fn/nearest_even/sat_finite"),
        ("e5m2", "e5m2/nearest_even/ovf_inf"),
        ("e8m3/toward_zero/sat_finite", "e8m3/toward_zero/sat_finite"),
        ("e8m3/sat_finite/toward_zero", "e8m3/toward_zero/sat_finite"),
        ("e8m3/toward_zero", "e8m3/toward_zero/ovf_inf"),
        ("e8m3/sat_propagate", "e8m3/nearest_even/sat_propagate"),
        ("bf16", "e8m7/nearest_even/ovf_inf"),
        ("torch.float8_e5m2/up", "e5m2/up/ovf_inf"),
        ("e5m2:bias=16:nosubnormals/down", "e5m2:bias=16:nosubnormals/down/ovf_inf"),
    ],
)
def test_a_cast_is_a_format_and_its_modes(text: str, expected: str) -> None:
    assert str(parse_cast(text)) == expected
    assert parse_cast(expected) == parse_cast(text)
    assert hash(parse_cast(expected)) == hash(parse_cast(text))


def test_none_denotes_no_cast() -> None:
    assert parse_cast("none") is None


def test_a_cast_may_be_given_as_a_format() -> None:
    assert parse_cast(FloatFormat(5, 2), "up", "sat_finite") == Cast(FloatFormat(5, 2), "up", "sat_finite")


def test_modes_in_the_text_override_the_defaults_given_beside_it() -> None:
    assert str(parse_cast("e5m2", "up", "sat_finite")) == "e5m2/up/sat_finite"
    assert str(parse_cast("e5m2/down", "up", "sat_finite")) == "e5m2/down/sat_finite"
    assert str(parse_cast("e5m2/ovf_inf", "up", "sat_finite")) == "e5m2/up/ovf_inf"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("e4m3fn", "e4m3fn"),
        ("e5m2/sat_finite", "e5m2 sat_finite"),
        ("e5m2/up", "e5m2 up"),
        ("e5m2/up/sat_finite", "e5m2 up sat_finite"),
    ],
)
def test_the_label_of_a_cast_names_the_modes_that_differ_from_the_defaults(text: str, label: str) -> None:
    cast = parse_cast(text)
    assert cast is not None and cast.label == label


def test_an_unknown_mode_in_a_cast_names_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"'sideways'.*nearest_even.*sat_finite"):
        parse_cast("e5m2/sideways")


def test_a_cast_must_be_text_or_a_format() -> None:
    with pytest.raises(TypeError, match="a cast is a string"):
        parse_cast(8)  # type: ignore[arg-type]


# -- fields ------------------------------------------------------------------------------------------------------------


def test_the_default_is_the_ocp_hybrid_saturating() -> None:
    assert casts(Policy()) == by_role(E4M3, E4M3, E5M2)
    assert Policy().output_cast("fprop") is None
    assert Policy().attention == "round"
    assert not Policy().uses_paths


def test_the_default_equals_the_hybrid_written_out() -> None:
    spelled = Policy(activation="e4m3fn", weight="e4m3fn", gradient="e5m2", overflow="sat_finite")
    assert casts(Policy()) == casts(spelled) == by_role(E4M3, E4M3, E5M2)
    assert Policy() == Policy(**HYBRID) == hybrid()
    assert hash(Policy()) == hash(hybrid())


def test_a_format_applies_to_every_operand_with_its_usual_overflow_mode() -> None:
    e5m2 = "e5m2/nearest_even/ovf_inf"
    assert casts(Policy(format="e5m2")) == by_role(e5m2, e5m2, e5m2)
    assert casts(Policy(format=FloatFormat(5, 2))) == by_role(e5m2, e5m2, e5m2)  # type: ignore[arg-type]


def test_a_role_overrides_the_format() -> None:
    bf16, e5m2 = "e8m7/nearest_even/ovf_inf", "e5m2/nearest_even/ovf_inf"
    assert casts(Policy(format="bf16", gradient="e5m2")) == by_role(bf16, bf16, e5m2)
    assert casts(Policy(format="bf16", weight="none")) == by_role(bf16, None, bf16)


@pytest.mark.parametrize("role", ROLES)
def test_a_role_given_alone_leaves_the_others_unrounded(role: str) -> None:
    expected = {place: "e3m4/nearest_even/ovf_inf" if place[1] == role else None for place in PLACES}
    assert casts(Policy(**{role: "e3m4"})) == expected


@pytest.mark.parametrize("role", ROLES)
def test_none_excludes_one_role_from_the_hybrid(role: str) -> None:
    expected = {place: None if place[1] == role else cast for place, cast in casts(Policy()).items()}
    assert casts(hybrid(**{role: "none"})) == expected


def test_none_rounds_nothing() -> None:
    nothing = by_role(None, None, None)
    assert casts(Policy(format="none")) == nothing
    assert casts(Policy(activation="none", weight="none", gradient="none")) == nothing


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_overrides_the_roles_it_names_in_its_own_products_only(kind: str) -> None:
    policy = hybrid(**{kind: {"weight": "bf16", "activation": "none"}})
    changed = {(kind, "weight"): "e8m7/nearest_even/ovf_inf", (kind, "activation"): None}
    assert casts(policy) == casts(Policy()) | changed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", ["e3m4", FloatFormat(3, 4)])
def test_a_format_for_a_kind_applies_to_all_its_roles(kind: str, given: Any) -> None:
    policy = Policy(format="bf16", **{kind: given})
    expected = {place: "e3m4/nearest_even/ovf_inf" for place in PLACES if place[0] == kind}
    assert casts(policy) == casts(Policy(format="bf16")) | expected


def test_switchback_keeps_the_weight_gradient_high() -> None:
    policy = hybrid(wgrad={"gradient": "bf16", "activation": "bf16"}, overflow="sat_finite")
    bf16 = "e8m7/nearest_even/sat_finite"
    assert casts(policy) == casts(Policy()) | {("wgrad", "gradient"): bf16, ("wgrad", "activation"): bf16}


def test_a_role_mapped_to_no_format_is_ignored() -> None:
    assert Policy(fprop={"weight": None}) == Policy()


def test_forward_only() -> None:
    policy = Policy(format="none", fprop="e4m3fn")
    assert casts(policy) == by_role(None, None, None) | {("fprop", role): E4M3 for role in ROLES}


def test_the_output_is_rounded_if_it_has_a_format() -> None:
    assert Policy(format="none", output="bf16").output_cast("fprop") == parse_cast("bf16")
    assert Policy(format="none", output="none").output_cast("fprop") is None


def test_rounding_applies_to_casts_that_name_none() -> None:
    policy = Policy(
        format="e5m2", gradient="e5m2/up", output="bf16", rounding="toward_zero", fprop={"weight": "e4m3fn"}
    )
    expected = by_role("e5m2/toward_zero/ovf_inf", "e5m2/toward_zero/ovf_inf", "e5m2/up/ovf_inf")
    assert casts(policy) == expected | {("fprop", "weight"): "e4m3fn/toward_zero/sat_finite"}
    assert str(policy.output_cast("dgrad")) == "e8m7/toward_zero/ovf_inf"
    assert casts(hybrid(rounding="to_odd")) == by_role(
        "e4m3fn/to_odd/sat_finite", "e4m3fn/to_odd/sat_finite", "e5m2/to_odd/sat_finite"
    )


def test_overflow_applies_to_casts_that_name_none() -> None:
    policy = Policy(format="e5m2", gradient="e5m2/ovf_inf", output="bf16", overflow="sat_propagate")
    usual = "e5m2/nearest_even/sat_propagate"
    assert casts(policy) == by_role(usual, usual, "e5m2/nearest_even/ovf_inf")
    assert str(policy.output_cast("dgrad")) == "e8m7/nearest_even/sat_propagate"


def test_a_scale_applies_to_casts_of_operands_that_name_none() -> None:
    policy = Policy(scale="power_of_two", gradient="e5m2/unscaled", output="bf16", wgrad={"activation": "e4m3/up"})
    assert policy.activation is None and policy.cast("fprop", "activation") is None
    assert str(policy.cast("wgrad", "activation")) == "e4m3/up/ovf_inf/power_of_two"
    assert str(policy.cast("dgrad", "gradient")) == "e5m2/nearest_even/ovf_inf"
    assert str(policy.output_cast("fprop")) == "e8m7/nearest_even/ovf_inf"
    scaled = hybrid(scale="power_of_two")
    assert str(scaled.cast("fprop", "weight")) == "e4m3fn/nearest_even/sat_finite/power_of_two"
    assert scaled == Policy(**{role: f"{HYBRID[role]}/power_of_two" for role in ROLES}, scale="power_of_two")


def test_a_single_cast_may_have_a_scale() -> None:
    policy = Policy(format="bf16", gradient="e5m2/power_of_two/toward_zero")
    assert str(policy.cast("dgrad", "gradient")) == "e5m2/toward_zero/ovf_inf/power_of_two"
    assert str(policy.cast("dgrad", "weight")) == "e8m7/nearest_even/ovf_inf"


def test_a_policy_derived_from_a_policy_keeps_the_scales() -> None:
    policy = Policy(scale="power_of_two", format="e4m3fn", gradient="e5m2/unscaled")
    assert dataclasses.replace(policy) == policy
    assert dataclasses.replace(policy, skip=("head",)).cast("dgrad", "gradient").scale is None
    assert dataclasses.replace(policy, skip=("head",)).cast("dgrad", "weight").scale == Scale("power_of_two")


def test_modules_inherit_the_scale_and_may_exclude_it() -> None:
    policy = Policy(
        scale="power_of_two", modules={"a": "e5m2", "b": {"format": "e5m2", "scale": None}, "c": "e5m2/unscaled"}
    )
    assert "scale" not in Policy(modules={"a": "e5m2"}).to_dict()["modules"]["a"]
    scales = [policy.at(path).cast("fprop", "weight").scale for path in "abc"]
    assert scales == [Scale("power_of_two"), None, None]
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("field", ["output", "elementwise"])
def test_results_are_scaled_only_if_their_cast_says_so(field: str) -> None:
    policy = Policy(scale="mx", format="e4m3fn", **{field: "e5m2"})
    assert str(policy.output_cast("fprop") or policy.elementwise_cast("forward")) == "e5m2/nearest_even/ovf_inf"
    scaled = Policy(**{field: "mxfp8"})
    assert str(scaled.output_cast("fprop") or scaled.elementwise_cast("forward")).endswith("/mx:32:rceil")
    assert Policy.from_json(scaled.to_json()) == scaled
    with pytest.raises(ValueError, match="no scales that other steps determine: leave 'history:4' out of"):
        Policy(**{field: "e4m3fn/tensor/history:4"})


def test_the_error_for_an_unknown_scale_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown scale 'amax': use one of power_of_two, tensor"):
        Policy(scale="amax")


def test_policies_with_the_same_meaning_are_equal_in_any_spelling() -> None:
    short = Policy(format="bf16", fprop={"weight": "e4m3fn"}, skip="head", gaps="aten.convolution*")
    full = Policy(
        format="torch.bfloat16/nearest_even/ovf_inf",
        fprop=(("weight", "float8_e4m3fn/sat_finite"),),
        skip=("head",),
        gaps=["aten.convolution*"],
    )
    assert short == full and hash(short) == hash(full)
    assert Policy(fprop={"weight": "bf16", "gradient": "e5m2"}) == Policy(fprop={"gradient": "e5m2", "weight": "bf16"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "bf16"),
        ("activation", "bf16"),
        ("weight", "bf16"),
        ("gradient", "bf16"),
        ("output", "bf16"),
        ("fprop", {"weight": "bf16"}),
        ("dgrad", {"weight": "bf16"}),
        ("wgrad", {"gradient": "bf16"}),
        ("elementwise", "bf16"),
        ("saved", "bf16"),
        ("products", "weights"),
        ("rounding", "up"),
        ("overflow", "ovf_inf"),
        ("scale", "power_of_two"),
        ("accumulator", "fp16"),
        ("reductions", "e8m13"),
        ("transform", "hadamard:16"),
        ("skip", ["head"]),
        ("modules", {"head": "none"}),
        ("attention", "keep"),
        ("gaps", ["*"]),
    ],
)
def test_every_field_makes_a_difference(field: str, value: Any) -> None:
    changed = Policy(**{field: value})
    assert changed != Policy()
    assert changed.to_json() != Policy().to_json()


def test_the_test_above_names_every_field() -> None:
    """But chunk, order and promote, which need an accumulator: tests/accumulators/test_accumulator.py has these."""
    (mark,) = test_every_field_makes_a_difference.pytestmark
    named = [field for field, _ in mark.args[1]]
    assert named == [field for field in FIELDS if field not in ("chunk", "order", "promote")]


# -- globs of modules --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "path", "matches"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "lm_head.dense", True),
        ("lm_head", "model.lm_head", False),
        ("lm_head", "lm_head2", False),
        ("*.lm_head", "model.lm_head", True),
        ("layers.0", "layers.0.attn.q_proj", True),
        ("layers.0", "layers.01", False),
        ("layers.0", "layers.10", False),
        ("layers.*.attn", "layers.3.attn.q_proj", True),
        ("layers.*.attn", "layers.3.mlp.up", False),
        ("layers.[02]", "layers.2.mlp", True),
        ("layers.[02]", "layers.1.mlp", False),
        ("*_proj", "layers.0.attn.q_proj", True),
        ("Layers.*", "layers.0", False),
        ("*", "", True),
        ("*", "anything.at.all", True),
        ("", "", True),
        ("", "layers", False),
    ],
)
def test_a_glob_matches_a_module_and_all_inside_it(glob: str, path: str, matches: bool) -> None:
    assert (Policy(skip=[glob]).at(path) is None) == matches
    assert (Policy(modules={glob: "none"}).at(path) is None) == matches


def test_modules_that_no_glob_matches_have_the_policy_itself() -> None:
    policy = Policy(modules={"head": "bf16"}, skip=["embed"])
    assert policy.at("layers.0") is policy
    assert policy.uses_paths


def test_the_first_glob_that_matches_decides() -> None:
    policy = Policy(modules={"layers.0.attn": "bf16", "layers.0": "e3m4", "layers.*": "none"})
    assert policy.at("layers.0.attn.q") == Policy(format="bf16")
    assert policy.at("layers.0.mlp") == Policy(format="e3m4")
    assert policy.at("layers.1.mlp") is None
    assert Policy(modules={"layers.*": "none", "layers.0": "e3m4"}).at("layers.0") is None


def test_rules_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(ValueError, match="two rules for modules 'a' contradict each other"):
        Policy(modules=[("a", "e3m4"), ("a", "bf16")])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'a' is in skip and has a policy in modules"):
        Policy(modules={"a": "bf16"}, skip=["b", "a"])
    same = Policy(modules=[("a", "bf16"), ("a", {"format": "bf16"})])  # type: ignore[arg-type]
    assert same == Policy(modules={"a": "bf16"})
    assert Policy(modules={"a": "none"}, skip=["a"]).at("a") is None


def test_with_modules_puts_rules_before_the_others() -> None:
    policy = Policy(format="e4m3fn", skip=["embed", "head"], modules={"layers.0": "bf16", "layers": "e5m2"})
    composed = policy.with_modules({"layers.1": "fp16", "layers.0": "none", "head": {"weight": "bf16"}})
    assert composed.skip == ("embed",)
    assert [glob for glob, _ in composed.modules] == ["layers.1", "layers.0", "head", "layers"]
    assert composed.at("layers.0.mlp") is None
    assert composed.at("layers.1.mlp") == Policy(format="fp16")
    assert composed.at("layers.2.mlp") == Policy(format="e5m2")
    assert composed.at("head") == Policy(weight="bf16")
    assert composed.at("other") is composed
    assert policy.at("head") is None  # the policy itself has not changed


def test_rules_of_with_modules_inherit_the_modes() -> None:
    policy = Policy(format="bf16", rounding="up").with_modules({"a": "e5m2"})
    assert policy == Policy(format="bf16", rounding="up", modules={"a": "e5m2"})


def test_presets() -> None:
    assert Policy.preset("fp8_hybrid") == Policy()
    assert Policy.preset("bf16") == Policy(format="bf16", output="bf16")
    assert Policy.preset("fp16") == Policy(format="fp16", output="fp16")
    paper = Policy.preset("paper:e8m3")
    assert {str(paper.cast(kind, role)) for kind in KINDS for role in ROLES} == {"e8m3/toward_zero/sat_propagate"}
    assert paper.output_cast("fprop") is None and paper.products == "weights" and paper.attention == "keep"
    assert Policy.from_options({"policy": "paper:e8m3"}) == paper


@pytest.mark.parametrize(("name", "message"), [("fp7", "unknown preset 'fp7': .*fp8_hybrid"), ("paper:e8", "'e8'")])
def test_the_error_for_an_unknown_preset_lists_the_valid_ones(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.preset(name)


def test_elementwise_may_differ_between_forward_and_backward() -> None:
    both = Policy(elementwise="bf16", overflow="ovf_inf")
    assert [both.elementwise_cast(direction) for direction in DIRECTIONS] == 2 * [parse_cast("bf16")]
    one = Policy(elementwise={"backward": "e5m2/up"}, overflow="sat_finite")
    assert one.elementwise_cast("forward") is None
    assert str(one.elementwise_cast("backward")) == "e5m2/up/sat_finite"
    assert one.rounds_results and not Policy().rounds_results
    assert Policy(modules={"a": {"elementwise": "bf16"}}).rounds_results
    assert Policy(elementwise="bf16/stochastic").is_stochastic


def test_a_kind_may_have_its_own_output() -> None:
    policy = Policy(output="bf16", dgrad={"output": "e5m2"}, wgrad={"output": "none"})
    assert str(policy.output_cast("fprop")) == "e8m7/nearest_even/ovf_inf"
    assert str(policy.output_cast("dgrad")) == "e5m2/nearest_even/ovf_inf"
    assert policy.output_cast("wgrad") is None
    assert policy.cast("dgrad", "weight") is None
    assert Policy(dgrad="bf16").output_cast("dgrad") is None
    assert policy.rounds_results and Policy(dgrad={"output": "bf16"}).rounds_results


def test_skip_has_precedence_over_modules() -> None:
    policy = Policy(skip=["layers.0.*"], modules={"layers": "bf16"})
    assert policy.at("layers.0.mlp") is None
    assert policy.at("layers.1.mlp") == Policy(format="bf16")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Policy(gradient="e3m4"), Policy(gradient="e3m4")),
        ({"gradient": "e3m4"}, Policy(gradient="e3m4")),
        ({"policy": Policy(gradient="e3m4")}, Policy(gradient="e3m4")),
        ({}, Policy()),
        ("e5m2/up", Policy(format="e5m2/up")),
        (FloatFormat(5, 2), Policy(format="e5m2")),
        ("none", None),
        (None, None),
    ],
)
def test_the_policy_of_a_module_in_all_its_forms(given: Any, expected: Policy | None) -> None:
    assert Policy(modules={"head": given}).at("head") == expected
    assert Policy(modules=[("head", given)]) == Policy(modules={"head": expected})  # type: ignore[arg-type]


def test_formats_and_fields_of_a_module_inherit_the_modes_and_nothing_else() -> None:
    modules = {"a": "e5m2", "b": {"weight": "e5m2"}, "c": {"format": "e5m2", "rounding": "up", "overflow": None}}
    policy = Policy(format="bf16", output="bf16", rounding="toward_zero", overflow="sat_finite", modules=modules)
    assert policy.at("a") == Policy(format="e5m2/toward_zero/sat_finite", rounding="toward_zero", overflow="sat_finite")
    assert policy.at("b") == Policy(weight="e5m2/toward_zero/sat_finite", rounding="toward_zero", overflow="sat_finite")
    assert policy.at("c") == Policy(format="e5m2/up/ovf_inf", rounding="up")
    assert Policy.from_json(policy.to_json()) == policy


def test_a_policy_for_a_module_inherits_nothing() -> None:
    policy = Policy(rounding="up", modules={"a": Policy(format="bf16"), "b": {"policy": Policy(format="bf16")}})
    assert policy.at("a") == policy.at("b") == Policy(format="bf16")
    assert Policy.from_json(policy.to_json()) == policy


def test_the_overflow_mode_of_the_hybrid_is_not_inherited() -> None:
    assert Policy(modules={"a": "bf16"}).at("a") == Policy(format="bf16/nearest_even/ovf_inf")


@pytest.mark.parametrize("inner", [{"skip": ["head.a"]}, {"modules": {"head.a": "none"}}])
@pytest.mark.parametrize("rule", [dict, lambda fields: Policy(**fields)])
def test_the_policy_of_a_module_may_have_globs_of_its_own(inner: dict[str, Any], rule: Any) -> None:
    policy = Policy(format="e5m2", modules={"head": rule({"format": "bf16", **inner})})
    assert policy.at("head.a") is None and policy.at("head.a.b") is None
    assert str(policy.at("head").cast("fprop", "weight")) == "e8m7/nearest_even/ovf_inf"
    assert policy.at("body") is policy
    assert policy.unmatched_globs({"head", "head.a"}) == [] and policy.unmatched_globs({"body"}) == ["head", "head.a"]
    assert Policy.from_json(policy.to_json()) == policy


def test_attention_and_gaps_may_differ_from_module_to_module() -> None:
    policy = Policy(gaps=["aten.a"], modules={"head": {"attention": "keep", "gaps": ["aten.b"]}})
    assert (policy.attention, policy.at("head").attention) == ("round", "keep")
    assert policy.attentions == {"round", "keep"} and policy.all_gaps == ("aten.a", "aten.b")
    assert Policy.from_json(policy.to_json()) == policy


def test_a_rule_that_is_not_a_complete_policy_inherits_attention() -> None:
    policy = Policy(attention="keep", modules={"a": "bf16", "b": {"format": "bf16"}, "c": Policy(format="bf16")})
    assert [policy.at(path).attention for path in "abc"] == ["keep", "keep", "round"]
    assert Policy.from_json(policy.to_json()) == policy


@pytest.mark.parametrize("name", ["fp8_hybrid", "paper:e8m3"])
def test_a_rule_for_modules_may_be_a_preset(name: str) -> None:
    policy = Policy(format="e5m7", modules={"head": name, "body": {"policy": name}})
    assert policy.at("head") == policy.at("body") == Policy.preset(name)
    assert Policy.from_json(policy.to_json()) == policy
    assert Policy().with_modules({"head": name}).at("head.proj") == Policy.preset(name)


def test_in_modules_a_name_of_both_a_format_and_a_preset_is_a_format() -> None:
    policy = Policy(modules={"format": "bf16", "preset": {"policy": "bf16"}})
    assert policy.at("format").output_cast("fprop") is None
    assert str(policy.at("preset").output_cast("fprop")) == "e8m7/nearest_even/ovf_inf"


def test_a_format_is_shown_in_the_spelling_of_the_caller() -> None:
    policy = Policy(format="bf16", gradient="torch.float8_e5m2/up", wgrad={"weight": FloatFormat(8, 10)})
    assert policy.to_dict() == {
        "format": "bf16/nearest_even/ovf_inf",
        "gradient": "torch.float8_e5m2/up/ovf_inf",
        "wgrad": {"weight": "e8m10/nearest_even/ovf_inf"},
    }
    assert policy.canonical() == Policy(format="e8m7", gradient="e5m2/up", wgrad={"weight": "tf32"}).canonical()


def test_gaps_are_globs_of_operators() -> None:
    policy = Policy(gaps=["aten.convolution", "aten._cdist*"])
    assert policy.allows_gap("aten.convolution") and policy.allows_gap("aten._cdist_forward")
    assert not policy.allows_gap("aten.convolution_backward") and not Policy().allows_gap("aten.convolution")
    assert Policy(gaps="*").allows_gap("anything")


# -- JSON --------------------------------------------------------------------------------------------------------------

format_names = st.sampled_from(
    ["e4m3fn", "e5m2", "bf16", "fp16", "e8m3", "e2m1fn", "e5m2:bias=16", "e3m4:nosubnormals"]
)


@st.composite
def cast_texts(draw: st.DrawFn) -> str:
    name = draw(format_names)
    parts = [name]
    if draw(st.booleans()):
        parts.append(draw(st.sampled_from(ROUNDINGS)))
    if draw(st.booleans()):
        parts.append(draw(st.sampled_from([mode for mode in OVERFLOWS if is_possible(name, mode)])))
    return "/".join(parts)


def is_possible(name: str, overflow: str) -> bool:
    try:
        return bool(resolve_overflow(parse_format(name), overflow))
    except ValueError:
        return False


@st.composite
def operand_texts(draw: st.DrawFn) -> str:
    parts = [draw(cast_texts()), *draw(st.sampled_from([(), ("power_of_two",), ("unscaled",)]))]
    return "/".join(parts)


anything = st.one_of(cast_texts(), st.just("none"))
of_operands = st.one_of(operand_texts(), st.just("none"))
casts_by_role = st.dictionaries(st.sampled_from(ROLES), of_operands)
casts_by_place = st.builds(
    lambda roles, rest: {**roles, **rest}, casts_by_role, st.dictionaries(st.just("output"), anything)
)
globs = st.text(alphabet='ab.*[]é"\\ ', max_size=6)
inner_fields = {
    **dict.fromkeys(("format", "activation", "weight", "gradient"), of_operands),
    "output": anything,
    **dict.fromkeys(KINDS, st.one_of(of_operands, casts_by_place)),
    "elementwise": st.one_of(anything, st.dictionaries(st.sampled_from(DIRECTIONS), anything)),
    "products": st.sampled_from(PRODUCTS),
    "rounding": st.sampled_from(ROUNDINGS),
    "overflow": st.just("sat_finite"),  # the one mode that every format has
    "scale": st.sampled_from([None, "power_of_two"]),
}
inner_policies = st.fixed_dictionaries({}, optional=inner_fields).map(lambda options: Policy(**options))
policies = st.fixed_dictionaries(
    {},
    optional={
        **inner_fields,
        "skip": st.lists(globs, max_size=3),
        "modules": st.lists(st.tuples(globs, st.none() | inner_policies), max_size=3, unique_by=lambda rule: rule[0]),
        "attention": st.sampled_from(ATTENTIONS),
        "gaps": st.lists(globs, max_size=2),
    },
).map(lambda options: Policy(**{**options, "skip": _not_ruled(options)}))


def _not_ruled(options: dict[str, Any]) -> list[str]:
    """The globs to skip, without those that have a policy: both would contradict each other."""
    ruled = {glob for glob, policy in options.get("modules", ()) if policy is not None}
    return [glob for glob in options.get("skip", ()) if glob not in ruled]


@given(policies)
def test_a_policy_survives_the_round_trip_through_json(policy: Policy) -> None:
    again = Policy.from_json(policy.to_json())
    assert again == policy
    assert hash(again) == hash(policy)
    assert again.to_json() == policy.to_json()
    assert casts(again) == casts(policy)


@given(policies)
def test_the_fields_of_a_policy_are_options_that_give_it_again(policy: Policy) -> None:
    options = policy.to_dict()
    assert Policy.from_options(options) == policy
    assert Policy.from_options({"policy": options}) == policy
    assert Policy.from_options({"policy": policy}) is policy
    assert json.loads(json.dumps(options)) == options


@given(policies, policies)
def test_policies_are_equal_exactly_if_their_json_is(a: Policy, b: Policy) -> None:
    assert (a == b) == (a.to_json() == b.to_json())


def test_json_is_readable_and_has_a_version() -> None:
    assert json.loads(hybrid(modules={"lm_head": "none"}, wgrad={"gradient": "bf16"}).to_json()) == {
        "version": 1,
        "activation": E4M3,
        "weight": E4M3,
        "gradient": E5M2,
        "wgrad": {"gradient": "bf16/nearest_even/ovf_inf"},
        "modules": {"lm_head": "none"},
    }


def test_json_without_a_version_has_the_current_version() -> None:
    assert Policy.from_json('{"format": "bf16"}') == Policy(format="bf16")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("format: bf16", "must be valid JSON"),
        ("", "must be valid JSON"),
        ('["bf16"]', "must be a JSON object, got list"),
        ('"bf16"', "must be a JSON object, got str"),
        ('{"version": 2, "format": "bf16"}', "version 2.*reads version 1.*upgrade"),
        ('{"fromat": "bf16"}', "unknown option 'fromat'"),
        ('{"format": "bf99"}', "unknown format 'bf99'"),
    ],
)
def test_json_that_is_no_policy_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Policy.from_json(text)


# -- options and errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, {}, {"policy": None}, {"policy": {}}])
def test_without_options_the_policy_is_the_default(options: Any) -> None:
    assert Policy.from_options(options) == Policy()


def test_an_unknown_option_lists_the_valid_ones_and_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown option 'atention'") as caught:
        Policy.from_options({"atention": "keep"})
    assert "did you mean 'attention'?" in str(caught.value)
    assert all(name in str(caught.value) for name in [*FIELDS, "policy"])


def test_an_unknown_option_far_from_all_has_no_hint() -> None:
    with pytest.raises(ValueError, match="unknown option 'zzz': fpsim's options are format") as caught:
        Policy.from_options({"zzz": 1})
    assert "did you mean" not in str(caught.value)


def test_a_policy_and_fields_together_are_an_error() -> None:
    with pytest.raises(ValueError, match="either 'policy' or its fields, not both: format, skip"):
        Policy.from_options({"policy": Policy(), "skip": ["a"], "format": "bf16"})


@pytest.mark.parametrize(("options", "error"), [("e4m3fn", TypeError), ({"policy": "e4m3fn"}, ValueError)])
def test_a_format_is_no_policy_and_the_error_says_what_to_write(options: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"'e4m3fn'.*\{'format': 'e4m3fn'\}"):
        Policy.from_options(options)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"format": "e4m3fm"}, ValueError, "unknown format 'e4m3fm'.*did you mean e4m3"),
        ({"gradient": "e99m1"}, ValueError, "e99m1"),
        ({"output": "what"}, ValueError, "unknown format 'what'"),
        ({"wgrad": {"weight": "what"}}, ValueError, "unknown format 'what'"),
        ({"modules": {"a": "what"}}, ValueError, "unknown format 'what'"),
        ({"modules": {"a": {"fromat": "bf16"}}}, ValueError, "unknown option 'fromat'"),
        ({"format": "e5m2/sideways"}, ValueError, "unknown mode 'sideways'"),
        ({"format": "e5m2/up/down"}, ValueError, "has two roundings, up and down: leave one of them out"),
        ({"weight": "e5m2/up/up"}, ValueError, "has two roundings, up and up"),
        ({"format": "e5m2/stochastic:8/stochastic:4"}, ValueError, "has two roundings"),
        ({"format": "e5m2/ovf_inf/sat_finite"}, ValueError, "has two overflow modes, ovf_inf and sat_finite"),
        ({"format": "e5m2/power_of_two/unscaled"}, ValueError, "has two scales, power_of_two and unscaled"),
        ({"gradient": "e4m3fn:bias=1:bias=2"}, ValueError, "two options for its bias"),
        ({"elementwise": "e4m3fn:ieee"}, ValueError, "e4m3fn has a meaning that 'ieee' repeats or contradicts"),
        (
            {"fprop": {"weights": "bf16"}},
            ValueError,
            "unknown role 'weights' in fprop .did you mean 'weight'..: use activation, ",
        ),
        (
            {"elementwise": {"loss": "bf16"}},
            ValueError,
            "unknown direction 'loss' in elementwise",
        ),
        ({"products": "linear"}, ValueError, "unknown products 'linear': use one of all, weights"),
        ({"attention": "open"}, ValueError, "unknown attention 'open': use one of round, keep"),
        ({"rounding": "sideways"}, ValueError, "unknown rounding 'sideways': use one of nearest_even"),
        ({"overflow": "wrap"}, ValueError, "unknown overflow mode 'wrap': use one of ovf_inf"),
        ({"format": "e2m1fn/ovf_inf"}, ValueError, "e2m1fn has neither: use overflow='sat_finite'"),
        ({"format": "e2m1fn", "overflow": "ovf_inf"}, ValueError, "e2m1fn has neither"),
        ({"format": 8}, TypeError, "a cast is a string"),
        ({"skip": [1]}, TypeError, "skip must be a list of strings"),
        ({"gaps": [None]}, TypeError, "gaps must be a list of strings"),
        ({"skip": None}, TypeError, "skip"),
        ({"fprop": ["bf16"]}, TypeError, "fprop must be .*mapping"),
        ({"modules": ["head"]}, TypeError, "modules must be .*mapping"),
        ({"modules": {"a": 3}}, TypeError, "3"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_it(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Policy(**fields)
    with pytest.raises(error, match=message):
        Policy.from_options(fields)


def test_an_overflow_mode_that_only_some_formats_have_is_valid_for_those() -> None:
    assert casts(Policy(format="e5m2", weight="e2m1fn/sat_finite", overflow="ovf_inf"))["fprop", "weight"] == (
        "e2m1fn/nearest_even/sat_finite"
    )


# -- policies are values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_a_policy_cannot_be_changed(field: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(Policy(), field, None)


def test_later_changes_of_arguments_have_no_effect() -> None:
    wgrad, skip, gaps = {"gradient": "bf16"}, ["embed"], ["aten.convolution"]
    inner = {"format": "bf16"}
    modules: dict[str, Any] = {"head": inner}
    fields = {"wgrad": wgrad, "skip": skip, "gaps": gaps, "modules": modules}
    policy, options_policy = Policy(**fields), Policy.from_options(fields)
    before, text = hash(policy), policy.to_json()
    wgrad["gradient"] = "e5m2"
    wgrad["weight"] = "none"
    skip.append("layers")
    gaps.clear()
    inner["format"] = "none"
    modules["layers"] = "none"
    fields["format"] = "none"
    assert (hash(policy), policy.to_json()) == (before, text)
    assert options_policy == policy == Policy.from_json(text)


def test_changes_of_returned_values_have_no_effect() -> None:
    policy = Policy(wgrad={"gradient": "bf16"}, skip=["a"], modules={"head": {"wgrad": {"gradient": "bf16"}}})
    text = policy.to_json()
    handed_out = policy.to_dict()
    handed_out["wgrad"]["gradient"] = "none"
    handed_out["skip"].clear()
    handed_out["modules"]["head"].clear()
    assert policy.to_json() == text


def test_replacing_one_field_keeps_the_others() -> None:
    assert dataclasses.replace(Policy(), skip=("head",)) == hybrid(skip="head")
    assert dataclasses.replace(Policy(format="bf16"), attention="keep") == Policy(format="bf16", attention="keep")


@pytest.mark.parametrize("format", [None, "e4m3fn", FloatFormat(4, 3), "bf16/toward_zero"])
def test_a_scale_put_in_by_replace_holds_for_all_casts_that_name_none(format: str | FloatFormat | None) -> None:
    replaced = dataclasses.replace(Policy(format=format, output="bf16"), scale="power_of_two")
    assert replaced == Policy(format=format, output="bf16", scale="power_of_two")
    assert dataclasses.replace(replaced) == replaced


def test_a_policy_that_an_older_fpsim_pickled_rounds_as_it_did() -> None:
    policy = Policy(format="e4m3fn", scale="power_of_two", wgrad={"gradient": "bf16/unscaled"})
    as_text = {
        "format": "e4m3fn/nearest_even/sat_finite/power_of_two",
        "wgrad": (("gradient", "e8m7/nearest_even/ovf_inf/unscaled"),),
        "scale": "power_of_two",
    }
    older = Policy.__new__(Policy)
    vars(older).update({**vars(policy), **as_text})
    loaded = pickle.loads(pickle.dumps(older))
    assert loaded == policy
    assert loaded.cast("fprop", "weight") == policy.cast("fprop", "weight")


def test_a_rule_for_modules_writes_attention_only_where_it_differs() -> None:
    rules = Policy(attention="keep", modules={"a": "bf16", "b": {"attention": "round"}}).to_dict()["modules"]
    assert "attention" not in rules["a"]
    assert rules["b"]["attention"] == "round"


@pytest.mark.parametrize("scale", [["power_of_two"], 2, ""])
def test_a_scale_that_is_no_name_is_an_error_that_lists_the_names(scale: object) -> None:
    with pytest.raises(ValueError, match=r"unknown scale .*: use one of power_of_two"):
        Policy(scale=scale)


def test_policies_serve_as_keys() -> None:
    assert {Policy(): 1, Policy(format="bf16"): 2}[Policy(format="torch.bfloat16")] == 2


def test_the_policy_is_at_the_top_of_the_package() -> None:
    assert fpsim.Policy is Policy


NEAR_MISSES = [
    (lambda: Policy(fromat="e4m3fn"), TypeError, "Policy has no field 'fromat' (did you mean 'format'?): its fields "
                                                 "are format, activation, weight, "),
    (lambda: Policy.from_options({"fromat": "e4m3fn"}), ValueError, "unknown option 'fromat' (did you mean 'format'?)"),
    (lambda: Policy(format="e4m3fm"), ValueError, "unknown format 'e4m3fm': did you mean e4m3fn"),
    (lambda: Policy(format="mxfp9"), ValueError, "did you mean mxfp8"),
    (lambda: Policy(format="e4m3fn/nearest_evn"), ValueError, "(did you mean 'nearest_even'?): after the format"),
    (lambda: Policy(format="e4m3fn/sat_finit"), ValueError, "(did you mean 'sat_finite'?)"),
    (lambda: Policy(format="e4m3fn/blck:32"), ValueError, "(did you mean 'block'?)"),
    (lambda: Policy(format="bf16", overflow="sat_finit"), ValueError, "mode 'sat_finit' (did you mean 'sat_finite'?)"),
    (lambda: Policy(format="bf16", rounding="nearest_evn"), ValueError, "use one of nearest_even, "),
    (lambda: Policy(format="bf16", scale="power_of_tow"), ValueError, "'power_of_tow' (did you mean 'power_of_two'?)"),
    (lambda: Policy(format="bf16", products="weight"), ValueError, "products 'weight' (did you mean 'weights'?)"),
    (lambda: Policy(fprop={"activaton": "bf16"}), ValueError, "in fprop (did you mean 'activation'?): use "),
    (lambda: Policy(elementwise={"foward": "bf16"}), ValueError, "in elementwise (did you mean 'forward'?): use "),
    (lambda: Policy(saved={"products": "bf16"}), ValueError, "in saved (did you mean 'product'?): use "),
    (lambda: Policy(format="bf16", accumulator={"frop": "fp16"}), ValueError, "in accumulator (did you mean 'fprop'?)"),
    (lambda: Policy(format="bf16", accumulator="hoper_fp8"), ValueError, "hopper_fp8"),
    (lambda: Policy(format="bf16", transform={"fporp": "smooth"}), ValueError, "in transform (did you mean 'fprop'?)"),
    (lambda: Policy(format="bf16", transform="hadamar:16"), ValueError, "'hadamar:16' (did you mean 'hadamard'?)"),
    (lambda: Policy(format="bf16", attention="rond"), ValueError, "attention 'rond' (did you mean 'round'?)"),
    (lambda: Policy(format="bf16", attention={"blok_k": 64}), ValueError, "field 'blok_k' of attention (did you mean "),
    (lambda: Policy(format="bf16", modules={"head": {"outptu": "bf16"}}), ValueError, "(did you mean 'output'?)"),
    (lambda: Policy.preset("fp8_hybird"), ValueError, "preset 'fp8_hybird' (did you mean 'fp8_hybrid'?): use one of "),
    (lambda: fpsim.FlashAttention(blok_k=64), TypeError, "has no field 'blok_k' (did you mean 'block_k'?)"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), NEAR_MISSES, ids=[message for _, _, message in NEAR_MISSES])
def test_a_wrong_name_at_any_level_names_the_nearest_right_one(call: Any, kind: type, message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        call()
