"""Settings, agreement between ranks, bad input, and which way a message goes."""

from __future__ import annotations

import time
import warnings

import pytest
import torch
import torch.distributed as dist
from support import gloo_group, raise_first, run_ranks, same_bits

from flashcomm import Communicator, FlashcommError, WireFormat, reference
from flashcomm.errors import ClosedError, CommunicationError, FormatError, InputError, SettingsError
from flashcomm.routing import policy
from flashcomm.routing.route import Choice, Message
from flashcomm.settings import Settings, parse_size


def steps(n_rows: int, row: int) -> torch.Tensor:
    """0 to 15, again and again: 4 bits code it exactly, and so the sum of any number of them."""
    return (torch.arange(row) % 16).float().expand(n_rows, row).contiguous()


def errors_of(results: list[object], kind: type[BaseException]) -> set[str]:
    """The messages of all ranks, each of which must have raised exactly `kind`."""
    assert all(type(r) is kind for r in results), results
    return {str(r) for r in results}


class TestSettings:
    def test_argument_over_environment_over_default(self) -> None:
        env = {"FLASHCOMM_FORMAT": "int5", "FLASHCOMM_MIN_BYTES": "2K", "FLASHCOMM_CHECK": "0"}
        got = Settings.resolve("cpu", env)
        assert (got.fmt, got.min_bytes, got.check, got.algorithm) == ("int5", 2048, False, "auto")
        given = Settings.resolve("cpu", env, format="int4", min_bytes=7, check=True)
        assert (given.fmt, given.min_bytes, given.check) == ("int4", 7, True)
        default = Settings.resolve("cpu", {})
        assert (default.fmt, default.min_bytes, default.check) == ("int6-had/int7-had", "auto", True)
        assert (default.transport, default.workspace_bytes) == ("auto", 256 << 20)
        on_gpu = Settings.resolve("cuda", {"FLASHCOMM_TRANSPORT": "symmetric", "FLASHCOMM_WORKSPACE_BYTES": "32M"})
        assert (on_gpu.check, on_gpu.transport, on_gpu.workspace_bytes) == (False, "symmetric", 32 << 20)

    @pytest.mark.parametrize(
        ("env", "message"),
        [
            ({"FLASHCOMM_ALGORITHM": "ring"}, "algorithm='ring': allowed are auto, backend, one_shot, two_shot"),
            ({"FLASHCOMM_MIN_BYTES": "-1"}, "min_bytes='-1': give a number of bytes"),
            ({"FLASHCOMM_CHUNK_BYTES": "0"}, "chunk_bytes='0': give a number of bytes of at least 1"),
            (
                {"FLASHCOMM_TRANSPORT": "pigeon"},
                "transport='pigeon': allowed are auto, process_group, symmetric, host_memory, cpu_shared",
            ),
            ({"FLASHCOMM_WORKSPACE_BYTES": "1M"}, "workspace_bytes='1M': give a number of bytes of at least 4194304"),
            ({"FLASHCOMM_TIMEOUT_S": "soon"}, "timeout_s='soon': give a positive number"),
            ({"FLASHCOMM_TIMEOUT_S": "0"}, "timeout_s='0'"),
            ({"FLASHCOMM_CHECK": "maybe"}, "check='maybe': allowed are 0, 1"),
            ({"FLASHCOMM_DEBUG": "loud"}, "debug='loud': allowed are off, info"),
        ],
    )
    def test_wrong_values_say_what_is_allowed(self, env: dict[str, str], message: str) -> None:
        with pytest.raises(SettingsError, match=message.replace("(", r"\(")):
            Settings.resolve("cpu", env)

    def test_a_plan_is_no_format(self) -> None:
        with pytest.raises(SettingsError, match=r"format='p\.json' is a plan, with formats by layer; one call has one"):
            Settings.resolve("cpu", {"FLASHCOMM_FORMAT": "p.json"})

    def test_misspelt_arguments_are_errors(self) -> None:
        with pytest.raises(SettingsError, match="unknown settings algoritm: there are format, algorithm"):
            Settings.resolve("cpu", {}, algoritm="two_shot")
        with pytest.raises(SettingsError, match="timeout_s="):
            Settings.resolve("cpu", {}, timeout_s=[1])

    def test_unknown_names_are_warned_about(self) -> None:
        with pytest.warns(UserWarning, match="FLASHCOMM_FROMAT is not a flashcomm setting"):
            Settings.resolve("cpu", {"FLASHCOMM_FROMAT": "int4"})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Settings.resolve("cpu", {"FLASHCOMM_FORMAT": "int4", "OTHER": "x"})

    def test_sizes(self) -> None:
        assert [parse_size("s", t) for t in ("7", "64K", "16M", "1GiB", "2kb", 5)] == [
            7,
            65536,
            16 << 20,
            1 << 30,
            2048,
            5,
        ]


