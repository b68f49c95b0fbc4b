"""The table of products: everything that fpsim knows about operators that multiply matrices.

The rounding pass, `explain`, `profile`, the error of products and the messages read this table; no other file knows
which operators multiply. `PRODUCTS` has an entry for every operator of aten whose operands can be rounded. `OPAQUE`
gives remedies for families of operators that multiply matrices inside. These and all operators that nobody has looked
at are refused (`fpsim.compile_backend.graph.families`). A new operator is one entry, and the tests of the table cover
it.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch._ops import OpOverload, OpOverloadPacket

aten = torch.ops.aten

#: Axes of an operand, counted from the front or, if negative, from the back.
Axes = tuple[int, ...]

#: All axes of a batch of images except that of the channels; images of fewer dimensions lack the last of these axes.
ALL_BUT_CHANNELS: Axes = (0, 2, 3, 4)


class Form(enum.Enum):
    """How an operator multiplies. The form decides how `profile` computes its product again in float64."""

    MATRICES = enum.auto()  #: two matrices, or two batches of matrices
    SUM_OF_BATCH = enum.auto()  #: two batches of matrices; the products are added up
    VECTORS = enum.auto()  #: at least one of the two is a vector
    GROUPS = enum.auto()  #: groups of rows or columns, each with its own matrix
    CONVOLUTION = enum.auto()  #: an image and a kernel
    CONVOLUTION_GRADIENT = enum.auto()  #: the gradient of a convolution


@dataclass(frozen=True)
class Multiplication:
    """One product that an operator computes.

    Attributes:
        operands: the positions of its two operands among the operator's arguments.
        contracted: for each operand the axes along which the product sums. Rows and blocks that share a scale lie along
            these axes (microscaling: OCP MX 1.0, section 6). A convolution also sums over the taps of its kernel.
    """

    operands: tuple[int, int]
    contracted: tuple[Axes, Axes]


@dataclass(frozen=True)
class ProductOperator:
    """An operator of aten whose products can be rounded from outside.

    Attributes:
        packet: the operator.
        overloads: the overloads that graphs contain; empty if tracing always decomposes the operator.
        form: how it multiplies.
        multiplications: the products that it computes: one, or one for each of its first results.
        gradients: the operators that autograd calls for the derivatives of the first and of the second operand;
            ``aten.mul`` stands for a product that is decomposed into a multiplication and a sum.
        addend: the position of the argument that is added to the product.
        composed: operators that torch composes of multiplications and sums. Every multiplication of two tensors in
            them, forward and backward, belongs to a product.
        weight: the position of the argument that is a weight, whatever computes it; None if the operator does not say.
        is_layer_with_bias: whether it is a linear layer if the addend is a vector. Then the second operand is a weight.
        transposed: for a convolution the position of the argument that exchanges the roles of the kernel's first two
            axes.
        scales: the scales of operands that can multiply the result instead (`fpsim.compile_backend.graph.epilogues`):
            ``tensors``, one of a whole tensor; ``rows``, also one of all elements along the contracted axes; empty,
            none.
        plain: the operator without the addend, for operators whose result may be scaled.
    """

    packet: OpOverloadPacket
    form: Form
    multiplications: tuple[Multiplication, ...]
    gradients: tuple[str, ...] = ()
    overloads: tuple[str, ...] = ("default",)
    addend: int | None = None
    composed: tuple[str, ...] = ()
    weight: int | None = None
    is_layer_with_bias: bool = False
    transposed: int | None = None
    scales: Literal["", "tensors", "rows"] = ""
    plain: OpOverload | None = None

    @property
    def name(self) -> str:
        """The operator's name in plans and messages: ``aten.mm``."""
        return f"aten.{self.packet.__name__}"

    @property
    def event(self) -> str:
        """The operator's name in torch's profiler: ``aten::mm``."""
        return f"aten::{self.packet.__name__}"

    @property
    def is_joint(self) -> bool:
        """Whether one call computes several products."""
        return len(self.multiplications) > 1

    def contracted(self, result: int, arguments: Sequence[Any]) -> tuple[Axes, Axes]:
        """For each operand the axes along which product number ``result`` of a call sums.

        Args:
            arguments: the arguments of the call; only a convolution's ``transposed`` is read.
        """
        first, second = self.multiplications[result].contracted
        if self.transposed is not None and arguments[self.transposed] and second != ALL_BUT_CHANNELS:
            second = tuple(1 - axis for axis in second)  # the kernel's first two axes are exchanged
        return first, second


