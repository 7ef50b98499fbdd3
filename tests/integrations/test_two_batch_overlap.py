"""Two-batch overlap: equal bits and caches, the same order of all-reduces on all ranks, errors for the caller."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm.errors import InputError
from flashcomm.integrations.two_batch_overlap import TwoBatchOverlap, current
from flashcomm.ranks.launch import RankContext, run

MODEL = Path(__file__).parent.parent.parent / ".assets" / "smollm2-135m-instruct"
TEXT = Path(__file__).parent.parent.parent / ".assets" / "wikipedia-test.txt"
CPU = torch.device("cpu")


class TestTwoBatchOverlap:
    def test_turns_and_the_order_of_reduces(self) -> None:
        """One micro-batch computes at a time, reduces alternate, and one computes while a reduce of the other runs."""
        overlap = TwoBatchOverlap((1, 2), CPU)
        log: list[str] = []
        computing = threading.Lock()
        met: list[bool] = []

        def micro_batch(h: int, n_reduces: int) -> str:
            assert current() is overlap
            computing.acquire(timeout=0.1) or pytest.fail("both compute")
            for k in range(n_reduces):
                assert overlap.whole(10 * overlap.sizes[h]) == 30
                time.sleep(0.02)
                asked = f"{h}.{k}"

                def work(k: int = k, asked: str = asked) -> torch.Tensor:
                    assert current() is None
                    assert torch.is_inference_mode_enabled()
                    log.append(asked)
                    deadline = time.monotonic() + 0.2
                    while not computing.locked() and time.monotonic() < deadline:
                        time.sleep(0.001)
                    met.append(computing.locked())
                    return torch.tensor(k)

                computing.release()
                assert overlap.reduce(work).item() == k
                computing.acquire(timeout=0.1) or pytest.fail("both compute")
            computing.release()
            return f"micro-batch {h}"

        with torch.inference_mode():
            got = overlap.run((lambda: micro_batch(0, 3), lambda: micro_batch(1, 4)))
        assert got == ("micro-batch 0", "micro-batch 1")
        assert log == ["0.0", "1.0", "0.1", "1.1", "0.2", "1.2", "1.3"]
        assert sum(met) >= 5  # all but the last ones overlap with computation
        assert current() is None

    def test_each_micro_batch_keeps_its_modes(self) -> None:
        overlap = TwoBatchOverlap((1, 1), CPU)

        def first() -> bool:
            with torch.enable_grad():
                overlap.reduce(lambda: torch.tensor(0))
                return torch.is_grad_enabled()

        def second() -> bool:
            overlap.reduce(lambda: torch.tensor(0))
            return torch.is_grad_enabled()

        with torch.no_grad():
            assert overlap.run((first, second)) == (True, False)
            assert not torch.is_grad_enabled()

    @pytest.mark.parametrize("failing", [0, 1])
    @pytest.mark.parametrize("inside", [False, True])
    def test_an_error_in_one_micro_batch_ends_both(self, failing: int, inside: bool) -> None:
        overlap = TwoBatchOverlap((1, 1), CPU)
        reached: list[int] = []

        def micro_batch(h: int) -> None:
            def work(k: int) -> torch.Tensor:
                if inside and h == failing and k == 1:
                    raise InputError("this one")
                return torch.tensor(0)

            for k in range(3):
                overlap.reduce(lambda: work(k))  # noqa: B023  (done before k changes)
                if not inside and h == failing and k == 1:
                    raise InputError("this one")
            reached.append(h)

        with pytest.raises(InputError, match="this one"):
            overlap.run((lambda: micro_batch(0), lambda: micro_batch(1)))
        assert reached == []
        ours = ("flashcomm-micro-batch", "flashcomm-reduce")
        assert not [t for t in threading.enumerate() if t.name.startswith(ours)]

    def test_micro_batches_without_reduces(self) -> None:
        assert TwoBatchOverlap((1, 1), CPU).run((lambda: 1, lambda: 2)) == (1, 2)


def tiny(kind: str = "llama") -> Any:
    """Return a sharded model with random weights, equal in every call."""
    from flashcomm.bench.shapes import build

    return build("tiny" if kind == "llama" else kind, None, dist.get_world_size(), CPU, torch.bfloat16)


def overlaps(ctx: RankContext, min_bytes: int) -> None:
    """Logits and caches have the same bits for given and new caches, odd batches, padding and decoding."""
    from transformers import DynamicCache

    from flashcomm.integrations import transformers as integration

    integration.enable("int4", min_bytes=min_bytes)
    model = integration.overlap(tiny(), mode="always")
    switch = model.base_model.forward
    cuts = 0
    run_both = TwoBatchOverlap.run

    def counted(self: TwoBatchOverlap, calls: Any) -> Any:
        nonlocal cuts
        cuts += 1
        return run_both(self, calls)

    TwoBatchOverlap.run = counted  # type: ignore[method-assign]

    def both(**kwargs: Any) -> tuple[Any, Any]:
        outs = []
        for switch.mode in ("never", "always"):
            more = {"past_key_values": DynamicCache(config=model.config)} if kwargs.get("given") else {}
            with torch.inference_mode():
                out = model(**{k: v for k, v in kwargs.items() if k != "given"}, **more)
                if more:
                    assert out.past_key_values is more["past_key_values"]
                nexts = model(kwargs["input_ids"][:, :1], past_key_values=out.past_key_values)
            outs.append((out, nexts))
        (plain, then), (cut, then_cut) = outs
        assert torch.equal(plain.logits, cut.logits)
        assert torch.equal(then.logits, then_cut.logits)
        for a, b in zip(plain.past_key_values.layers, cut.past_key_values.layers, strict=True):
            assert torch.equal(a.keys, b.keys)
            assert torch.equal(a.values, b.values)
        return plain, cut

    ids = torch.randint(0, 500, (5, 24), generator=torch.Generator().manual_seed(1))
    both(input_ids=ids)
    both(input_ids=ids[:2], logits_to_keep=1, given=True)
    both(input_ids=ids[:4], use_cache=True, position_ids=torch.arange(24)[None])
    assert cuts == 3, "decoding is not cut"
    padded = torch.ones_like(ids)
    padded[0, :5] = padded[4, :7] = 0
    both(input_ids=ids, attention_mask=padded)
    assert cuts == 4
    padded[0] = 1  # one micro-batch needs a mask, the other does not: run as before
    both(input_ids=ids, attention_mask=padded)
    both(input_ids=ids[:1, :3])
    both(input_ids=ids, output_hidden_states=True)
    assert cuts == 4
    with torch.inference_mode():
        out = model.base_model(ids, use_cache=False)
        assert out.past_key_values is None
        assert cuts == 5
    with integration.backend_all_reduce(), torch.inference_mode():
        cut = model(ids).logits
        switch.mode = "never"
        assert torch.equal(model(ids).logits, cut)


def continues(ctx: RankContext) -> None:
    """A second part of the prompt on a filled cache, and the arguments of the Communicator."""
    from flashcomm.communicator import Communicator
    from flashcomm.integrations import transformers as integration

    integration.enable("int6-had/int7-had")
    model = integration.overlap(tiny(), mode="always")
    asked: list[tuple[int, int | None]] = []
    reduce = Communicator.all_reduce

    def spy(self: Communicator, x: torch.Tensor, out: Any = None, **more: Any) -> torch.Tensor:
        asked.append((x.numel(), more.get("whole")))
        return reduce(self, x, out, **more)

    Communicator.all_reduce = spy  # type: ignore[method-assign]
    ids = torch.randint(0, 500, (3, 32), generator=torch.Generator().manual_seed(1))
    results = []
    for model.base_model.forward.mode in ("never", "always"):
        with torch.inference_mode():
            past = model(ids[:, :16]).past_key_values
            results.append(model(ids[:, 16:], past_key_values=past).logits)
    assert torch.equal(*results)
    n, hidden = 16, model.config.hidden_size
    plain, cut = asked[: len(asked) // 3], asked[len(asked) // 3 :]
    assert plain == [(3 * n * hidden, None)] * 2 * 2 * model.config.num_hidden_layers
    assert cut == [(n * hidden, 3 * n * hidden), (2 * n * hidden, 3 * n * hidden)] * (len(cut) // 2)


def refuses(ctx: RankContext) -> None:
    from flashcomm.integrations import transformers as integration

    model = tiny()
    model._tp_plan["model.layers.*.mlp.experts"] = "grouped_gemm"
    with pytest.raises(InputError, match=r"overlap is for dense models.*grouped_gemm: do not use overlap"):
        integration.overlap(model, mode="always")


def fails_in_a_reduce(ctx: RankContext) -> None:
    """The error of an all-reduce in a micro-batch reaches the caller, and the model can run again afterwards."""
    from flashcomm.integrations import transformers as integration

    integration.enable("int4", min_bytes=0)
    model = integration.overlap(tiny(), mode="always")
    ids = torch.arange(48).view(2, 24)
    with torch.inference_mode():
        want = model(ids).logits
        reduce, calls = integration.RowwiseAllReduce.reduce, iter(range(100))

        def failing(self: Any, *args: Any) -> torch.Tensor:
            if next(calls) == 3:
                raise InputError("the fourth reduce")
            return reduce(self, *args)

        integration.RowwiseAllReduce.reduce = failing  # type: ignore[method-assign]
        with pytest.raises(InputError, match="the fourth reduce"):
            model(ids)
        integration.RowwiseAllReduce.reduce = reduce  # type: ignore[method-assign]
        dist.barrier()
        assert torch.equal(model(ids).logits, want)


def real_text(ctx: RankContext) -> None:
    from flashcomm.accuracy.models import load_model
    from flashcomm.integrations import transformers as integration

    integration.enable("int4-had")
    model, tokenizer = load_model(MODEL, ctx.world_size, CPU, torch.bfloat16)
    integration.overlap(model, mode="always")
    text = tokenizer(TEXT.read_text()[:4000], return_tensors="pt").input_ids[0, :512].view(2, 256)
    with torch.inference_mode():
        overlapped = model(text).logits
        model.base_model.forward.mode = "never"
        # One sequence at a time: a CPU may round a matrix product of 512 rows otherwise than one of 256.
        alone = torch.cat([model(row[None]).logits for row in text])
    assert torch.equal(overlapped, alone)


def blocks(ctx: RankContext) -> None:
    """One sequence as two blocks of tokens: caches as without overlap, and what cannot be split."""
    from transformers import DynamicCache

    from flashcomm.integrations import transformers as integration

    integration.enable("int4", min_bytes=0)
    model = integration.overlap(tiny(), mode="always")
    switch = model.base_model.forward
    ids = torch.randint(0, 500, (1, 64), generator=torch.Generator().manual_seed(1))
    seen = []
    for switch.mode in ("never", "always"):
        with torch.inference_mode():
            given = DynamicCache(config=model.config)
            first = model(ids, past_key_values=given)
            assert first.past_key_values is given
            assert switch.last == ("tokens" if switch.mode == "always" else None)
            then = model(ids[:, :40], past_key_values=given, attention_mask=torch.ones(1, 104, dtype=torch.long))
            assert switch.last == ("tokens" if switch.mode == "always" else None)
            nexts = model(ids[:, :1], past_key_values=given)
            uncached = model(ids, use_cache=False)
            assert uncached.past_key_values is None
        seen.append((first, then, nexts, uncached, given))
    *outs, (plain, cut) = zip(*seen, strict=True)
    for a, b in outs:
        assert torch.equal(a.logits, b.logits)
    for a, b in zip(plain.layers, cut.layers, strict=True):
        assert a.keys.shape[-2] == 105
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    with torch.inference_mode():
        for more in ({"attention_mask": padded}, {"output_hidden_states": True}):
            model(ids, **more)
            assert switch.last is None
        model(ids, use_cache=False, position_ids=torch.arange(64)[None] % 32)  # two sequences in a row
        assert switch.last is None
    model(ids)  # training
    assert switch.last is None


def decides(ctx: RankContext) -> list[bool | None]:
    """The slowest rank's clock decides for all ranks; return what was split in each pass."""
    from flashcomm.integrations import transformers as integration
    from flashcomm.integrations import transformers_overlap

    integration.enable("int4", min_bytes=0)
    model = integration.overlap(tiny())
    switch = model.base_model.forward
    clock, overlap_costs = [0.0], 1.0 if ctx.rank == 0 else 3.0  # rank 1 finds overlap slower, rank 0 faster
    transformers_overlap.time = type("Clock", (), {"perf_counter": lambda: clock[0]})
    plain, split = switch.plain, switch._sequences

    def timed_plain(**given: Any) -> Any:
        clock[0] += 2.0 if switch.last is None else 0.0
        return plain(**given)

    def timed_split(given: Any) -> Any:
        clock[0] += overlap_costs
        return split(given)

    switch.plain, switch._sequences = timed_plain, timed_split
    ids = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(1))
    used = []
    with torch.inference_mode():
        for _ in range(2 * (transformers_overlap.N_TIMED + 1) + 2):
            model(ids)
            used.append(switch.last is not None)
    (trial,) = switch.trials.values()
    assert trial.pays is False
    overlap_costs = 1.0
    integration.overlap(model)
    switch = model.base_model.forward
    assert not switch.trials
    return used


class TestTransformers:
    def test_blocks_of_tokens(self) -> None:
        run(blocks, 2)

    def test_the_first_passes_decide(self) -> None:
        assert run(decides, 2) == [False, True] * 4 + [False, False]

    @pytest.mark.parametrize("min_bytes", [0, 1 << 13])
    def test_bits(self, min_bytes: int) -> None:
        """With min_bytes of 8 KiB some messages are low-bit although half of them would be too small."""
        run(overlaps, 2, (min_bytes,))

    def test_a_filled_cache_and_the_whole_message(self) -> None:
        run(continues, 2)

    def test_dense_models_only(self) -> None:
        run(refuses, 2)

    def test_errors(self) -> None:
        run(fails_in_a_reduce, 2)

    @pytest.mark.skipif(not TEXT.exists(), reason="no model: run scripts/fetch_assets.py")
    def test_real_text_on_three_ranks(self) -> None:
        run(real_text, 3)
