"""Finding the matrix products of a joint forward-and-backward aten graph, and telling what each operand is.

What a product is stands in three tables: `PRODUCTS`, operators whose operands can be rounded, `JOINT_PRODUCTS`,
operators that compute several products at once, and `is_opaque`, operators that hold products inside and are
refused. Small products are decomposed into a multiplication and a sum before any pass sees them; those are
recognised by the operator or the function that they came from. Roles follow from what a value depends on:
parameters, inputs, or the incoming gradient.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any, cast

import torch
from torch import fx

from fpsim.compile_backend.graph.marks import find_marks, mark

aten = torch.ops.aten

#: Matrix products (a convolution is one), and the positions of their two operands.
PRODUCTS: dict[torch._ops.OpOverload, tuple[int, int]] = {
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
    aten.mv.default: (0, 1),
    aten.addmv.default: (1, 2),
    aten.dot.default: (0, 1),
    aten.vdot.default: (0, 1),
    aten.addbmm.default: (1, 2),
    aten.mm.dtype: (0, 1),
    aten.bmm.dtype: (0, 1),
    aten.addmm.dtype: (1, 2),
    aten.baddbmm.dtype: (1, 2),
    aten._grouped_mm.default: (0, 1),
    aten.convolution.default: (0, 1),
}

#: Operators that compute two products, each of their results one: the positions of the operands of each result.
JOINT_PRODUCTS: dict[torch._ops.OpOverload, tuple[tuple[int, int], ...]] = {
    aten.convolution_backward.default: ((0, 2), (0, 1)),  # of the input and of the weight; that of the bias is a sum
}
_PRODUCT_NAMES = {op.overloadpacket for op in [*PRODUCTS, *JOINT_PRODUCTS]}

#: Functions of torch whose every multiplication of two tensors, forward and backward, belongs to a matrix product.
_PRODUCT_FUNCTIONS = frozenset(
    {
        "linear", "matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "outer", "ger", "addmm", "baddbmm", "addmv",
        "addr", "addbmm", "einsum", "tensordot", "chain_matmul", "multi_dot", "linalg_multi_dot", "vecdot",
        "linalg_vecdot", "kron",
    }
)  # fmt: skip

#: Operators that hold matrix products which cannot be rounded from outside (patterns of their names).
_OPAQUE = re.compile(
    r"aten\.("
    r"convolution|_convolution|convolution_backward|conv_|cudnn_conv|mkldnn_conv|mkldnn_rnn|miopen_"
    r"|_scaled_dot_product|_flash_attention|_efficient_attention|_fused_sdp|_native_multi_head_attention"
    r"|_transform_bias_rescale_qkv|_transformer_encoder_layer_fwd|_triton_scaled_dot_attention"
    r"|_cdist_|_pdist_|_euclidean_dist|_trilinear|_grouped_mm|_scaled_grouped_mm|_scaled_mm|_addmm_activation"
    r"|_sparse_|_weight_int|_dyn_quant|_cudnn_rnn|lstm|gru|rnn_|_thnn_"
    r"|linalg_(?!vector_norm|cross|_powsum)|_linalg_|cholesky|matrix_exp|triangular_solve|lu_solve|ormqr|_compute_linear_combination"
    r").*"
)
_ATTENTION = re.compile(r"aten\.(_scaled_dot_product|_flash_attention|_efficient_attention|_fused_sdp).*")

#: What to do instead of calling an operator, for patterns of the names; the first that matches.
_REMEDIES = {
    r"aten\.(_transformer_encoder_layer_fwd|_native_multi_head_attention).*": "Turn torch's fast path off: "
    "torch.backends.mha.set_fastpath_enabled(False)",
    _ATTENTION.pattern: "Leave the choice of the kernel to torch.nn.functional.scaled_dot_product_attention",
    r"aten\._trilinear": "Write it as torch.einsum('bi,kij,bj->bk', x, weight, y)",
    r"aten\.(_euclidean_dist|_cdist|_pdist).*": "Write the distance out: (x[:, None] - y).square().sum(-1).sqrt()",
    r"aten\.mkldnn_rnn.*": "Let torch take the layer apart: torch.backends.mkldnn.enabled = False",
    r"aten\._cudnn_rnn.*": "Let torch take the layer apart: torch.backends.cudnn.enabled = False",
    r"aten\._embedding_bag.*": "Write it as torch.einsum('bn,bnd->bd', per_sample_weights, embedding(indices))",
    r"transformers\.grouped_mm.*": "Set experts_implementation='batched_mm' in the model's configuration",
    r"higher_order\.flex_attention.*": "Use torch.nn.functional.scaled_dot_product_attention",
    r"higher_order\..*": "Write what it does as plain Python, which torch.compile traces",
    r".*": "Replace it",
}

#: Namespaces whose operators are known not to hide products (beyond `_OPAQUE`).
_TRANSPARENT_NAMESPACES = frozenset(
    {"aten", "prims", "fpsim", "inductor", "inductor_prims", "rngprims", "_c10d_functional", "c10d_functional"}
)

#: Operators that only rearrange their first operand: rounding commutes with them.
VIEWS = frozenset(
    {
        aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.t, aten.transpose, aten.unsqueeze,
        aten.squeeze, aten.expand, aten.alias, aten.detach, aten.clone,
    }
)  # fmt: skip


class Source(enum.Flag):
    """What a value depends on."""

    NONE = 0
    PARAMETER = enum.auto()
    BUFFER = enum.auto()
    INPUT = enum.auto()  #: a floating-point input of the model
    INTEGER_INPUT = enum.auto()
    TANGENT = enum.auto()  #: a gradient coming in from outside the graph


#: What varies. A value that depends on none of these is part of the model's definition: a table of angles, say.
VARIABLE = Source.PARAMETER | Source.INPUT | Source.TANGENT


@dataclass(frozen=True)
class Product:
    """A matrix product in a graph.

    Attributes:
        value: the value of the multiplication, or what the multiplication gives beside other values.
        result: the value of the product: `value`, or, where the product is decomposed into a multiplication and a sum,
            the end of these.
        operands: the positions of its two operands among the arguments of `node`.
        roles: ``activation``, ``weight`` or ``gradient``, for each operand.
        kind: ``fprop``, ``dgrad`` or ``wgrad``.
        operator: the name of the operator it comes from, such as ``aten.mm``.
        path: the path of the module it belongs to, ``""`` for the root; None if unknown.
        constant: whether it depends on nothing but buffers, constants and integer inputs (a table of rotary
            angles, say): part of the model's definition rather than of its arithmetic.
    """

    value: fx.Node
    result: fx.Node
    operands: tuple[int, int]
    roles: tuple[str, str]
    kind: str
    operator: str
    path: str | None
    constant: bool

    @property
    def has_weight(self) -> bool:
        """Whether it is the product of a weight, forward, or one of the gradients of such a product."""
        return self.kind == "wgrad" or "weight" in self.roles

    @property
    def node(self) -> fx.Node:
        """The multiplication."""
        return _multiplication(self.value)


def find_products(graph: fx.Graph, sources: Mapping[fx.Node, Source], input_sources: Sequence[Source]) -> list[Product]:
    """The floating-point matrix products of ``graph``, in its order.

    Args:
        graph: a joint or inference graph of aten operators, as Inductor's joint-graph passes see it.
        sources: what its nodes depend on: `find_sources`.
        input_sources: what the inputs of the traced function are, in its order.
    """
    found = [(node, operands) for node in graph.nodes if (operands := _operands(node))]
    forward = [(node, operands) for node, operands in found if not is_backward(node, sources)]
    mates = {node.meta.get("seq_nr"): (node, operands) for node, operands in forward}
    ends = _ends(graph)
    return [
        _classify(node, operands, sources, mates.get(node.meta.get("seq_nr")), input_sources, ends.get(node))
        for node, operands in found
    ]


def is_product(node: fx.Node) -> bool:
    """Whether ``node`` is the value of a product of matrices of floating-point numbers, or computes several."""
    return node.target in JOINT_PRODUCTS or _operands(node) is not None


def find_opaque(graph: fx.Graph) -> list[tuple[fx.Node, str]]:
    """The nodes whose operators may hold floating-point products that cannot be rounded, with their names."""
    return [
        (node, name)
        for node in graph.nodes
        if node.op == "call_function" and _has_floats(node) and (name := operator_name(node)) and is_opaque(node)
    ]


def is_opaque(node: fx.Node) -> bool:
    """Whether the operator of ``node`` may hold products that this backend cannot reach."""
    target = _operator(node)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True
    if not isinstance(target, torch._ops.OpOverload) or is_product(node):
        return False
    hidden = may_hold_products(operator_name(node)) or _weighs_embeddings(node)
    return target.namespace not in _TRANSPARENT_NAMESPACES or hidden


def _weighs_embeddings(node: fx.Node) -> bool:
    """Whether ``node`` is a bag of embeddings, or its derivative, that multiplies each by a weight of its sample."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return given.get("per_sample_weights") is not None