def _one(first: int, second: int, *contracted: Axes) -> tuple[Multiplication, ...]:
    along_first, along_second = contracted
    return (Multiplication((first, second), (along_first, along_second)),)


#: The operators whose products are rounded.
PRODUCTS: tuple[ProductOperator, ...] = (
    ProductOperator(
        aten.mm,
        Form.MATRICES,
        _one(0, 1, (-1,), (-2,)),
        scales="rows",
        gradients=("aten.mm", "aten.mm"),
        overloads=("default", "dtype"),
    ),
    ProductOperator(
        aten.bmm,
        Form.MATRICES,
        _one(0, 1, (-1,), (-2,)),
        scales="rows",
        gradients=("aten.bmm", "aten.bmm"),
        overloads=("default", "dtype"),
    ),
    ProductOperator(
        aten.addmm,
        Form.MATRICES,
        _one(1, 2, (-1,), (-2,)),
        scales="rows",
        plain=aten.mm.default,
        gradients=("aten.mm", "aten.mm"),
        overloads=("default", "dtype"),
        addend=0,
        is_layer_with_bias=True,
    ),
    ProductOperator(
        aten.baddbmm,
        Form.MATRICES,
        _one(1, 2, (-1,), (-2,)),
        scales="rows",
        plain=aten.bmm.default,
        gradients=("aten.bmm", "aten.bmm"),
        overloads=("default", "dtype"),
        addend=0,
    ),
    ProductOperator(
        aten.addbmm,
        Form.SUM_OF_BATCH,
        _one(1, 2, (0, -1), (0, -2)),
        gradients=("aten.bmm", "aten.bmm"),
        addend=0,
    ),
    ProductOperator(
        aten.mv,
        Form.VECTORS,
        _one(0, 1, (-1,), (0,)),
        scales="rows",
        gradients=("aten.mul", "aten.mv"),
    ),
    ProductOperator(
        aten.addmv,
        Form.VECTORS,
        _one(1, 2, (-1,), (0,)),
        scales="rows",
        plain=aten.mv.default,
        gradients=("aten.mul", "aten.mv"),
        addend=0,
    ),
    ProductOperator(
        aten.dot,
        Form.VECTORS,
        _one(0, 1, (0,), (0,)),
        scales="rows",
        gradients=("aten.mul", "aten.mul"),
    ),
    ProductOperator(
        aten.vdot,
        Form.VECTORS,
        _one(0, 1, (0,), (0,)),
        scales="rows",
        gradients=("aten.mul", "aten.mul"),
    ),
    # An outer product has no sum: tracing decomposes it into one multiplication.
    ProductOperator(
        aten.ger,
        Form.VECTORS,
        (),
        gradients=("aten.mul", "aten.mul"),
        overloads=(),
        composed=("ger", "outer", "kron", "einsum", "linalg_vecdot"),
    ),
    ProductOperator(
        aten.addr,
        Form.VECTORS,
        _one(1, 2, (), ()),
        gradients=("aten.mv", "aten.mv"),
        addend=0,
    ),
    # The product of a grid of coordinates and the matrices of affine maps. Tracing decomposes it.
    ProductOperator(aten.affine_grid_generator, Form.MATRICES, (), overloads=()),
    ProductOperator(
        aten._grouped_mm,
        Form.GROUPS,
        _one(0, 1, (-1,), (-2,)),
        scales="tensors",
        gradients=("aten._grouped_mm", "aten._grouped_mm"),
    ),
    ProductOperator(
        aten.convolution,
        Form.CONVOLUTION,
        _one(0, 1, (1,), (1,)),
        scales="tensors",
        plain=aten.convolution.default,
        gradients=("aten.convolution_backward", "aten.convolution_backward"),
        addend=2,
        weight=1,
        transposed=6,
    ),
    ProductOperator(
        aten.convolution_backward,
        Form.CONVOLUTION_GRADIENT,
        (  # the gradients of the input and of the weight; the gradient of the bias is a sum
            Multiplication((0, 2), ((1,), (0,))),
            Multiplication((0, 1), (ALL_BUT_CHANNELS, ALL_BUT_CHANNELS)),
        ),
        weight=2,
        transposed=7,
        scales="tensors",
    ),
)


