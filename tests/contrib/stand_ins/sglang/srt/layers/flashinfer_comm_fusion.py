"""FlashInfer's fusion of all-reduce and norm: only the question whether it can be had."""


def is_flashinfer_allreduce_unavailable() -> bool:
    return False
