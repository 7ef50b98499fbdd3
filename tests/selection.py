"""Which tests belong to `scripts/test-thorough`, and which prove a point of the contract from outside tests/contract/.

Tests may carry the markers `thorough` and `contract` themselves. The lists here are for everything else. An entry is
the beginning of a test's name without "tests/": a file, a class, a function or one set of parameters; `*` stands for
any text. When the whole suite is collected, an entry that matches nothing is an error.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# With the seconds of CPU time that one took without a GPU.
THOROUGH = (
    "accuracy/*test_three_real_ranks_compute_the_same_bits",  # 60
    "cli/*test_three_ranks_say_what_one_says",  # 60
    "cli/*test_compiled",  # 55
    "cli/*test_tune_then_eval_the_plan",  # 41
    "cli/*test_real_ranks_give_the_rows_of_simulated_ones",  # 39
    "cli/*test_torchrun",  # 19
    "cli/*test_sweep_with_overlap",  # 18
    "cli/*test_an_interrupted_eval_goes_on_where_it_was",  # 8
    "cli/*test_eval_quick_ends_in_a_recommendation",  # 8
    "cli/*test_probe",  # 10
    "gpu/test_kernels.py::test_all_reduce_equals_the_reference[3]",  # 27
    "gpu/test_kernels.py::test_all_reduce_equals_the_reference[4]",  # 36
    "gpu/test_kernels.py::test_all_reduce_equals_the_reference[8]",  # 40
    "gpu/test_kernels.py::test_collectives_of_shards_equal_the_reference[3]",  # 18
    "gpu/test_kernels.py::test_how_a_message_is_cut_changes_no_bit",  # 27
    "gpu/test_kernels.py::test_a_killed_peer_and_a_fresh_communicator",
    "gpu/test_kernels.py::test_subgroups_and_several_communicators",
    "gpu/test_kernels.py::test_calls_of_all_kinds_with_and_without_flags_take_turns",
    "gpu/test_kernels.py::test_calls_of_alternating_shapes",
    "integrations/*test_compiled",
    "integrations/*compiled_once",
    "integrations/*compiled_once_for_all_lengths",
    "integrations/*test_real_text_on_three_ranks",
    "ranks",  # a hundred processes; all other tests start theirs by it
    "test_docs.py::test_the_example_prints_what_the_page_says[accuracy]",  # 8
    "test_docs.py::test_the_example_prints_what_the_page_says[compile]",
    "cli/*test_a_real_model",  # 35
    "cli/*test_nodes_have_a_link_together",  # 25
    "cli/*test_over_a_link",  # 35
    "cli/*test_a_plan_with_a_format_for_decoding",  # 25
    "gpu/test_host_kernel.py::test_a_rank_that_does_not_come_is_an_error_that_names_it[two_shot-3]",  # 20
    "gpu/test_host_kernel.py::test_every_collective_equals_the_reference[4]",  # 20
    "gpu/test_kernels.py::test_a_slow_reader_reads_what_was_meant_for_it[ll]",  # 30
    "integrations/test_dtensor.py::test_lengths_that_do_not_divide",  # 30
    "integrations/test_dtensor.py::test_the_block_of_the_how_to",  # 50
    "integrations/*test_uncompressed_is_transformers_own_and_formats_switch",  # 20
    "integrations/test_transformers.py::TestTransformers::test_what_is_not_low_bit_is_not_scaled",  # 15
    "integrations/test_two_batch_overlap.py::TestTransformers::test_bits[8192]",  # 30
    "integrations/test_two_batch_overlap.py::TestTransformers::test_a_filled_cache_and_the_whole_message",  # 25
    "integrations/test_two_batch_overlap.py::TestTransformers::test_dense_models_only",  # 20
    "integrations/test_vllm.py::TestInRanks::test_plans_that_cannot_be_followed",  # 30
    "integrations/test_vllm.py::TestInRanks::test_workers_that_differ",  # 25
    "setup/test_call_guard.py::test_a_survivor_exits_as_it_wants[leave]",  # 15
    "test_docs.py::test_the_example_prints_what_the_page_says[dtensor]",  # 20
    "test_docs.py::test_the_example_prints_what_the_page_says[transformers]",  # 25
    "test_ops.py::test_reduce_scatter_and_all_gather_compile_to_one_graph_for_all_lengths",  # 15
    "test_readme.py::test_commands_exist",  # 20
    "transports/test_process_group_interrupts.py::test_right_or_an_error_on_every_rank[4-cases1-5]",  # 30
)

CONTRACT: dict[int, tuple[str, ...]] = {
    2: (
        "gpu/test_gpu_codec.py::test_the_bytes_of_the_torch_codec",
        "gpu/test_kernels.py::test_all_reduce_equals_the_reference",
        "gpu/test_kernels.py::test_collectives_of_shards_equal_the_reference",
        "gpu/test_on_gpus.py::test_nccl_gives_the_bits_of_the_reference",
        "*test_compiled_codec_sums_to_the_same_bits",
        "*test_compiled_codec_writes_the_same_bytes",
    ),
    3: ("*test_sums_run_in_rank_order", "*test_sums_run_in_rank_order_in_float32"),
    4: (
        "*test_error_is_within_the_bound_and_the_bound_is_tight",
        "*test_the_bound_of_a_transform_is_tight",
    ),
    8: (
        "gpu/test_attack.py::test_killed",
        "gpu/test_attack.py::test_right_or_an_error_over_one_kind_of_memory",
        "gpu/test_kernels.py::test_a_killed_peer_and_a_fresh_communicator",
        "gpu/test_kernels.py::test_a_rank_that_does_not_come_is_an_error_that_names_it",
    ),
    9: (
        "gpu/test_gpu_codec.py::test_a_new_length_is_no_new_kernel",
        "gpu/test_on_gpus.py::test_a_graph_replayed_a_thousand_times_with_changing_inputs",
        "gpu/test_on_gpus.py::test_a_new_length_compiles_and_allocates_nothing",
    ),
    10: ("*test_not_finite_poisons_its_group_and_nothing_else",),
    11: ("gpu/test_kernels.py::test_a_transport_that_cannot_be_had_is_an_error_on_all_ranks",),
}


def mark(items: list[pytest.Item]) -> list[str]:
    """Add the markers; returns a line for each entry that matches none of the items."""
    entries = [(pytest.mark.thorough, entry) for entry in THOROUGH]
    entries += [(pytest.mark.contract(point), entry) for point, listed in CONTRACT.items() for entry in listed]
    unmatched = []
    for marker, entry in entries:
        pattern = re.compile("tests/" + ".*".join(map(re.escape, entry.split("*"))) + r"($|/|::|\[)")
        matching = [item for item in items if pattern.match(item.nodeid)]
        for item in matching:
            item.add_marker(marker)
        if not matching and importlib.util.find_spec("triton"):  # without it whole files are skipped
            unmatched.append(f"tests/selection.py: no test begins with {entry!r}: correct the entry of {marker.name!r}")
    return unmatched


def points() -> dict[int, str]:
    """The points of the contract, from docs/guarantees.md."""
    section = (ROOT / "docs" / "guarantees.md").read_text().split("## The contract\n")[1].split("\n## ")[0]
    found = re.findall(r"^ ?(\d+)\. (.+(?:\n    .+)*)", section, re.MULTILINE)
    return {int(number): re.sub(r"\s+", " ", text) for number, text in found}


def proofs(items: list[pytest.Item]) -> dict[int, list[pytest.Item]]:
    """The tests of each point of the contract."""
    return {
        point: [item for item in items if any(point in marker.args for marker in item.iter_markers("contract"))]
        for point in points()
    }


def unproven(items: list[pytest.Item]) -> list[str]:
    """A line for each point without a file in tests/contract/ or without a test that `scripts/test` runs."""
    faults = []
    for point, tests in proofs(items).items():
        if not any(item.path.name.startswith(f"test_{point:02}_") for item in tests):
            faults.append(f"point {point} of the contract has no tests/contract/test_{point:02}_*.py")
        if not any(item.get_closest_marker("thorough") is None for item in tests):
            faults.append(f"point {point} of the contract has no test outside scripts/test-thorough")
    return faults


def table(items: list[pytest.Item]) -> str:
    """Each point of the contract and the tests that prove it, with the number of their sets of parameters."""
    lines = []
    for point, tests in proofs(items).items():
        lines.append(f"\n{point:2}. {points()[point]}")
        names = [item.nodeid.removeprefix("tests/").split("[")[0] for item in tests]
        for name in dict.fromkeys(names):
            n = names.count(name)
            lines.append(f"      {name}" + (f" ({n})" if n > 1 else ""))
    return "\n".join(lines)
