"""A plan, which gives each layer of a model its own format, compared with single formats. Needs transformers.

For a model of your own let `flashcomm tune --model DIR --text FILE --budget 1% -o plan.json` choose the formats. Pass
the file to `flashcomm.integrations.transformers.enable("plan.json")`, or set FLASHCOMM_FORMAT=plan.json.
"""

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flashcomm.accuracy.simulate import TensorParallel, row_parallel_layers
from flashcomm.plan import Plan

FILE = {"flashcomm_plan": 1, "format": "int4-had", "layers": {"*.o_proj": "int8-had"}}


def main():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=200,
    )
    model = LlamaForCausalLM(config).eval()  # random weights
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        Plan.from_dict(FILE).save(path)
        plan = Plan.load(path)
    plan.check(list(row_parallel_layers(model)))  # an error if it is for another model
    ids = torch.arange(128).view(1, 128)
    with torch.inference_mode():
        exact = model(ids).logits
        for name, given in (("int8-had", "int8-had"), ("plan", plan), ("int4-had", "int4-had")):
            with TensorParallel(model, world_size=2, plan=given, algorithm="two_shot", min_bytes=0) as ranks:
                error = (model(ids).logits - exact).norm() / exact.norm()
                print(f"{name}: {ranks.bits_per_value:.2f} bits per value, relative error of logits {error:.2f}")


if __name__ == "__main__":
    main()
