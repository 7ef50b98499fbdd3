"""The tests can fail: each mutation below breaks the code in a way that matters, and a named test must notice.

Each runs in a copy of the sources, in a process of its own, and only with the tests that are named. A mutation whose
text or tests have moved is an error, also in `scripts/test`: its entry must be corrected.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PACKAGE = ROOT / "src" / "flashcomm"

MUTATIONS = {
    "round toward zero": (
        "wire/torch_codec.py", "torch.round(y * inverse[:, None])", "torch.trunc(y * inverse[:, None])",
        "wire/test_torch_codec.py::test_error_is_within_the_bound_and_the_bound_is_tight",
    ),
    "round the scale down": (
        "wire/torch_codec.py", "+ low) & ~low", "+ 0) & ~low", "wire/test_torch_codec.py::test_the_stored_scale_is_as_needed",
    ),
    "round the scale too far": (
        "wire/torch_codec.py", "+ low) & ~low", "+ 2 * low + 1) & ~low", "wire/test_torch_codec.py::test_the_stored_scale_is_as_needed",
    ),
    "hide NaN": (
        "wire/torch_codec.py", 'torch.where(finite, scale, float("nan"))', "scale",
        "wire/test_torch_codec.py::test_not_finite_poisons_its_group_and_nothing_else",
    ),
    "the worse of two ranges": (
        "wire/torch_codec.py", "*smaller, inverse) <", "*smaller, inverse) >", "wire/test_golden.py::TestGoldenHadamard",
    ),
    "errors in the steps of each range": (
        "wire/torch_codec.py", "scale[:, None] * (codes - zero_point[:, None])) * inverse[:, None]",
        "scale[:, None] * (codes - zero_point[:, None])) / scale[:, None]",
        "collectives/test_pipelined.py::test_the_reference_is_what_the_method_says",
    ),
    "a transform without its 1/n": (
        "wire/torch_codec.py", "total = hadamard(total) * (1.0 / groups.n)", "total = hadamard(total)",
        "wire/test_golden.py::TestGoldenHadamard",
    ),
    "a transform of tails that have none": (
        "wire/format.py", "return self.hadamard and n & (n - 1) == 0", "return self.hadamard and n >= 8",
        "wire/test_golden.py::TestGoldenHadamard",
    ),
    "sums of transforms of different groups": (
        "wire/format.py", "and a.group == b.group", "", "wire/test_format.py::test_between_steps_with_equal_groups_nothing_is_transformed",
    ),
    "the compiled codec never chooses": (
        "cpu/quantize.py", 'better = self._reduce(F32, 1, "+").compare("<", 0.0)',
        'better = self._reduce(F32, 1, "+").compare("<", -1e9)', "wire/test_golden.py::TestGoldenHadamard",
    ),
    "the compiled codec prefers the part if equal": (
        "cpu/quantize.py", 'better = self._reduce(F32, 1, "+").compare("<", 0.0)',
        'better = self._reduce(F32, 1, "+").compare("<=", 0.0)', "cpu/test_cpu_codec.py::test_compiled_codec_writes_the_same_bytes",
    ),
    "the compiled codec sees no -NaN and no -Inf": (
        "cpu/quantize.py", "(low & (sign - 1)).compare(", "(low & 0).compare(",
        "wire/test_golden.py::TestGolden::test_not_finite",
    ),
    "the compiled transform subtracts the wrong way": (
        "cpu/hadamard.py", "vectors[i], vectors[i + h] = a + b, a - b", "vectors[i], vectors[i + h] = a + b, b - a",
        "cpu/test_cpu_codec.py::test_compiled_codec_writes_the_same_bytes",
    ),
    "sum in bf16": (
        "wire/torch_codec.py", "total = total + term", "total = (total + term).bfloat16().float()",
        "collectives/test_pipelined.py::test_the_reference_is_what_the_method_says wire/test_torch_codec.py::test_sums_run_in_rank_order_in_float32",
    ),
    "sum in reverse rank order": (
        "wire/torch_codec.py", "for term in terms[1:]:", "for term in terms[:0:-1]:",
        "wire/test_torch_codec.py::test_sums_run_in_rank_order_in_float32",
    ),
    "shift a scale by one group": (
        "wire/torch_codec.py", "torch.int16)[groups.numbers], step)", "torch.int16).roll(1)[groups.numbers], step)",
        "wire/test_torch_codec.py::test_error_is_within_the_bound_and_the_bound_is_tight",
    ),
    "a group that straddles rows": (
        "collectives/pipelined.py", "return Layout(step, message.shape[-1] if message.dim() else 1, message.element_size())",
        "return Layout(step, max(1, message.numel()), message.element_size())",
        "contract/test_03_sums_in_rank_order.py::test_a_group_never_reaches_into_the_next_row",
    ),
    "own shard from the accumulator": (
        "collectives/pipelined.py", "wire = wires[i : i + 1]",
        "wire = wires[i : i + 1]\n                if i == rank and not ctx.fmt.gather.uncompressed:\n"
        "                    flat_out[start:stop] = 0\n                    continue",
        "contract/test_01_same_bits_on_every_rank.py::test_every_rank_returns_the_same_bits[int4-two_shot]",
    ),
    "send each peer its neighbor's piece": (
        "transports/process_group.py", "out.unbind(), inp.unbind()", "out.unbind(), inp.roll(1, 0).unbind()",
        "contract/test_02_same_bits_as_the_reference.py::test_the_size_of_chunks_changes_no_bit[300]",
    ),
    "drop a wait": (
        "collectives/pipelined.py", "        pending, wires = received.pop(c)\n        pending.wait()\n        ctx.codec",
        "        pending, wires = received.pop(c)\n        ctx.codec",
        "contract/test_02_same_bits_as_the_reference.py::test_all_reduce_equals_the_reference[int4-dtype0-one_shot-2]",
    ),
    "one buffer instead of three": (
        "collectives/pipelined.py", "SLOTS = 3", "SLOTS = 1",
        "contract/test_02_same_bits_as_the_reference.py::test_the_size_of_chunks_changes_no_bit[2000]",
    ),
    "a call that an exception left goes on": (
        "setup/call_guard.py", "if kind is None or issubclass(kind, _CLEAN):", "if True:",
        "setup/test_call_guard.py::TestLeft",
    ),
    "the fast path forgets that it was interrupted": (
        "collectives/recent.py", "        finally:\n            guard.owner = 0", "        finally:\n            guard.busy, guard.owner = False, 0",
        "collectives/test_recent.py",
    ),
    "the fast path takes no lock": (
        "collectives/recent.py", "guard.busy or not guard.lock.acquire(False)", "guard.busy or not (guard.lock.locked() or guard.lock.acquire(False))",
        "collectives/test_recent.py",
    ),
    "a dropped region keeps its descriptor": (
        "transports/cpu_shared.py", "self._held.callback(os.close, file)", "pass",
        "transports/test_dropped.py::test_nothing_is_left",
    ),
    "a dropped region stays pinned": (
        "transports/host_memory.py", "self._held.callback(_unpin, os.getpid(), self.device, address)", "pass",
        "transports/test_dropped.py::test_pinned_memory_is_unpinned_before_it_is_unmapped",
    ),
    "messages of all calls have one tag": (
        "transports/process_group.py", "self._call % 2048 << 9", "0", "transports/test_tags.py",
    ),
    "out may overlap x": (
        "setup/call.py", "return begin < out.data_ptr()", "return False and begin < out.data_ptr()",
        "setup/test_consistency.py::TestMemory",
    ),
    "quantize gradients": (
        "integrations/process_group.py", "if in_backward_pass() and not self._gradients:", "if False:",
        "integrations/test_c10d.py::TestAsGloo::test_gradients_are_exact_unless_asked_for",
    ),
    "no agreement before a call": (
        "setup/consistency.py", "if settings.check and transport.world_size > 1:", "if False:",
        "contract/test_06_errors_on_all_ranks_or_none.py::test_a_bad_tensor_on_one_rank_is_an_error_on_all[True-int32]",
    ),
    "settings are not compared": (
        "setup/consistency.py", "if differing or not isinstance(mine, Settings):", "if not isinstance(mine, Settings):",
        "contract/test_05_decisions_from_equal_facts.py::test_formats_that_differ_are_an_error_on_all_ranks",
    ),
    "integers count as low-bit": (
        "integrations/planned.py", "x.dtype in DTYPES and x.layout", "x.layout",
        "integrations/test_planned.py",
    ),
    "compress a MAX in the c10d backend": (
        "integrations/process_group.py", "options.reduceOp != _SUM or", "",
        "integrations/test_c10d_backend.py::TestProcessGroup::test_everything_else_is_passed_through",
    ),
    "any all-gather of vLLM is low-bit": (
        "integrations/vllm_sequence.py", "elif scattered is None or not follows:", "elif scattered is None:",
        "integrations/test_vllm.py::TestInRanks::test_sequence_parallelism",
    ),
    "vLLM's graphs of mixed batches count as decoding": (
        "integrations/vllm_sequence.py", "if not own_graphs or context", "if context",
        "integrations/test_vllm.py::TestStartUp::test_cuda_graphs_with_the_decode_format",
    ),
    "add the bias before the sum": (
        "integrations/transformers.py", "total = self.all_reduce(output, mesh, ",
        "total = self.all_reduce(output + 1, mesh, ",
        "integrations/test_transformers.py::TestTransformers::test_uncompressed_is_transformers_own_and_formats_switch",
    ),
    "the op aliases its input": (
        "setup/call.py", "        if self.out is None:", "        return self.x\n        if self.out is None:",
        "test_ops.py::test_all_reduce_as_a_function_and_as_an_op",
    ),
    "the channel mean is not added back": (
        "plan.py", "return (total * inverse + mean).to(dtype)", "return (total * inverse).to(dtype)",
        "test_plan.py::test_conditioning_is_undone_after_the_sum",
    ),
    "decoding takes the layer's format": (
        "plan.py", "return self.decode if self.decode is not None and is_decode(x) else ", "return ",
        "test_plan.py::test_decoding_takes_its_own_format_and_no_conditioning",
    ),
    "a simulated rank left out": (
        "accuracy/simulate.py", "return reference.all_reduce(route.algorithm, tensors,",
        "return reference.all_reduce(route.algorithm, tensors[:-1],",
        "accuracy/test_simulate.py::test_every_sum_is_the_reference_of_the_partial_sums",
    ),
    "a sensitivity without its half": (
        "accuracy/sensitivity.py", "0.5 * float(square)", "float(square)",
        "accuracy/test_sensitivity.py::test_it_is_half_the_square_of_gradient_times_error",
    ),
    "divergence the wrong way round": (
        "accuracy/evaluate.py", "b.exp().mul(b.sub_(mine))", "mine.exp().mul(mine - b)",
        "accuracy/test_evaluate.py::test_rows_are_what_the_logits_say",
    ),
    "a budget is compared with the mean of an interval": (
        "accuracy/tune.py", "max(self.kl.high, self.least_risen)", "max(self.kl.mean, self.least_risen)",
        "accuracy/test_tune.py::test_a_plan_is_fitted_to_the_divergence_that_is_measured",
    ),
    "a noisy rise in perplexity steers": (
        "accuracy/tune.py", "max(self.kl.high, self.least_risen)", "math.log1p(self.rise.mean)",
        "accuracy/test_tune.py::test_a_rise_in_perplexity_that_is_pure_noise_steers_nothing",
    ),
    "timings are read in straight lines of sizes": (
        "routing/timings.py", "math.log(n_bytes / low) / math.log(high / low)", "(n_bytes - low) / (high - low)",
        "routing/test_policy.py::test_timings_are_read_between_and_beyond_their_sizes",
    ),
    "a peer is taken for another rank": (
        "gpu/sync.py", "return peer + (peer >= region.rank)", "return peer + (peer > region.rank)",
        "gpu/test_kernels.py::test_collectives_of_shards_equal_the_reference[2]",
    ),
    "a kernel exchanges pieces whose sizes only two ranks know": (
        "routing/policy.py", "if message.split is not None or not message.quantizable:", "if not message.quantizable:",
        "collectives/test_pieces.py::test_routes_of_all_to_all",
    ),
    "timings win over min_bytes": (
        "routing/policy.py", "uncompressed, min_bytes != AUTO)", "uncompressed, False)",
        "routing/test_policy.py::test_settings_win_over_timings",
    ),
    "timings of other versions count": (
        "routing/timings.py", "if found.version != version:", "if False:",
        "routing/test_policy.py::test_an_own_file_of_no_use_is_ignored_with_one_line",
    ),
    "the fastest rank counts when times are measured": (
        "setup/measure.py", "slowest = [max(of_turn)", "slowest = [min(of_turn)",
        "setup/test_measure.py::test_the_slowest_rank_counts_and_of_turns_the_median",
    ),
    "only the rank whose result is wrong raises": (
        "setup/verify.py", "if any(everyone):", "if wrong:",
        "setup/test_verify.py::test_a_wrong_result_is_an_error_on_all_ranks",
    ),
    "the package's timings come before one's own": (
        "routing/timings.py", "if found is None and (BUILT_IN / name).exists():", "if (BUILT_IN / name).exists():",
        "routing/test_policy.py::test_own_timings_come_before_those_of_the_package",
    ),
    "peers on another host": (
        "transports/cpu_shared.py", 'if mine["host"] != probes[0]["host"]:', "if False:",
        "gpu/test_kernels.py::test_what_peers_memory_needs",
    ),
    "another transport than was asked for": (
        "setup/discovery.py", 'if settings.transport != "auto":', "if False:",
        "gpu/test_kernels.py::test_a_transport_that_cannot_be_had_is_an_error_on_all_ranks",
    ),
    "sections that are not aligned": (
        "wire/format.py", "return -(-n_bytes // ALIGN) * ALIGN", "return n_bytes",
        "wire/test_format.py::test_sections_are_aligned_and_hold_their_content",
    ),
    "no zeros behind the last section": (
        "wire/format.py", "[*begins[1:], at.nbytes], strict=True)]", "[*begins[1:], begins[-1]], strict=True)]",
        "wire/test_golden.py",
    ),
    "the Triton codec leaves gaps as they were": (
        "gpu/codec.py", "out[a:b].zero_()", "pass",
        "gpu/test_gpu_codec.py::test_the_bytes_of_the_torch_codec[int4]",
    ),
    "the Triton codec hides NaN": (
        "gpu/quantize.py", "tl.where(not_finite, SCALE_NAN, scale", "tl.where(not_finite, 0, scale",
        "gpu/test_gpu_codec.py::test_the_bytes_of_the_torch_codec[int4]",
    ),
    "the Triton codec prefers the part if equal": (
        "gpu/quantize.py", "better = error2 < _square", "better = error2 <= _square",
        "gpu/test_gpu_codec.py::test_the_bytes_of_the_torch_codec[int2-g16-had]",
    ),
    "a kernel for every length": (
        "gpu/launch.py", "Int64(shard_units)", "Int64(shard_units) if count > 64 else shard_units",
        "gpu/test_gpu_codec.py::test_a_new_length_is_no_new_kernel",
    ),
    "a message cut with a gap": (
        "gpu/tuning.py", "((a, b - a) for a, b in", "((a, b - a - (a > 0)) for a, b in",
        "gpu/test_kernels.py::test_messages_are_cut_without_gaps",
    ),
    "results behind the end of a message": (
        "gpu/collective_kernel.py", "(group // (UNIT // GROUP) < left) & (inside >= 0)", "(group >= 0) & (inside >= 0)",
        "gpu/test_kernels.py::test_how_a_message_is_cut_changes_no_bit[False]",
    ),
    "a flag of the call before will do": (
        "gpu/sync.py", "late = tl.max((here & (((seen.to(tl.int32) - epoch) & -2) != 0", "late = tl.max((here & (((seen.to(tl.int32) - epoch) & -2) > 0",
        "gpu/test_kernels.py::test_a_slow_reader_reads_what_was_meant_for_it",
    ),
    "data of even and odd calls lie in one place": (
        "gpu/launch.py", "Int64(self.ll_epoch_bytes if tuning.ll else self.epoch_bytes)", "Int64(0)",
        "gpu/test_kernels.py::test_a_slow_reader_reads_what_was_meant_for_it",
    ),
    "misaligned tensors go to the kernel": (
        "collectives/executors.py", "return x.clone() if x.data_ptr() % 16 else x", "return x",
        "gpu/test_kernels.py::test_strided_misaligned_and_refused_tensors",
    ),
    "transforms have the limit of values": (
        "gpu/quantize.py", "if step.HADAMARD:\n        power", "if False:\n        power",
        "gpu/test_gpu_codec.py::test_transforms_have_a_smaller_limit",
    ),
    "strides are not looked at": (
        "collectives/executors.py", "x = x.resolve_neg().contiguous()", "x = x.resolve_neg()",
        "gpu/test_kernels.py::test_strided_misaligned_and_refused_tensors",
    ),
    "outboxes of even and odd calls in one place": (
        "gpu/host_kernel.py", "    data = inbox_of(epoch, message)\n    given_up", "    data = message.inbox\n    given_up",
        "gpu/test_host_kernel.py::test_a_slow_reader_reads_what_was_meant_for_it",
    ),
    "a wave of the last call is taken for this one's": (
        "gpu/host_kernel.py", "wait(reached1, i - lag + 1, bases", "wait(reached1, i - lag + 1 - _MAX_WAVES, bases",
        "gpu/test_host_kernel.py::test_a_slow_reader_reads_what_was_meant_for_it",
    ),
    "tiles that did not come are taken": (
        "gpu/host_kernel.py", "scale = tl.where(reached < GAVE_UP // 2, scale, float(\"nan\"))", "scale = tl.where(reached > -9, scale, 0.0)",
        "gpu/test_host_kernel.py::test_a_rank_that_does_not_come_is_an_error_that_names_it[one_shot-2]",
    ),
    "a rank that gave up goes on publishing": (
        "gpu/host_sync.py", "sem=\"relaxed\", scope=\"gpu\") == 0:\n        tl.debug_barrier()", "sem=\"relaxed\", scope=\"gpu\") >= 0:\n        tl.debug_barrier()",
        "gpu/test_host_kernel.py::test_a_rank_that_does_not_come_is_an_error_that_names_it[one_shot-2]",
    ),
    "a peer that gave up is overlooked if another one did not": (
        "gpu/host_sync.py", "tl.where(gave_up != 0, GAVE_UP, least)", "least",
        "gpu/test_host_kernel.py::test_a_rank_that_does_not_come_is_an_error_that_names_it[one_shot-3]",
    ),
    "words of unused workers stay behind": (
        "gpu/host_sync.py", "tl.store(progress1 + at, at * 0 + base1, mask=at >= outbox.n_workers)", "pass",
        "gpu/test_host_kernel.py::test_words_of_workers_that_a_launch_does_not_have_follow_the_calls",
    ),
    "what stays on its rank is quantized": (
        "reference.py", "if source == target or fmt.gather.uncompressed", "if fmt.gather.uncompressed",
        "collectives/test_pieces.py::test_the_reference_of_all_to_all_keeps_what_stays",
    ),
    "what stays is not copied": (
        "collectives/pieces.py", "received[rank].values.copy_(sent[rank].values)", "received[rank].values.zero_()",
        "collectives/test_pieces.py::test_all_to_all_equals_the_reference[int5-g32-had-400]",
    ),
    "splits that ranks do not compare": (
        "setup/consistency.py", "in (sent != received).nonzero().tolist()", "in (sent < 0).nonzero().tolist()",
        "collectives/test_pieces.py::test_bad_splits_on_one_rank_are_an_error_on_all",
    ),
    "nodes' sums rounded early": (
        "collectives/hierarchical.py", "dtype = x.dtype if sent.step.uncompressed else torch.float32", "dtype = x.dtype",
        "collectives/test_hierarchical.py::test_ranks_give_the_bits_of_the_reference[int4-dtype0-4-2]",
    ),
    "a column of ranks with other shards": (
        "setup/discovery.py", "* local_world_size, transport.rank % local_world_size",
        "* local_world_size, transport.rank // local_world_size",
        "collectives/test_hierarchical.py::test_ranks_give_the_bits_of_the_reference[int4-dtype0-4-2]",
    ),
    "nodes whose ranks are apart": (
        "setup/discovery.py", "if len(lengths) == len(set(names)) and", "if",
        "setup/test_discovery.py::test_a_node_is_a_host_or_what_is_near_to_the_same_cpus",
    ),
}  # fmt: skip


def test_every_mutation_finds_its_text_and_its_tests() -> None:
    """Whatever has moved is listed here at once, with the entry to correct."""
    faults = []
    for name, (file, old, _, tests) in MUTATIONS.items():
        path = PACKAGE / file
        n = path.read_text().count(old) if path.exists() else 0
        if n != 1:
            faults.append(f"{name!r}: its text is {n} times in src/flashcomm/{file}, not once: {old!r}")
        for node in tests.split():
            path, *names = node.split("[")[0].split("::")
            text = (TESTS / path).read_text() if (TESTS / path).exists() else ""
            if not text or not all(re.search(rf"^ *(def|class) {part}\b", text, re.MULTILINE) for part in names):
                faults.append(f"{name!r}: there is no tests/{node.split('[')[0]}")
    assert not faults, "correct these entries of MUTATIONS in tests/test_mutations.py:\n" + "\n".join(faults)


@pytest.mark.thorough
@pytest.mark.parametrize("name", MUTATIONS)
def test_a_test_notices(name: str, tmp_path: Path) -> None:
    file, old, new, tests = MUTATIONS[name]
    shutil.copytree(ROOT / "src", tmp_path / "src")  # what is compiled, too: times of files are kept
    path = tmp_path / "src" / "flashcomm" / file
    text = path.read_text()
    entry = f"entry {name!r} of MUTATIONS in tests/test_mutations.py"
    assert text.count(old) == 1, f"{entry}: its text is not in src/flashcomm/{file} once: {old!r}"
    path.write_text(text.replace(old, new, 1))
    nodes = [str(TESTS / node) for node in tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *nodes]
    done = subprocess.run(
        [*command, "--timeout", "100"],
        env={**os.environ, "PYTHONPATH": str(tmp_path / "src"), "RANKS_TIMEOUT_S": "8"},
        cwd=ROOT, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    broken = re.search("(Name|Attribute|Syntax)Error: .*", done.stdout)
    assert not broken, f"{entry} is no mutation of {file} but an error of its own: {broken}"
    noticed = done.returncode == 1 or done.returncode < 0  # a failed test, or a process that gloo aborted
    assert noticed, f"{entry}: {tests} did not notice it in {file}:\n{done.stdout[-2000:]}{done.stderr[-1000:]}"
