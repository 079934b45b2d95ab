"""Fixtures for all tests: one seed, and compilers that begin each test with nothing remembered."""

import re

import pytest
import quick  # noqa: F401
import torch

#: slow, and each of a kind with one that stays in every run; ``*`` stands for anything
SLOW_TWINS = {
    "tests/families/test_families.py": (
        "test_lockstep[T5]", "test_lockstep[Mamba]", "test_lockstep[ViT]", "test_lockstep[ConvNeXt]",
        "test_lockstep[BERT, sequences]",
        "test_coverage_and_training[nn.Transformer]", "test_coverage_and_training[U-Net]",
    ),
    "tests/families/test_family_doors.py": (
        "test_both_doors_agree[Mixtral, grouped_mm]", "test_both_doors_agree[BERT, sequences]",
        "test_settings_hold_during_a_call_alone",
    ),
    "tests/test_accumulate.py": ("test_parts_are_the_batch[published-20]", "test_ranks_send_once_a_step[kfac-options0]"),
    "tests/test_averages.py": ("test_ranks_have_the_same[owner]", "test_they_are_those_of_torch[mkor-options4]"),
    "tests/test_backward_mode.py": (
        "test_direction_is_that_of_the_factors_before_the_step[gpt]",
        "test_direction_is_that_of_the_factors_before_the_step[cnn]",
    ),
    "tests/test_base_optimizers.py": tuple(
        f"test_behind_a_rule_the_doors_agree[{name}]" for name in ("COAP", "HFac", "Adalayer")
    ),
    "tests/test_changed_model.py": (
        "test_statistics_follow_the_dtype_of_the_model[backward]", "test_statistics_follow_the_dtype_of_the_model[compile]",
    ),
    "tests/test_checkpoint.py": ("test_two_to_one_to_four",),  # as in test_owner_checkpoint.py
    "tests/test_clip_norm.py": (
        "test_half_precision_and_inductor", "test_it_clips_as_torch_does[published]", "test_it_clips_as_torch_does[kfac]",
    ),
    "tests/test_coap.py": (
        "test_resumed_before_each_kind_of_step_it_goes_on_exactly[4]", "test_beside_the_reference[options1*",
    ),
    "tests/test_collective_passes.py": ("test_generated_code_keeps_the_order",),  # as in test_cuda_code.py
    "tests/test_compilations.py": (
        "test_no_host_read_in_the_compiled_step",  # as in test_cuda_code.py
        "test_schedule_and_partial_batch[5-4-AdamW*", "test_schedule_and_partial_batch[1-2*",
        "test_schedule_and_partial_batch[10-3-SGD*",
    ),
    "tests/test_compression.py": (
        "test_ranks_stay_equal_and_a_step_errs_no_further[step-0.5-4]",
        "test_ranks_stay_equal_and_a_step_errs_no_further[loop-*", "test_a_resumed_run_draws_the_same[loop-local]",
        "test_a_quarter_of_the_bytes_is_sent[*-owner]",
    ),
    "tests/test_damped.py": (
        "test_compiled_in_float32[step-cnn]",
        "test_the_reference_goes_the_same_way[gpt-*",
        "test_so_it_does_with_other_options[*-sums]",
        "test_so_it_does_with_other_options[*-gradient]",
    ),
    "tests/test_damped_loops.py": ("test_two_ranks_are_one_process[*-2]",),
    "tests/test_ddp.py": ("test_ranks_are_one_process[1-outside]", "test_ranks_are_one_process[2-inside]"),
    "tests/test_distributed.py": ("test_ranks_are_one_process[gpt-2]", "test_ranks_are_one_process[mlp-4]"),
    "tests/test_doors.py": ("test_both_doors_have_one_trajectory[gpt]", "test_fullgraph_in_both_doors[checkpointed]"),
    "tests/test_lengths.py": ("test_lengths_of_a_recurrent_layer_are_said_once[RNN-compile]",),
    "tests/test_lockstep.py": ("test_compiled_drop_in_in_float32[cnn]", "test_compiled_step_in_float32[cnn]"),
    "tests/test_logging.py": (
        "test_stages_and_coverage_are_trace_artifacts[compile]", "test_nothing_is_printed_unasked[environment1]",
        "test_torch_logs_without_plus_prints_stages_only",
    ),
    "tests/test_memory.py": ("test_under_inductor_too[compile]", "test_under_inductor_too[backward]"),
    "tests/test_mkor.py": tuple(
        f"test_ten_thousand_updates_stay_finite_and_positive_definite[{kind}]"
        for kind in ("random-dtype1", "zero-dtype0", "constant-dtype*", "huge-dtype0", "tiny-dtype1")
    ),
    "tests/test_ops.py": ("test_sizes_may_be_dynamic[drop-in-<lambda>-0_*", "test_sizes_may_be_dynamic[step-<lambda>-2_*"),
    "tests/test_owner.py": ("test_volume_memory_and_work[4-0.5-2]", "test_owners_train_as_replicas_do[mlp-4-half]"),
    "tests/test_rotation.py": ("test_a_run_goes_on_within_a_window[2-compile_step]", "test_ranks_are_one_process[owner]"),
    "tests/test_rule_contract.py": ("test_resume_is_exact[mkor, sums-compile_step]",),
    "tests/test_stale.py": ("test_a_resumed_run_goes_on_alike[2]",),
}


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
