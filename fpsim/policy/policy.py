"""Policies: which operations are rounded, and how. A policy is a frozen, hashable value with a JSON form.

A model has three kinds of matrix products: ``fprop`` (the forward product), ``dgrad`` (the gradient with respect to an
activation) and ``wgrad`` (the gradient with respect to a weight). Each product has two operands, and each operand has a
role: ``activation``, ``weight`` or ``gradient``. A policy assigns a *cast* to every pair of kind and role: the format,
the rounding, the overflow mode and the scale with which the operand is rounded before it is multiplied.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, cast

from fpsim.accumulators.accumulator import Accumulator, AccumulatorLike, Order, parse_accumulator
from fpsim.accumulators.sums import parse_reduction
from fpsim.attention.flash import PRESETS as KERNELS
from fpsim.attention.flash import FlashAttention, FlashLike, parse_flash
from fpsim.casts import NONE, UNSCALED, Cast, CastLike, parse_cast
from fpsim.formats import OVERFLOWS, FloatFormat, full_rounding, parse_format
from fpsim.json_text import check_depth, parse_versioned
from fpsim.policy.globs import matches
from fpsim.policy.presets import HYBRID, MORE_THAN_POLICIES, PRESETS
from fpsim.scaling.scale import Scale, parse_scale
from fpsim.showing import Shown
from fpsim.suggestions import did_you_mean, named_arguments
from fpsim.transforms.names import NAMES_OF_PRODUCTS, parse_transform
from fpsim.transforms.transform import Transform

ROLES = ("activation", "weight", "gradient")
KINDS = ("fprop", "dgrad", "wgrad")
#: The pairs of kind and role that occur.
OPERANDS = frozenset(
    {
        ("fprop", "activation"),
        ("fprop", "weight"),
        ("dgrad", "gradient"),
        ("dgrad", "weight"),
        ("dgrad", "activation"),  # in a product of two activations
        ("wgrad", "gradient"),
        ("wgrad", "activation"),
    }
)
DIRECTIONS = ("forward", "backward")
#: The operations that read a saved activation in backward.
READERS = ("product", "elementwise")
#: The values of the field `attention` that are no `FlashAttention`.
ATTENTIONS = ("round", "keep")
PRODUCTS = ("all", "weights")

#: The prefix of presets that apply the paper's recipe to a format.
_PAPER = "paper:"

#: The fields that a rule for modules inherits from the policy around it, unless the rule is a complete policy.
_INHERITED = ("rounding", "overflow", "scale", "attention")

#: The version of the JSON form. It increases when an older fpsim could misread a newer file.
JSON_VERSION = 1

#: The argument type for the casts of several roles, or of both directions: one cast for all, or a mapping.
CastsLike = CastLike | Mapping[str, CastLike | None] | Sequence[tuple[str, CastLike | None]]

#: The argument type for accumulators: one for all kinds of product, or a mapping.
AccumulatorsLike = AccumulatorLike | Mapping[str, AccumulatorLike | None] | Sequence[tuple[str, AccumulatorLike | None]]
#: The argument type for transforms: one for all kinds of product, or a mapping from kinds.
TransformsLike = str | Transform | Mapping[str, str | Transform | None] | Sequence[tuple[str, str | Transform | None]]

#: A cast as a policy stores it: "none" leaves values unrounded, None means that the field states nothing.
_StoredCast = Cast | Literal["none"] | None


@named_arguments
@dataclass(frozen=True)
class Policy(Shown):
    """Which values the compiler backend rounds, and how. The fields are also the ``options`` of `torch.compile`.

    Every field that takes a format also takes a cast, which adds modes to the format: ``"e8m3/toward_zero"``,
    ``"e5m2/nearest_even/sat_finite"``, and a floating-point dtype of torch (`fpsim.formats.format_name`). ``"none"``
    leaves the values unrounded.

    Attributes:
        format: the format of every operand of every matrix product, unless a more specific field names one.
        activation, weight, gradient: the format of the operands in this role, in all three kinds of product. It
            overrides `format`.
        output: the format of the results of all matrix products. The result of a linear layer includes its bias. Rows
            and blocks of elements that share a scale lie along the last axis. Default: results are not rounded.
        fprop, dgrad, wgrad: a mapping from role to format for the operands of this kind of product. It overrides the
            fields above. SwitchBack, for example, is ``wgrad={"gradient": "bf16", "activation": "bf16"}``. A format
            alone applies to all roles. The key ``output`` sets the format of the results of this kind of product.
        elementwise: the format of the results of all other operations on floating-point numbers, forward and backward:
            additions, softmax, normalisation, activation functions, the loss, the gradients of all these and the sums
            of gradients. A mapping with the keys ``forward`` and ``backward`` sets two different formats. Default:
            results are not rounded. An operation is one aten operator as the model or autograd calls it, before
            decomposition; its result is rounded once. Rows and blocks that share a scale lie along its last
            axis. An operator that torch itself composes of others (CompositeImplicitAutograd) counts as
            these others. Operations that only move, select or create numbers are not rounded, nor are
            operations that depend on neither a parameter nor a floating-point input.
        saved: the format of the copies of activations that forward keeps for backward, as in COAT (arXiv 2410.19313).
            Forward reads the activations themselves, and has the same bits as without it. A mapping with the keys
            ``product`` and ``elementwise`` sets the formats of the copies that the derivatives of matrix products
            and of all other operations read. An activation is every floating-point tensor that autograd saves and that
            depends on an input of the model: operands of products, arguments and results of activation functions,
            softmax, norms and losses. Not counted are parameters, functions of parameters alone, tables of constants,
            and statistics: tensors with one number for each row, and those that a norm or attention returns for its
            own backward. A view reads the copy of the tensor that it is a view of; rows and blocks that share a scale
            lie along the last axis of that tensor. The cast of an operand of dgrad or wgrad rounds the copy. Under
            activation checkpointing the inputs of a checkpointed region are saved, and backward computes the rest from
            their copies. The policy of the module whose derivative reads the copy decides. Default: backward reads
            what forward read.
        products: ``"all"`` rounds all matrix products. ``"weights"`` rounds only the products with weights, forward
            and backward: those of linear layers, convolutions and the LM head. Products of two activations, as in
            attention, are then listed as gaps.
        rounding: the rounding of every cast that names none. Default: ``nearest_even``. Stochastic rounding
            (``stochastic``, or ``stochastic:8`` with 8 random bits) draws its seed from torch's generator in every call
            of the model, so `torch.manual_seed` reproduces a run. Forward and backward see the same draw of the same
            rounding.
        overflow: the overflow mode of every cast that names none. Default: the usual mode of the format.
        scale: the scale of every operand whose cast names none. ``power_of_two`` multiplies an operand before it is
            rounded by the largest power of two that keeps it in the format's range, and divides by it afterwards
            (`fpsim.power_of_two_scale`: one factor per tensor, from the tensor's own largest magnitude). Default: None,
            operands are not scaled. A cast may name a scale too: ``"e5m2/power_of_two"`` or ``"e5m2/unscaled"``. In
            parallel training every rank computes the scales of its own tensors.
        transform: a change of both operands of a product, along the axis over which it sums, before they are rounded.
            It leaves the product as it is in exact arithmetic: ``hadamard:16`` rotates blocks
            (`fpsim.transforms.hadamard.Hadamard`), ``smooth`` moves factors of channels from one operand to the other
            (`fpsim.transforms.smoothing.Smoothing`), ``permute:amax`` sorts channels
            (`fpsim.transforms.permutation.Permutation`). ``smooth/hadamard:16`` rotates what smoothing has made of the
            operands (`fpsim.transforms.chain.Chain`). A mapping from kinds to transforms changes only products of these
            kinds: ``{"wgrad": "hadamard:16:te"}``. The changed operands are float32 (float64 for float64), and are
            rounded by their casts; an operand without a cast is rounded to the dtype of the product. Products of which
            no operand is rounded stay as they are. Default: no transform.
        skip: globs of module paths. The products in these modules are not rounded; the plan lists them as gaps.
        modules: a mapping from globs of module paths to the policy that applies to these modules instead: a `Policy`,
            a preset (``"paper:e8m3"``), a mapping of fields, a format, or ``"none"``. A mapping and a format inherit
            `rounding`, `overflow`, `scale` and `attention` from this policy. The first glob that matches decides.
            `skip` has precedence over `modules`. The policy of a module may have `skip` and `modules` of its own, with
            paths from the whole model.
        accumulator, chunk, order, promote: the accumulator of every matrix product, with the arguments of
            `fpsim.matmul`: ``accumulator="hopper_fp8"``, ``accumulator="e8m13/toward_zero", chunk=32``. Each may be a
            mapping from ``fprop``, ``dgrad`` and ``wgrad``; other kinds of product then have the sums of torch, or
            no chunk, order or promotion. Stored are the accumulators, with the other three in their text. A bias is
            added after the sum. Default: the sums are those of torch. Rules for modules do not inherit it.
        reductions: the accumulator of all sums that are no products, forward and backward: of softmax, norms (means and
            variances), losses, and gradients of biases and of broadcast tensors. A format with an order:
            ``"e8m13"``, ``"bf16 chunk=32"``, ``"fp16 order=pairwise"``, as in `fpsim.matmul`. Other steps (quotients,
            exponentials) stay in the tensors' dtype. Integers are added as usual. An operator whose sums cannot be
            simulated, such as the gradient of an embedding, is an error unless `gaps` lists it
            (``"aten.embedding_dense_backward"``). Default: the sums are those of torch. Rules for modules do not
            inherit it.
        attention: ``"round"`` decomposes scaled dot-product attention, so that its inner products are rounded.
            ``"keep"`` leaves it fused and unrounded; the plan lists it as a gap. ``"flash"`` computes it in tiles with
            an online softmax, as kernels do, and rounds every step: a `FlashAttention`, the name of a kernel
            (``flash2_bf16``, which ``flash`` means, ``flash2_fp16``, ``all_bf16``, ``flash3_fp8``), or a mapping of
            its fields, which may stand beside a name: ``{"preset": "flash2_bf16", "block_k": 64}``. The formats of
            this policy do not apply inside. In modules that `skip` names, attention stays fused and unrounded.
        gaps: names of operators that contain matrix products which the backend cannot round, and which may stay
            unrounded (``"aten.convolution"``, ``"*"``). The plan lists them. Any other such operator is an error.

    A glob (``layers.*.attn``, ``lm_head``) matches the path of a module. It then applies to everything inside the
    module too.

    A policy rounds what its fields name, and nothing else. Only a policy without any field means the OCP FP8 hybrid:
    ``e4m3fn`` activations and weights, ``e5m2`` gradients, ``sat_finite``. The preset ``fp8_hybrid`` names it together
    with other fields: ``Policy.from_options({"policy": "fp8_hybrid", "skip": "lm_head"})``. The backend refuses a
    policy that names no format at all (`check_names_format`).

    Raises:
        ValueError: a format, mode, role or choice is unknown. The message names it and the remedy.
        TypeError: a value has the wrong type, or an argument is no field. The message lists the fields.
    """

    # The annotations are the types that a caller may pass. `__post_init__` stores values instead: a `Cast` or "none"
    # for each cast, a `Scale`, and tuples for mappings and lists.
    format: CastLike | None = None
    activation: CastLike | None = None
    weight: CastLike | None = None
    gradient: CastLike | None = None
    output: CastLike | None = None
    fprop: CastsLike = ()
    dgrad: CastsLike = ()
    wgrad: CastsLike = ()
    elementwise: CastsLike = ()
    saved: CastsLike = ()
    products: str = "all"
    rounding: str = "nearest_even"
    overflow: str | None = None
    scale: str | Scale | None = None
    accumulator: AccumulatorsLike | None = None
    chunk: int | Mapping[str, int] | None = None
    order: Order | Mapping[str, Order] | None = None
    promote: int | Mapping[str, int] | None = None
    reductions: AccumulatorLike | None = None
    transform: TransformsLike | None = ()
    skip: str | Iterable[str] = ()
    modules: Mapping[str, ModuleRule] | Sequence[tuple[str, ModuleRule]] = ()
    attention: FlashLike = "round"
    gaps: str | Iterable[str] = ()

    def __post_init__(self) -> None:
        check_depth([getattr(self, field.name) for field in fields(self)])
        object.__setattr__(self, "rounding", full_rounding(self.rounding))
        if self.overflow is not None and self.overflow not in OVERFLOWS:
            hint = did_you_mean(self.overflow, OVERFLOWS)
            raise ValueError(
                f"unknown overflow mode {self.overflow!r}{hint}: use one of {', '.join(OVERFLOWS)}, or None"
            )
        if self.products not in PRODUCTS:
            hint = did_you_mean(self.products, PRODUCTS)
            raise ValueError(f"unknown products {self.products!r}{hint}: use one of {', '.join(PRODUCTS)}")
        set_ = object.__setattr__
        set_(self, "attention", _attention(self.attention))
        set_(self, "scale", parse_scale(self.scale))
        set_(self, "transform", self._transforms())
        set_(self, "skip", _strings("skip", self.skip))
        set_(self, "gaps", _strings("gaps", self.gaps))
        set_(self, "modules", self._module_rules())
        for name in ("format", *ROLES):
            set_(self, name, self._operand(getattr(self, name)))
        set_(self, "output", self._result(self.output))
        for kind in KINDS:
            set_(self, kind, self._casts(kind, ROLES, (*ROLES, "output"), "role"))
        set_(self, "accumulator", self._accumulators())
        set_(self, "reductions", None if self.reductions in (None, NONE) else parse_reduction(self.reductions))
        for name in ("chunk", "order", "promote"):  # the accumulators have them
            set_(self, name, None)
        set_(self, "elementwise", self._casts("elementwise", DIRECTIONS, DIRECTIONS, "direction"))
        set_(self, "saved", self._casts("saved", READERS, READERS, "reader"))
        if all(getattr(self, field.name) == field.default for field in fields(self)):
            for role, usual in HYBRID.items():
                set_(self, role, self._operand(usual))

    def _operand(self, given: CastLike | None) -> _StoredCast:
        """The cast of an operand; it takes the modes that it does not name from this policy."""
        if given is None:
            return None
        parsed = parse_cast(given, self.rounding, self.overflow, self.scale)
        if parsed is not None and parsed.scale is None and parsed.leaves_scale_open:
            # The cast is of a policy without a scale, which `dataclasses.replace` gave one.
            parsed = replace(parsed, scale=parse_scale(self.scale))
        if parsed is not None and parsed.transform is not None and parsed.transform.is_of_products:
            name = str(parsed.transform)
            raise ValueError(
                f"cast {str(given)!r} transforms one operand, and {name!r} is to change both operands of a product: "
                f"leave it out of the cast, and write transform={name!r}"
            )
        return parsed or NONE

    def _result(self, given: CastLike | None) -> _StoredCast:
        """`_operand` for the result of an operation, for which `scale` does not stand."""
        if given is None:
            return None
        parsed = parse_cast(given, self.rounding, self.overflow)
        if parsed is not None and parsed.scale is not None and parsed.scale.is_timed:
            raise ValueError(
                f"results and saved activations have no scales that other steps determine: leave "
                f"{parsed.scale.timing!r} out of {str(given)!r}"
            )
        if parsed is not None and parsed.transform is not None:
            name = str(parsed.transform)
            raise ValueError(
                f"the result of an operation takes no transform, nor does a saved activation: leave {name!r} out of "
                f"{str(given)!r}"
            )
        return parsed or NONE

    def _casts(
        self, name: str, usual: Sequence[str], valid: Sequence[str], what: str
    ) -> tuple[tuple[str, _StoredCast], ...]:
        """The field ``name``, a mapping from ``valid`` keys to casts; a cast alone applies to all ``usual`` keys."""
        given = getattr(self, name)
        if isinstance(given, CastLike):
            given = dict.fromkeys(usual, given)
        casts = {key: cast for key, cast in _pairs(name, given) if cast is not None}
        _check_keys(what, name, casts, valid)
        parsers = {key: self._operand if key in ROLES else self._result for key in valid}
        return tuple((key, parsers[key](casts[key])) for key in valid if key in casts)

    def _accumulators(self) -> tuple[tuple[str, Accumulator], ...] | None:
        """The accumulators by kind of product, each with its chunk, order and promotion; None if there are none."""
        given = {name: _by_kind(name, getattr(self, name)) for name in ("accumulator", "chunk", "order", "promote")}
        accumulators = given.pop("accumulator")
        for name, values in given.items():
            if lacking := [kind for kind in values if kind not in accumulators and values[kind] is not None]:
                raise ValueError(f"{name} is that of an accumulator, and {lacking[0]} has none: name accumulator too")
        parsed = tuple(
            (kind, parse_accumulator(accumulators[kind], *(given[name].get(kind) for name in given)))
            for kind in KINDS
            if kind in accumulators
        )
        return parsed or None

    def _transforms(self) -> tuple[tuple[str, Transform], ...]:
        """The field `transform`, a mapping from kinds to transforms; a transform alone applies to all kinds."""
        given = () if self.transform is None else self.transform
        if isinstance(given, str | Transform):
            given = dict.fromkeys(KINDS, given)
        transforms = {kind: parse_transform(name) for kind, name in _pairs("transform", given)}
        _check_keys("kind", "transform", transforms, KINDS)
        for transform in transforms.values():
            if transform is not None and not transform.is_of_products:
                name = str(transform)
                raise ValueError(
                    f"transform {name!r} changes one tensor, not both operands of a product: write it in a cast, such "
                    f"as 'e4m3fn/group:128/{name}', or use one of {', '.join(NAMES_OF_PRODUCTS)}"
                )
        return tuple((kind, transforms[kind]) for kind in KINDS if transforms.get(kind) is not None)  # type: ignore[misc]

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
        """The policy of a rule for modules; None if the rule says that nothing is rounded.

        A mapping of fields and a cast inherit the modes and `attention` of this policy. A preset and a `Policy` inherit
        nothing.
        """
        if given is None or given == NONE:
            return None
        if isinstance(given, Policy):
            return given
        if isinstance(given, str) and is_preset(given):
            return Policy.preset(given)
        if isinstance(given, CastLike):
            given = {"format": given}
        if isinstance(given, Mapping) and "policy" not in given:
            given = {**{name: getattr(self, name) for name in _INHERITED}, **given}
        return Policy.from_options(given)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Restore a policy that was pickled, also by an older fpsim, which kept casts and scales as text."""
        vars(self).update(state)
        self.__post_init__()

    # -- queries ---------------------------------------------------------------------------------------------

    def at(self, path: str) -> Policy | None:
        """The policy for the module ``path``; None if nothing in it is rounded."""
        if any(matches(glob, path) for glob in self.skip):
            return None
        for glob, policy in self._rules:
            if matches(glob, path):
                return None if policy is None else policy.at(path)
        return self

    def cast(self, kind: str, role: str) -> Cast | None:
        """The cast of the operand with ``role`` in products of ``kind``; None if it is not rounded."""
        return _rounding_cast(_casts_by_key(self, kind).get(role) or getattr(self, role) or self.format)

    def product_transform(self, kind: str) -> Transform | None:
        """The transform of both operands of products of ``kind``; None if they are rounded as they are."""
        return dict(cast(tuple[tuple[str, Transform], ...], self.transform)).get(kind)

    def operand_casts(self) -> list[Cast | None]:
        """The casts of all operands, for every role of every kind of product; None for unrounded operands."""
        own = [self.cast(kind, role) for kind in KINDS for role in ROLES if (kind, role) in OPERANDS]
        return own + [cast for policy in self._policies_of_modules for cast in policy.operand_casts()]

    def output_cast(self, kind: str) -> Cast | None:
        """The cast of the results of products of ``kind``; None if they are not rounded."""
        return _rounding_cast(_casts_by_key(self, kind).get("output", cast(_StoredCast, self.output)))

    def accumulator_of(self, kind: str) -> Accumulator | None:
        """The accumulator of products of ``kind``; None if their sums are those of torch."""
        return dict(cast(tuple[tuple[str, Accumulator], ...], self.accumulator or ())).get(kind)

    @property
    def reduction(self) -> Accumulator | None:
        """The accumulator of sums that are no products; None if they are those of torch."""
        return cast(Accumulator | None, self.reductions)

    @property
    def reduces(self) -> bool:
        """Whether sums that are no products have an accumulator in any module."""
        return self.reductions is not None or any(policy.reduces for policy in self._policies_of_modules)

    @property
    def accumulates(self) -> bool:
        """Whether products have an accumulator in any module."""
        return self.accumulator is not None or any(policy.accumulates for policy in self._policies_of_modules)

    def elementwise_cast(self, direction: str) -> Cast | None:
        """The cast of the results of other operations, ``forward`` or ``backward``; None if they are not rounded."""
        return _rounding_cast(_casts_by_key(self, "elementwise").get(direction))

    def saved_cast(self, reader: str) -> Cast | None:
        """The cast of the activations that a ``product`` or an ``elementwise`` operation reads in backward, or None."""
        return _rounding_cast(_casts_by_key(self, "saved").get(reader))

    @property
    def rounds_saved(self) -> bool:
        """Whether activations that are kept for backward are rounded in any module."""
        return bool(self.saved) or any(policy.rounds_saved for policy in self._policies_of_modules)

    @property
    def rounds_results(self) -> bool:
        """Whether results are rounded in any module: results of products or of other operations."""
        own = bool(self.elementwise) or any(self.output_cast(kind) for kind in KINDS)
        return own or any(policy.rounds_results for policy in self._policies_of_modules)

    def rounds_elementwise(self, direction: str) -> bool:
        """Whether results of operations that are no products are rounded in any module, ``forward`` or ``backward``."""
        own = self.elementwise_cast(direction) is not None
        return own or any(policy.rounds_elementwise(direction) for policy in self._policies_of_modules)

    def check_names_format(self) -> None:
        """Refuse a policy that names no format, for the whole model or in a rule for modules.

        It would round nothing, without a word. ``format="none"`` says that nothing is to be rounded.

        Raises:
            ValueError: the message names the fields that the policy has.
        """
        for glob, policy in self._rules:
            try:
                if policy is not None:
                    policy.check_names_format()
            except ValueError as error:
                raise ValueError(f"in the rule for modules {glob!r}: {error}") from None
        sums = self.accumulator or self.reductions
        is_rounding = self._policies_of_modules or sums or isinstance(self.attention, FlashAttention)
        is_rounding = is_rounding or any(True for _ in self._all_casts())
        says_none = self.format == NONE or all(getattr(self, role) == NONE for role in ROLES)
        if not is_rounding and not says_none:
            given = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
            raise ValueError(
                f"no option names a format (given: {', '.join(given)}), so that nothing would be rounded: add a "
                "format, such as format='e4m3fn', or start from a preset with policy='fp8_hybrid'; format='none' says "
                "that nothing is to be rounded"
            )

    def _check_beside_preset(self, name: str, given: Mapping[str, Any]) -> None:
        """Refuse a format or mode in ``given`` that no cast takes, because those of the preset ``name`` name their own.

        Raises:
            ValueError: the message names the option and the fields to write in its place.
        """
        specific = [_casts_by_key(self, kind).get(role) or getattr(self, role) for kind, role in sorted(OPERANDS)]
        is_taken = {
            "format": not all(specific),
            "rounding": any(cast.rounding == self.rounding for cast in self._all_casts()),
            "overflow": any(cast.overflow == self.overflow for cast in self._all_casts()),
        }
        for option, taken in is_taken.items():
            if given.get(option) is not None and not taken:
                fields_ = ", ".join(ROLES) if name in PRESETS else "format"
                raise ValueError(
                    f"{option}={given[option]!r} beside policy={name!r} would change nothing, for every cast of this "
                    f"preset names its own {option}: write casts such as 'e4m3fn/toward_zero/ovf_inf' in {fields_}"
                )

    def _all_casts(self) -> Iterator[Cast]:
        """The casts that any field names, in the rules for modules too."""
        casts = [getattr(self, name) for name in ("format", *ROLES, "output")]
        casts += [cast for name in (*KINDS, "elementwise", "saved") for cast in _casts_by_key(self, name).values()]
        yield from (cast for cast in casts if isinstance(cast, Cast))
        for policy in self._policies_of_modules:
            yield from policy._all_casts()

    @property
    def uses_paths(self) -> bool:
        """Whether any rule depends on the module that contains an operation."""
        return bool(self.skip or self.modules)

    @property
    def is_stochastic(self) -> bool:
        """Whether any rounding draws random numbers."""
        sums = [self.reduction, *(self.accumulator_of(kind) for kind in KINDS)]
        return (
            any(cast.is_stochastic for cast in self._all_casts())
            or any(accumulator is not None and accumulator.is_stochastic for accumulator in sums)
            or (isinstance(self.attention, FlashAttention) and self.attention.is_stochastic)
            or any(policy.is_stochastic for policy in self._policies_of_modules)
        )

    @property
    def stated_fields(self) -> frozenset[str]:
        """The names of the fields that differ from their defaults, here or in a rule for modules."""
        own = {field.name for field in fields(self) if getattr(self, field.name) != field.default}
        return frozenset(own.union(*(policy.stated_fields for policy in self._policies_of_modules)))

    @property
    def is_timed(self) -> bool:
        """Whether any scale depends on other steps."""
        return any(cast.scale is not None and cast.scale.is_timed for cast in self._all_casts())

    @property
    def attentions(self) -> frozenset[str | FlashAttention]:
        """The values of `attention` in this policy and in the rules for modules."""
        own = cast(str | FlashAttention, self.attention)
        return frozenset({own}.union(*(policy.attentions for policy in self._policies_of_modules)))

    def unmatched_globs(self, paths: Set[str]) -> list[str]:
        """The globs of `skip` and `modules` that match none of ``paths``, the paths of modules.

        Those in the policy of a rule for modules have to match a path to which the rule applies.
        """
        own = (*self.skip, *(glob for glob, _ in self._rules))
        unmatched = [glob for glob in own if not any(matches(glob, path) for path in paths)]
        for outer, policy in self._rules:
            if policy is not None:
                unmatched += policy.unmatched_globs({path for path in paths if matches(outer, path)})
        return list(dict.fromkeys(unmatched))

    @property
    def all_gaps(self) -> tuple[str, ...]:
        """`gaps` of this policy and of the policies in the rules for modules."""
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

    # -- other policies --------------------------------------------------------------------------------------

    @property
    def of_forward(self) -> Policy:
        """The policy that rounds in forward as this one does, and nothing in backward.

        >>> Policy(activation="e4m3fn", weight="e4m3fn", gradient="e5m2/stochastic").of_forward.is_stochastic
        False
        """
        elementwise, accumulator = self.elementwise_cast("forward"), self.accumulator_of("fprop")
        transform = self.product_transform("fprop")
        return replace(
            self,
            format=NONE,
            gradient=NONE,
            activation=self.cast("fprop", "activation") or NONE,
            weight=self.cast("fprop", "weight") or NONE,
            output=self.output_cast("fprop"),
            elementwise={} if elementwise is None else {"forward": elementwise},
            accumulator=None if accumulator is None else {"fprop": accumulator},
            transform={} if transform is None else {"fprop": transform},
            fprop=(),
            dgrad=(),
            wgrad=(),
            saved=(),
            modules=tuple((glob, policy and policy.of_forward) for glob, policy in self._rules),
        )

    def with_modules(self, modules: Mapping[str, ModuleRule] | Sequence[tuple[str, ModuleRule]]) -> Policy:
        """This policy with more rules for modules. They precede its own rules and replace rules with the same glob.

        Args:
            modules: the new rules, in the form of the field `modules`.

        Raises: the errors of `Policy`.

        >>> Policy(format="e8m3", skip="lm_head").with_modules({"lm_head": "bf16"}).skip
        ()
        """
        first = _pairs("modules", modules)
        globs = {glob for glob, _ in first}
        rest = [(glob, policy) for glob, policy in self._rules if glob not in globs]
        return replace(self, skip=tuple(glob for glob in self.skip if glob not in globs), modules=(*first, *rest))

    @staticmethod
    def preset(name: str) -> Policy:
        """The policy with this name.

        - ``fp8_hybrid``: the default policy, the OCP FP8 hybrid.
        - ``bf16``, ``fp16``: operands and results of all matrix products are rounded, as under autocast; no others.
        - ``mxfp8``: e4m3fn in blocks of 32 with E8M0 scales for every operand, along the axis that its product sums
          over (Transformer Engine's recipe MXFP8).
        - ``nvfp4``: Transformer Engine's recipe NVFP4 (arXiv 2509.25149) for products with weights. e2m1fn in blocks of
          16, weights in tiles of 16 by 16, gradients rounded stochastically with 8 random bits, and both operands of
          wgrad rotated in blocks of 16 with fixed signs. Attention is not rounded. The recipe also keeps the LM head
          and some blocks in bfloat16, which depends on the model: ``skip=["lm_head", "layers.0", ...]``. A convolution
          has no rotation in wgrad, and needs a rule in `modules`.
        - ``amp_bf16``, ``dfp16``, ``te_current``, ``te_delayed``, ``torchao_rowwise``, ``torchao_rowwise_gw_hp``,
          ``torchao_tensorwise``: the policies of the recipes of these names (`fpsim.recipes`), with default arguments.
        - ``paper:FORMAT``, such as ``paper:e8m3``: the recipe of arXiv 2405.18710, as far as it is known. Both operands
          of all three products of linear layers, the LM head included, are truncated. Attention is not rounded. With
          the exponents of bfloat16 (``e8m3``) this is a bit mask, through which infinities and NaN pass. Any other
          format clips to its largest value, infinities included. (Reviews of the paper state a bit mask for mantissas,
          and clipping for exponents. It is an inference that gradients are truncated too, and that attention is not.)

        Raises:
            ValueError: the name or the format is unknown.
        """
        return Policy(**_preset_fields(name))

    # -- conversions -----------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as JSON types. Formats are spelled as the caller spelled them."""
        return self._fields(spelled=True)

    def canonical(self) -> str:
        """JSON text that is the same for equal policies, whatever the spelling of their formats."""
        return json.dumps(self._fields(spelled=False))

    def _fields(self, spelled: bool) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if value == field.default:
                continue
            if field.name in (*KINDS, "elementwise", "saved"):
                value = {key: self._text(cast, spelled) if isinstance(cast, Cast) else cast for key, cast in value}
            elif field.name == "accumulator":
                texts = {kind: str(accumulator) for kind, accumulator in value}
                value = texts[KINDS[0]] if len(texts) == len(KINDS) and len(set(texts.values())) == 1 else texts
            elif isinstance(value, Accumulator):
                value = str(value)
            elif field.name == "transform":
                value = _written_transforms(dict(value))
            elif field.name == "modules":
                value = {glob: self._rule_fields(policy, spelled) for glob, policy in self._rules}
            elif isinstance(value, Cast):
                value = self._text(value, spelled)
            elif isinstance(value, Scale):
                value = str(value)
            elif isinstance(value, FlashAttention):
                value = value.written() if spelled else value.to_dict(spelled=False)
            elif isinstance(value, tuple):
                value = list(value)
            result[field.name] = value
        return result

    def _rule_fields(self, policy: Policy | None, spelled: bool) -> str | dict[str, Any]:
        """The fields of a module's policy, including those that a reader would otherwise inherit from this policy."""
        if policy is None:
            return NONE
        inherited: dict[str, Any] = {"rounding": policy.rounding, "overflow": policy.overflow}
        if policy.scale != self.scale:
            inherited["scale"] = None if policy.scale is None else str(policy.scale)
        own = policy._fields(spelled)
        if policy.attention == self.attention:
            own.pop("attention", None)
        else:
            kernel = policy.attention
            inherited["attention"] = kernel.written() if isinstance(kernel, FlashAttention) else kernel
        return {**inherited, **own}

    def _text(self, cast: Cast, spelled: bool) -> str:
        """The text from which a policy with this policy's modes parses the same cast."""
        text = cast.written if spelled else str(cast)
        return f"{text}/{UNSCALED}" if self.scale is not None and cast.scale is None else text

    def to_json(self) -> str:
        """The policy as JSON text; `from_json` gives an equal policy."""
        return json.dumps({"version": JSON_VERSION, **self.to_dict()}, indent=2)

    @staticmethod
    def from_json(text: str) -> Policy:
        """The policy that `to_json` wrote.

        Raises:
            ValueError: ``text`` is not JSON, is not a policy, or was written by a newer fpsim.
        """
        return Policy.from_options(parse_versioned(text, "policy", JSON_VERSION))

    @staticmethod
    def from_options(options: Mapping[str, Any] | None) -> Policy:
        """The policy that the ``options`` of `torch.compile` state: its fields, or ``{"policy": policy}``.

        In the second form ``policy`` is a `Policy`, the name of a preset, or a mapping of fields. Fields beside the
        name of a preset replace those of the preset: ``{"policy": "fp8_hybrid", "skip": ["lm_head"]}``.

        Raises:
            ValueError: a key is not a field (the message lists all fields), a `Policy` or a mapping is given
                together with fields, or a format or mode beside the name of a preset would change nothing.
            TypeError: ``options`` is not a mapping, or ``policy`` has none of these three types.
        """
        check_depth(options)
        if not isinstance(options, Mapping | None):
            raise TypeError(f"{options!r} is no policy: give a Policy or its fields, such as {{'format': {options!r}}}")
        options = dict(options or {})
        if "policy" in options:
            policy = options.pop("policy")
            if isinstance(policy, str):
                result = Policy.from_options({**_preset_fields(policy), **options})
                result._check_beside_preset(policy, options)
                return result
            if options:
                raise ValueError(f"give either 'policy' or its fields, not both: {', '.join(sorted(options))}")
            return policy if isinstance(policy, Policy) else Policy.from_options(policy)
        valid = [field.name for field in fields(Policy)]
        for key in options:
            if key not in valid:
                hint = did_you_mean(key, valid)
                raise ValueError(f"unknown option {key!r}{hint}: fpsim's options are {', '.join(valid)}, or policy")
        return Policy(**options)


#: The argument type of a rule for the modules that a glob matches.
ModuleRule = Policy | Mapping[str, Any] | CastLike | None


def _preset_fields(name: str) -> dict[str, Any]:
    """The fields of the preset ``name``; raises ValueError if it is unknown."""
    if name.startswith(_PAPER):
        written = name.removeprefix(_PAPER)
        cast = f"{written}/toward_zero/{'sat_propagate' if _is_masked(written) else 'sat_finite'}"
        return {"format": cast, "products": "weights", "attention": "keep"}
    if name in MORE_THAN_POLICIES:
        raise ValueError(
            f"{name!r} is more than a policy: use fpsim.recipes.{name}().apply(model, optimizer), which returns both"
        )
    if name not in PRESETS:
        raise ValueError(
            f"unknown preset {name!r}{did_you_mean(name, PRESETS)}: use one of {', '.join(PRESETS)}, or "
            f"{_PAPER}FORMAT; one format for all is {{'format': {name!r}}}"
        )
    return PRESETS[name]


def _written_transforms(transforms: Mapping[str, Transform]) -> str | dict[str, str]:
    """The text of the field `transform`: one name if it is the same for all kinds."""
    names = {kind: str(transform) for kind, transform in transforms.items()}
    return names["fprop"] if len(names) == len(KINDS) and len(set(names.values())) == 1 else names


def _is_masked(name: str) -> bool:
    """Whether a bit mask makes the format of the paper's bfloat16: with its exponents, so that infinities pass.

    A format of fewer exponents clips the range, infinities included.
    """
    given = parse_format(name)
    return isinstance(given, FloatFormat) and given == FloatFormat(8, given.mantissa_bits)


def is_preset(name: str) -> bool:
    """Whether ``name`` is that of a preset and not of a format too, as ``bf16`` and ``nvfp4`` are."""
    try:
        parse_cast(name)
    except ValueError:
        return name in PRESETS or name.startswith(_PAPER)
    return False


def _attention(given: FlashLike) -> str | FlashAttention:
    """The field `attention` as a policy stores it."""
    if isinstance(given, str) and given not in (*ATTENTIONS, "flash", *KERNELS):
        valid = (*ATTENTIONS, "flash", *KERNELS)
        raise ValueError(f"unknown attention {given!r}{did_you_mean(given, valid)}: use one of {', '.join(valid)}")
    return given if isinstance(given, str) and given in ATTENTIONS else parse_flash(given)


def _by_kind(name: str, given: Any) -> dict[str, Any]:
    """``given``, one value for all kinds of product or a mapping, as a mapping without the kinds that have none."""
    is_mapping = isinstance(given, Mapping) or (
        isinstance(given, tuple | list) and bool(given) and all(isinstance(p, tuple | list) for p in given)
    )
    values = dict(_pairs(name, given)) if is_mapping else dict.fromkeys(KINDS, given)
    _check_keys("kind", name, values, KINDS)
    return {kind: value for kind, value in values.items() if value is not None and value != NONE}


def _check_keys(what: str, name: str, given: Iterable[str], valid: Sequence[str]) -> None:
    """Refuse keys of the field ``name`` that are not ``valid``."""
    if unknown := sorted(set(given) - set(valid)):
        hint = did_you_mean(unknown[0], valid)
        raise ValueError(f"unknown {what} {unknown[0]!r} in {name}{hint}: use {', '.join(valid)}")


def _strings(name: str, given: Any) -> tuple[str, ...]:
    items = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else (given,)
    if not all(isinstance(item, str) for item in items):
        raise TypeError(f"{name} must be a list of strings, got {given!r}")
    return items


def _pairs(name: str, given: Any) -> list[tuple[str, Any]]:
    """The items of ``given``, a mapping or a list of pairs."""
    pairs = list(given.items()) if isinstance(given, Mapping) else given
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise TypeError(f"{name} must be a mapping, got {given!r}")
    return [(str(key), value) for key, value in pairs]


def _casts_by_key(policy: Policy, name: str) -> dict[str, _StoredCast]:
    """The field ``name`` of a policy, as a mapping from roles or directions to casts."""
    return dict(getattr(policy, name))


def _rounding_cast(stored: Any) -> Cast | None:
    return stored if isinstance(stored, Cast) else None
