"""The SGLang plugin against a stand-in of SGLang (stand_ins/), found through the entry point of pyproject.toml."""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashcomm import WireFormat, reference
from flashcomm.errors import FormatError, SettingsError, UnavailableError
from flashcomm.ranks import processes
from flashcomm.ranks.launch import RankContext, run

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
FMT = WireFormat.parse("int4")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create metadata as if sglang 0.5.23 and flashcomm, with its entry points, were installed, also for children."""
    declared = re.search(
        r'^\[project\.entry-points\."sglang\.srt\.plugins"\]\n(.*?)\n\n', (ROOT / "pyproject.toml").read_text(),
        re.MULTILINE | re.DOTALL,
    )  # fmt: skip
    assert declared is not None
    write_info(tmp_path, "flashcomm", "0.1.0", "[sglang.srt.plugins]\n" + declared[1].replace('"', "") + "\n")
    write_info(tmp_path, "sglang", "0.5.23")
    for path in (HERE / "stand_ins", tmp_path):
        monkeypatch.syspath_prepend(str(path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return tmp_path


def write_info(site: Path, name: str, version: str, entry_points: str = "") -> None:
    for old in site.glob(f"{name}-*.dist-info"):
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    info = site / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "entry_points.txt").write_text(entry_points)


def python(code: str, **env: str) -> tuple[str, int]:
    """Run code in a Python process that has imported torch only. Return its output and its exit status."""
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(processes.PRELOADED)
    with tempfile.NamedTemporaryFile("r") as output:
        process = context.Process(target=_execute, args=(code, {**os.environ, **env}, sys.path, output.name))
        process.start()
        process.join(120)
        return output.read(), process.exitcode


def _execute(code: str, env: dict[str, str], path: list[str], output: str) -> None:
    os.environ.clear()
    os.environ.update(env)
    sys.path[:] = path
    for stream in (1, 2):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), stream)
    exec(compile(code, "<a new process>", "exec"), {"__name__": "__main__"})


def start(ctx: RankContext, group_name: str = "tp", ranks: list[list[int]] | None = None, **more: Any) -> Any:
    """Start like an SGLang worker: load plugins, then create groups."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.layers import add_norm  # noqa: F401  before the plugins are loaded
    from sglang.srt.plugins import load_plugins

    load_plugins()
    return GroupCoordinator(
        group_ranks=ranks or [list(range(ctx.world_size))], local_rank=ctx.rank, torch_distributed_backend="gloo",
        use_pynccl=True, use_mscclpp=False, use_custom_allreduce=True, use_torch_symm_mem_all_reduce=False,
        use_hpu_communicator=True, use_xpu_communicator=True, group_name=group_name, **more,
    )  # fmt: skip


def big(seed: int, rows: int = 64) -> torch.Tensor:
    return torch.randn(rows, 1152, generator=torch.Generator().manual_seed(seed)).bfloat16()


def exact(inputs: list[torch.Tensor]) -> torch.Tensor:
    """Return gloo's own sum of two ranks."""
    assert len(inputs) == 2
    return inputs[0] + inputs[1]


def takes_large_sums(ctx: RankContext) -> None:
    from sglang.srt.layers.add_norm import flashinfer_ar_fusion_applies

    from flashcomm.contrib import sglang as integration

    group = start(ctx)
    inputs = [big(r) for r in range(ctx.world_size)]
    mine, want = inputs[ctx.rank].clone(), reference.one_shot(inputs, FMT)
    assert torch.equal(group.all_reduce(mine), want)
    assert torch.equal(mine, inputs[ctx.rank]), "the input is not modified"
    small = torch.full((2, 1152), 0.1 * (ctx.rank + 1), dtype=torch.bfloat16)
    assert torch.equal(group.all_reduce(small.clone()), exact([0 * small + 0.1, 0 * small + 0.2]))
    whole = torch.arange(100_000).view(100, -1) * (ctx.rank + 1)
    assert torch.equal(group.all_reduce(whole), torch.arange(100_000).view(100, -1) * 3)
    (comm,) = integration.communicators()
    assert comm.calls == {"all_reduce/one_shot": 1}
    route = comm.explain(mine.shape, mine.dtype).route
    assert (route.algorithm, route.transport) == ("one_shot", "process_group")
    assert comm.sent == {"all_reduce/one_shot": route.wire_bytes}
    assert group.ca_comm.calls == 1
    assert not flashinfer_ar_fusion_applies(8)

    world_size = start(ctx, "world")
    assert world_size.qr_comm is None, "only tensor-parallel groups"
    alone = start(ctx, "tp", [[r] for r in range(ctx.world_size)])
    assert alone.qr_comm is None
    assert alone.all_reduce(mine) is mine

    integration.disable()
    assert comm.closed
    assert group.qr_comm is None
    assert flashinfer_ar_fusion_applies(8)
    assert torch.equal(group.all_reduce(inputs[ctx.rank].clone()), exact(inputs))
    assert start(ctx).qr_comm is None
    integration.plugin()
    again = start(ctx)
    assert torch.equal(again.all_reduce(mine), want), "enabled again"