class TestAgreement:
    """Contract 5 and 6: the same error on every rank, and soon."""

    def test_formats_differ(self) -> None:
        messages = errors_of(run_ranks(3, lambda g, r: Communicator(g, "int4" if r else "int5")), SettingsError)
        assert len(messages) == 1
        assert "fmt: rank 0 'int5', rank 1 'int4', rank 2 'int4'" in messages.pop()

    def test_one_rank_has_a_format_that_does_not_exist(self) -> None:
        messages = errors_of(run_ranks(3, lambda g, r: Communicator(g, "int9" if r == 1 else "int4")), FormatError)
        assert len(messages) == 1
        assert "rank 1: 9 bits asked for, 2 to 8 are allowed" in messages.pop()

    @pytest.mark.parametrize("theirs", ["int9", "int6"])
    def test_formats_of_one_call_differ_and_the_group_goes_on(self, theirs: str) -> None:
        """An unknown format on one rank, or another one: an error on all, and the next call works."""

        def body(group: dist.ProcessGroup, rank: int) -> torch.Tensor:
            comm = Communicator(group, "int4", min_bytes=0)
            with pytest.raises(InputError, match="did not make the same valid call"):
                comm.all_reduce(steps(64, 576), format=theirs if rank else "int4")
            return comm.all_reduce(rank * steps(64, 576), format="int8")

        want = reference.one_shot([0 * steps(64, 576), steps(64, 576)], WireFormat.parse("int8"))
        assert all(torch.equal(r, want) for r in raise_first(run_ranks(2, body)))

    def test_an_unknown_format_without_the_check(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            with pytest.raises(FormatError, match="9 bits asked for"):
                Communicator(group, "int4", check=False).all_reduce(steps(64, 576), format="int9")

        raise_first(run_ranks(2, body))

    @pytest.mark.parametrize("algorithm", ["auto", "two_shot"])
    def test_shapes_differ_and_the_group_goes_on(self, algorithm: str) -> None:
        """Also across the minimum size, where one rank would code and the other not."""

        def body(group: dist.ProcessGroup, rank: int) -> torch.Tensor:
            comm = Communicator(group, "int4", algorithm=algorithm)
            with pytest.raises(InputError) as caught:
                comm.all_reduce(torch.ones(200 if rank != 1 else 400, 576))
            assert "rank 1: all_reduce number 1 of (400, 576) float32" in str(caught.value)
            assert "rank 2: all_reduce number 1 of (200, 576) float32" in str(caught.value)
            return comm.all_reduce(rank * steps(100, 576))

        assert all(torch.equal(r, 3 * steps(100, 576)) for r in raise_first(run_ranks(3, body)))

    def test_two_communicators_in_different_order(self) -> None:
        """Their messages differ in size, or worse, only in meaning: the calls are told apart by the settings."""

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comms = [Communicator(group, fmt) for fmt in ("int4-g32", "int4-g16-had")]
            x = steps(64, 1152)
            with pytest.raises(InputError, match="did not make the same valid call"):
                comms[rank].all_reduce(x)
            assert torch.equal(comms[0].all_reduce(x), 2 * x)

        raise_first(run_ranks(2, body))

    def test_one_rank_makes_a_communicator_while_another_calls(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4")
            with pytest.raises(InputError, match="rank 1: making a Communicator"):
                Communicator(group, "int8") if rank else comm.all_reduce(torch.ones(4))

        raise_first(run_ranks(2, body))

    def test_one_rank_asks_for_a_device_that_is_not_there(self) -> None:
        results = run_ranks(2, lambda g, r: Communicator(g, "int4", device="tpu" if r else None))
        assert errors_of(results, SettingsError) == {"rank 1: device='tpu': allowed are 'cpu' and 'cuda'"}

    def test_calls_and_dtypes_differ(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4")
            with pytest.raises(InputError, match="did not make the same valid call"):
                comm.all_reduce(torch.ones(4, dtype=torch.float16 if rank else torch.float32))
            with pytest.raises(InputError, match="rank 0: all_gather number 1"):
                (comm.all_reduce if rank else comm.all_gather)(torch.ones(4))

        raise_first(run_ranks(2, body))

    @pytest.mark.parametrize(
        ("bad", "advice"),
        [
            (torch.ones(4, dtype=torch.int32), "the dtype must be one of bfloat16, float16, float32"),
            (torch.ones(4, dtype=torch.float64), "the dtype must be one of bfloat16, float16, float32"),
            (torch.ones(4, device="meta"), "the tensor must be on cpu"),
            (torch.ones(4).to_sparse(), "the tensor must be dense"),
            (torch.ones(4, requires_grad=True), "flashcomm is for inference"),
            (torch.ones((1,) * 9), "at most 8 dimensions"),
            ([1.0, 2.0], "a torch.Tensor is needed"),
        ],
        ids=["int32", "float64", "meta", "sparse", "grad", "dims", "list"],
    )
    @pytest.mark.parametrize("check", [True, False])
    def test_bad_input(self, bad: object, advice: str, check: bool) -> None:
        """One rank's bad tensor is every rank's error (with check=False: only its own, so all of them pass it)."""

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4", check=check)
            with pytest.raises(InputError, match=advice):
                comm.all_reduce(bad if rank == 0 or not check else torch.ones(4))  # type: ignore[arg-type]
            assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4

        raise_first(run_ranks(2, body))

    def test_out_must_fit(self) -> None:
        """One rank's bad out= is every rank's error too."""

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm, x = Communicator(group, "int4"), torch.ones(4, 6)
            for bad in (torch.ones(6, 4), torch.ones(4, 6).half(), torch.ones(6, 4).t(), [0.0]):
                with pytest.raises(InputError, match="out= must be contiguous"):
                    comm.all_reduce(x, out=bad if rank else x.clone())  # type: ignore[arg-type]
            assert (comm.all_reduce(x, out=torch.empty(4, 6)) == 2).all()

        raise_first(run_ranks(2, body))

    def test_reduce_scatter_needs_equal_slices(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4")
            with pytest.raises(InputError, match="multiple of the world size 3"):
                comm.reduce_scatter(torch.ones(4, 2))
            with pytest.raises(InputError, match="dimension 0 must exist"):
                comm.all_gather(torch.tensor(1.0))

        raise_first(run_ranks(3, body))

    def test_a_peer_that_never_comes_is_an_error_within_the_timeout(self) -> None:
        begin = time.monotonic()
        results = run_ranks(3, lambda g, r: Communicator(g, "int4", timeout_s=2) if r else time.sleep(0))
        assert time.monotonic() - begin < 20
        for rank in (1, 2):
            assert isinstance(results[rank], CommunicationError)
            assert f"rank {rank} of 3: the consistency check of making a Communicator failed" in str(results[rank])
            assert "rank 0" in str(results[rank])

    def test_a_peer_that_dies_in_a_call_is_an_error_and_a_new_group_works(self) -> None:
        import os

        store = dist.HashStore()

        def body(group: dist.ProcessGroup, rank: int) -> torch.Tensor | None:
            comm = Communicator(group, "int4", min_bytes=0, timeout_s=2)
            if rank == 0:
                return None  # leaves
            with pytest.raises(
                CommunicationError, match=f"rank {rank} of 3: the consistency check of all_reduce failed"
            ):
                comm.all_reduce(torch.ones(4, 576))
            fresh = gloo_group(dist.PrefixStore(f"fresh{os.getpid()}", store), rank - 1, 2)
            return Communicator(fresh, "int4", min_bytes=0).all_reduce(steps(4, 576))

        results = raise_first(run_ranks(3, body))
        for result in results[1:]:
            assert result is not None
            assert torch.equal(result, 2 * steps(4, 576))

    def test_a_peer_that_leaves_between_chunks(self) -> None:
        """The exchange runs on the transport's thread then; its error reaches the caller all the same."""

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4", algorithm="two_shot", check=False, chunk_bytes=4000, timeout_s=2)
            comm.all_reduce(torch.ones(40, 576))
            if rank:
                with pytest.raises(CommunicationError, match=f"rank {rank} of 3: two-shot reduce, chunk 1/23 failed"):
                    comm.all_reduce(torch.ones(40, 576))

        raise_first(run_ranks(3, body))


class TestLife:
    def test_closed(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            with Communicator(group, "int4") as comm:
                assert repr(comm) == f"Communicator(rank {rank} of 2, int4, cpu)"
            comm.close()
            with pytest.raises(ClosedError, match="all_reduce on a closed Communicator: make a new one"):
                comm.all_reduce(torch.ones(3))

        raise_first(run_ranks(2, body))

    def test_without_a_process_group(self) -> None:
        with pytest.raises(SettingsError, match="init_process_group"):
            Communicator(None, "int4")
        with pytest.raises(SettingsError, match="a process group that this rank is a member of"):
            Communicator(dist.GroupMember.NON_GROUP_MEMBER, "int4")

    def test_device_that_the_group_has_not(self) -> None:
        errors_of(run_ranks(1, lambda g, r: Communicator(g, "int4", device="cuda")), SettingsError)
        errors_of(run_ranks(1, lambda g, r: Communicator(g, "int4", device="tpu")), SettingsError)

    def test_counters(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> tuple[dict[str, int], int, int]:
            comm = Communicator(group, "int4", min_bytes=1000)
            x = torch.ones(8, 1152, dtype=torch.bfloat16)
            for _ in range(3):
                comm.all_reduce(x)
            sent = comm.transport.n_bytes_sent
            comm.all_reduce(x[:1, :100].contiguous())
            return dict(comm.calls), sent, comm.explain(x.shape, x.dtype).route.wire_bytes

        for calls, sent, planned in raise_first(run_ranks(3, body)):
            assert calls == {"all_reduce/one_shot": 3, "all_reduce/backend": 1}
            assert sent == 3 * planned == 3 * 2 * (8 * 576 + 8 * 18 * 2)

    def test_bytes_by_way(self, caplog: pytest.LogCaptureFixture) -> None:
        """What `sent` says is what went over the transport, for each collective."""

        def body(group: dist.ProcessGroup, rank: int) -> dict[str, int]:
            comm = Communicator(group, "int4/int8", algorithm="two_shot", debug="info")
            x, before = torch.ones(9, 576, dtype=torch.bfloat16), 0
            for call in (comm.all_reduce, comm.reduce_scatter, comm.all_gather):
                for _ in range(10):
                    call(x)
                sent = comm.transport.n_bytes_sent - before
                assert sent == sum(comm.sent[key] for key in comm.sent if key.startswith(call.__name__)) > 0
                before += sent
            comm.all_reduce(torch.empty(0))
            return dict(comm.sent)

        for sent in raise_first(run_ranks(3, body)):
            assert set(sent) == {"all_reduce/two_shot", "reduce_scatter/pipelined", "all_gather/pipelined"}
        told = [record.getMessage() for record in caplog.records]
        of_rank_0 = [text for text in told if text.startswith("Communicator(rank 0 of 3, int4/int8, cpu): ")]
        assert len(of_rank_0) == 6
        n_bytes = sent["all_reduce/two_shot"] // 10
        assert of_rank_0[0].endswith(
            f"first all_reduce goes two_shot, shape (9, 576) torch.bfloat16, {n_bytes} bytes sent"
        )
        assert of_rank_0[1].endswith(f"10 calls of all_reduce/two_shot, {10 * n_bytes} bytes sent")

    def test_all_errors_have_one_base(self) -> None:
        for kind in (SettingsError, FormatError, InputError, CommunicationError, ClosedError):
            assert issubclass(kind, FlashcommError)


class TestPolicy:
    """choose() is a pure function: no group is needed to ask it."""

    def choose(
        self,
        numel: int,
        world_size: int,
        fmt: str = "int4",
        algorithm: str = "auto",
        row: int = 576,
        min_bytes: int = 65536,
    ) -> Choice:
        call = Message(numel, row, 2, world_size, "cpu")
        return policy.choose(call, WireFormat.parse(fmt), algorithm, min_bytes)

    def test_auto(self) -> None:
        assert self.choose(512 * 576, 2).route.algorithm == "one_shot"
        assert self.choose(512 * 576, 3).route.algorithm == "two_shot"
        assert self.choose(80 * 576, 3).route.algorithm == "one_shot"
        assert self.choose(576, 3).route.algorithm == "backend"
        assert self.choose(512 * 576, 3, "bf16").route.algorithm == "backend"
        assert self.choose(512 * 576, 3, row=1).route.algorithm == "backend"  # 3 bytes a value would be sent for 2
        assert self.choose(512 * 576, 1).route.algorithm == "copy"
        assert self.choose(0, 3, row=0).route.algorithm == "copy"

    def test_a_sweep_admits_every_algorithm_somewhere(self) -> None:
        seen = {self.choose(n * 576, w).route.algorithm for n in (1, 80, 512) for w in range(1, 9)}
        assert seen == {"copy", "backend", "one_shot", "two_shot"}

    def test_explicit_wins(self) -> None:
        for algorithm in policy.CANDIDATES:
            assert self.choose(576, 3, algorithm=algorithm).route.algorithm == algorithm
        assert self.choose(576, 3, min_bytes=0).route.algorithm == "one_shot"

    def test_every_way_not_taken_has_a_reason(self) -> None:
        for world_size in (2, 3):
            for n in (1, 80, 512):
                choice = self.choose(n * 576, world_size)
                assert {choice.route.algorithm, *(r.name for r in choice.rejected)} == set(policy.CANDIDATES)
                assert all(r.reason for r in choice.rejected)
                assert choice.route.reason
                assert f"{choice.route.wire_bytes} bytes a rank" in str(choice)

    def test_wire_bytes(self) -> None:
        """int4 over 3 ranks, two-shot: 4.25 bits, two thirds of the message sent in each of two steps."""
        row_bytes = 288 + 9 * 2
        assert self.choose(513 * 576, 3).route.wire_bytes == 2 * 2 * (171 * row_bytes + -171 * 18 % 16)
        assert self.choose(512 * 576, 2).route.wire_bytes == 512 * row_bytes
        assert self.choose(512 * 576, 4, "bf16").route.wire_bytes == 2 * 3 * 512 * 576 * 2 // 4


def test_batch_of_settings_reaches_the_result() -> None:
    """algorithm= decides between results that differ: one-shot rounds once, two-shot twice."""
    tensors = [torch.randn(4, 576) for _ in range(2)]
    fmt = WireFormat.parse("int3")

    def body(group: dist.ProcessGroup, rank: int) -> list[torch.Tensor]:
        return [
            Communicator(group, "int3", algorithm=a).all_reduce(tensors[rank])
            for a in ("one_shot", "two_shot", "backend")
        ]

    one, two, native = raise_first(run_ranks(2, body))[0]
    assert same_bits(one, reference.one_shot(tensors, fmt))
    assert same_bits(two, reference.two_shot(tensors, fmt))
    assert not torch.equal(one, two)
    assert torch.equal(native, tensors[0] + tensors[1])
