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
from typing import Any, Literal, cast

from fpsim.casts import NONE, UNSCALED, Cast, CastLike, parse_cast, parse_unscaled
from fpsim.formats import OVERFLOWS, FloatFormat, full_rounding, parse_format
from fpsim.policy.globs import matches
from fpsim.scaling.scale import Scale, parse_scale
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

#: The fields that a rule for modules takes over from the policy that holds it, unless the rule is a whole policy.
_INHERITED = ("rounding", "overflow", "scale", "attention")

#: Version of the JSON form, raised when an older fpsim could misread a newer file.
JSON_VERSION = 1

#: What a caller gives for the casts of several roles, or of both directions: one for all, or a mapping.
CastsLike = CastLike | Mapping[str, CastLike | None] | Sequence[tuple[str, CastLike | None]]

#: A cast as a policy keeps it: "none" leaves values unrounded, None says nothing.
_Kept = Cast | Literal["none"] | None


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

    # The annotations are what a caller passes. Kept are values: a `Cast` or "none" for each cast, a `Scale`, and tuples
    # for mappings and lists.
    format: CastLike | None = None
    activation: CastLike | None = None
    weight: CastLike | None = None
    gradient: CastLike | None = None
    output: CastLike | None = None
    fprop: CastsLike = ()
    dgrad: CastsLike = ()
    wgrad: CastsLike = ()
    elementwise: CastsLike = ()
    products: str = "all"
    rounding: str = "nearest_even"
    overflow: str | None = None
    scale: str | Scale | None = None
    skip: str | Iterable[str] = ()
    modules: Mapping[str, ModuleRule] | Sequence[tuple[str, ModuleRule]] = ()
    attention: str = "round"
    gaps: str | Iterable[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rounding", full_rounding(self.rounding))
        if self.overflow is not None and self.overflow not in OVERFLOWS:
            raise ValueError(f"unknown overflow mode {self.overflow!r}: use one of {', '.join(OVERFLOWS)}, or None")
        if self.attention not in ATTENTIONS:
            raise ValueError(f"unknown attention {self.attention!r}: use one of {', '.join(ATTENTIONS)}")
        if self.products not in PRODUCTS:
            raise ValueError(f"unknown products {self.products!r}: use one of {', '.join(PRODUCTS)}")
        set_ = object.__setattr__
        set_(self, "scale", parse_scale(self.scale))
        set_(self, "skip", _strings("skip", self.skip))
        set_(self, "gaps", _strings("gaps", self.gaps))
        set_(self, "modules", self._module_rules())
        if self.format is None and all(getattr(self, role) in (None, NONE) for role in ROLES):
            set_(self, "overflow", self.overflow or "sat_finite")
            for role, usual in HYBRID.items():
                set_(self, role, getattr(self, role) or usual)
        for name in ("format", *ROLES):
            set_(self, name, self._operand(getattr(self, name)))
        set_(self, "output", self._result(self.output))
        for kind in KINDS:
            set_(self, kind, self._casts(kind, ROLES, (*ROLES, "output"), "role"))
        set_(self, "elementwise", self._casts("elementwise", DIRECTIONS, DIRECTIONS, "direction"))

    def _operand(self, given: CastLike | None) -> _Kept:
        """The cast of an operand, with this policy's modes where it names none."""
        if given is None:
            return None
        parsed = parse_cast(given, self.rounding, self.overflow, self.scale)
        if parsed is not None and parsed.scale is None and parsed.leaves_scale_open:
            parsed = replace(parsed, scale=self.scale)  # a cast of a policy without a scale (`dataclasses.replace`)
        return parsed or NONE

    def _result(self, given: CastLike | None) -> _Kept:
        """`_operand` for the result of an operation, which cannot be scaled."""
        if given is None:
            return None
        return parse_unscaled(given, self.rounding, self.overflow, "the result of an operation") or NONE

    def _casts(self, name: str, usual: Sequence[str], valid: Sequence[str], what: str) -> tuple[tuple[str, _Kept], ...]:
        """The field ``name``, a mapping from ``valid`` keys to casts; one cast alone means all ``usual`` keys."""
        given = getattr(self, name)
        if isinstance(given, str | FloatFormat | Cast):
            given = dict.fromkeys(usual, given)
        casts = {key: cast for key, cast in _pairs(name, given) if cast is not None}
        if unknown := sorted(set(casts) - set(valid)):
            raise ValueError(f"unknown {what} {unknown[0]!r} in {name}: use {', '.join(valid)}")
        parsers = {key: self._operand if key in ROLES else self._result for key in valid}
        return tuple((key, parsers[key](casts[key])) for key in valid if key in casts)

    def _module_rules(self) -> tuple[tuple[str, Policy | None], ...]:
        rules: dict[str, Policy | None] = {}
        for glob, given in _pairs("modules", self.modules):
            policy = self._module_policy(given)
            if rules.setdefault(glob, policy) != policy:
                given = " and ".join(str(self._rule_fields(rule, spelled=True)) for rule in (rules[glob], policy))
                raise ValueError(f"two rules for modules {glob!r} contradict each other: {given}")
            if policy is not None and glob in self.skip:
                raise ValueError(f"{glob!r} is in skip and has a policy in modules: take it out of one of them")
        return tuple(rules.items())

    def _module_policy(self, given: ModuleRule) -> Policy | None:
        """The policy of a rule for modules; None where nothing is rounded.

        A mapping of fields and a cast inherit the modes and `attention` of this policy. A preset and a `Policy` stand
        for themselves.
        """
        if given is None or given == NONE:
            return None
        if isinstance(given, Policy):
            return given
        if isinstance(given, str) and is_preset(given) and not _is_format(given):
            return Policy.preset(given)
        if isinstance(given, str | FloatFormat | Cast):
            given = {"format": given}
        if isinstance(given, Mapping) and "policy" not in given:
            given = {**{name: getattr(self, name) for name in _INHERITED}, **given}
        return Policy.from_options(given)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore a policy that was pickled, also by an older fpsim, which kept casts and scales as text."""
        vars(self).update(state)
        self.__post_init__()

    # -- what it says ----------------------------------------------------------------------------------------

    def at(self, path: str) -> Policy | None:
        """The policy for the module ``path``; None where nothing is rounded."""
        if any(matches(glob, path) for glob in self.skip):
            return None
        for glob, policy in self._rules:
            if matches(glob, path):
                return None if policy is None else policy.at(path)
        return self

    def cast(self, kind: str, role: str) -> Cast | None:
        """How an operand in ``role`` of a product of ``kind`` is rounded; None where it is not."""
        return _rounding_cast(_kept(self, kind).get(role) or getattr(self, role) or self.format)

    def operand_casts(self) -> list[Cast | None]:
        """The casts of all operands: every role of every kind of product; None where they are not rounded."""
        own = [self.cast(kind, role) for kind in KINDS for role in ROLES if (kind, role) in OPERANDS]
        return own + [cast for policy in self._policies_of_modules for cast in policy.operand_casts()]

    def output_cast(self, kind: str) -> Cast | None:
        """How the result of a product of ``kind`` is rounded; None where it is not."""
        return _rounding_cast(_kept(self, kind).get("output", cast(_Kept, self.output)))

    def elementwise_cast(self, direction: str) -> Cast | None:
        """How the results of operations other than products are rounded, ``forward`` or ``backward``."""
        return _rounding_cast(_kept(self, "elementwise").get(direction))

    @property
    def rounds_results(self) -> bool:
        """Whether anything but operands is rounded anywhere: results of products or of other operations."""
        own = bool(self.elementwise) or any(self.output_cast(kind) for kind in KINDS)
        return own or any(policy.rounds_results for policy in self._policies_of_modules)

    @property
    def uses_paths(self) -> bool:
        """Whether any rule depends on the module in which a product is."""
        return bool(self.skip or self.modules)

    @property
    def is_stochastic(self) -> bool:
        """Whether any rounding draws random numbers."""
        kept = [getattr(self, name) for name in ("format", *ROLES, "output")]
        kept += [cast for name in (*KINDS, "elementwise") for cast in _kept(self, name).values()]
        own = any(isinstance(each, Cast) and each.is_stochastic for each in kept)
        return own or any(policy.is_stochastic for policy in self._policies_of_modules)

    @property
    def attentions(self) -> frozenset[str]:
        """The values that `attention` has here and in the rules for modules."""
        return frozenset({self.attention}.union(*(policy.attentions for policy in self._policies_of_modules)))

    @property
    def globs(self) -> tuple[str, ...]:
        """The globs of modules in `skip` and `modules`, and in the policies of the rules for modules."""
        nested = (glob for policy in self._policies_of_modules for glob in policy.globs)
        return (*self.skip, *(glob for glob, _ in self._rules), *nested)

    @property
    def all_gaps(self) -> tuple[str, ...]:
        """`gaps`, and those of the policies of the rules for modules."""
        return (*self.gaps, *(glob for policy in self._policies_of_modules for glob in policy.all_gaps))

    @property
    def _rules(self) -> tuple[tuple[str, Policy | None], ...]:
        return cast(tuple[tuple[str, Policy | None], ...], self.modules)

    @property
    def _policies_of_modules(self) -> list[Policy]:
        return [policy for _, policy in self._rules if policy is not None]

    def allows_gap(self, operator: str) -> bool:
        """Whether `gaps` lets ``operator`` (such as ``aten.convolution``) stay unrounded."""
        return any(fnmatch.fnmatchcase(operator, glob) for glob in self.gaps)

    # -- making others ---------------------------------------------------------------------------------------

    def with_modules(self, modules: Mapping[str, ModuleRule] | Sequence[tuple[str, ModuleRule]]) -> Policy:
        """This policy with more rules for modules, which go before its own and replace those of the same glob.

        Args:
            modules: as the field `modules`.

        Raises: as `Policy`.

        >>> Policy(format="e8m3", skip="lm_head").with_modules({"lm_head": "bf16"}).skip
        ()
        """
        first = _pairs("modules", modules)
        globs = {glob for glob, _ in first}
        rest = [(glob, policy) for glob, policy in self._rules if glob not in globs]
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
        """The fields that differ from their defaults, as JSON types; formats in the spelling of the caller."""
        return self._fields(spelled=True)

    def canonical(self) -> str:
        """JSON text that equal policies have in common, however their formats were spelled."""
        return json.dumps(self._fields(spelled=False))

    def _fields(self, spelled: bool) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name in (*KINDS, "elementwise"):
                value = {key: self._text(cast, spelled) if isinstance(cast, Cast) else cast for key, cast in value}
            elif field.name == "modules":
                value = {glob: self._rule_fields(policy, spelled) for glob, policy in self._rules}
            elif isinstance(value, Cast):
                value = self._text(value, spelled)
            elif isinstance(value, Scale):
                value = str(value)
            elif isinstance(value, tuple):
                value = list(value)
            result[field.name] = value
        return result

    def _rule_fields(self, policy: Policy | None, spelled: bool) -> str | dict[str, Any]:
        """A module's policy, with the fields that it would otherwise inherit from this one."""
        if policy is None:
            return NONE
        inherited = {"rounding": policy.rounding, "overflow": policy.overflow}
        if policy.scale != self.scale:
            inherited["scale"] = None if policy.scale is None else str(policy.scale)
        own = policy._fields(spelled)
        if policy.attention == self.attention:
            own.pop("attention", None)
        else:
            inherited["attention"] = policy.attention
        return {**inherited, **own}

    def _text(self, cast: Cast, spelled: bool) -> str:
        """A cast as text that this policy reads as the same cast."""
        text = cast.written if spelled else str(cast)
        return f"{text}/{UNSCALED}" if self.scale is not None and cast.scale is None else text

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


#: What a caller gives as the rule for the modules that a glob matches.
ModuleRule = Policy | Mapping[str, Any] | CastLike | None


def is_preset(name: str) -> bool:
    """Whether `Policy.preset` knows ``name``."""
    return name in PRESETS or name.startswith(_PAPER)


def _is_format(name: str) -> bool:
    try:
        parse_format(name)
    except ValueError:
        return False
    return True


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


def _kept(policy: Policy, name: str) -> dict[str, _Kept]:
    """The field ``name`` of a policy, which maps roles or directions to casts."""
    return dict(getattr(policy, name))


def _rounding_cast(kept: Any) -> Cast | None:
    return kept if isinstance(kept, Cast) else None
