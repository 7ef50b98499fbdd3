"""Two-batch overlap (as SGLang's TBO and vLLM's DBO): one micro-batch computes during the all-reduce of the other.

Each micro-batch is a plain call in its own greenlet, a stack of frames that this thread can leave and enter again. When
it reaches an all-reduce, the thread continues with the other one, so the two alternate layer by layer without changes
to the model, without locks and without a second thread that competes for Python's interpreter lock. All ranks run the
all-reduces in the same order: the first of micro-batch 0, the first of micro-batch 1, the second of micro-batch 0, ...

    computing   | 0: attention  | 1: attention  | 0: MLP         | 1: MLP         | 0: attention ...
    reducing    |               | 0: all-reduce | 1: all-reduce  | 0: all-reduce  | 1: all-reduce

All-reduces run one after the other in one place: a stream on GPUs, a thread on CPUs. On GPUs its priority is high and
it is launched before the other micro-batch's kernels, so that it becomes resident beside them. Two streams share
tensors:

    tensor              written on  read on     may be freed when
    input of a reduce   computing   reducing    the computing stream has waited for the result: `done()`
    its result          reducing    computing   its readers are enqueued: the next all-reduce waits for the computing
                                                stream first

Gradient mode, autocast and the current stream belong to the thread, so each micro-batch gets its own back when it
continues. Inference mode cannot be set so: a model must not enter or leave it around an all-reduce.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from flashcomm.errors import UnavailableError

T = TypeVar("T")
Work = Callable[[], Tensor]

_of_thread = threading.local()


def check_available() -> None:
    """Raise an UnavailableError if the package greenlet is missing."""
    try:
        import greenlet  # noqa: F401
    except ImportError as why:
        raise UnavailableError(
            f"two-batch overlap needs the package greenlet ({why}): pip install 'flashcomm[transformers]'"
        ) from why


class TwoBatchOverlap:
    """One run of two micro-batches.

    Args:
        sizes: The number of sequences, or of tokens of each sequence, in each micro-batch.
        device: The device of the model.
        stream: The CUDA stream for all-reduces; None on CPUs. Pass the same one to all runs.
    """

    def __init__(self, sizes: tuple[int, int], device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.sizes, self.device, self.stream = sizes, device, stream
        self._current = 0
        self._reduces: ThreadPoolExecutor | None = None
        self._leave: Callable[[], Any] = lambda: None

    def run(self, calls: tuple[Callable[[], T], Callable[[], T]]) -> tuple[T, T]:
        """Run both calls in turns in this thread. The second starts when the first reaches an all-reduce, or ends.

        Returns:
            The results of the two calls.

        Raises:
            UnavailableError: The package greenlet is missing.
            BaseException: The first exception of either call, after both have ended.
        """
        check_available()
        from greenlet import getcurrent, greenlet

        self._leave = getcurrent().switch
        halves = [greenlet(call) for call in calls]
        for half in halves:
            half.gr_context = contextvars.copy_context()
        modes = [_modes(self.device)] * 2
        before: tuple[Any, ...] = modes[0]
        results: list[Any] = [None, None]
        _of_thread.overlap = self
        self._reduces = ThreadPoolExecutor(1, "flashcomm-reduce") if self.stream is None else None
        try:
            self._current = 0
            while not all(half.dead for half in halves):
                mine = self._current
                _restore(modes[mine], self.device)
                result = halves[mine].switch()  # until its next all-reduce, or its end
                modes[mine] = _modes(self.device)
                if halves[mine].dead:
                    results[mine] = result
                if not halves[1 - mine].dead:
                    self._current = 1 - mine
        finally:
            for i, half in enumerate(halves):
                if half and not half.dead:  # the other one failed: unwind its frames
                    self._current = i
                    half.throw()
            del _of_thread.overlap
            _restore(before, self.device)
            if self._reduces is not None:
                self._reduces.shutdown()
        return results[0], results[1]

    def reduce(self, work: Work) -> Tensor:
        """Run work(), an all-reduce, while the other micro-batch computes. Return its result.

        Call this from a micro-batch. All-reduces run in the order of these calls.
        """
        done = self._on_gpu(work) if self.stream is not None else self._on_cpu(work)
        self._leave()
        return done()

    def whole(self, numel: int) -> int:
        """Return the number of values in both micro-batches, given `numel` in the calling one."""
        return numel // self.sizes[self._current] * sum(self.sizes)

    def _on_cpu(self, work: Work) -> Work:
        assert self._reduces is not None
        inference = torch.is_inference_mode_enabled()

        def in_thread() -> Tensor:
            with torch.inference_mode(inference), torch.no_grad():
                return work()

        return self._reduces.submit(contextvars.copy_context().run, in_thread).result

    def _on_gpu(self, work: Work) -> Work:
        assert self.stream is not None
        computing = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(computing)  # for the input, and for readers of the previous result
        with torch.cuda.stream(self.stream):
            result = work()
            ready = self.stream.record_event()

        def done() -> Tensor:
            computing.wait_event(ready)
            return result

        return done


def current() -> TwoBatchOverlap | None:
    """Return the run that the calling thread is a micro-batch of; None outside of a run."""
    return getattr(_of_thread, "overlap", None)


def _modes(device: torch.device) -> tuple[Any, ...]:
    """Return the modes that torch keeps for this thread."""
    kind = device.type
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None
    return torch.is_grad_enabled(), torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), stream


def _restore(modes: tuple[Any, ...], device: torch.device) -> None:
    if modes == _modes(device):
        return
    grad, autocast, dtype, stream = modes
    torch.set_grad_enabled(grad)
    torch.set_autocast_enabled(device.type, autocast)
    torch.set_autocast_dtype(device.type, dtype)
    if stream is not None:
        torch.cuda.set_stream(stream)