def may_hold_products(operator: str) -> bool:
    """Whether ``operator``, of aten, holds products that this backend cannot reach."""
    return bool(_OPAQUE.fullmatch(operator))


def is_attention(operator: str) -> bool:
    """Whether ``operator`` is a fused scaled-dot-product attention, forward or backward."""
    return bool(_ATTENTION.fullmatch(operator))


def is_body(graph: fx.Graph) -> bool:
    """Whether ``graph`` is the body of a higher-order operator, which is opaque.

    AOTAutograd describes the results of whole graphs only.
    """
    return not any("desc" in node.meta for node in graph.find_nodes(op="output"))


def remedy(operator: str) -> str:
    """What to do instead of calling ``operator``, which holds products that cannot be rounded."""
    return next(text for pattern, text in _REMEDIES.items() if re.fullmatch(pattern, operator))


def operator_name(node: fx.Node) -> str:
    """The name of the operator of ``node``, without its overload: ``aten.mm``, ``higher_order.cond``."""
    target = _operator(node)
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target._opname}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    return getattr(target, "__name__", str(target))


def module_path(node: fx.Node) -> str | None:
    """The path of the module in whose forward ``node`` arose: ``layers.0.attn``; None if it is not recorded."""
    stack = node.meta.get("fwd_nn_module_stack") or node.meta.get("nn_module_stack")
    if not stack:
        return None
    return stack_path(list(stack.values())[-1][0])


