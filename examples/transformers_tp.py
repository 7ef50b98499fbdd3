"""A tensor-parallel model of transformers with low-bit all-reduces, on two CPU processes."""

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import flashcomm.integrations.transformers as integration

logging.disable_progress_bar()


def rank_main(rank, world_size, store, path):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    integration.enable("int4-had")
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, distributed_config=DistributedConfig(tp_size=world_size, tp_plan="auto")
    )
    with torch.inference_mode():
        model(torch.arange(256).view(1, 256))
    (comm,) = integration.communicators()
    if rank == 0:
        print(f"calls {dict(comm.calls)}; bytes sent {dict(comm.sent)}")
    dist.destroy_process_group()


if __name__ == "__main__":
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
    )
    with tempfile.TemporaryDirectory() as path:
        LlamaForCausalLM(config).bfloat16().save_pretrained(path)
        mp.spawn(rank_main, (2, tempfile.mktemp(), path), nprocs=2)
