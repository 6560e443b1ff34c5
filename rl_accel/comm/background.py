"""Work that goes on while the host computes, and waiting for as much of it as is needed.

On the CPU it runs in a thread of its own; codec and sockets leave Python's lock alone. On an accelerator it is queued
on a stream of its own by the thread that starts it, so that all ranks queue their collectives in one order, and waiting
is left to the streams; there it has not been run yet.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import torch


class Background:
    """Runs one piece of work at a time, an iterator that tells after each part how many are done."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        self._events: dict[int, torch.Event] = {}
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._done = 0
        self._error: BaseException | None = None
        self.running = False
        """Whether work was started and nobody has waited for its end yet."""

    def start(self, work: Callable[[], Iterator[int]]) -> None:
        """Start; what was started before must have been waited for."""
        assert not self.running
        self._done, self._error, self.running = 0, None, True
        if self._stream is not None:
            self._queue(work)
            return
        threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._run, args=(work, threads), name="rl_accel-comm", daemon=True)
        self._thread.start()

    def wait(self, count: int | None = None) -> None:
        """Wait until so many parts are done; None: until all is. What failed in the work is raised here."""
        if not self.running:
            return
        if self._stream is not None:
            self._wait_for_stream(count)
            return
        with self._changed:
            self._changed.wait_for(lambda: self._ended or (count is not None and self._done >= count))
        if self._error is not None or count is None or self._ended:
            self._finish()

    @property
    def _ended(self) -> bool:
        return self._thread is None or not self._thread.is_alive() or self._done < 0

    def _finish(self) -> None:
        assert self._thread is not None
        self._thread.join()
        self._thread, self.running = None, False
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, work: Callable[[], Iterator[int]], threads: int) -> None:
        torch.set_num_threads(threads)  # of this thread only
        try:
            for done in work():
                with self._changed:
                    self._done = done
                    self._changed.notify_all()
        except BaseException as error:  # raised where somebody waits
            self._error = error
        finally:
            with self._changed:
                self._done = -1
                self._changed.notify_all()

    def _queue(self, work: Callable[[], Iterator[int]]) -> None:
        assert self._stream is not None
        self._stream.wait_stream(torch.accelerator.current_stream(self._device))
        self._events = {}
        with self._stream:
            for done in work():
                self._events[done] = self._stream.record_event()
                self._done = done

    def _wait_for_stream(self, count: int | None) -> None:
        assert self._stream is not None
        current = torch.accelerator.current_stream(self._device)
        if count is None:
            current.wait_stream(self._stream)
            self._events, self.running = {}, False
        elif count in self._events:
            current.wait_event(self._events[count])
