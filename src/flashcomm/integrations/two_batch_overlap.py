"""Two-batch overlap (as SGLang's TBO and vLLM's DBO): one micro-batch computes during the all-reduce of the other.

Each micro-batch is a plain call on its own thread. Only one of the two computes at any time. When it reaches an
all-reduce, the other continues, so the two alternate layer by layer without changes to the model. All ranks run the
all-reduces in the same order: the first of micro-batch 0, the first of micro-batch 1, the second of micro-batch 0, ...

    computing   | 0: attention  | 1: attention  | 0: MLP         | 1: MLP         | 0: attention ...
    reducing    |               | 0: all-reduce | 1: all-reduce  | 0: all-reduce  | 1: all-reduce

All-reduces run one after the other in one place: a stream on GPUs, a thread on CPUs. On GPUs two streams share tensors:

    tensor              written on  read on     may be freed when
    input of a reduce   computing   reducing    the computing stream has waited for the result: `done()`
    its result          reducing    computing   its readers are enqueued: the next all-reduce waits for the computing
                                                stream first
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Work = Callable[[], Tensor]

_of_thread = threading.local()


class _StoppedError(Exception):
    """Ends a micro-batch because the other one failed."""


class TwoBatchOverlap:
    """One run of two micro-batches.

    Args:
        sizes: The number of sequences in each micro-batch.
        device: The device of the model.
        stream: The CUDA stream for all-reduces; None on CPUs. Pass the same one to all runs.
        helper: The thread of micro-batch 1. None: a new one. On GPUs pass the same one to all runs, because CUDA's
            libraries allocate a state for each thread.
    """

    def __init__(
        self,
        sizes: tuple[int, int],
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
        helper: ThreadPoolExecutor | None = None,
    ) -> None:
        self.sizes, self.device, self.stream = sizes, device, stream
        self._helper = helper
        self._turn = (threading.Semaphore(0), threading.Semaphore(0))
        self._ended = [False, False]
        self._error: BaseException | None = None
        self._reduces: ThreadPoolExecutor | None = None

    def run(self, calls: tuple[Callable[[], T], Callable[[], T]]) -> tuple[T, T]:
        """Run both calls in turns, the first one in this thread.

        Returns:
            The results of the two calls.

        Raises:
            BaseException: The first exception of either call, after both have ended.
        """
        results: list[Any] = [None, None]
        modes = _ThreadModes()

        def micro_batch(i: int) -> None:
            _of_thread.overlap, _of_thread.index = self, i
            try:
                if i == 1:
                    self._turn[1].acquire()
                    self._stop_after_error()
                results[i] = calls[i]()
            except _StoppedError:
                pass
            except BaseException as why:  # raised below, in the caller's thread
                self._error = self._error or why
            finally:
                del _of_thread.overlap
                self._ended[i] = True
                self._turn[1 - i].release()

        def second() -> None:
            with modes.applied():
                micro_batch(1)

        with ExitStack() as stack:
            if self.stream is None:
                self._reduces = stack.enter_context(ThreadPoolExecutor(1, "flashcomm-reduce"))
            helper = self._helper or stack.enter_context(ThreadPoolExecutor(1, "flashcomm-micro-batch"))
            ended = helper.submit(contextvars.copy_context().run, second)
            micro_batch(0)
            ended.result()
        if self._error is not None:
            raise self._error
        return results[0], results[1]

    def reduce(self, work: Work) -> Tensor:
        """Run work(), an all-reduce, while the other micro-batch computes. Return its result.

        Call this from a micro-batch. All-reduces run in the order of these calls.
        """
        done = self._on_gpu(work) if self.stream is not None else self._on_cpu(work)
        mine: int = _of_thread.index
        if not self._ended[1 - mine]:
            self._turn[1 - mine].release()
            self._turn[mine].acquire()
            self._stop_after_error()
        return done()

    def whole(self, numel: int) -> int:
        """Return the number of values in both micro-batches, given `numel` in the calling one."""
        return numel // self.sizes[_of_thread.index] * sum(self.sizes)

    def _stop_after_error(self) -> None:
        if self._error is not None:
            raise _StoppedError

    def _on_cpu(self, work: Work) -> Work:
        assert self._reduces is not None
        modes = _ThreadModes()

        def in_thread() -> Tensor:
            with modes.applied():
                return work()

        return self._reduces.submit(in_thread).result

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


class _ThreadModes:
    """A copy of torch's per-thread modes of the calling thread: gradients, inference, autocast, current stream."""

    def __init__(self) -> None:
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self._autocast = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Apply the modes to the calling thread inside a with block."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            yield
