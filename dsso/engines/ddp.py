"""Data-parallel replicas: the single engine on every rank, with gradients averaged at the end of the window.

The averaging is dsso's own and not `torch.nn.parallel.DistributedDataParallel`: a second-order step needs the whole
averaged gradient at the end of the window and nothing before, and torch's reducer, which counts gradients as they
arrive, refuses what recipes may ask for (reentrant checkpointing beside unused parameters, passes that leave no
gradient). What is given up is the overlap with the last backward pass; the messages are few and large instead.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from dsso.engines.single import SingleEngine
from dsso.parallel.averaging import average, same_everywhere


class DDPEngine(SingleEngine):
    """One replica of the model on each rank; the method's state is shared out among them.

    Its arguments are those of `SingleEngine`; rank 0's weights are given to all.
    """

    def _agree(self) -> None:
        same_everywhere(p.detach() for p in chain(self.module.parameters(), self.module.buffers()))

    def _bring_gradients(self) -> None:
        """Average over ranks; a parameter that this rank's loss did not reach counts as zero."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for master in self._masters.values():
            by_dtype.setdefault(master.dtype, []).append(master)
        for masters in by_dtype.values():
            own = [torch.zeros_like(m, requires_grad=False) if m.grad is None else m.grad for m in masters]
            for master, mean in zip(masters, average(own), strict=True):
                master.grad = mean
