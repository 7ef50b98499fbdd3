"""Consistency checks: a mistake on one rank is soon the same, clear error on all ranks."""

from __future__ import annotations

import ast
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import raise_first, run_ranks, same_bits

import flashcomm
from flashcomm import Communicator, reference
from flashcomm.errors import CommunicationError, FlashcommError, FormatError, InputError, SettingsError
from flashcomm.setup import consistency, discovery
from flashcomm.wire import format as wire_format

HUGE = "9" * 5000
OVER = threading.local()  # replacements of module attributes, for one rank (a thread)


def same_error(results: list[Any], kind: type[Exception]) -> str:
    """Return the message that all ranks raised."""
    assert all(type(r) is kind for r in results), results
    messages = {str(r) for r in results}
    assert len(messages) == 1, messages
    return messages.pop()


class TestSettings:
    @pytest.mark.parametrize(
        "bad",
        [
            {"min_bytes": HUGE},
            {"chunk_bytes": HUGE},
            {"workspace_bytes": HUGE},
            {"local_world_size": HUGE},
            {"timeout_s": 10**400},
            {"timeout_s": 1e-4},
            {"timeout_s": float("nan")},
            {"min_bytes": 10**5000},
            {"algorithm": "\\" * 1500},
            {"plan": object()},
        ],
        ids=lambda bad: f"{next(iter(bad))}-{str(type(next(iter(bad.values()))))[8:-2]}",
    )
    def test_a_setting_that_one_rank_cannot_have(self, bad: dict[str, Any]) -> None:
        begin = time.monotonic()
        results = run_ranks(3, lambda g, r: Communicator(g, "int4", **(bad if r == 1 else {})))
        assert "rank 1: " in same_error(results, SettingsError)
        assert time.monotonic() - begin < 30

    @pytest.mark.parametrize("bad", ["int" + HUGE, "int4-g" + HUGE, "\\" * 1500, "int٤", "int4-g064"])
    def test_a_format_that_one_rank_cannot_have(self, bad: str) -> None:
        assert "rank 1: " in same_error(run_ranks(2, lambda g, r: Communicator(g, bad if r else "int4")), FormatError)

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4")
            with pytest.raises(InputError, match="format= is not a wire format"):
                comm.all_reduce(torch.ones(4), format=bad if rank else "int4")
            assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4

        raise_first(run_ranks(2, body))

    def test_a_setting_of_any_length_is_compared(self) -> None:
        results = run_ranks(2, lambda g, r: Communicator(g, "int4", plan="x" * 5000 if r else ""))
        assert "plan: rank 0 ''" in same_error(results, SettingsError)
        assert raise_first(run_ranks(2, lambda g, r: Communicator(g, "int4", plan="x" * 5000).rank)) == [0, 1]

    def test_a_warning_that_is_an_error_on_one_rank(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """PYTHONWARNINGS=error does this. Filters belong to a process, but ranks are threads here."""
        real = flashcomm.settings.warn_unknown

        def warn(environ: Any) -> None:
            real(environ)
            if OVER.rank == 1:
                raise UserWarning("FLASHCOMM_FORMATT is not a flashcomm setting")

        def body(group: dist.ProcessGroup, rank: int) -> None:
            OVER.rank = rank
            Communicator(group, "int4")

        monkeypatch.setattr("flashcomm.settings.warn_unknown", warn)
        message = same_error(run_ranks(2, body), SettingsError)
        assert message == "rank 1: UserWarning: FLASHCOMM_FORMATT is not a flashcomm setting"

    def test_any_exception_on_one_rank_is_an_error_on_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """This includes late failures, when the other ranks have nothing more to compare."""
        real = discovery.connect

        def connect(group: Any, transport: Any, settings: Any) -> Any:
            found = real(group, transport, settings)
            if transport.rank == 1:
                raise MemoryError("of this rank alone")
            return found

        monkeypatch.setattr(discovery, "connect", connect)
        results = run_ranks(3, lambda g, r: Communicator(g, "int4"))
        assert all(
            isinstance(r, FlashcommError) and "rank 1: MemoryError: of this rank alone" in str(r) for r in results
        )

    @pytest.mark.parametrize(
        ("module", "name", "value", "words"),
        [
            (flashcomm, "__version__", "9.9", "version: rank 0 '{was}', rank 1 '9.9'"),
            (wire_format, "WIRE_VERSION", 99, "wire version: rank 0 {was}, rank 1 99"),
        ],
        ids=["package", "wire"],
    )
    def test_versions_differ(
        self, module: Any, name: str, value: Any, words: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, was = consistency._described, getattr(module, name)
        lock = threading.Lock()

        def described(transport: Any, mine: Any) -> Any:
            with lock:
                setattr(module, name, value if transport.rank else was)
                try:
                    return real(transport, mine)
                finally:
                    setattr(module, name, was)

        monkeypatch.setattr(consistency, "_described", described)
        message = same_error(run_ranks(2, lambda g, r: Communicator(g, "int4")), SettingsError)
        assert "versions differ between ranks" in message
        assert words.format(was=was) in message

    def test_other_words_are_another_version_and_are_not_decoded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = consistency._exchange_words

        def exchange(transport: Any, *rest: Any) -> Any:
            rows = real(transport, *rest)
            rows[1] = [77, *[99] * 15]  # an unknown version may send this
            return rows

        monkeypatch.setattr(consistency, "_exchange_words", exchange)
        message = same_error(run_ranks(2, lambda g, r: Communicator(g, "int4")), InputError)
        assert "rank 1: another version of flashcomm (consistency check 77, here 2)" in message

    def test_one_rank_knows_a_setting_more(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = consistency._described
        for knows in (0, 1):
            monkeypatch.setattr(
                consistency, "_described", lambda t, m, k=knows: real(t, m) | ({"new": 1} if t.rank == k else {})
            )
            message = same_error(run_ranks(2, lambda g, r: Communicator(g, "int4")), SettingsError)
            assert "new: " in message
            assert "'not known'" in message


class TestCalls:
    def test_communicators_of_equal_settings_in_another_order(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            comms = [Communicator(group, "int4") for _ in range(2)]
            with pytest.raises(InputError) as caught:
                comms[rank].all_reduce(torch.ones(4))
            assert "rank 0: all_reduce number 1 of Communicator 0" in str(caught.value)
            assert "rank 1: all_reduce number 1 of Communicator 1" in str(caught.value)
            assert comms[1].all_reduce(torch.ones(4)).tolist() == [2.0] * 4

        raise_first(run_ranks(2, body))

    def test_ranks_that_counted_differently_agree_on_a_number(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> list[int]:
            comm = Communicator(group, "int4")
            with pytest.raises(InputError, match="rank 1: creating a Communicator"):
                Communicator(group, "int4") if rank else comm.all_reduce(torch.ones(4))
            return [Communicator(group, "int4").transport.tags.communicator for _ in range(2)]

        first, second = raise_first(run_ranks(2, body))
        assert first == second

    @pytest.mark.parametrize(
        ("make", "kind"),
        [
            (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "strided"),
            (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), "jagged"),
        ],
        ids=["strided", "jagged"],
    )
    @pytest.mark.parametrize("check", [True, False])
    def test_nested_tensors(self, make: Callable[[], torch.Tensor], kind: str, check: bool) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4", check=check)
            for call in (comm.all_reduce, comm.reduce_scatter, comm.all_gather):
                with pytest.raises(InputError, match="the tensor must be dense"):
                    call(make() if rank == 0 or not check else torch.ones(4))
            assert comm.all_reduce(torch.ones(4)).tolist() == [2.0] * 4

        raise_first(run_ranks(2, body))

    @pytest.mark.parametrize("whole", [0, -1, 3, "x", 4.0])
    @pytest.mark.parametrize("check", [True, False])
    def test_whole_is_a_number_of_values(self, whole: Any, check: bool) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4", check=check)
            with pytest.raises(InputError, match="whole= must be a number of values"):
                comm.all_reduce(torch.ones(4), whole=whole if rank or not check else 4)
            assert comm.all_reduce(torch.ones(4), whole=8).tolist() == [2.0] * 4

        raise_first(run_ranks(2, body))


class TestMemory:
    @pytest.mark.parametrize("algorithm", ["backend", "two_shot"])
    @pytest.mark.parametrize("shift", [1, 4, 4096, 65535])
    def test_out_that_overlaps_x_in_part(self, algorithm: str, shift: int) -> None:
        """If it overlaps on one rank, all ranks raise the error."""
        n = 64 * 1024

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int8", algorithm=algorithm, min_bytes=0, chunk_bytes=1 << 14)
            for before in (True, False):
                buffer = torch.ones(n + shift)
                views = [buffer[:n].view(64, 1024), buffer[shift:].view(64, 1024)]
                x, out = views if before else views[::-1]
                with pytest.raises(InputError, match="must not share memory with x"):
                    comm.all_reduce(x, out=out if rank else None)
            x = torch.ones(2 * n)
            assert (comm.all_reduce(x[:n], out=x[n:]).round() == 2).all()  # neighbors do not overlap
            assert (comm.all_reduce(x[:n], out=x[:n]).round() == 2).all()

        raise_first(run_ranks(2, body))

    def test_out_of_other_collectives_shares_nothing(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm, buffer = Communicator(group, "int8"), torch.ones(8, 4)
            for call in (
                lambda: comm.reduce_scatter(buffer, out=buffer[:4]),
                lambda: comm.all_gather(buffer[4:], out=buffer),
            ):
                with pytest.raises(InputError, match="must not share memory with x"):
                    call()

        raise_first(run_ranks(2, body))

    def test_out_at_the_place_of_a_transposed_x(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            x = torch.ones(4, 4)
            with pytest.raises(InputError, match="must not share memory with x"):
                Communicator(group, "int8").all_reduce(x.t(), out=x)

        raise_first(run_ranks(2, body))

    @pytest.mark.parametrize("algorithm", ["backend", "one_shot", "two_shot"])
    @pytest.mark.parametrize("shape", [(1,), (64, 576)])
    def test_negative_views(self, algorithm: str, shape: tuple[int, ...]) -> None:
        plain = [torch.randn(shape, generator=torch.Generator().manual_seed(r)) for r in range(2)]

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int8", algorithm=algorithm, min_bytes=0)
            want = comm.all_reduce(plain[rank])
            for x in (torch._neg_view(-plain[rank]), torch.complex(plain[rank], -plain[rank]).conj().imag):
                assert x.is_neg()
                assert same_bits(comm.all_reduce(x), want)
                with pytest.raises(InputError, match="out= must be contiguous"):
                    comm.all_reduce(plain[rank], out=torch._neg_view(torch.zeros(shape)))
            if algorithm == "two_shot":
                x = torch._neg_view(-plain[rank])
                for op in ("reduce_scatter", "all_gather") if shape[0] > 1 else ("all_gather",):
                    assert same_bits(getattr(comm, op)(x), getattr(comm, op)(plain[rank]))
                got = comm.all_reduce_add_rms_norm(x, x, torch._neg_view(-torch.ones(shape[-1])), 1e-6)
                normed = comm.all_reduce_add_rms_norm(plain[rank], plain[rank], torch.ones(shape[-1]), 1e-6)
                assert all(same_bits(a, b) for a, b in zip(got, normed, strict=True))

        raise_first(run_ranks(2, body))


class TestCachedTimings:
    """Broken files of timings on one rank break no Communicator."""

    @pytest.mark.parametrize(
        "text",
        [
            '{"source":"x","sizes":[1],"us":[]}',
            '{"source":"x","sizes":[Infinity],"us":{"backend":[1]}}',
            '{"source":"x","sizes":[1e400],"us":{"backend":[1]}}',
            "[" * 200_000,
            '{"source":"x","sizes":[0,1048576],"us":{"backend":[9,9],"int4 one_shot":[1,1]}}',
            '{"source":"x","sizes":[-5,3],"us":{"backend":[9,9],"int4 one_shot":[1,1]}}',
            '{"source":"x","sizes":[1,3],"us":{"native":[9,9],"int99 one_shot":[1,1]}}',
            '{"source":"x","sizes":[1,3],"us":{"backend":[9,9]," one_shot":[1,1]}}',
            '{"source":"x","sizes":[1,3],"us":{"backend":[9,9],"int4 three_shot":[1,1]}}',
            '{"source":"x","sizes":[1,3],"us":{"backend":[NaN,9],"int4 one_shot":[1,1]}}',
            '{"source":"x","sizes":[1,3],"us":{"backend":[9,9],"int4 one_shot":[1,Infinity]}}',
            '{"sizes":[1,3],"us":{"backend":[9,9]}}',
            '{"source":"x","sizes":[1,3],"us":{"backend":[9,9,9]}}',
            "null",
            "3",
            "",
            '{"source":"x","sizes":[' + "9" * 5000 + '],"us":{"backend":[9]}}',
        ],
        ids=range(17),
    )
    def test_a_file_of_nonsense_is_as_good_as_none(
        self, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        (tmp_path / "flashcomm").mkdir()
        (tmp_path / "flashcomm" / "cpu-x2-process-group.json").write_text(text)
        x = torch.ones(256, 576)

        def body(group: dist.ProcessGroup, rank: int) -> torch.Tensor:
            return Communicator(group, "int8").all_reduce(x)

        want = reference.two_shot([x, x], wire_format.WireFormat.parse("int8"))
        assert all(same_bits(r, want) for r in raise_first(run_ranks(2, body)))
        assert "is not a valid file of timings and is ignored" in caplog.text

    def test_a_good_file_counts(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        (tmp_path / "flashcomm").mkdir()
        (tmp_path / "flashcomm" / "cpu-x2-process-group.json").write_text(
            f'{{"source":"me","flashcomm":"{flashcomm.__version__}","sizes":[1,1048576],'
            '"us":{"backend":[1,1],"int4 one_shot":[9,9]}}'
        )
        for choice in raise_first(
            run_ranks(2, lambda g, r: str(Communicator(g, "int8").explain((4096, 576), torch.float32)))
        ):
            assert "(me)" in choice


class TestPeers:
    @pytest.mark.parametrize("dead", [0, 1, 2, 3])
    def test_a_peer_that_does_not_come_is_named(self, dead: int) -> None:
        """All ranks name it, also those that wait for another rank first."""
        over = threading.Event()

        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4", timeout_s=1)
            if rank == dead:
                over.wait(20)
                return
            try:
                with pytest.raises(CommunicationError) as caught:
                    comm.all_reduce(torch.ones(64, 576))
                assert f"rank {dead} did not answer within 1 s" in str(caught.value), caught.value
            finally:
                time.sleep(1)
                over.set()

        raise_first(run_ranks(4, body))

    def test_a_lost_connection_is_told_from_a_timeout(self) -> None:
        def body(group: dist.ProcessGroup, rank: int) -> None:
            comm = Communicator(group, "int4", timeout_s=20)
            if rank:
                begin = time.monotonic()
                with pytest.raises(CommunicationError, match=r"the connection to rank 0 was lost after .* s"):
                    comm.all_reduce(torch.ones(64, 576))
                assert time.monotonic() - begin < 30

        raise_first(run_ranks(2, body))


def test_nothing_is_pickled_or_evaluated() -> None:
    """As docs/security.md says, data from other ranks and from files are never executed."""
    forbidden = {"pickle", "dill", "marshal", "shelve", "yaml", "eval", "exec"}
    verbs = ("all_gather", "broadcast", "gather", "scatter", "send", "recv")
    forbidden |= {f"{verb}_object{more}" for verb in verbs for more in ("", "_list")} | {"cloudpickle", "joblib"}
    for path in Path(flashcomm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names: set[str] = set()
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {node.func.id}
            elif (
                isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args
            ):  # model.eval() is another eval
                names = {node.func.attr} | ({"eval"} if ast.unparse(node.func) == "torch.load" else set())
            assert not names & forbidden, f"{path}:{node.lineno}"  # type: ignore[attr-defined]
