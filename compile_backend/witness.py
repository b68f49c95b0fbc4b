"""An outside view of the operators that run: whether each of them is known to multiply no matrices.

This file shares no table with the pass, and can contradict it. It knows harmless operators by torch's own tags, by
their schemas, and by a list of its own. Every other operator may hold a product, those of other libraries included.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch._guards import TracingContext
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

#: Libraries of torch and of fpsim whose operators multiply no matrices, but for `_EXCEPTIONS`.
_HARMLESS_LIBRARIES = frozenset(
    {"_c10d_functional", "_c10d_functional_autograd", "c10d", "c10d_functional", "fpsim", "fsdp", "inductor_prims",
     "prim", "prims", "profiler", "rngprims", "streams"}
)  # fmt: skip
_EXCEPTIONS = frozenset({"prims::svd"})

#: Operators of aten that multiply no matrices, as regular expressions. Most pointwise operations are missing here, for
#: torch tags them. A name stands for its in-place form, its derivative (``_backward``), its copying form (``_copy``)
#: and its form for lists of tensors (``_foreach_``) too. Sums, interpolations and transforms with fixed coefficients
#: are no products of matrices.
_HARMLESS = {
    "constructors": r"""
        (new_)?(empty|full|ones|zeros|rand|randn|randint)(_like|_strided|_permuted|_quantized)? arange eye range
        linspace logspace (bartlett|blackman|hamming|hann|kaiser)_window fft_r?fftfreq scalar_tensor randperm
        tri[lu]_indices complex polar from_file _efficientzerotensor _new_zeros_with_same_feature_meta _make_dep_token
        sparse_(coo|compressed)_tensor _sparse_(coo|compressed)_tensor_.* _empty_.*affine_quantized""",
    "random numbers": r"""
        bernoulli binomial cauchy exponential geometric log_normal multinomial normal(_functional)? poisson random
        uniform _philox_.* _sample_dirichlet _dirichlet_grad _standard_gamma(_grad)? native_dropout _fused_dropout
        _masked_scale rrelu_with_noise(_functional)? _fill_mem_eff_dropout_mask _cudnn_init_dropout_state""",
    "movements": r"""
        (_lazy_)?clone copy _to _copy_from(_and_resize)? _fw_primal _make_dual _neg_view lift(_fresh)? _conj detach set
        alias as_strided diagonal expand narrow permute _?reshape(_alias)? select slice split(_with_sizes)? squeeze t
        transpose unbind unfold unsqueeze view(_as_complex|_as_real)? _?values _?indices (crow|row|ccol|col)_indices
        (as_strided|diagonal|select|slice)_scatter _unsafe_view cat _?stack _chunk_cat block_diag constant_pad_nd
        (reflection|replication)_pad\dd (native_)?channel_shuffle pixel_(un)?shuffle flip roll rot90
        repeat(_interleave)? tril triu diag_embed gather scatter(_add|_reduce)? _?index(_add|_copy|_fill|_put|_reduce)?
        index_select _index_put_impl _nested_.* put take where _unsafe_(masked_)?index(_put)?(_accumulate)?
        masked_(fill|scatter|select) embedding(_dense|_renorm)? fill zero _?resize(_as|_output)?(_sparse)?
        unsafe_split(_with_sizes)? im2col col2im nonzero(_static)? _pin_memory record_stream to_padded_tensor
        _pack_padded_sequence _padded_dense_to_.* _jagged_to_padded_dense_forward _spdiags _convert_indices_.* lu_unpack
        _cudnn_rnn_flatten_weight _to_(dense|sparse)(_(bsc|bsr|csc|csr))? sparse_mask _sparse_mask_projection
        _sparse_broadcast_to _?coalesced? copy_sparse_to_sparse sparse_resize(_and_clear)? to_mkldnn
        _mkldnn_(reshape|transpose) mkldnn_reorder_conv\dd_weight""",
    "comparisons": r"""
        sort topk kthvalue mode (nan)?median unique_.* _unique2? searchsorted bucketize isin bincount histc histogram
        _histogramdd_.* _is_(all|any)_true hash_tensor isinf isnan eq ge gt le lt ne _functional_.*""",
    "reductions": r"""
        (nan)?sum mean prod std var (std|var)_mean amax amin _?aminmax argmax argmin max min all any norm trace dist
        count_nonzero native_norm logsumexp cum(sum|prod|max|min) _cum(max|min)_helper _?logcumsumexp renorm
        linalg_cross linalg_vector_norm linalg__powsum powsum _?segment_reduce _sparse_(csr_)?(sum|prod) _amp_.*
        _fused_(adagrad|adam|adamw|sgd) _(cdist|pdist)(_forward)?""",
    "norms, activations and losses": r"""
        (_?native_|cudnn_|miopen_|quantized_)?batch_norm(_.*)? _batch_norm_.* native_(layer|group)_norm _fused_rms_norm
        _weight_norm_interface (_sparse)?_?(safe_|masked_|log_)?softmax(_backward_data)? _prelu_kernel celu elu gelu
        glu(_jvp|_backward_jvp)? hard(shrink|sigmoid|swish|tanh) leaky_relu log_sigmoid(_forward)? mish relu softplus
        softshrink threshold binary_cross_entropy(_with_logits)? (huber|mse|smooth_l1|soft_margin|multi_margin)_loss
        multilabel_margin_loss(_forward)? nll_loss(2d)?(_forward)? _?(cudnn_|miopen_)?ctc_loss
        _thnn_fused_(lstm|gru)_cell(_backward_impl)?""",
    "pooling, interpolation and transforms with fixed coefficients": r"""
        (_?adaptive_|fractional_|mkldnn_|mkldnn_adaptive_|quantized_)*(avg|max)_pool\dd(_with_indices)? max_unpool\dd
        _?upsample_.* (_?cudnn_)?_?grid_sampler(_\dd)?(_cpu_fallback)? _fft_(c2c|c2r|r2c)""",
    "arithmetic": r"""
        add sub mul div pow lerp addcdiv addcmul _add_relu rsub remainder floor_divide xlogy gcd lcm heaviside copysign
        bitwise_.* __i?[lr]shift_?_? abs a?(cos|sin|tan)h? ceil clamp_(max|min) erfc? exp expm1 floor frac lgamma
        log(10|1p|2)? maximum minimum neg reciprocal round rsqrt sigmoid sign sqrt trunc _conj_physical""",
    "quantisation of one tensor": r"""
        _?(fake_)?quantize_.* _make_per_(channel|tensor)_quantized_tensor dequantize int_repr q_per_channel_.*
        _fused_moving_avg_obs_fq_helper(_functional)?""",
}
_HARMLESS_NAME = re.compile("|".join(" ".join(_HARMLESS.values()).split()))

#: Operators that torch composes of others and that users know as products.
_COMPOSED = frozenset(
    {"outer", "ger", "kron", "lstm", "gru", "rnn_tanh", "rnn_relu", "quantized_lstm", "quantized_gru"}
)

#: Bags of embeddings, which are products only with a weight for each sample.
_WEIGHTED = re.compile("_embedding_bag.*")

#: The number by which `torch.cdist` asks for Euclidean distances without a product.
_NO_PRODUCT = 2


def may_multiply(operator: str, shapes: Sequence[Sequence[int]] = ()) -> bool:
    """Whether a call of ``operator`` (``aten::mm``), as torch's profiler names it, may hold a matrix product.

    Operators that torch composes of others (``aten::linear``) hold none of their own: those that they call are judged.
    A name that no operator has, such as that of a range of the profiler, is False.

    Args:
        shapes: the shapes of all arguments, empty for those that are no tensors.
    """
    if not _is_operator(operator):
        return False
    if _WEIGHTED.fullmatch(operator.removeprefix("aten::")):
        return _has_weights(operator, shapes)
    return _is_suspect(operator)


@lru_cache(maxsize=4096)
def _is_operator(name: str) -> bool:
    return "::" in name and bool(torch._C._jit_get_schemas_for_operator(name))


def may_multiply_in_call(overload: OpOverload, arguments: Sequence[Any]) -> bool:
    """Whether a call of ``overload``, as a `TorchDispatchMode` sees it, may hold a matrix product."""
    operator, name = overload._schema.name, overload._opname
    if _WEIGHTED.fullmatch(name):
        return _has_weights(operator, [getattr(argument, "shape", ()) for argument in arguments])
    if name == "_cdist_forward":  # an operator that this one calls is not seen here
        return arguments[2] == 2 and arguments[3] != _NO_PRODUCT
    is_composed_here = _is_composed(overload) and name not in _COMPOSED
    return _is_suspect(operator) or (not is_composed_here and operator.startswith("aten::") and not _is_known(overload))


@lru_cache(maxsize=4096)
def _is_suspect(operator: str) -> bool:
    library, _, name = operator.partition("::")
    if library != "aten":
        return library not in _HARMLESS_LIBRARIES or operator in _EXCEPTIONS
    packet = getattr(torch.ops.aten, name)
    if name in _COMPOSED or packet in flop_registry:
        return True
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    return not any(_is_known(overload) or _is_composed(overload) for overload in overloads)


def _is_known(overload: OpOverload) -> bool:
    """Whether ``overload`` of aten is known to multiply no matrices."""
    schema = overload._schema
    is_view = any(result.alias_info is not None and not result.alias_info.is_write for result in schema.returns)
    is_silent = not schema.is_mutable and not any("Tensor" in str(result.type) for result in schema.returns)
    # an in-place form, a derivative, a copy, and a form for lists have the name of their operator with a mark
    stem = re.sub(r"(_backward|_copy)?_?$", "", overload._opname.removeprefix("_foreach_")) or overload._opname
    return torch.Tag.pointwise in overload.tags or is_view or is_silent or bool(_HARMLESS_NAME.fullmatch(stem))


def _is_composed(overload: OpOverload) -> bool:
    """Whether torch composes ``overload`` of other operators, which are then seen too."""
    if not torch._C._dispatch_has_kernel(overload.name()):
        return False  # an overload for TorchScript alone
    key = torch._C.DispatchKey
    return overload.has_kernel_for_dispatch_key(
        key.CompositeImplicitAutograd
    ) and not overload.has_kernel_for_dispatch_key(key.CPU)


def _has_weights(operator: str, shapes: Sequence[Sequence[int]]) -> bool:
    name = operator.removeprefix("aten::")
    names = [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]
    given = dict(zip(names, shapes, strict=False))
    return "per_sample_weights" not in names or bool(len(given.get("per_sample_weights", ())))


class Witness(TorchDispatchMode):
    """Watch the operators that run and are not left out by ``is_covered``, without changing them.

    Attributes:
        in_backward: called with the autograd node that is evaluated, and the name of an operator in it that may hold a
            matrix product.
        computed: whether any operator computed a tensor in forward code; views and copies count too.
        products: how often each operator ran in forward code that may hold a matrix product, by its name (``aten.mm``).
    """

    supports_higher_order_operators = True

    def __init__(self, is_covered: Callable[[], bool], in_backward: Callable[[Any, str], None]) -> None:
        super().__init__()
        self.is_covered = is_covered
        self.in_backward = in_backward
        self.computed = False
        self.products: Counter[str] = Counter()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Torch compiles what it would compile without this mode."""
        return True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # compiling runs operators on made-up numbers
        if isinstance(func, OpOverload) and TracingContext.try_get() is None and not self.is_covered():
            node = torch._C._current_autograd_node()
            self.computed |= node is None and func.namespace not in _HARMLESS_LIBRARIES
            if may_multiply_in_call(func, args):
                operator = func._schema.name.replace("::", ".")
                if node is None:
                    self.products[operator] += 1
                else:
                    self.in_backward(node, operator)
        return func(*args, **(kwargs or {}))


#: Whether this version of torch lets a mode watch without keeping Dynamo from compiling.
CAN_WATCH = hasattr(TorchDispatchMode, "ignore_compile_internals") and hasattr(TorchDispatchMode, "is_infra_mode")
