"""Fixtures for all tests: one seed, and compilers that begin each test with nothing remembered."""

import gc

import pytest
import torch

# Graphs are millions of small objects that live on: to look through them all the time takes a tenth of the tests' time.
gc.set_threshold(200_000, 20, 100)
torch._dynamo.config.run_gc_after_compile = False


#: slow, and each of a kind with one that stays in every run
SLOW_TWINS = {
    "tests/families/test_families.py": ("test_lockstep[T5]", "test_lockstep[Mamba]"),
    "tests/families/test_family_doors.py": ("test_both_doors_agree[Mixtral, grouped_mm]",),
    "tests/test_accumulate.py": ("test_parts_are_the_batch[published-20]", "test_ranks_send_once_a_step[kfac-options0]"),
    "tests/test_backward_mode.py": ("test_direction_is_that_of_the_factors_before_the_step[gpt]",),
    "tests/test_checkpoint.py": ("test_two_to_one_to_four",),  # as in test_owner_checkpoint.py
    "tests/test_damped.py": (
        "test_the_reference_goes_the_same_way[gpt-step]",
        "test_so_it_does_with_other_options[step-sums]",
        "test_so_it_does_with_other_options[step-gradient]",
    ),
    "tests/test_distributed.py": ("test_ranks_are_one_process[gpt-2]", "test_ranks_are_one_process[mlp-4]"),
    "tests/test_doors.py": ("test_both_doors_have_one_trajectory[gpt]", "test_fullgraph_in_both_doors[checkpointed]"),
    "tests/test_lockstep.py": ("test_compiled_drop_in_in_float32[cnn]",),
    "tests/test_logging.py": ("test_stages_and_coverage_are_trace_artifacts[compile]",),
    "tests/test_owner.py": ("test_volume_memory_and_work[4-0.5-2]", "test_owners_train_as_replicas_do[mlp-4-half]"),
    "tests/test_rule_contract.py": ("test_owners_on_two_ranks[mkor, sums]", "test_resume_is_exact[mkor, sums-compile_step]"),
    "tests/test_stale.py": ("test_a_resumed_run_goes_on_alike[2]",),
}


def pytest_collection_modifyitems(items):
    for item in items:
        path, _, name = item.nodeid.partition("::")
        if name in SLOW_TWINS.get(path, ()):
            item.add_marker(pytest.mark.nightly)


@pytest.fixture(autouse=True)
def fresh_start():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
