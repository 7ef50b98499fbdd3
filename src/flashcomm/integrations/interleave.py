"""Two halves of a batch that take turns: while the sums of one travel, the other computes.

Each half is a plain call on a thread of its own, and at any time one of the two runs. It hands over where it reaches a
sum, so that the halves run layer by layer beside each other without the model knowing, and the order of all sums is
the same on all ranks: half 0's first, half 1's first, half 0's second, ...

    computing   | 0: attention | 1: attention | 0: MLP        | 1: MLP        | 0: attention ...
    travelling  |              | 0: sum       | 1: sum        | 0: sum        | 1: sum

Sums run in their order in one place: on GPUs a stream, on CPUs a thread. On GPUs two streams share memory:

    tensor       made on     read on     may be freed when
    a half's x   computing   travelling  the computing stream has waited for the sum: `done()`
    its sum      travelling  computing   its readers are enqueued: the next sum waits for the computing stream first
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

_here = threading.local()


class _GivenUpError(Exception):
    """Ends a half because the other one failed."""


class Halves:
    """One run of two halves on a device. The caller keeps between runs, on a GPU, `stream`, where sums run, and
    `helper`, the thread of half 1: what CUDA's libraries keep for a thread is made once then.

    sizes: how many sequences the halves have; a sum's `whole` is as many values as both would have together.
    """

    def __init__(
        self,
        sizes: tuple[int, int],
        device: torch.device,
        stream: torch.cuda.Stream | None = None,
        helper: ThreadPoolExecutor | None = None,
    ) -> None:
        self._helper = helper
        self.sizes, self.device, self.stream = sizes, device, stream
        self._turn = (threading.Semaphore(0), threading.Semaphore(0))
        self._ended = [False, False]
        self._failed: BaseException | None = None
        self._pool: ThreadPoolExecutor | None = None

    def run(self, calls: tuple[Callable[[], T], Callable[[], T]]) -> tuple[T, T]:
        """What the two calls return; the first runs in this thread. Raises what either raises, once both have ended."""
        results: list[Any] = [None, None]
        modes = _Modes()

        def half(h: int) -> None:
            _here.halves, _here.h = self, h
            try:
                if h == 1:
                    self._turn[1].acquire()
                    self._go_on()
                results[h] = calls[h]()
            except _GivenUpError:
                pass
            except BaseException as why:  # raised below, in the caller's thread
                self._failed = self._failed or why
            finally:
                del _here.halves
                self._ended[h] = True
                self._turn[1 - h].release()

        def other() -> None:
            with modes.twice_reduced():
                half(1)

        with ExitStack() as stack:
            if self.stream is None:
                self._pool = stack.enter_context(ThreadPoolExecutor(1, "flashcomm-sums"))
            helper = self._helper or stack.enter_context(ThreadPoolExecutor(1, "flashcomm-half"))
            ended = helper.submit(contextvars.copy_context().run, other)
            half(0)
            ended.result()
        if self._failed is not None:
            raise self._failed
        return results[0], results[1]

    def sum(self, work: Work) -> Tensor:
        """work(), run where sums run, after all sums before it; the other half computes meanwhile. For halves only."""
        done = self._on_gpu(work) if self.stream is not None else self._on_cpu(work)
        me: int = _here.h
        if not self._ended[1 - me]:
            self._turn[1 - me].release()
            self._turn[me].acquire()
            self._go_on()
        return done()

    def whole(self, n_values: int) -> int:
        """How many values a message would have that is n_values of the half that asks."""
        return n_values // self.sizes[_here.h] * sum(self.sizes)

    def _go_on(self) -> None:
        if self._failed is not None:
            raise _GivenUpError

    def _on_cpu(self, work: Work) -> Work:
        assert self._pool is not None
        modes = _Modes()

        def in_pool() -> Tensor:
            with modes.twice_reduced():
                return work()

        return self._pool.submit(in_pool).result

    def _on_gpu(self, work: Work) -> Work:
        assert self.stream is not None
        computing = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(computing)  # x is made; whatever read earlier sums comes before what overwrites them
        with torch.cuda.stream(self.stream):
            result = work()
            ready = self.stream.record_event()

        def done() -> Tensor:
            computing.wait_event(ready)
            return result

        return done


def current() -> Halves | None:
    """The run that this thread is a half of, if it is one."""
    return getattr(_here, "halves", None)


class _Modes:
    """What torch keeps for each thread, as it is in this one: gradients, inference, autocast, the current stream."""

    def __init__(self) -> None:
        self._inference, self._grad = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
        kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
        self._autocast = [(k, torch.get_autocast_dtype(k), torch.is_autocast_enabled(k)) for k in kinds]
        self._stream = torch.cuda.current_stream() if torch.cuda.is_initialized() else None  # type: ignore[no-untyped-call]

    @contextmanager
    def twice_reduced(self) -> Iterator[None]:
        """The same in the thread that enters this."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled))
            if self._stream is not None:
                stack.enter_context(torch.cuda.stream(self._stream))
            yield
