"""What is rounded where: a policy is a frozen, hashable value that survives a round trip through JSON.

A model's matrix products come in three kinds: ``fprop`` (the forward product), ``dgrad`` (the gradient with
respect to an activation) and ``wgrad`` (the gradient with respect to a weight). Each has two operands, and each
operand plays a role: ``activation``, ``weight`` or ``gradient``. A policy gives every (kind, role) a *cast*: the
format, rounding and overflow mode by which that operand is rounded before it is multiplied.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any

from fpsim.formats import (
    OVERFLOWS,
    ROUNDINGS,
    STOCHASTIC_ROUNDINGS,
    FloatFormat,
    full_rounding,
    parse_format,
    resolve_overflow,
)
from fpsim.scaling.ops import SCALES, check_scale
from fpsim.suggestions import did_you_mean

ROLES = ("activation", "weight", "gradient")
KINDS = ("fprop", "dgrad", "wgrad")
#: The roles of the operands that each kind of product has.
OPERANDS = frozenset(
    {
        ("fprop", "activation"),
        ("fprop", "weight"),
        ("dgrad", "gradient"),
        ("dgrad", "weight"),
        ("dgrad", "activation"),  # where two activations are multiplied
        ("wgrad", "gradient"),
        ("wgrad", "activation"),
    }
)
DIRECTIONS = ("forward", "backward")
ATTENTIONS = ("round", "keep")
PRODUCTS = ("all", "weights")

#: The formats of the OCP FP8 hybrid recipe, by role.
HYBRID = {"activation": "e4m3fn", "weight": "e4m3fn", "gradient": "e5m2"}

#: Policies by name (`Policy.preset`).
PRESETS: dict[str, dict[str, Any]] = {
    "fp8_hybrid": {},
    "bf16": {"format": "bf16", "output": "bf16"},
    "fp16": {"format": "fp16", "output": "fp16"},
}
#: Before a format: the preset of the paper's recipe in it.
_PAPER = "paper:"

#: Version of the JSON form, raised when an older fpsim could misread a newer file.
JSON_VERSION = 1

#: In place of a format: leave the operand as it is.
NONE = "none"
#: In an operand's cast: no scale, whatever the policy's.
UNSCALED = "unscaled"


@dataclass(frozen=True)
class Cast:
    """One way to round: a format with its rounding and overflow mode, all resolved, and for operands a scale.

    Its string form is ``format/rounding/overflow`` or ``format/rounding/overflow/scale``; in a policy all but the
    format may be left out.
    """

    format: FloatFormat
    rounding: str
    overflow: str
    scale: str | None = None

    def __str__(self) -> str:
        return "/".join([self.format.name, self.rounding, self.overflow, *([self.scale] if self.scale else [])])

    @property
    def label(self) -> str:
        """Short form for tables: what differs from nearest-even and the format's usual overflow mode."""
        parts = [self.format.name]
        if self.rounding != "nearest_even":
            parts.append(self.rounding)
        if self.overflow != resolve_overflow(self.format, None):
            parts.append(self.overflow)
        if self.scale:
            parts.append("scaled")
        return " ".join(parts)


def parse_cast(
    text: str | FloatFormat, rounding: str = "nearest_even", overflow: str | None = None, scale: str | None = None
) -> Cast | None:
    """The cast that ``text`` denotes: ``format[/rounding][/overflow][/scale]``, or ``none`` for None.

    Args:
        text: a format (name or `FloatFormat`), optionally followed by modes that override the next three.
        rounding: the rounding where ``text`` names none.
        overflow: the overflow mode where ``text`` names none; None is the format's usual one.
        scale: the scale where ``text`` names none; ``unscaled`` in it means None.

    Raises:
        ValueError: an unknown format or mode, named with its remedy.

    >>> str(parse_cast("e8m3/toward_zero")), str(parse_cast("e4m3fn/power_of_two"))
    ('e8m3/toward_zero/ovf_inf', 'e4m3fn/nearest_even/sat_finite/power_of_two')
    """
    check_scale(scale)
    if isinstance(text, FloatFormat):
        return Cast(text, full_rounding(rounding), resolve_overflow(text, overflow), scale)
    if not isinstance(text, str):
        raise TypeError(f"a cast is a string such as 'e4m3fn' or 'e8m3/toward_zero', got {text!r}")
    if text == NONE:
        return None
    name, *modes = text.split("/")
    for mode in modes:
        if mode in ROUNDINGS or mode.partition(":")[0] in STOCHASTIC_ROUNDINGS:
            rounding = mode
        elif mode in OVERFLOWS:
            overflow = mode
        elif mode in (*SCALES, UNSCALED):
            scale = None if mode == UNSCALED else mode
        else:
            raise ValueError(
                f"unknown mode {mode!r} in cast {text!r}: after the format may come a rounding "
                f"({', '.join([*ROUNDINGS, *STOCHASTIC_ROUNDINGS])}), an overflow mode ({', '.join(OVERFLOWS)}) and a "
                f"scale ({', '.join([*SCALES, UNSCALED])})"
            )
    fmt = parse_format(name)
    return Cast(fmt, full_rounding(rounding), resolve_overflow(fmt, overflow), scale)