def stack_path(source: str) -> str:
    """The path of a module from its source in a module stack: ``L['self'].layers.0`` is ``layers.0``."""
    return re.sub(r"^[LG]\['[^']*'\](\.|$)", "", source)


def is_view(node: fx.Node) -> bool:
    """Whether ``node`` only rearranges its first argument."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in VIEWS


def find_input(graph: fx.Graph, position: int) -> fx.Node:
    """The placeholder of ``graph`` that is input number ``position`` of the traced function."""
    for node in graph.nodes:
        description = node.meta.get("desc")
        if type(description).__name__ == "PlainAOTInput" and description.idx == position and node.op == "placeholder":
            return node
    raise LookupError(f"the traced graph has no input number {position}")


def find_sources(graph: fx.Graph, input_sources: Sequence[Source]) -> dict[fx.Node, Source]:
    """What every node of ``graph`` depends on; ``input_sources`` says what the inputs of the traced function are."""
    sources: dict[fx.Node, Source] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            sources[node] = _placeholder_source(node, input_sources)
        elif node.op == "get_attr":
            sources[node] = Source.BUFFER
        else:
            result = Source.NONE
            for argument in node.all_input_nodes:
                result |= sources[argument]
            sources[node] = result
    return sources


def _placeholder_source(node: fx.Node, input_sources: Sequence[Source]) -> Source:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return Source.NONE  # sizes
    description: Any = node.meta.get("desc")
    while hasattr(description, "base"):  # views, subclasses: what they were made of
        description = description.base
    name = type(description).__name__
    if name == "TangentAOTInput":
        return Source.TANGENT
    if name == "ParamAOTInput":
        return Source.PARAMETER
    if name == "BufferAOTInput":
        return Source.BUFFER
    if name == "PlainAOTInput":
        return input_sources[description.idx]
    return Source.INPUT if _is_float(value) else Source.INTEGER_INPUT


def is_backward(node: fx.Node, sources: Mapping[fx.Node, Source]) -> bool:
    """Whether ``node`` belongs to the backward pass."""
    return bool(sources[node] & Source.TANGENT) or node.meta.get("partitioner_tag") == "is_backward"


def _original(node: fx.Node) -> object:
    """The operator packet that ``node`` was before decomposition."""
    original = node.meta.get("original_aten") or node.target
    return getattr(original, "overloadpacket", original)


def _operator(node: fx.Node) -> object:
    """The operator that ``node`` counts as: its own, but for the product that torch makes of a distance.

    Its operands hold vectors beside their squared lengths, which no narrow format suits both.
    """
    within_distance = node.target in PRODUCTS and _original(node) is aten._euclidean_dist
    return node.meta["original_aten"] if within_distance else node.target


def _multiplication(result: fx.Node) -> fx.Node:
    """The node that computes ``result``: itself, or the operator of whose values it is one."""
    return cast(fx.Node, result.args[0]) if result.target is getitem else result


def _ends(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The multiplications of decomposed products, and the marks at which the products end."""
    ends = {}
    for end in find_marks(graph):
        waiting = [end.args[0]] if _original(end) in _PRODUCT_NAMES else []
        while waiting:
            node: fx.Node = waiting.pop()  # type: ignore[assignment]
            if _original(node) is _original(end) and node.target is not mark:
                if _operands(node):
                    ends[node] = end
                else:
                    waiting += node.all_input_nodes
    return ends