def compiles(ctx: RankContext) -> int:
    group, graphs = start(ctx), 0

    def backend(module: torch.fx.GraphModule, example: list[torch.Tensor]) -> Any:
        nonlocal graphs
        graphs += 1
        return module.forward

    fast = torch.compile(lambda x: group.all_reduce(x * 2) + 1, fullgraph=True, dynamic=True, backend=backend)
    for rows in (64, 65, 300):
        inputs = [big(10 * rows + r, rows) for r in range(ctx.world_size)]
        assert torch.equal(fast(inputs[ctx.rank]), reference.one_shot([2 * x for x in inputs], FMT) + 1)
    few = [big(r, 3) for r in range(ctx.world_size)]
    assert torch.equal(fast(few[ctx.rank]), exact([2 * x for x in few]) + 1)
    assert group.ca_comm.calls == 1, "the few rows"
    return graphs


def inert(ctx: RankContext) -> None:
    group = start(ctx)
    from sglang.srt.plugins.hook_registry import HookRegistry

    assert not HookRegistry._hooks
    inputs = [big(r) for r in range(ctx.world_size)]
    assert torch.equal(group.all_reduce(inputs[ctx.rank].clone()), exact(inputs))
    assert group.qr_comm is None


def one_lacks_it(ctx: RankContext) -> None:
    if ctx.rank == 1:
        os.environ["SGLANG_PLUGINS"] = "another"
    start(ctx)


def formats_differ(ctx: RankContext) -> None:
    os.environ["FLASHCOMM_FORMAT"] = ("int4", "int8")[ctx.rank]
    start(ctx)


def one_is_wrong(ctx: RankContext) -> None:
    os.environ["FLASHCOMM_FORMAT"] = ("int4", "int1")[ctx.rank]
    start(ctx)


def joins_later(ctx: RankContext) -> None:
    start(ctx, recovered_rank=True)


