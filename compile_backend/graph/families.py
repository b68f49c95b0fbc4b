"""The operators that are known to hold no matrix product, by family.

An operator that is in none of these families and not in the table of products is refused: nobody has looked at it. The
list therefore errs on the safe side when a new version of torch adds operators.

Names are those of aten without overload and without the underscore of an in-place variant: ``mul`` stands for
``aten.mul.Tensor`` and for ``aten.mul_.Scalar``. ``_foreach_mul`` belongs where ``mul`` does.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch


class Work(enum.Enum):
    """The work that an operator does on floating-point numbers."""

    ARITHMETIC = enum.auto()  #: it computes new numbers; `Policy.elementwise` rounds them
    NONE = enum.auto()  #: it moves, selects, creates or inspects numbers


@dataclass(frozen=True)
class Family:
    """Operators of aten that hold no matrix product for the same reason.

    Attributes:
        reason: why no operand of these operators is that of a matrix product.
        work: whether their results are new numbers.
        names: the operators.
        adds: whether a result may be a sum of many numbers.
    """

    reason: str
    work: Work
    names: frozenset[str]
    adds: bool = False


def _family(reason: str, work: Work, names: str, adds: bool = False) -> Family:
    return Family(reason, work, frozenset(names.split()), adds)


FAMILIES: tuple[Family, ...] = (
    _family(
        "each result is a function of one element of each operand",
        Work.ARITHMETIC,
        """
        __iand__ __ilshift__ __ior__ __irshift__ __ixor__ __lshift__ __rshift__ _add_relu _conj_physical
        _prelu_kernel _prelu_kernel_backward abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh
        binary_cross_entropy_with_logits bitwise_and bitwise_left_shift bitwise_not bitwise_or bitwise_right_shift
        bitwise_xor ceil celu clamp clamp_max clamp_min complex conj_physical copysign cos cosh deg2rad digamma div elu
        elu_backward eq erf erfc erfinv exp exp2 expm1 floor floor_divide fmod frac frexp gcd ge gelu gelu_backward
        glu glu_backward glu_backward_jvp glu_jvp gt hardshrink hardshrink_backward hardsigmoid hardsigmoid_backward
        hardswish hardswish_backward hardtanh hardtanh_backward heaviside hypot i0 igamma igammac isin isinf isnan
        isneginf isposinf lcm ldexp le leaky_relu leaky_relu_backward lerp lgamma log log10 log1p log2
        log_sigmoid_backward log_sigmoid_forward logaddexp logaddexp2 logical_and logical_not logical_or logical_xor
        logit logit_backward lt mish mish_backward mul mvlgamma nan_to_num native_dropout_backward ne neg nextafter
        polar polygamma pow rad2deg reciprocal relu remainder round rrelu_with_noise_backward rsqrt rsub sgn sigmoid
        sigmoid_backward sign signbit silu silu_backward sin sinc sinh softplus softplus_backward softshrink
        softshrink_backward special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0 special_bessel_y1
        special_chebyshev_polynomial_t special_chebyshev_polynomial_u special_chebyshev_polynomial_v
        special_chebyshev_polynomial_w special_entr special_erfcx special_hermite_polynomial_h
        special_hermite_polynomial_he special_i0e special_i1 special_i1e special_laguerre_polynomial_l
        special_legendre_polynomial_p special_log_ndtr special_modified_bessel_i0 special_modified_bessel_i1
        special_modified_bessel_k0 special_modified_bessel_k1 special_ndtri special_scaled_modified_bessel_k0
        special_scaled_modified_bessel_k1 special_shifted_chebyshev_polynomial_t
        special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
        special_shifted_chebyshev_polynomial_w special_spherical_bessel_j0 special_xlog1py special_zeta sqrt sub tan
        tanh tanh_backward threshold threshold_backward trunc xlogy
        """,
    ),
    _family(
        "the gates of a recurrent cell, elementwise; the products of the cell are operators of their own",
        Work.ARITHMETIC,
        """
        _thnn_fused_gru_cell _thnn_fused_gru_cell_backward _thnn_fused_lstm_cell _thnn_fused_lstm_cell_backward_impl
        """,
    ),
    _family(
        "it quantizes each element, or undoes that",
        Work.ARITHMETIC,
        """
        _fake_quantize_learnable_per_channel_affine _fake_quantize_learnable_per_channel_affine_backward
        _fake_quantize_learnable_per_tensor_affine _fake_quantize_learnable_per_tensor_affine_backward
        _fake_quantize_per_tensor_affine_cachemask_tensor_qparams _fused_moving_avg_obs_fq_helper
        _fused_moving_avg_obs_fq_helper_functional _make_per_channel_quantized_tensor
        _make_per_tensor_quantized_tensor dequantize fake_quantize_per_channel_affine_cachemask
        fake_quantize_per_tensor_affine_cachemask quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic
        """,
    ),
    _family(
        "it reduces one operand: a sum, product, mean, variance, norm or count of its elements, or a running one",
        Work.ARITHMETIC,
        """
        _is_all_true _is_any_true _log_softmax _log_softmax_backward_data _logcumsumexp _masked_softmax
        _masked_softmax_backward _nested_sum_backward _safe_softmax _segment_reduce_backward _softmax
        _softmax_backward_data _sparse_csr_prod _sparse_csr_sum _sparse_log_softmax _sparse_log_softmax_backward_data
        _sparse_softmax _sparse_softmax_backward_data _sparse_sum _sparse_sum_backward all any argmax argmin bincount
        bucketize count_nonzero cumprod cumsum dist hash_tensor histc histogram _histogramdd_bin_edges
        _histogramdd_from_bin_cts _histogramdd_from_bin_tensors linalg__powsum linalg_vector_norm log_softmax
        logcumsumexp logsumexp mean nansum native_norm norm powsum prod renorm searchsorted segment_reduce softmax std
        std_mean sum trace var var_mean
        """,
        adds=True,
    ),
    _family(
        "a normalisation: its sums are of one operand and of that operand times its own gradient",
        Work.ARITHMETIC,
        """
        _batch_norm_no_update _batch_norm_with_update _batch_norm_with_update_functional _fused_rms_norm
        _fused_rms_norm_backward _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training _weight_norm_interface _weight_norm_interface_backward
        batch_norm_backward batch_norm_backward_elemt batch_norm_backward_reduce batch_norm_elemt
        batch_norm_gather_stats batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats
        cudnn_batch_norm cudnn_batch_norm_backward miopen_batch_norm miopen_batch_norm_backward native_batch_norm
        native_batch_norm_backward native_group_norm native_group_norm_backward native_layer_norm
        native_layer_norm_backward
        """,
        adds=True,
    ),
    _family(
        "a loss, which compares two operands element by element",
        Work.ARITHMETIC,
        """
        _ctc_loss _ctc_loss_backward _cudnn_ctc_loss binary_cross_entropy binary_cross_entropy_backward huber_loss
        huber_loss_backward miopen_ctc_loss mse_loss mse_loss_backward multi_margin_loss multi_margin_loss_backward
        multilabel_margin_loss_backward multilabel_margin_loss_forward nll_loss2d_backward nll_loss2d_forward
        nll_loss_backward nll_loss_forward smooth_l1_loss smooth_l1_loss_backward soft_margin_loss
        soft_margin_loss_backward
        """,
        adds=True,
    ),
    _family(
        "a pooling: a mean or an extreme of one operand's neighbourhoods",
        Work.ARITHMETIC,
        """
        _adaptive_avg_pool2d _adaptive_avg_pool2d_backward _adaptive_avg_pool3d _adaptive_avg_pool3d_backward
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_avg_pool3d_backward
        adaptive_max_pool2d_backward adaptive_max_pool3d_backward avg_pool1d avg_pool2d avg_pool2d_backward avg_pool3d
        avg_pool3d_backward fractional_max_pool2d fractional_max_pool2d_backward fractional_max_pool3d
        fractional_max_pool3d_backward max_pool2d_backward max_pool2d_with_indices_backward
        max_pool3d_with_indices_backward
        """,
        adds=True,
    ),
    _family(
        "an interpolation: its coefficients follow from positions alone, and their gradients are elementwise",
        Work.ARITHMETIC,
        """
        _grid_sampler_2d_cpu_fallback _grid_sampler_2d_cpu_fallback_backward _upsample_bicubic2d_aa
        _upsample_bicubic2d_aa_backward _upsample_bilinear2d_aa _upsample_bilinear2d_aa_backward _upsample_lanczos2d_aa
        _upsample_lanczos2d_aa_backward _upsample_nearest_exact1d _upsample_nearest_exact1d_backward
        _upsample_nearest_exact2d _upsample_nearest_exact2d_backward _upsample_nearest_exact3d
        _upsample_nearest_exact3d_backward cudnn_grid_sampler cudnn_grid_sampler_backward grid_sampler_2d
        grid_sampler_2d_backward grid_sampler_3d grid_sampler_3d_backward upsample_bicubic2d
        upsample_bicubic2d_backward upsample_bilinear2d upsample_bilinear2d_backward upsample_linear1d
        upsample_linear1d_backward upsample_nearest1d upsample_nearest1d_backward upsample_nearest2d
        upsample_nearest2d_backward upsample_nearest3d upsample_nearest3d_backward upsample_trilinear3d
        upsample_trilinear3d_backward
        """,
        adds=True,
    ),
    _family(
        "a Fourier transform: no unit for matrix products computes it, and its coefficients are constants",
        Work.ARITHMETIC,
        "_fft_c2c _fft_c2r _fft_r2c",
        adds=True,
    ),
    _family("the cross product of two vectors with three elements", Work.ARITHMETIC, "linalg_cross"),
    _family(
        "a distance: a sum of powers of differences; `opaque` finds the calls that multiply",
        Work.ARITHMETIC,
        "_cdist_backward _cdist_forward _pdist_backward _pdist_forward",
        adds=True,
    ),
    _family(
        "it adds elements of one operand at given positions",
        Work.ARITHMETIC,
        """
        _embedding_bag _embedding_bag_backward _embedding_bag_dense_backward _embedding_bag_forward_only
        _sparse_mask_projection _unsafe_index_put _unsafe_masked_index_put_accumulate col2im embedding_dense_backward
        embedding_renorm im2col index_add index_put index_reduce masked_scatter_backward put reflection_pad1d_backward
        reflection_pad2d_backward reflection_pad3d_backward replication_pad1d_backward replication_pad2d_backward
        replication_pad3d_backward scatter scatter_add scatter_reduce unfold_backward
        """,
        adds=True,
    ),
    _family(
        "the step of an optimizer or of a gradient scaler, elementwise",
        Work.ARITHMETIC,
        """
        _amp_foreach_non_finite_check_and_unscale _amp_update_scale _fused_adagrad _fused_adam _fused_adamw _fused_sgd
        """,
    ),
    _family(
        "it draws random numbers",
        Work.ARITHMETIC,
        """
        _dirichlet_grad _fused_dropout _masked_scale _philox_key_fold_in _philox_key_split _philox_normal
        _philox_uniform _sample_dirichlet _standard_gamma _standard_gamma_grad binomial multinomial native_dropout
        poisson rrelu_with_noise rrelu_with_noise_functional
        """,
    ),
    _family(
        "it draws random numbers from a distribution that the operands do not change",
        Work.NONE,
        """
        _cudnn_init_dropout_state _fill_mem_eff_dropout_mask bernoulli cauchy exponential geometric log_normal normal
        normal_functional rand rand_like randint randint_like randn randn_like random randperm uniform
        """,
    ),
    _family(
        "it creates a tensor",
        Work.NONE,
        """
        _efficientzerotensor _empty_affine_quantized _empty_per_channel_affine_quantized _make_dep_token
        _new_zeros_with_same_feature_meta arange bartlett_window blackman_window empty empty_like empty_permuted
        empty_quantized empty_strided eye fft_fftfreq fft_rfftfreq fill from_file full full_like hamming_window
        hann_window kaiser_window linspace logspace new_empty new_empty_strided new_full new_ones new_zeros ones
        ones_like range scalar_tensor tril_indices triu_indices zero zeros zeros_like
        """,
    ),
    _family(
        "it copies, rearranges or selects elements",
        Work.NONE,
        """
        _aminmax _chunk_cat _conj _conj_copy _copy_from _copy_from_and_resize _fw_primal _fw_primal_copy
        _index_put_impl _lazy_clone _make_dual _make_dual_copy _mkldnn_reshape _mkldnn_transpose _neg_view
        _neg_view_copy _pack_padded_sequence _pin_memory _reshape_alias _reshape_alias_copy _reshape_copy
        _resize_output _spdiags _stack _to_copy _unique _unique2 _unsafe_index _unsafe_masked_index _unsafe_view
        adaptive_max_pool2d adaptive_max_pool3d alias alias_copy amax amin aminmax as_strided as_strided_copy
        as_strided_scatter block_diag cat channel_shuffle clone constant_pad_nd copy cummax cummin detach detach_copy
        diag_embed diagonal diagonal_backward diagonal_copy diagonal_scatter embedding expand expand_copy flip fmax
        fmin gather index index_copy index_fill index_select kthvalue lift lift_fresh lift_fresh_copy lu_unpack
        masked_fill masked_scatter masked_select max max_pool2d_with_indices max_pool3d_with_indices max_unpool2d
        max_unpool3d maximum median min minimum mode nanmedian narrow_copy native_channel_shuffle nonzero
        nonzero_static permute permute_copy pixel_shuffle pixel_unshuffle reflection_pad1d reflection_pad2d
        reflection_pad3d repeat repeat_interleave replication_pad1d replication_pad2d replication_pad3d resize
        resize_as roll rot90 select select_backward select_copy select_scatter set slice slice_backward slice_copy
        slice_inverse slice_scatter sort split split_copy split_with_sizes split_with_sizes_copy squeeze squeeze_copy
        stack t t_copy take topk transpose transpose_copy tril triu unbind unbind_copy unfold unfold_copy
        unique_consecutive unique_dim unique_dim_consecutive unsafe_split unsafe_split_with_sizes unsqueeze
        unsqueeze_copy view view_as_complex view_as_complex_copy view_as_real view_as_real_copy view_copy where
        """,
    ),
    _family(
        "it rearranges a sparse, nested or packed tensor, or builds one of its parts",
        Work.NONE,
        """
        _coalesce _coalesced _convert_indices_from_coo_to_csr _convert_indices_from_csr_to_coo _indices _indices_copy
        _jagged_to_padded_dense_forward _nested_from_padded _nested_from_padded_and_nested_example
        _nested_from_padded_tensor _nested_get_jagged_dummy _nested_get_lengths _nested_get_max_seqlen
        _nested_get_min_seqlen _nested_get_offsets _nested_get_values _nested_get_values_copy _nested_select_backward
        _nested_tensor_from_mask _nested_tensor_from_tensor_list _nested_tensor_size _nested_tensor_storage_offsets
        _nested_tensor_strides _nested_view_from_buffer _nested_view_from_buffer_copy _nested_view_from_jagged
        _nested_view_from_jagged_copy _padded_dense_to_jagged_forward _sparse_broadcast_to _sparse_broadcast_to_copy
        _sparse_compressed_tensor_with_dims _sparse_coo_tensor_with_dims _sparse_coo_tensor_with_dims_and_tensors
        _to_dense _to_sparse _to_sparse_bsc _to_sparse_bsr _to_sparse_csc _to_sparse_csr _values _values_copy
        ccol_indices ccol_indices_copy col_indices col_indices_copy copy_sparse_to_sparse crow_indices
        crow_indices_copy indices indices_copy int_repr q_per_channel_scales q_per_channel_zero_points
        resize_as_sparse row_indices row_indices_copy sparse_compressed_tensor sparse_coo_tensor sparse_mask
        sparse_resize sparse_resize_and_clear to_mkldnn to_padded_tensor values values_copy
        """,
    ),
    _family(
        "it inspects a tensor, or checks a condition",
        Work.NONE,
        """
        _assert_async _assert_scalar _assert_tensor_metadata _functional_assert_async
        _functional_assert_scalar _functional_sym_constrain_range _functional_sym_constrain_range_for_size
        _local_scalar_dense _print equal is_coalesced is_same_size is_set_to item numel size stride storage_offset
        sym_constrain_range sym_constrain_range_for_size sym_is_contiguous sym_numel sym_size sym_storage_offset
        sym_stride
        """,
    ),
)

#: Operators outside aten that are known to hold no matrix product, by namespace. Collective operations (c10d) move
#: numbers between ranks, and add them up. The quantization of pt2e works on single elements.
_OTHERS = {
    "fpsim": """
        accumulate_sum mark mx_multiplier observe observe_reduction observe_sum outer_scale power_of_two_scale
        random_key random_keys random_words round round_mx round_scaled round_stochastic round_transformed
        round_with_words saved scaled_part switch timed_factor times_scale transform_operand transform_parameters
        """,
    "prims": """
        _low_memory_max_pool_offsets_to_indices _low_memory_max_pool_with_offsets _make_token _sink_tokens
        _unsafe_index_put_ abs acos acosh add amax amin as_strided as_strided_scatter asin asinh atan atan2 atanh
        bessel_i0 bessel_i0e bessel_i1 bessel_i1e bessel_j0 bessel_j1 bitwise_and bitwise_not bitwise_or bitwise_xor
        broadcast_in_dim cat cbrt ceil clone collapse collapse_view conj conj_physical convert_element_type
        copy_strided copy_to cos cosh device_put digamma div empty empty_permuted empty_strided eq erf erf_inv erfc
        erfcx exp exp2 expm1 fft_c2c fft_c2r fft_r2c fill floor fma fmax fmin fmod frexp full full_like gcd ge gt
        hypot igamma igammac imag inductor_cvt_e8m0_rceil inductor_force_stride_order inductor_lookup_seed
        inductor_rand_eager_offset inductor_rand_eager_offsets inductor_randint inductor_random inductor_seed
        inductor_seeds iota isfinite item le lgamma log log10 log1p log2 lt maximum maximum_value minimum
        minimum_value mul ndtri ne neg nextafter normal pow prepare_softmax_online prod real reciprocal remainder
        reshape resize rev round rsqrt scalar_tensor shift_left shift_right_arithmetic sign signbit sin sinh
        spherical_bessel_j0 split_dim sqrt squeeze sub sum tan tanh transpose trunc uniform var view_of view_of_dtype
        where xor_sum zeta
        """,
    "rngprims": "philox_rand",
    "inductor": "_alloc_from_pool _reinterpret_tensor accumulate_grad_ resize_storage_bytes_",
    "inductor_prims": "inductor_reserve_rng_state",
    "_c10d_functional": """
        _wrap_tensor_autograd all_gather_into_tensor all_gather_into_tensor_coalesced all_gather_into_tensor_out
        all_reduce all_reduce_ all_reduce_coalesced all_reduce_coalesced_ all_to_all_single batch_p2p_ops broadcast
        broadcast_ irecv isend reduce_scatter_tensor reduce_scatter_tensor_coalesced reduce_scatter_tensor_out
        wait_tensor
        """,
    "_c10d_functional_autograd": "all_gather_into_tensor all_to_all_single reduce_scatter_tensor",
    "fsdp": "all_gather_copy_in chunk_cat copy_ split_with_sizes_copy",
    "streams": """
        control_deps fork join record_event record_stream sync_dealloc synchronize_device synchronize_event
        synchronize_stream wait_event wait_stream
        """,
    "profiler": "_record_function_enter _record_function_enter_new _record_function_exit",
    "quantized_decomposed": """
        choose_qparams choose_qparams_per_token choose_qparams_per_token_asymmetric choose_qparams_symmetric
        convert_element_type dequantize_per_channel dequantize_per_channel_group dequantize_per_tensor
        dequantize_per_token fake_quant_per_channel quantize_per_channel quantize_per_channel_group
        quantize_per_tensor quantize_per_token
        """,
}
OTHER_NAMESPACES = {namespace: frozenset(names.split()) for namespace, names in _OTHERS.items()}

#: Operators of prims whose results may be sums of many numbers.
_ADDING_PRIMS = frozenset(
    ["fft_c2c", "fft_c2r", "fft_r2c", "prepare_softmax_online", "prod", "sum", "var", "_unsafe_index_put_"]
)
#: The position of the argument that tells whether a call adds, for operators of families that do.
_ADDING_IF = {"index_put": 3, "_unsafe_index_put": 3, "put": 3}
_WITHOUT_ADDITIONS = frozenset(["im2col", "scatter.src", "scatter.value"])

_FAMILY = {name: family for family in FAMILIES for name in family.names}


def family_of(name: str) -> Family | None:
    """The family of the operator ``name`` of aten (``mul``, ``mul_``, ``_foreach_mul``); None if it is unknown."""
    name = name.removeprefix("_foreach_")
    in_place = name.endswith("_") and not name.endswith("__")
    return _FAMILY.get(name[:-1] if in_place else name)


def adds_up(operator: object, arguments: Sequence[Any], named: Mapping[str, Any]) -> bool:
    """Whether a call of ``operator``, which holds no product, may have sums of many numbers as results.

    Operators of other libraries than aten and prims do not count: collective operations add numbers of other ranks.
    """
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    name = operator._opname
    if operator.namespace != "aten":
        return operator.namespace == "prims" and name in _ADDING_PRIMS
    if {name, f"{name}.{operator._overloadname}"} & _WITHOUT_ADDITIONS:
        return False
    if name in _ADDING_IF:
        position = _ADDING_IF[name]
        return bool(arguments[position] if len(arguments) > position else named.get("accumulate", False))
    family = family_of(name)
    return family is not None and family.adds


def is_known(operator: torch._ops.OpOverload) -> bool:
    """Whether ``operator`` is known to hold no matrix product."""
    if operator.namespace == "aten":
        return family_of(operator._opname) is not None
    return operator._opname in OTHER_NAMESPACES.get(operator.namespace, ())
