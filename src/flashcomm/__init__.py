"""flashcomm: low-bit collectives for tensor-parallel LLM inference (Flash Communication, arXiv 2412.04964).

Importing it registers `torch.ops.flashcomm` and does nothing else. It touches no GPU and imports no compiler, inference
engine or command line.
"""

from flashcomm.communicator import Communicator
from flashcomm.errors import FlashcommError
from flashcomm.ops import all_gather, all_reduce, all_reduce_add_rms_norm, all_to_all_single, reduce_scatter
from flashcomm.wire.format import WireFormat

__version__ = "0.1.0"
__all__ = [
    "Communicator",
    "FlashcommError",
    "WireFormat",
    "__version__",
    "all_gather",
    "all_reduce",
    "all_reduce_add_rms_norm",
    "all_to_all_single",
    "reduce_scatter",
]
