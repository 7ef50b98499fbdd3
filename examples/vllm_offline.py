"""Text from vLLM with low-bit all-reduces: python examples/vllm_offline.py MODEL [FORMAT]. The same for a server:

FLASHCOMM_FORMAT=int8 vllm serve MODEL --tensor-parallel-size 2
"""

import importlib.util
import os
import sys


def main():
    if importlib.util.find_spec("vllm") is None:
        print("skipped: vLLM is not installed")
        return
    if len(sys.argv) < 2:
        sys.exit("give a model: python examples/vllm_offline.py MODEL [FORMAT]")
    os.environ["FLASHCOMM_FORMAT"] = sys.argv[2] if len(sys.argv) > 2 else "int8"  # before vLLM is imported

    import vllm

    llm = vllm.LLM(sys.argv[1], tensor_parallel_size=2, worker_extension_cls="flashcomm.integrations.vllm.Report")
    (answer,) = llm.generate(["The sky is blue because"], vllm.SamplingParams(temperature=0, max_tokens=32))
    print(answer.outputs[0].text)
    for rank, report in enumerate(llm.collective_rpc("flashcomm_report")):
        print(f"rank {rank}: {report}")  # calls and bytes of low-bit all-reduces by route; {} if flashcomm is not used


if __name__ == "__main__":
    main()