@dataclass(frozen=True)
class OpaqueFamily:
    """Operators that hold matrix products which cannot be rounded from outside.

    Attributes:
        names: a regular expression for their names in plans (``aten.NAME``).
        remedy: advice that avoids these operators.
        events: the names, without ``aten::``, of those that torch's profiler reports.
        is_attention: whether they are fused scaled-dot-product attention.
    """

    names: str
    remedy: str = "Replace it"
    events: tuple[str, ...] = ()
    is_attention: bool = False


_DISTANCES = "Give torch.cdist compute_mode='donot_use_mm_for_euclid_dist', which multiplies no matrices"

#: Families of operators that are refused. The first family that matches a name decides. An operator of no family is
#: refused too, unless it is known to hold no product.
OPAQUE: tuple[OpaqueFamily, ...] = (
    OpaqueFamily(
        r"aten\.(_transformer_encoder_layer_fwd|_native_multi_head_attention).*",
        "Turn torch's fast path off: torch.backends.mha.set_fastpath_enabled(False)",
        ("_transformer_encoder_layer_fwd", "_native_multi_head_attention"),
    ),
    OpaqueFamily(
        r"aten\.(_scaled_dot_product|_flash_attention|_efficient_attention|_fused_sdp).*",
        "Leave the choice of the kernel to torch.nn.functional.scaled_dot_product_attention",
        (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_backward",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_efficient_attention_backward",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_cudnn_attention_backward",
            "_scaled_dot_product_fused_attention_overrideable",
        ),
        is_attention=True,
    ),
    OpaqueFamily(r"aten\.(_transform_bias_rescale_qkv|_triton_scaled_dot_attention).*"),
    OpaqueFamily(r"aten\._trilinear.*", "Write it as torch.einsum('bi,kij,bj->bk', x, weight, y)", ("_trilinear",)),
    OpaqueFamily(r"aten\._euclidean_dist.*", _DISTANCES, ("_euclidean_dist",)),
    OpaqueFamily(
        r"aten\.mkldnn_rnn.*",
        "Let torch decompose the layer: torch.backends.mkldnn.enabled = False",
        ("mkldnn_rnn_layer", "mkldnn_rnn_layer_backward"),
    ),
    OpaqueFamily(
        r"aten\._cudnn_rnn.*",
        "Let torch decompose the layer: torch.backends.cudnn.enabled = False",
        ("_cudnn_rnn", "_cudnn_rnn_backward"),
    ),
    OpaqueFamily(
        r"aten\.(lstm|gru|rnn_|quantized_(lstm|gru)|_lstm_mps|miopen_rnn).*",
        events=("lstm", "gru", "rnn_tanh", "rnn_relu"),
    ),
    OpaqueFamily(
        r"aten\.(convolution|_convolution|conv_|_conv_|cudnn_conv|mkldnn_conv|miopen_.*conv|_mps_conv|mps_conv|_slow_conv"
        r"|slow_conv|thnn_conv|_nnpack_spatial_conv).*",
        "Use torch.nn.functional.conv1d, conv2d, conv3d or their transposed versions",
    ),
    OpaqueFamily(
        r"aten\.(_grouped_mm|_scaled_grouped_mm|_scaled_mm|_addmm_activation).*",
        events=("_scaled_mm", "_addmm_activation"),
    ),
    OpaqueFamily(
        r"aten\.(_sparse_(addmm|mm|semi_structured_(addmm|linear|mm)|sparse_matmul)|sparse_sampled_addmm|s?spaddmm|hspmm"
        r"|_cslt_sparse_mm).*",
        "Make the sparse tensor dense: x.to_dense()",
    ),
    OpaqueFamily(r"aten\.(_weight_int|_dyn_quant_matmul|_int_mm|_mixed_dtypes_linear).*"),
    OpaqueFamily(r"aten\.(linear|mkldnn_linear|matmul)_backward.*"),
    OpaqueFamily(
        r"aten\.(linalg_(?!vector_norm|cross|_powsum)|_linalg_|cholesky|matrix_exp|triangular_solve|lu_solve|ormqr"
        r"|_compute_linear_combination).*"
    ),
)

