"""The promises of fpsim, and for each the tests that `make quick` runs.

A test is named by its file and function, or by one of its cases in brackets. `conftest.py` gives the marker `promise`
to the tests named here.
"""

from __future__ import annotations

PROMISES: dict[str, tuple[str, ...]] = {
    "formats are those of the standards": (
        "formats/test_formats.py::test_codes_are_those_of_the_standards",
        "formats/test_formats.py::test_properties_are_those_of_the_ocp_tables",
    ),
    "rounding is that of the reference in every mode": (
        "rounding/test_rounding.py::test_named_formats_at_every_boundary",
        "verify/test_verify.py::test_named_formats_are_rounded_right_in_every_mode_of_the_plan[e4m3fn]",
        "verify/test_verify.py::test_named_formats_are_rounded_right_in_every_mode_of_the_plan[e5m2]",
    ),
    "stochastic rounding is that of the reference": (
        "rounding/test_stochastic.py::test_every_random_number_of_few_bits_gives_the_reference_result",
        "rounding/test_stochastic.py::test_the_result_changes_at_the_right_random_number_of_many_bits",
        "rounding/test_stochastic.py::test_the_fraction_of_random_numbers_that_round_up_is_the_probability",
        "rounding/test_stochastic.py::test_overflow_modes",
        "rounding/test_stochastic.py::test_words_are_the_documented_hash",
    ),
    "flushing subnormals to zero changes no bit": (
        "rounding/test_peer_cases.py::test_flush_to_zero_changes_nothing",
        "rounding/test_peer_cases.py::test_codes_under_flush_to_zero",
        "rounding/test_eager_shortcuts.py::test_scaling_is_right_under_flush_to_zero",
    ),
    "codes are those of the reference, and decode undoes encode": (
        "rounding/test_encoding.py::test_codes_are_those_of_the_reference",
        "rounding/test_encoding.py::test_encode_undoes_decode",
        "rounding/test_packing.py::test_codes_are_a_little_endian_string_of_bits",
    ),
    "a scale is the largest power of two that keeps the format": (
        "scaling/test_scaling.py::test_the_scale_is_the_largest_power_of_two_within_the_range",
        "scaling/test_scaling.py::test_scaled_rounding_is_the_reference_on_scaled_numbers",
    ),
    "elements that share scales are those of the reference": (
        "scaling/test_blocks_against_reference.py::test_powers_of_two",
        "compile_backend/test_blocks.py::test_a_linear_layer_has_six_roundings[mxfp8]",
    ),
    "delayed scaling is that of Transformer Engine and MS-AMP, and resumes bit for bit": (
        "scaling/test_history.py::test_factors_by_hand",
        "compile_backend/test_timed_scales.py::test_a_resumed_run_has_the_bits_of_an_uninterrupted_one[fpsim_eager]",
    ),
    "a transform leaves products as they are": (
        "transforms/test_transformed_products.py::test_a_product_stays_as_it_is_in_exact_arithmetic",
    ),
    "compiled rounding has the bits of eager rounding": (
        "rounding/test_compiled.py::test_float32[signed, with subnormals]",
        "rounding/test_stochastic.py::test_eager_and_compiled_give_the_bits_of_the_definition[torch.float32-True]",
        "rounding/test_stochastic.py::test_eager_and_compiled_give_the_bits_of_the_definition[torch.bfloat16-False]",
        "scaling/test_scaling.py::test_compiled_as_eager[dtype0-True]",
        "scaling/test_scaling.py::test_compiled_as_eager[dtype2-False]",
    ),
    "the derivative of rounding is the one that was asked for": (
        "rounding/test_gradient.py::test_autograd",
        "rounding/test_gradient.py::test_clipped_means_within_the_finite_range",
    ),
    "a compiled model computes what its policy says, forward and backward": (
        "compile_backend/test_values.py::test_linear_layers_compute_what_the_policy_says[switchback-fpsim]",
        "compile_backend/test_values.py::test_linear_layers_compute_what_the_policy_says[scaled-fpsim]",
        "compile_backend/test_values.py::test_module_rules_hold_in_forward_and_backward",
        "compile_backend/test_values.py::test_all_ways_to_write_a_matrix_product",
        "compile_backend/test_stochastic.py::test_a_step_is_that_written_by_hand_with_the_seed_of_the_generator",
        "compile_backend/test_elementwise.py::test_every_operation_is_rounded_once_forward_and_backward",
    ),
    "a compiled model has the bits of an interpreted one": (
        "compile_backend/test_models.py::test_compiled_and_interpreted_give_the_same_bits[torch.float32]",
    ),
    "a product that cannot be rounded is an error with a remedy": (
        "compile_backend/test_models.py::test_what_cannot_be_rounded_is_an_error_with_the_remedy",
    ),
    "explain lists every operand of every product": (
        "compile_backend/test_inspect.py::test_every_operand_of_every_product_of_gpt2_is_a_site",
    ),
    "audit finds products that ran unrounded": (
        "compile_backend/test_inspect.py::test_audit_finds_exactly_the_products_in_code_that_is_not_compiled",
    ),
    "audit contradicts a pass that overlooks a product": (
        "compile_backend/test_audit.py::test_a_pass_that_finds_nothing_is_contradicted",
    ),
    "a model that torch runs uncompiled is an error or a warning": (
        "compile_backend/test_calls.py::test_a_model_of_which_nothing_is_compiled_is_an_error_in_every_call",
        "compile_backend/test_calls.py::test_a_stance_that_runs_the_model_unrounded_is_a_warning",
    ),
    "profile counts what rounding does to every operand": (
        "compile_backend/test_profile.py::test_every_operand_of_a_linear_layer_is_a_site",
        "compile_backend/test_profile.py::test_every_product_is_compared_with_that_of_the_unrounded_operands",
    ),
    "settings of torch change when a model is first compiled": (
        "compile_backend/test_torch_settings.py::test_importing_fpsim_changes_nothing[import fpsim]",
        "compile_backend/test_torch_settings.py::test_settings_change_before_a_model_is_traced"
        "[from fpsim.compile_backend import fpsim]",
    ),
    "sums in an accumulator are those of the reference, and the machines' those of recorded results": (
        "accumulators/test_reference.py::test_the_model_in_numpy_gives_the_recorded_results_of_gpus[hopper_fp8-e4m3fn]",
        "accumulators/test_matmul.py::test_machines_have_the_bits_of_the_reference[hopper_fp8-e4m3fn]",
        "accumulators/test_matmul.py::test_every_order_has_the_bits_of_the_reference[bf16-nearest_even]",
        "compile_backend/test_accumulators.py::test_every_spelling_of_a_product_has_the_sums_of_the_reference[addmm]",
    ),
    "one table knows what a product is": (
        "compile_backend/test_products.py::test_reversing_both_operands_along_the_contracted_axes_changes_no_sum",
        "compile_backend/test_products.py::test_a_graph_rounds_both_operands_and_reports_their_axes",
    ),
    "a cache never mixes policies or versions of the source": (
        "compile_backend/test_cache.py::test_every_fact_that_the_pass_reads_is_in_its_key",
        "compile_backend/test_cache.py::test_equal_facts_give_an_equal_key",
        "test_source.py::test_a_file_that_moves_into_a_new_folder_and_is_edited_there_changes_the_hash",
        "test_source.py::test_the_pass_the_kernels_and_the_scales_have_this_hash_in_their_keys",
    ),
    "an optimizer's state and weights are rounded around its own step": (
        "training/test_optimizers.py::test_each_step_rounds_the_results_of_the_plain_step",
        "training/test_optimizers.py::test_kahan_compensation_by_hand",
    ),
    "a skipped step leaves no trace, and weights that are written hold": (
        "training/test_between_steps.py::test_a_step_that_the_scaler_skips_leaves_no_trace",
        "training/test_between_steps.py::test_the_next_step_starts_from_the_weights_that_were_written",
    ),
    "a policy survives JSON": (
        "policy/test_policy.py::test_a_policy_survives_the_round_trip_through_json",
        "policy/test_policy.py::test_every_field_makes_a_difference",
    ),
    "the reference is right by other people's arithmetic": (
        "reference/test_rounding.py::test_ties",
        "reference/test_rounding.py::test_overflow",
        "reference/test_codes.py::test_decode_agrees_with_ml_dtypes_and_numpy_on_every_code",
        "reference/test_arithmetic.py::test_results_are_those_of_mpfr",
    ),
    "a curvature product is that of the dense matrix": (
        "curvature/test_operators.py::test_hessian_is_the_dense_one[attention-reverse]",
        "curvature/test_operators.py::test_hessian_is_the_dense_one[encoder layer-double_backward]",
        "curvature/test_operators.py::test_hessian_is_the_dense_one[group norm and convolution-forward]",
        "curvature/test_operators.py::test_hessian_is_the_dense_one[padding row, tied-reverse]",
        "curvature/test_simulated_precision.py::test_the_surrogate_is_the_loss_at_the_rounded_values",
    ),
    "a curvature result is right, refused, or says why it has not converged": (
        "curvature/test_second_derivatives.py::test_hessian_through_weight_norm_is_that_of_the_weight_written_out"
        "[parametrization-0]",
        "curvature/test_convergence.py::test_dropout_has_not_converged[lanczos]",
        "curvature/test_convergence.py::test_a_nan_loss_is_an_error_in_every_algorithm[lanczos]",
    ),
    "logit sharpness is the exact maximum": (
        "sharpness/test_logits.py::test_closed_form_is_the_maximum_over_all_corners",
        "sharpness/test_logits.py::test_ignored_and_masked_tokens_are_nan_and_do_not_affect_others",
    ),
    "the command line rounds and verifies": (
        "cli/test_round.py::test_round_shows_result_code_error_and_neighbours",
        "cli/test_verify.py::test_verify_prints_a_verdict_for_every_format_and_rounding",
        "cli/test_verify.py::test_verify_ends_with_code_1_and_shows_the_inputs_that_went_wrong",
    ),
    "a run of the study rounds and repeats": (
        "paper/test_training.py::test_the_run_is_the_recipe_written_out",
        "paper/test_training.py::test_the_same_configuration_gives_the_same_bits",
        "paper/test_resume.py::test_a_finished_run_is_not_run_again",
    ),
    "a sweep outlives broken files and other sweeps": (
        "paper/test_broken_files.py::test_a_broken_checkpoint_is_put_aside_and_its_run_starts_anew",
        "paper/test_broken_files.py::test_a_broken_result_is_put_aside_and_computed_again",
        "paper/test_broken_files.py::test_sweeps_that_start_at_the_same_time_keep_all_plans",
    ),
}
