"""Read small device tensors one step later, when reading them costs no wait.

Decisions on the host (repeat a refresh, retry a factorization) need figures that only the device knows. Reading
them at once would stall it; reading them at a fixed later moment does not, and keeps all ranks in step, because
each of them reads the same value at the same step.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Deferred:
    """A mailbox for one vector: `push` in one step, `pop` in the next."""

    def __init__(self) -> None:
        self._box: Tensor | None = None
        self._event: torch.cuda.Event | None = None

    def push(self, values: Tensor) -> None:
        """Start copying a float vector to the host; it replaces an unread one."""
        if values.device.type == "cuda":
            self._box = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._box.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()
        else:
            self._box, self._event = values.detach().clone(), None

    def peek(self) -> list[float] | None:
        """The vector of the last `push`; None when there was none or it has been popped."""
        if self._box is None:
            return None
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._box.tolist()
        return values

    def pop(self) -> list[float] | None:
        """The vector of the last `push`, once; None when there was none."""
        values = self.peek()
        self._box = None
        return values