def parse_unscaled(text: str | FloatFormat, rounding: str, overflow: str | None, what: str) -> Cast | None:
    """`parse_cast` of what cannot be scaled, such as ``what``.

    Raises:
        ValueError: as `parse_cast`, and a scale.
    """
    parsed = parse_cast(text, rounding, overflow)
    if parsed is not None and parsed.scale is not None:
        raise ValueError(f"{what} cannot be scaled: leave {parsed.scale!r} out of {text!r}")
    return parsed


@dataclass(frozen=True)
class Policy:
    """What the compiler backend rounds, and how. The fields are also the ``options`` of `torch.compile`.

    Wherever a format is asked for, a cast may stand: ``"e4m3fn"``, ``"e8m3/toward_zero"``,
    ``"e5m2/nearest_even/sat_finite"``; ``"none"`` leaves the operand unrounded.

    Attributes:
        format: of every operand of every matrix product, where nothing more specific is given.
        activation, weight, gradient: of the operands in that role, in all three kinds of product.
        output: of the results of all matrix products (with the bias of a linear layer added). Default: unrounded.
        fprop, dgrad, wgrad: a mapping from role to format for the operands of that kind of product, overriding the
            former (SwitchBack: ``wgrad={"gradient": "bf16", "activation": "bf16"}``); a format alone means all roles.
            The key ``output`` is for the results of that kind of product.
        elementwise: of the results of all other operations on floating-point numbers, forward and backward: additions,
            softmax, normalisation, activation functions, the loss, the gradients of all these and the sums of
            gradients. A mapping from ``forward`` or ``backward`` to format tells these apart. Default: unrounded. An
            operation is one operator of aten as the model or autograd calls it, before it is decomposed, and is
            rounded once; what torch itself composes of several (CompositeImplicitAutograd) is rounded as these. What
            only moves, picks or makes numbers is not rounded, nor what depends on no parameter and no floating-point
            input.
        products: ``"all"`` matrix products, or only those with ``"weights"``: linear layers, convolutions, the LM head,
            forward and backward; the products of two activations, as in attention, are then listed as gaps.
        rounding: where a cast names none. Default ``nearest_even``. Stochastic rounding (``stochastic``,
            ``stochastic:8`` with 8 random bits) draws its seed from torch's generator in every call of the model, so
            that `torch.manual_seed` reproduces a run; forward and backward see the same draw of the same rounding.
        overflow: where a cast names none. Default: each format's usual mode.
        scale: of operands whose cast names none. ``power_of_two`` multiplies every operand, as it is rounded, by the
            largest power of two that brings it into the format's range (`fpsim.power_of_two_scale`: one factor for a
            tensor, from its own largest magnitude) and divides again after. Default: None, as operands are. In casts
            ``"e5m2/power_of_two"`` or ``"e5m2/unscaled"`` may be said. Every rank of parallel training scales its own.
        skip: globs of module paths whose products stay unrounded; they are listed as gaps in the plan.
        modules: mapping from globs of module paths to the policy that holds there instead: a `Policy`, a mapping of
            its fields, a format, or ``"none"``. The first glob that matches decides; `skip` goes before.
        attention: ``"round"`` opens scaled dot-product attention so that its inner products are rounded; ``"keep"``
            leaves it fused and unrounded, listed as a gap.
        gaps: names of operators that hold matrix products the backend cannot round and that may stay unrounded
            (``"aten.convolution"``, ``"*"``); they are listed in the plan. Anything else of the kind is an error.

    A glob (``layers.*.attn``, ``lm_head``) matches a module by its path and, with it, everything inside.

    Where none of ``format``, ``activation``, ``weight``, ``gradient`` names a format, those that are not ``"none"``
    are the OCP FP8 hybrid: ``e4m3fn`` activations and weights, ``e5m2`` gradients, ``sat_finite``. Where one does,
    roles without a format of their own stay unrounded.

    Raises:
        ValueError: an unknown format, mode, role or choice; the message names it and the remedy.
        TypeError: a value of the wrong type.
    """

    format: str | None = None
    activation: str | None = None
    weight: str | None = None
    gradient: str | None = None
    output: str | None = None
    fprop: tuple[tuple[str, str], ...] = ()
    dgrad: tuple[tuple[str, str], ...] = ()
    wgrad: tuple[tuple[str, str], ...] = ()
    elementwise: tuple[tuple[str, str], ...] = ()
    products: str = "all"
    rounding: str = "nearest_even"
    overflow: str | None = None
    scale: str | None = None
    skip: tuple[str, ...] = ()
    modules: tuple[tuple[str, Policy | None], ...] = ()
    attention: str = "round"
    gaps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounding", full_rounding(self.rounding))
        if self.overflow is not None and self.overflow not in OVERFLOWS:
            raise ValueError(f"unknown overflow mode {self.overflow!r}: use one of {', '.join(OVERFLOWS)}, or None")
        check_scale(self.scale)
        if self.attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {self.attention!r}: use one of {', '.join(ATTENTIONS)}")
        if self.products not in PRODUCTS:
            raise ValueError(f"unknown products {self.products!r}: use one of {', '.join(PRODUCTS)}")
        set_ = object.__setattr__
        set_(self, "skip", _strings("skip", self.skip))
        set_(self, "gaps", _strings("gaps", self.gaps))
        set_(self, "modules", self._module_rules())
        if self.format is None and all(getattr(self, role) in (None, NONE) for role in ROLES):
            set_(self, "overflow", self.overflow or "sat_finite")
            for role, usual in HYBRID.items():
                set_(self, role, getattr(self, role) or usual)
        for name in ("format", *ROLES):
            set_(self, name, self._spelled_operand(getattr(self, name)))
        set_(self, "output", self._spelled(self.output))
        for kind in KINDS:
            set_(self, kind, self._casts(kind, ROLES, (*ROLES, "output"), "role"))
        set_(self, "elementwise", self._casts("elementwise", DIRECTIONS, DIRECTIONS, "direction"))

    def _spelled(self, cast: Any) -> str | None:
        """A cast in its full string form, so that equal policies are equal values."""
        if cast is None:
            return None
        return str(parse_unscaled(cast, self.rounding, self.overflow, "the result of an operation") or NONE)

    def _spelled_operand(self, cast: Any) -> str | None:
        """`_spelled` for a cast that may have a scale."""
        if cast is None:
            return None
        parsed = parse_cast(cast, self.rounding, self.overflow, self.scale)
        is_exempt = parsed is not None and self.scale is not None and parsed.scale is None
        return f"{parsed or NONE}" + (f"/{UNSCALED}" if is_exempt else "")

    def _casts(self, name: str, usual: Sequence[str], valid: Sequence[str], what: str) -> tuple[tuple[str, str], ...]:
        """The field ``name``, a mapping from ``valid`` keys to casts; a format alone means all ``usual`` keys."""
        given = getattr(self, name)
        if isinstance(given, str | FloatFormat):
            given = dict.fromkeys(usual, given)
        casts = {key: cast for key, cast in _pairs(name, given) if cast is not None}
        if unknown := sorted(set(casts) - set(valid)):
            raise ValueError(f"unknown {what} {unknown[0]!r} in {name}: use {', '.join(valid)}")
        spelled = {key: self._spelled_operand if key in ROLES else self._spelled for key in valid}
        return tuple((key, str(spelled[key](casts[key]))) for key in valid if key in casts)

    def _module_rules(self) -> tuple[tuple[str, Policy | None], ...]:
        rules: dict[str, Policy | None] = {}
        for glob, given in _pairs("modules", self.modules):
            policy = self._module_policy(glob, given)
            if rules.setdefault(glob, policy) != policy:
                raise ValueError(f"two rules for modules {glob!r} contradict each other: {rules[glob]} and {policy}")
            if policy is not None and glob in self.skip:
                raise ValueError(f"{glob!r} is in skip and has a policy in modules: take it out of one of them")
        return tuple(rules.items())

    def _module_policy(self, glob: str, given: Any) -> Policy | None:
        if given is None or given == NONE:
            return None
        if isinstance(given, str | FloatFormat):
            given = {"format": given}
        if isinstance(given, Mapping) and "policy" not in given:
            given = {"rounding": self.rounding, "overflow": self.overflow, "scale": self.scale, **given}
        return _check_module_policy(glob, given if isinstance(given, Policy) else Policy.from_options(given))

    # -- what it says ----------------------------------------------------------------------------------------

    def at(self, path: str) -> Policy | None:
        """The policy for the module ``path``; None where nothing is rounded."""
        if any(matches(glob, path) for glob in self.skip):
            return None
        for glob, policy in self.modules:
            if matches(glob, path):
                return policy
        return self

    def cast(self, kind: str, role: str) -> Cast | None:
        """How an operand in ``role`` of a product of ``kind`` is rounded; None where it is not."""
        text = dict(getattr(self, kind)).get(role) or getattr(self, role) or self.format
        return parse_cast(text) if text else None

    def operand_casts(self) -> list[Cast | None]:
        """How operands are rounded anywhere, in every role of every kind of product; None where they are not."""
        own = [self.cast(kind, role) for kind in KINDS for role in ROLES if (kind, role) in OPERANDS]
        return own + [cast for policy in self._of_modules for cast in policy.operand_casts()]

    def output_cast(self, kind: str) -> Cast | None:
        """How the result of a product of ``kind`` is rounded; None where it is not."""
        text = dict(getattr(self, kind)).get("output", self.output)
        return parse_cast(text) if text else None

    def elementwise_cast(self, direction: str) -> Cast | None:
        """How the results of operations other than products are rounded, ``forward`` or ``backward``."""
        text = dict(self.elementwise).get(direction)
        return parse_cast(text) if text else None

    @property
    def rounds_results(self) -> bool:
        """Whether anything but operands is rounded anywhere: results of products or of other operations."""
        own = bool(self.elementwise) or any(self.output_cast(kind) for kind in KINDS)
        return own or any(policy.rounds_results for policy in self._of_modules)

    @property
    def uses_paths(self) -> bool:
        """Whether any rule depends on where in the model a product is."""
        return bool(self.skip or self.modules)

    @property
    def is_stochastic(self) -> bool:
        """Whether any rounding draws random numbers."""
        pairs = [cast for field in (*KINDS, "elementwise") for _, cast in getattr(self, field)]
        casts = [self.format, self.output, *(getattr(self, role) for role in ROLES), *pairs]
        return any("/stochastic" in cast for cast in casts if cast) or any(p.is_stochastic for p in self._of_modules)

    @property
    def _of_modules(self) -> list[Policy]:
        return [policy for _, policy in self.modules if policy is not None]

    def allows_gap(self, operator: str) -> bool:
        """Whether `gaps` lets ``operator`` (such as ``aten.convolution``) stay unrounded."""
        return any(fnmatch.fnmatchcase(operator, glob) for glob in self.gaps)

    # -- making others ---------------------------------------------------------------------------------------

    def with_modules(self, modules: Any) -> Policy:
        """This policy with more rules for modules, which go before its own and replace those of the same glob.

        Args:
            modules: as the field `modules`.

        Raises: as `Policy`.

        >>> Policy(format="e8m3", skip="lm_head").with_modules({"lm_head": "bf16"}).skip
        ()
        """
        first = _pairs("modules", modules)
        globs = {glob for glob, _ in first}
        rest = [(glob, policy) for glob, policy in self.modules if glob not in globs]
        return replace(self, skip=tuple(glob for glob in self.skip if glob not in globs), modules=(*first, *rest))

    @staticmethod
    def preset(name: str) -> Policy:
        """A policy by name.

        - ``fp8_hybrid``: the default, the OCP FP8 hybrid.
        - ``bf16``, ``fp16``: operands and results of all matrix products, as under autocast; all else stays as it is.
        - ``paper:FORMAT``, such as ``paper:e8m3``: the recipe of arXiv 2405.18710 as far as it is known: both operands
          of all three products of linear layers, the LM head included, truncated and clipped to the largest value;
          attention is left alone. (Truncation and clipping follow from reviews; that gradients are truncated too and
          attention is not are inferences.)

        Raises:
            ValueError: an unknown name or format.
        """
        if name.startswith(_PAPER):
            cast = f"{name.removeprefix(_PAPER)}/toward_zero/sat_finite"
            return Policy(format=cast, products="weights", attention="keep")
        if name not in PRESETS:
            raise ValueError(
                f"unknown preset {name!r}: use one of {', '.join(PRESETS)}, or {_PAPER}FORMAT; one format for all is "
                f"{{'format': {name!r}}}"
            )
        return Policy(**PRESETS[name])

    # -- conversions -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON types."""
        result: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name in (*KINDS, "elementwise"):
                value = dict(value)
            elif field.name == "modules":
                value = {glob: self._of_module(policy) for glob, policy in value}
            elif isinstance(value, tuple):
                value = list(value)
            result[field.name] = value
        return result

    def _of_module(self, policy: Policy | None) -> str | dict[str, Any]:
        """A module's policy, with the fields that it would inherit from this one."""
        if policy is None:
            return NONE
        scale = {} if self.scale is None else {"scale": policy.scale}
        return {"rounding": policy.rounding, "overflow": policy.overflow, **scale, **policy.to_dict()}

    def to_json(self) -> str:
        """The policy as JSON text; `from_json` gives an equal policy."""
        return json.dumps({"version": JSON_VERSION, **self.to_dict()}, indent=2)

    @staticmethod
    def from_json(text: str) -> Policy:
        """The policy that `to_json` wrote.

        Raises:
            ValueError: not JSON, not a policy, or written by a newer fpsim.
        """
        try:
            options = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"a policy must be valid JSON: {error}") from None
        if not isinstance(options, dict):
            raise ValueError(f"a policy must be a JSON object, got {type(options).__name__}")
        version = options.pop("version", JSON_VERSION)
        if version != JSON_VERSION:
            raise ValueError(
                f"this policy has version {version}, this fpsim reads version {JSON_VERSION}: upgrade fpsim"
            )
        return Policy.from_options(options)

    @staticmethod
    def from_options(options: Mapping[str, Any] | None) -> Policy:
        """The policy given to `torch.compile` as ``options``: its fields, or ``{"policy": policy}``.

        There ``policy`` is a `Policy`, the name of a preset, or a mapping of fields.

        Raises:
            ValueError: a key that is no field (all fields are listed), or ``policy`` together with fields.
            TypeError: neither a mapping nor, as ``policy``, a `Policy`.
        """
        if not isinstance(options, Mapping | None):
            raise TypeError(f"{options!r} is no policy: give a Policy or its fields, such as {{'format': {options!r}}}")
        options = dict(options or {})
        if "policy" in options:
            policy = options.pop("policy")
            if options:
                raise ValueError(f"give either 'policy' or its fields, not both: {', '.join(sorted(options))}")
            if isinstance(policy, str):
                return Policy.preset(policy)
            return policy if isinstance(policy, Policy) else Policy.from_options(policy)
        valid = [field.name for field in fields(Policy)]
        for key in options:
            if key not in valid:
                hint = did_you_mean(key, valid)
                raise ValueError(f"unknown option {key!r}{hint}: fpsim's options are {', '.join(valid)}, or policy")
        return Policy(**options)


def _strings(name: str, given: Any) -> tuple[str, ...]:
    items = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(item, str) for item in items):
        raise TypeError(f"{name} must be a list of strings, got {given!r}")
    return items


def _pairs(name: str, given: Any) -> list[tuple[str, Any]]:
    """The items of a mapping, which may also be given as pairs."""
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise TypeError(f"{name} must be a mapping, got {given!r}")
    return [(str(key), value) for key, value in pairs]


def _check_module_policy(glob: str, policy: Policy) -> Policy:
    if policy.uses_paths:
        raise ValueError(f"the policy for modules {glob!r} has skip or modules of its own: put all globs at the top")
    if policy.attention != "round" or policy.gaps:
        raise ValueError(
            f"the policy for modules {glob!r} has attention or gaps, which hold everywhere: put them at the top"
        )
    return policy


@lru_cache(maxsize=65536)
def matches(glob: str, path: str) -> bool:
    """Whether ``glob`` matches ``path`` or a module that contains it."""
    parts = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), glob) for n in range(1, len(parts) + 1))