def _sum_of(node: fx.Node) -> fx.Node | None:
    """The sum that completes the product that begins with ``node``, where autograd makes two operations of it."""
    if node.target is not aten.mul.Tensor or len(node.users) != 1:
        return None
    (user,) = node.users
    if user.target is mark and len(user.users) == 1:
        (user,) = user.users
    return user if user.target in (aten.sum.dim_IntList, aten.sum.default) and is_of_product(user) else None


def is_of_product(node: fx.Node) -> bool:
    """Whether ``node`` comes from an operator or a function that is a matrix product."""
    return _original(node) in _PRODUCT_NAMES or _source_function(node) in _PRODUCT_FUNCTIONS


def _operands(node: fx.Node) -> tuple[int, int] | None:
    """The positions of the operands if ``node`` is a product of matrices of floating-point numbers, else None."""
    if node.op != "call_function" or not _is_float(node.meta.get("val")):
        return None
    joint = JOINT_PRODUCTS.get(_multiplication(node).target)  # type: ignore[call-overload]
    if joint is not None:
        result = cast(int, node.args[1])
        return joint[result] if result < len(joint) else None
    if node.target in PRODUCTS:
        return PRODUCTS[node.target] if _operator(node) is node.target else None
    if node.target is not aten.mul.Tensor or not all(_is_tensor(argument) for argument in node.args):
        return None
    return (0, 1) if is_of_product(node) else None


def _source_function(node: fx.Node) -> str | None:
    """The name of the function of torch that the model called and that ``node`` is a part, or the derivative, of."""
    stack = node.meta.get("fwd_source_fn_stack") or node.meta.get("source_fn_stack")
    return getattr(stack[-1][1], "__name__", str(stack[-1][1])) if stack else None


