"""The private names of torch that the integrations use, read in torch 2.11 and 2.13; `dtensor` lists its overrides."""

from typing import Any

from torch.distributed import _functional_collectives, distributed_c10d

AsyncCollectiveTensor: Any = _functional_collectives.AsyncCollectiveTensor  # the result of a collective under way
default_store: Any = distributed_c10d._get_default_store  # () -> the Store that torch.distributed started with
resolve_process_group: Any = distributed_c10d._resolve_process_group  # type: ignore[attr-defined]  # by c10d name


def is_registered(group: Any) -> bool:
    """Whether a process group is one of torch.distributed's, so that its name can be resolved."""
    return group in distributed_c10d._world.pg_map
