"""Stop requests: SIGINT, SIGTERM and SIGUSR1 become a flag that all ranks agree upon at a step boundary.

The first signal asks for an orderly end: the loop finishes its step, writes a checkpoint and leaves with
status 128 + signal (130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1, by which schedulers announce the end of a job's
time: the run is to be queued again). A second one leaves at once, also when the main thread hangs in a collective call:
signals are read by a thread from a wake-up descriptor, because Python runs its own handlers only between two byte codes
of the main thread.

Launchers repeat signals: Ctrl-C in a terminal reaches a rank as SIGINT and then, from DeepSpeed's launcher, as SIGTERM,
on a busy machine seconds later. So a signal within `repeat_seconds` of the first counts as the same request, and one of
another kind within `launcher_seconds`. Schedulers send SIGTERM minutes after SIGUSR1, shortly before they kill: the
first of these belongs to the request whenever it comes, so that a checkpoint under way is not given up.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from types import FrameType, TracebackType
from typing import Any, NoReturn, Self

import torch

from dsso.parallel.collectives import any_flag, gather_objects

REQUEUE = signal.SIGUSR1
"""The request of a scheduler, and of a run whose own time is up: to go on later."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, REQUEUE)
"""What counts as a stop request."""

_TOGETHER_SECONDS = 0.02


class StopRequest:
    """Context manager that turns signals into a request to stop.

    Enter it in the main thread; leaving it restores the handlers that were there.

    Args:
        speak: say on stderr that the request was heard (rank 0).
        repeat_seconds: signals so close behind the first one belong to it.
        launcher_seconds: those of the other kind do so longer.
    """

    def __init__(
        self, speak: bool = True, repeat_seconds: float = 1.0, launcher_seconds: float = 30.0
    ) -> None:
        self.speak = speak
        self.repeat_seconds = repeat_seconds
        self.launcher_seconds = launcher_seconds
        self.signum: int | None = None
        """The first signal that this rank got, or None."""
        self._old_handlers: dict[signal.Signals, Any] = {}
        self._old_wakeup = -1
        self._read_fd = self._write_fd = -1
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._read_fd, self._write_fd = os.pipe()
        os.set_blocking(self._write_fd, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_fd, warn_on_full_buffer=False)
        for one in SIGNALS:
            self._old_handlers[one] = signal.signal(one, self._heard)
        self._thread = threading.Thread(target=self._watch, name="dsso-stop-request", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one, handler in self._old_handlers.items():
            signal.signal(one, handler)
        signal.set_wakeup_fd(self._old_wakeup)
        os.close(self._write_fd)  # the thread reads the end of the file and returns
        if self._thread is not None:
            self._thread.join()
        os.close(self._read_fd)

    def agreed(self, device: torch.device | str = "cpu") -> int | None:
        """The signal that stops the run, the same on every rank, or None.

        Every rank calls it at the same step boundary.

        Args:
            device: where the flag is reduced, see `control_device`.
        """
        if not any_flag(self.signum is not None, device):
            return None
        signals: list[int | None] = gather_objects(self.signum)
        return next(one for one in signals if one is not None)

    def request(self, signum: int, message: str) -> None:
        """Ask for an end as a signal would, on behalf of the run itself; no-op behind another request.

        Args:
            signum: the signal that it stands for.
            message: said on stderr.
        """
        if self.signum is None:
            self.signum = signum
            self._tell(message)

    def _heard(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum = signum

    def _watch(self) -> None:
        first: float | None = None
        announced = False
        # Not select(), which takes no descriptor above 1023.
        coming = select.poll()
        coming.register(self._read_fd, select.POLLIN)
        while True:
            coming.poll()
            # Of two signals that were pending together the kernel runs the handler of the later number first.
            time.sleep(_TOGETHER_SECONDS)
            data = os.read(self._read_fd, 64)
            if not data:
                return
            for signum in sorted(data):
                if signum not in SIGNALS:
                    continue
                now = time.monotonic()
                if first is None:
                    first = now
                    self._heard(signum, None)
                    self._tell(
                        f"{signal.Signals(signum).name}: writing a checkpoint after this step, then leaving;"
                        " once more leaves at once"
                    )
                elif self.signum == REQUEUE and signum == signal.SIGTERM and not announced:
                    announced = True
                elif now - first > (self.repeat_seconds if signum == self.signum else self.launcher_seconds):
                    self._tell(f"{signal.Signals(signum).name} again: leaving without a checkpoint")
                    os._exit(128 + signum)

    def _tell(self, message: str) -> None:
        if self.speak:
            # not print(): the main thread may hold the lock of the stream
            os.write(2, f"\n{message}\n".encode())


def leave(status: int) -> NoReturn:
    """End this process at once, with what it has printed but without taking anything down.

    Args:
        status: of the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def control_device(device: torch.device) -> torch.device | None:
    """Where a flag can be reduced at every step without waiting for an accelerator; None where it cannot.

    Args:
        device: the device of the model.
    """
    if device.type == "cpu" or not torch.distributed.is_initialized():
        return torch.device("cpu")
    if "cpu:" in str(torch.distributed.get_backend_config()):
        return torch.device("cpu")
    return None