def _classify(
    node: fx.Node,
    operands: tuple[int, int],
    sources: Mapping[fx.Node, Source],
    mate: tuple[fx.Node, tuple[int, int]] | None,
    input_sources: Sequence[Source],
    end: fx.Node | None,
) -> Product:
    """The product at ``node``, and what is known of it.

    ``mate`` is the forward product of the same autograd node, if there is one, and ``end`` the mark where the operator
    ends of whose decomposition ``node`` is a part.
    """
    values = _nodes(node, operands)
    roles = [_role(sources[value]) for value in values]
    kind = "fprop"
    if "gradient" in roles:
        other = values[1 - roles.index("gradient")]
        differentiated = _differentiated_role(other, node, sources, mate, input_sources)
        kind = "wgrad" if differentiated == "weight" else "dgrad"
    depends = sources[values[0]] | sources[values[1]]
    path = module_path(node)
    if path is None and kind == "fprop":
        path = ""  # forward code records every module but the root
    elif path is None and mate is not None:
        path = module_path(mate[0]) or ""
    origin = _original(_multiplication(node))
    name = origin.__name__ if origin in _PRODUCT_NAMES else _source_function(node)  # type: ignore[attr-defined]
    return Product(
        value=node,
        result=end or _sum_of(node) or node,
        operands=operands,
        roles=(roles[0], roles[1]),
        kind=kind,
        operator=f"aten.{name}",
        path=path,
        constant=not depends & VARIABLE,
    )


def _role(source: Source) -> str:
    if source & Source.TANGENT:
        return "gradient"
    if source & (Source.PARAMETER | Source.BUFFER) and not source & (Source.INPUT | Source.INTEGER_INPUT):
        return "weight"
    return "activation"


def _differentiated_role(
    other: fx.Node,
    node: fx.Node,
    sources: Mapping[fx.Node, Source],
    mate: tuple[fx.Node, tuple[int, int]] | None,
    input_sources: Sequence[Source],
) -> str:
    """The role of the forward operand with respect to which the backward product ``node`` differentiates."""
    if mate is None:  # a hand-written backward
        return "activation" if _role(sources[other]) == "weight" else _role_by_use(node, input_sources)
    forward = _nodes(*mate)
    bases = [base(value) for value in forward]
    kept = bases.index(base(other)) if base(other) in bases else None
    if kept is None:  # recomputed or copied on the way: then the roles decide
        roles = [_role(sources[value]) for value in forward]
        other_role = _role(sources[other])
        kept = roles.index(other_role) if other_role in roles else 0
    return _role(sources[forward[1 - kept]])


def _role_by_use(node: fx.Node, input_sources: Sequence[Source]) -> str:
    """``weight`` if ``node`` reaches an output that is the gradient of a parameter, else ``activation``."""
    seen, waiting = {node}, [node]
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if user.op == "output":
                if any(_is_parameter_gradient(user, i, input_sources) for i in _output_positions(user, current)):
                    return "weight"
            elif user not in seen and not is_product(user):
                seen.add(user)
                waiting.append(user)
    return "activation"


def _output_positions(output: fx.Node, value: fx.Node) -> list[int]:
    return [i for i, result in enumerate(output.args[0]) if result is value]  # type: ignore[arg-type]


def _is_parameter_gradient(output: fx.Node, position: int, input_sources: Sequence[Source]) -> bool:
    description: Any = output.meta["desc"][position]
    index = getattr(getattr(description, "grad_of", None), "idx", None)
    return index is not None and bool(input_sources[index] & Source.PARAMETER)


def _nodes(result: fx.Node, positions: Iterable[int]) -> list[fx.Node]:
    """The arguments at ``positions``, which are nodes, of the multiplication that computes ``result``."""
    return [cast(fx.Node, _multiplication(result).args[i]) for i in positions]


def base(node: fx.Node) -> fx.Node:
    """The value of which ``node`` is a rearrangement."""
    while is_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _is_tensor(argument: object) -> bool:
    return isinstance(argument, fx.Node) and isinstance(argument.meta.get("val"), torch.Tensor)


def _is_float(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _has_floats(node: fx.Node) -> bool:
    return any(_is_float(argument.meta.get("val")) for argument in node.all_input_nodes)
