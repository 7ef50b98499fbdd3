"""GroupCoordinator: which communicators can run an all-reduce, and in which order they are tried."""

import weakref

import torch
import torch.distributed as dist

_counts: dict = {}
_groups: dict = {}


@torch.library.custom_op("sglang_stand_in::outplace_all_reduce", mutates_args=())
def outplace_all_reduce(tensor: torch.Tensor, group_name: str, outplace_all_reduce_method: str) -> torch.Tensor:
    return _groups[group_name]()._all_reduce_out_place(tensor, outplace_all_reduce_method)


@outplace_all_reduce.register_fake
def _(tensor, group_name, outplace_all_reduce_method):
    return torch.empty_like(tensor)


class FastAllReduce:
    """In the place of SGLang's custom all-reduce, which is asked first, and of PyNccl: exact, out of place."""

    disabled = False

    def __init__(self, group):
        self.group, self.calls = group, 0

    def should_custom_ar(self, x):
        return x.is_floating_point() and x.numel() * x.element_size() <= 8 << 20

    def reduce(self, x):
        self.calls += 1
        out = x.clone()
        dist.all_reduce(out, group=self.group)
        return out


class GroupCoordinator:
    def __init__(
        self,
        group_ranks,
        local_rank,
        torch_distributed_backend,
        use_pynccl,
        use_mscclpp,
        use_custom_allreduce,
        use_torch_symm_mem_all_reduce,
        use_hpu_communicator,
        use_xpu_communicator,
        use_message_queue_broadcaster=False,
        group_name=None,
        gloo_timeout=None,
        recovered_rank=False,
        rank_offset=0,
        max_world_size=None,
    ):
        name = group_name or "anonymous"
        self.unique_name = f"{name}:{_counts.setdefault(name, 0)}"
        _counts[name] += 1
        _groups[self.unique_name] = weakref.ref(self)
        self.rank, self.local_rank = dist.get_rank(), local_rank
        for ranks in group_ranks:
            device_group = dist.new_group(ranks, backend=torch_distributed_backend)
            if self.rank in ranks:
                self.ranks, self.world_size, self.rank_in_group = ranks, len(ranks), ranks.index(self.rank)
                self.device_group = device_group
        self.ca_comm = FastAllReduce(self.device_group) if use_custom_allreduce and self.world_size > 1 else None
        self.pynccl_comm = FastAllReduce(self.device_group) if use_pynccl and self.world_size > 1 else None
        self.qr_comm = None

    def all_reduce(self, input_):
        if self.world_size == 1:
            return input_
        if torch.compiler.is_compiling():
            if self.ca_comm is None and self.qr_comm is None and self.pynccl_comm is None:
                raise NotImplementedError("in place, not in the stand-in")
            return outplace_all_reduce(input_, group_name=self.unique_name, outplace_all_reduce_method="auto")
        method = self._resolve_outplace_all_reduce_method(input_=input_, should_use_pymscclpp_allreduce=False)
        if method is not None:
            return outplace_all_reduce(input_, group_name=self.unique_name, outplace_all_reduce_method=method)
        dist.all_reduce(input_, group=self.device_group)
        return input_

    def _resolve_outplace_all_reduce_method(self, input_, should_use_pymscclpp_allreduce=None):
        if self.ca_comm is not None and not self.ca_comm.disabled and self.ca_comm.should_custom_ar(input_):
            return "ca"
        if self.qr_comm is not None and not self.qr_comm.disabled and self.qr_comm.should_quick_allreduce(input_):
            return "qr"
        return None

    def _all_reduce_out_place(self, input_, outplace_all_reduce_method):
        if outplace_all_reduce_method == "auto":
            outplace_all_reduce_method = self._resolve_outplace_all_reduce_method(input_) or "pynccl"
        assert any([self.qr_comm, self.ca_comm, self.pynccl_comm])
        if outplace_all_reduce_method == "qr":
            assert not self.qr_comm.disabled
            return self.qr_comm.quick_all_reduce(input_)
        return {"ca": self.ca_comm, "pynccl": self.pynccl_comm}[outplace_all_reduce_method].reduce(input_)