def warns_of_others(ctx: RankContext) -> None:
    """An existing qr_comm, a later one, and deterministic inference keep SGLang's all-reduce, each with a warning."""
    from sglang.srt.distributed import parallel_state
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    output: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: output.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("flashcomm").addHandler(handler)

    class Other:
        disabled = True

    def first(original: Any, self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.qr_comm = Other() if os.environ.get("OTHER") else None

    HookRegistry.register(f"{parallel_state.__name__}.GroupCoordinator.__init__", first, HookType.AROUND)
    inputs = [big(r) for r in range(ctx.world_size)]
    os.environ["OTHER"] = "1"
    for _ in range(2):
        there = start(ctx)
        assert type(there.qr_comm) is Other
        assert torch.equal(there.all_reduce(inputs[ctx.rank].clone()), exact(inputs))
    (warning,) = output
    assert "Other is already set as qr_comm" in warning

    del os.environ["OTHER"]
    later = start(ctx)
    later.qr_comm = Other()
    for _ in range(2):
        assert torch.equal(later.all_reduce(inputs[ctx.rank].clone()), exact(inputs))
    assert "Other replaced flashcomm's qr_comm" in output[1]

    os.environ["SGLANG_ENABLE_DETERMINISTIC_INFERENCE"] = "True"
    assert start(ctx).qr_comm is None
    assert "deterministic inference is on" in output[2]
    assert len(output) == 3


class TestPlugin:
    @pytest.fixture(autouse=True)
    def _format(self, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_FORMAT", "int4")

    def test_large_sums_are_low_bit_until_it_is_disabled(self) -> None:
        run(takes_large_sums, 2)

    def test_compiled_once_for_all_lengths(self) -> None:
        assert run(compiles, 2) == 1

    def test_inert_without_a_format(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FLASHCOMM_FORMAT")
        run(inert, 2)

    def test_a_worker_without_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FLASHCOMM_TIMEOUT_S", "2")
        with pytest.raises(
            UnavailableError, match=r"rank 1 of group 'tp:0' did not come with flashcomm within 2 s: inst"
        ):
            run(one_lacks_it, 2, timeout_s=60)

    def test_formats_that_differ(self) -> None:
        with pytest.raises(SettingsError, match="rank 0 'int4', rank 1 'int8'"):
            run(formats_differ, 2, timeout_s=60)

    def test_a_format_that_one_worker_has_wrong(self) -> None:
        with pytest.raises(UnavailableError, match=r"rank 1: FLASHCOMM_FORMAT=int1: .*2 to 8 are allowed"):
            run(one_is_wrong, 2, timeout_s=60)

    def test_workers_that_join_later(self) -> None:
        with pytest.raises(UnavailableError, match="workers cannot join or recover with flashcomm"):
            run(joins_later, 2, timeout_s=60)

    def test_others_that_want_the_same_place(self) -> None:
        run(warns_of_others, 2)


LOAD = "from sglang.srt.plugins import load_plugins; load_plugins(); load_plugins()\n"
HOOKS = "from sglang.srt.plugins.hook_registry import HookRegistry; print(len(HookRegistry._hooks), 'hooks')\n"


class TestVersions:
    def output(self, code: str = LOAD + HOOKS) -> str:
        return python(code, FLASHCOMM_FORMAT="int8")[0]

    def test_hooks_in_place(self, site: Path) -> None:
        assert self.output() == "3 hooks\n"

    @pytest.mark.parametrize("version", ["0.5.15.post1", "0.6.0", "0.5.24"])
    def test_a_version_not_checked(self, site: Path, version: str) -> None:
        write_info(site, "sglang", version)
        output = self.output()
        assert output.count("flashcomm in SGLang") == 1
        assert f"sglang {version} is not supported: install a version from 0.5.16 to 0.5.23" in output
        assert output.endswith("SGLang's own all-reduce is used\n0 hooks\n")

    @pytest.mark.parametrize(
        ("gone", "message"),
        [
            ("del G._resolve_outplace_all_reduce_method", r"has no \S+\._resolve_outplace_all_reduce_method, which"),
            ("del p.GroupCoordinator", r"has no \S+GroupCoordinator.__init__, \S+_resolve_"),
            ("G._all_reduce_out_place = lambda self, x, method: x", "does not call qr_comm.quick_all_reduce, which"),
            ("G._resolve_outplace_all_reduce_method = lambda self, x: None", "has no parameter input_, which"),
            ("del f.is_flashinfer_allreduce_unavailable", r"has no \S+\.is_flashinfer_allreduce_unavailable, which"),
            ("del h.HookType", "has no HookType.AROUND"),
        ],
    )  # fmt: skip
    def test_names_that_are_gone(self, site: Path, gone: str, message: str) -> None:
        named = "import sglang.srt.distributed.parallel_state as p, sglang.srt.layers.flashinfer_comm_fusion as f\n"
        named += f"import sglang.srt.plugins.hook_registry as h\nG = p.GroupCoordinator\n{gone}\n"
        output = self.output(named + LOAD + HOOKS)
        assert re.search(message, output), output
        assert output.count("flashcomm in SGLang") == 1
        assert output.endswith("0 hooks\n")

    def test_the_check_people_run(self, site: Path) -> None:
        code = "import runpy; runpy.run_module('flashcomm.contrib.sglang', run_name='__main__')"
        assert python(code, FLASHCOMM_FORMAT="int8") == ("sglang 0.5.23: the hooks fit\nformat int8\n", 0)
        page = (ROOT / "docs" / "sglang.md").read_text()
        assert "```text\nsglang 0.5.23: the hooks fit\nformat int8\n```" in page
        output, status = python(code)
        assert (output, status) == (
            "sglang 0.5.23: the hooks fit\nFLASHCOMM_FORMAT is not set: the plugin does nothing\n", 0
        )  # fmt: skip
        output, status = python(code, FLASHCOMM_FORMAT="int1")
        assert "2 to 8 are allowed" in output
        assert status == 1

    def test_without_sglang(self, monkeypatch: pytest.MonkeyPatch) -> None:
        integration = importlib.import_module("flashcomm.contrib.sglang")
        monkeypatch.setattr(
            integration, "version", lambda name: (_ for _ in ()).throw(integration.PackageNotFoundError(name))
        )
        assert integration.why_not() == "sglang is not installed here: pip install sglang"

    def test_importing_the_plugin_imports_no_engine(self) -> None:
        output, status = python("import sys, flashcomm.contrib.sglang; assert 'sglang' not in sys.modules")
        assert status == 0, output

    def test_the_old_import_still_works(self) -> None:
        sys.modules.pop("flashcomm.integrations.sglang", None)
        with pytest.warns(DeprecationWarning, match=r"flashcomm.integrations.sglang is now flashcomm.contrib.sglang"):
            old = importlib.import_module("flashcomm.integrations.sglang")
        new = importlib.import_module("flashcomm.contrib.sglang")
        assert [getattr(old, name) is getattr(new, name) for name in old.__all__] == [True] * 6


def test_plans_give_their_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    integration = importlib.import_module("flashcomm.contrib.sglang")
    (tmp_path / "plan.json").write_text('{"flashcomm_plan": 1, "format": "int6-had", "layers": {"*": "int2"}}')
    monkeypatch.setenv("FLASHCOMM_FORMAT", str(tmp_path / "plan.json"))
    assert integration._format() == "int6-had"
    monkeypatch.setenv("FLASHCOMM_FORMAT", "int12")
    with pytest.raises(FormatError):
        integration._format()
    assert not dist.is_initialized()
