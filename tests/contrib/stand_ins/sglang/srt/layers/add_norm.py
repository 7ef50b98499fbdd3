"""The layer that asks; it imported the question by name before any plugin was loaded."""

from sglang.srt.layers.flashinfer_comm_fusion import is_flashinfer_allreduce_unavailable


def flashinfer_ar_fusion_applies(batch_size: int) -> bool:
    return not is_flashinfer_allreduce_unavailable() and 0 < batch_size <= 2048