#: Remedies for operators that hold products only when they are called in a certain way, and for operators of other
#: libraries.
OTHER_REMEDIES: tuple[OpaqueFamily, ...] = (
    OpaqueFamily(r"aten\._cdist_forward.*", _DISTANCES),
    OpaqueFamily(
        r"aten\._embedding_bag.*", "Write it as torch.einsum('bn,bnd->bd', per_sample_weights, embedding(indices))"
    ),
    OpaqueFamily(r"transformers\.grouped_mm.*", "Set experts_implementation='batched_mm' in the model's configuration"),
    OpaqueFamily(r"higher_order\.flex_attention.*", "Use torch.nn.functional.scaled_dot_product_attention"),
    OpaqueFamily(r"higher_order\..*", "Write the computation as plain Python, which torch.compile traces"),
)

_BY_OVERLOAD: dict[OpOverload, ProductOperator] = {
    getattr(entry.packet, overload): entry for entry in PRODUCTS for overload in entry.overloads
}
_BY_PACKET = {entry.packet: entry for entry in PRODUCTS}

#: Composed operators in which every multiplication of two tensors belongs to a product.
COMPOSED = frozenset(name for entry in PRODUCTS for name in entry.composed)
#: Composed operators that compute a product of complex numbers as several of real numbers.
SPLIT_IF_COMPLEX = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
#: Composed operators whose second argument is a weight.
LINEAR = frozenset({"linear"})


def product_operator(target: object) -> ProductOperator | None:
    """The entry of an overload that graphs contain (``torch.ops.aten.mm.default``); None if it is no product."""
    return _BY_OVERLOAD.get(target) if isinstance(target, OpOverload) else None


def product_of_packet(packet: object) -> ProductOperator | None:
    """The entry of an operator (``torch.ops.aten.mm``); None if it is no product."""
    return _BY_PACKET.get(packet) if isinstance(packet, OpOverloadPacket) else None


def opaque_family(operator: str) -> OpaqueFamily | None:
    """The family of refused operators to which ``operator`` (``aten._cdist_forward``) belongs, or None."""
    return next((family for family in OPAQUE if re.fullmatch(family.names, operator)), None)


def remedy(operator: str) -> str:
    """Advice that avoids ``operator``, whose products cannot be rounded."""
    families = (*OPAQUE, *OTHER_REMEDIES)
    return next((family.remedy for family in families if re.fullmatch(family.names, operator)), "Replace it")


def product_events() -> dict[str, bool]:
    """The names under which torch's profiler reports products, and whether fpsim can round each."""
    rounded = {entry.event: True for entry in PRODUCTS if entry.overloads}
    return rounded | {f"aten::{name}": False for family in OPAQUE for name in family.events}
