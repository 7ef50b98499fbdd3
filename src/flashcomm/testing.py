"""Start ranks for tests and experiments: processes in a process group, on CPUs or GPUs, over emulated slow links.

`run` starts the ranks, calls a module-level function on each, and returns rank 0's result. It raises an error of any
rank in the caller. No process outlives it.

Example:
    Two ranks sum their tensors, and rank 0 returns the result::

        import torch

        import flashcomm
        from flashcomm.testing import RankContext, run


        def total(ctx: RankContext, value: float) -> list[float]:
            x = torch.full((2,), value + ctx.rank, device=ctx.device)
            return flashcomm.all_reduce(x).tolist()


        if __name__ == "__main__":
            print(run(total, 2, (1.0,)))  # [3.0, 3.0]

With `link="100mbit"` every rank gets its own network link of that rate. `probe_link()` returns why a machine does not
allow that, or None.
"""

from flashcomm.ranks.launch import RankContext, run
from flashcomm.ranks.link import probe as probe_link

__all__ = ["RankContext", "probe_link", "run"]
