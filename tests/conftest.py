"""Fixtures for all tests: one seed, and compilers that begin each test with nothing remembered."""

import re

import pytest
import quick  # noqa: F401
import torch

#: slow, and each of a kind with one that stays in every run; ``*`` stands for anything
SLOW_TWINS = {
    "tests/families/test_families.py": (
        "test_lockstep[T5]", "test_lockstep[Mamba]", "test_lockstep[ViT]", "test_lockstep[ConvNeXt]",
        "test_lockstep[BERT, sequences]", "test_coverage_and_training[nn.Transformer]",
        "test_coverage_and_training[U-Net]", "test_coverage_and_training[Mamba]", "test_coverage_and_training[T5]",
        "test_coverage_and_training[Mixtral, grouped_mm]", "test_coverage_and_training[ConvNeXt]",
        "test_coverage_and_training[nn.GRU]", "test_coverage_and_training[ViT]",
        "test_coverage_and_training[BERT, sequences]", "test_lockstep[BERT, masked words]", "test_lockstep[nn.GRU]",
        "test_lockstep[nn.Transformer]", "test_lockstep[GPT-2]", "test_lockstep[U-Net]",
    ),
    "tests/families/test_family_doors.py": (
        "test_both_doors_agree[Mixtral, grouped_mm]", "test_both_doors_agree[BERT, sequences]",
        "test_settings_hold_during_a_call_alone",
    ),
    "tests/test_accumulate.py": (
        "test_parts_are_the_batch[published-20]", "test_ranks_send_once_a_step[kfac-options0]",
        "test_parts_are_the_batch[eva-*", "test_parts_are_the_batch[mkor, gradient-20]",
        "test_parts_are_the_batch[mkor, gradient-3]", "test_parts_are_the_batch[kfac-2]",
        "test_parts_are_the_batch[kfac-3]", "test_parts_are_the_batch[none-20]",
        "test_parts_are_the_batch[published-2]",
    ),
    "tests/test_averages.py": (
        "test_ranks_have_the_same[owner]", "test_they_are_those_of_torch[mkor-options4]",
        "test_they_are_those_of_torch[mkor-options1]", "test_they_are_those_of_torch[mkor-options2]",
        "test_they_are_those_of_torch[none-options0]", "test_they_are_those_of_torch[published-options2]",
        "test_they_are_those_of_torch[published-options3]",
        "test_a_state_that_does_not_fit_changes_nothing[<lambda>-a*",
    ),
    "tests/test_backward_mode.py": (
        "test_direction_is_that_of_the_factors_before_the_step[gpt]",
        "test_direction_is_that_of_the_factors_before_the_step[cnn]",
        "test_looking_at_the_state_changes_nothing_wherever_it_happens[kfac]",
    ),
    "tests/test_base_optimizers.py": (
        "test_behind_a_rule_the_doors_agree[COAP]", "test_behind_a_rule_the_doors_agree[HFac]",
        "test_behind_a_rule_the_doors_agree[SMMF]", "test_beside_the_reference[*decay-compile_step]",
        "test_beside_the_reference[SMMF, no momentum-compile_step]",
        "test_beside_the_reference[Adalayer, rows-compile_step]", "test_state_goes_round[COAP-dtype0]",
        "test_state_goes_round[HFac-dtype0]",
    ),
    "tests/test_batched.py": (
        "test_members_train_as_layers_of_their_own[*-backward]",
        "test_groups_of_a_convolution_train_as_convolutions_of_their_own[4-*",
        "test_experts_see_their_own_tokens_and_keep_their_factors_without_any[*-backward]",
        "test_cross_attention_is_a_packed_weight_in_pieces[backward]",
    ),
    "tests/test_cgfac.py": ("test_equations[mlp-True-2-2-compile_step]",),
    "tests/test_changed_model.py": (
        "test_statistics_follow_the_dtype_of_the_model[backward]",
        "test_statistics_follow_the_dtype_of_the_model[compile]", "*-backward]", "*[backward]",
        "test_a_state_of_another_head[True-compile]",
        "test_a_state_without_a_part_lets_that_part_start_afresh_and_says_so[False-compile]",
        "test_a_state_without_a_part_lets_that_part_start_afresh_and_says_so[True-compile_step]",
        "test_ties_made_and_cut_between_steps[untied-*", "test_more_to_train_is_trained[compile_step]",
    ),
    "tests/test_checkpoint.py": ("test_two_to_one_to_four",),
    "tests/test_clip_norm.py": (
        "test_half_precision_and_inductor", "test_it_clips_as_torch_does[published]",
        "test_it_clips_as_torch_does[kfac]",
    ),
    "tests/test_coap.py": (
        "test_resumed_before_each_kind_of_step_it_goes_on_exactly[4]", "test_beside_the_reference[options1*",
    ),
    "tests/test_collective_passes.py": ("test_generated_code_keeps_the_order",),
    "tests/test_compilations.py": (
        "test_no_host_read_in_the_compiled_step", "test_schedule_and_partial_batch[5-4-AdamW*",
        "test_schedule_and_partial_batch[1-2*", "test_schedule_and_partial_batch[10-3-SGD*",
        "test_schedule_and_partial_batch[5-4-SGD-*", "test_schedule_and_partial_batch[10-3-AdamW-one cycle]",
    ),
    "tests/test_compression.py": (
        "test_ranks_stay_equal_and_a_step_errs_no_further[step-0.5-4]",
        "test_ranks_stay_equal_and_a_step_errs_no_further[loop-*", "test_a_resumed_run_draws_the_same[loop-local]",
        "test_a_quarter_of_the_bytes_is_sent[*-owner]",
        "test_ranks_stay_equal_and_a_step_errs_no_further[step-local-2]",
        "test_a_quarter_of_the_bytes_is_sent[loop-local]",
    ),
    "tests/test_damped.py": (
        "test_compiled_in_float32[step-cnn]", "test_the_reference_goes_the_same_way[gpt-*",
        "test_so_it_does_with_other_options[*-sums]", "test_so_it_does_with_other_options[*-gradient]",
        "test_factors_stay_positive_definite[dtype1]", "test_factors_stay_positive_definite[dtype0]",
        "test_the_reference_goes_the_same_way[cnn-drop-in]",
    ),
    "tests/test_damped_loops.py": (
        "test_two_ranks_are_one_process[*-2]", "test_two_ranks_are_one_process[replicated-1]",
    ),
    "tests/test_ddp.py": (
        "test_ranks_are_one_process[1-outside]", "test_ranks_are_one_process[2-inside]",
        "test_ranks_are_one_process[2-outside]",
    ),
    "tests/test_distributed.py": ("test_ranks_are_one_process[gpt-2]", "test_ranks_are_one_process[mlp-4]"),
    "tests/test_doors.py": (
        "test_both_doors_have_one_trajectory[gpt]", "test_fullgraph_in_both_doors[checkpointed]",
        "test_both_doors_have_one_trajectory[in_out]", "test_both_doors_have_one_trajectory[checkpointed]",
    ),
    "tests/test_lengths.py": ("test_lengths_of_a_recurrent_layer_are_said_once[RNN-compile]",),
    "tests/test_local.py": (
        "test_where_ranks_have_the_same_rows_it_is_one_process[gradient-step]",
        "test_where_ranks_have_the_same_rows_it_is_one_process[clipped-step]",
        "test_where_ranks_have_the_same_rows_it_is_one_process[mkor-loop]",
        "test_a_whole_checkpoint_goes_on_where_it_was[loop]", "test_training_is_that_of_owners_rows[step]",
    ),
    "tests/test_lockstep.py": (
        "test_compiled_drop_in_in_float32[cnn]", "test_compiled_step_in_float32[cnn]", "test_options[gpt-*",
        "test_default_rule[gpt-drop-in]", "test_default_rule[checkpointed-step]", "test_default_rule[cnn-drop-in]",
    ),
    "tests/test_logging.py": (
        "test_stages_and_coverage_are_trace_artifacts[compile]", "test_nothing_is_printed_unasked[environment1]",
        "test_torch_logs_without_plus_prints_stages_only",
    ),
    "tests/test_memory.py": (
        "test_under_inductor_too[compile]", "test_under_inductor_too[backward]",
        "test_a_model_its_optimizer_and_its_graphs_die_with_their_last_user[kfac-*",
        "test_a_model_its_optimizer_and_its_graphs_die_with_their_last_user[timed-*",
        "test_a_replaced_weight_dies[backward]", "test_a_replaced_weight_dies[compile]",
        "test_a_batch_whose_step_fails_dies_too[backward]",
        "test_the_handle_goes_and_the_model_stays_as_it_was[backward]",
        "test_an_optimizer_dies_while_its_model_goes_on[backward]",
        "test_the_last_batch_dies_while_training_goes_on[backward]",
    ),
    "tests/test_mkor.py": (
        "test_ten_thousand_updates_stay_finite_and_positive_definite[random-dtype1]",
        "test_ten_thousand_updates_stay_finite_and_positive_definite[zero-*",
        "test_ten_thousand_updates_stay_finite_and_positive_definite[constant-dtype*",
        "test_ten_thousand_updates_stay_finite_and_positive_definite[huge-*",
        "test_ten_thousand_updates_stay_finite_and_positive_definite[tiny-*",
    ),
    "tests/test_models.py": (
        "test_default_rule_does_not_depend_on_the_scale_of_the_loss[1.0]",
        "test_autocast_and_channels_last_in_both_doors[memory_format1-autocast]",
    ),
    "tests/test_ops.py": (
        "test_sizes_may_be_dynamic[drop-in-<lambda>-0_*", "test_sizes_may_be_dynamic[step-<lambda>-2_*",
        "test_sizes_may_be_dynamic[drop-in-<lambda>-2_1]", "test_sizes_may_be_dynamic[step-<lambda>-0_1]",
        "test_sizes_may_be_dynamic[step-<lambda>-0_2]",
    ),
    "tests/test_outermost_step.py": (
        "test_gradients_that_are_unscaled_to_be_clipped[False-*-kfac]",
        "test_gradients_that_are_unscaled_to_be_clipped[True-True-kfac]",
        "test_gradients_that_are_unscaled_to_be_clipped[*-True-own step]",
        "test_gradients_that_are_unscaled_to_be_clipped[True-False-own step]",
        "test_gradients_that_are_unscaled_to_be_clipped[*-False-mkor]",
        "test_gradients_that_are_unscaled_to_be_clipped[False-True-mkor]",
    ),
    "tests/test_owner.py": (
        "test_volume_memory_and_work[4-0.5-2]", "test_owners_train_as_replicas_do[mlp-4-half]",
        "test_ranks_that_keep_the_same_derive_in_turn[4-replicated-4-1]",
        "test_ranks_that_keep_the_same_derive_in_turn[2-replicated-4-2]",
    ),
    "tests/test_passes.py": ("test_schedule_of_a_whole_step_keeps_a_valid_order_and_computes_the_same[gpt]",),
    "tests/test_probes.py": ("*[soap-compile]", "*[kfac-compile]"),
    "tests/test_rank_failures.py": (
        "test_a_rank_that_would_run_something_else[learning rate]",
        "test_a_rank_that_would_run_something_else[coverage]",
    ),
    "tests/test_report.py": ("test_nothing_scrolls_sideways[800]",),
    "tests/test_rotation.py": (
        "test_a_run_goes_on_within_a_window[2-compile_step]", "test_ranks_are_one_process[owner]",
    ),
    "tests/test_rule_contract.py": (
        "test_resume_is_exact[mkor, sums-compile_step]", "test_both_doors_do_what_the_contract_says[*-tied-compile]",
        "test_both_doors_do_what_the_contract_says[*-batched-compile]",
        "test_both_doors_do_what_the_contract_says[*-convolution-compile]",
        "test_both_doors_do_what_the_contract_says[*-plain-compile]", "test_resume_is_exact[*-compile]",
    ),
    "tests/test_stale.py": ("test_a_resumed_run_goes_on_alike[2]",),
}  # fmt: skip


def pytest_collection_modifyitems(items):
    for item in items:
        path, _, name = item.nodeid.partition("::")
        if any(_is_like(name, twin) for twin in SLOW_TWINS.get(path, ())):
            item.add_marker(pytest.mark.nightly)


def _is_like(name, twin):
    return re.fullmatch(re.escape(twin).replace(r"\*", ".*"), name) is not None


@pytest.fixture(autouse=True)
def fresh_start():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture(params=[1, 2], ids=["one_thread", "two_threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)
