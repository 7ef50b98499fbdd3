"""The fastest codec of a device: the compiled one for CPUs, Triton kernels for GPUs, plain torch where neither runs."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

log = logging.getLogger("flashcomm")


@cache
def codec_for(device_type: str) -> ModuleType:
    """The fastest codec for tensors on `device_type`: a module with `encode` and `decode_sum` (see `torch_codec`)."""
    from flashcomm.wire import torch_codec

    if device_type == "cpu":
        try:
            from flashcomm.cpu import codec as cpu_codec

            return cpu_codec
        except ImportError as why:
            log.warning("the compiled CPU codec is not available (%s): using plain torch, same bits, slower", why)
    if device_type == "cuda":
        try:
            from flashcomm.gpu import codec as gpu_codec

            return gpu_codec
        except ImportError as why:
            log.warning("the Triton codec is not available (%s): using plain torch, same bits, slower", why)
    return torch_codec
