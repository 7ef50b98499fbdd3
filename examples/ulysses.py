"""Sequence-parallel attention (Ulysses) with low-bit all-to-alls: error and, over a slow link, time."""

import argparse
import time

import torch
import torch.distributed as dist
from torch.nn.functional import scaled_dot_product_attention

import flashcomm
from flashcomm.testing import RankContext, run

TOKENS, HEADS, WIDTH = 768, 12, 64


def to_heads(x, exchange, n):  # (tokens / n, heads, width) to (tokens, heads / n, width)
    return exchange(x.unflatten(1, (n, -1)).transpose(0, 1).contiguous()).flatten(0, 1)


def to_tokens(x, exchange, n):  # and back
    return exchange(x.unflatten(0, (n, -1)).contiguous()).transpose(0, 1).flatten(1, 2)


def attention(q, k, v):  # (tokens, heads, width)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(0, 1)


def layer(ctx: RankContext, formats: list[str]) -> list[tuple[str, float, float]]:
    torch.manual_seed(0)
    whole = [torch.randn(TOKENS, HEADS, WIDTH).bfloat16() for _ in range(3)]
    exact = attention(*whole).chunk(ctx.world_size)[ctx.rank].double()
    mine = [x.chunk(ctx.world_size)[ctx.rank] for x in whole]

    def backend(x):
        out = torch.empty_like(x)
        dist.all_to_all_single(out, x)
        return out

    found = []
    for fmt in ("backend", *formats):
        exchange = backend if fmt == "backend" else lambda x, fmt=fmt: flashcomm.all_to_all_single(x, format=fmt)
        for _ in range(3):  # the first warms up, the last counts
            dist.barrier()
            begin = time.perf_counter()
            heads = [to_heads(x, exchange, ctx.world_size) for x in mine]
            result = to_tokens(attention(*heads), exchange, ctx.world_size)
        taken = time.perf_counter() - begin
        found.append((fmt, ((result - exact).norm() / exact.norm()).item(), taken))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--world", type=int, default=2, choices=(2, 3, 4))
    parser.add_argument("--link", help="such as 100mbit; needs root")
    given = parser.parse_args()
    rows = run(layer, given.world, (["int8", "int6-had", "int4-had"],), link=given.link)
    if given.link:
        for name, _, seconds in rows:
            print(f"{name:10}{1e3 * seconds:8.1f} ms")
    print("relative error: " + ", ".join(f"{name} {error:.2f}" for name, error, _ in rows))
