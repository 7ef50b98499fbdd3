"""Choose the fastest codec for a device: compiled for CPUs, Triton for GPUs, plain torch if neither can be imported."""

from __future__ import annotations

import logging
from functools import cache
from types import ModuleType

log = logging.getLogger("flashcomm")


@cache
def codec_for(device_type: str) -> ModuleType:
    """Return the fastest codec for tensors on this type of device ("cpu", "cuda").

    A codec is a module with the functions `encode` and `decode_sum` of `wire.torch_codec`. All give the same bits.
    """
    from flashcomm.wire import torch_codec

    try:
        if device_type == "cpu":
            from flashcomm.cpu import codec as cpu_codec

            return cpu_codec
        if device_type == "cuda":
            from flashcomm.gpu import codec as gpu_codec

            return gpu_codec
    except ImportError as why:
        log.warning(
            "the fast codec for %s cannot be imported (%s): using plain torch, same bits, slower", device_type, why
        )
    return torch_codec
