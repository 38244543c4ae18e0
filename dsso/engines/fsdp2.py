"""FSDP2: weights, gradients and optimizer state in rows over the ranks, by torch's `fully_shard`.

The local pieces (`dsso.engines.rows`) are the buffers that dsso's optimizer steps. With bf16 the trained weights are
kept in fp32 and gathered in bf16, gradients are reduced in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines.rows import Rows
from dsso.engines.window import WindowEngine
from dsso.errors import RunError
from dsso.optim._partition import PartitionOptimizer
from dsso.parallel.fragments import Span


class FSDP2Engine(WindowEngine):
    """Shards a model over all ranks.

    Args:
        module: the model, best still on the CPU: it is moved to the device unit by unit. Rank 0's weights count.
        optimizer: carries the method; it is attached here.
        device: of this rank.
        gradient_accumulation_steps, micro_batch_size: of the recipe.
        scheduler: learning-rate scheduler on the optimizer, or None.
        dtype: of the gathered weights, float32 or bfloat16.

    Raises:
        RecipeError: for a model that cannot be cut into rows.
        RunError: when torch cuts the parameters in another way than dsso reads.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: PartitionOptimizer,
        device: torch.device,
        gradient_accumulation_steps: int,
        micro_batch_size: int,
        scheduler: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(module, optimizer, device, gradient_accumulation_steps, micro_batch_size, scheduler)
        self._dtype = dtype
        sizes = {n: p.numel() for n, p in module.named_parameters() if p.requires_grad}
        total = sum(p.numel() for p in module.parameters())
        # Whole gradients between micro-batches save a reduction each, where they take no more room than this rank's
        # share of the weights (adapters). Where all weights are trained, gradients stay sharded.
        self._hold = sum(sizes.values()) * self.world_size <= total
        self._take(Rows(module, device, dtype), sizes)

    def _take(self, rows: Rows, sizes: Mapping[str, int]) -> None:
        """Attach the optimizer to this rank's rows; collective.

        Args:
            rows: of the model, cut.
            sizes: elements of every trained parameter, in model order.
        """
        self._rows = rows
        self._buffers = {n: rows.local(n).detach() for n in sizes}
        starts = rows.starts
        spans = [Span(n, starts[n], b.numel(), i, 0) for i, (n, b) in enumerate(self._buffers.items())]
        # What still refers to the whole parameters lets them go.
        self._first = next(self.module.parameters())
        self.optimizer.param_groups[0]["params"] = list(self._buffers.values())
        self.optimizer.attach(list(self._buffers.values()), spans, sizes)

    # -- passes -------------------------------------------------------------------------------------------------

    def _begin_pass(self, last: bool) -> None:
        self._reduce_gradients(last or not self._hold)

    def _reduce_gradients(self, reduce: bool) -> None:
        self._rows.units[-1].set_requires_gradient_sync(reduce)

    def sampled_pass(self, forward: Callable[[], Tensor]) -> None:
        """Measure output gradients on sampled labels; nothing is reduced."""
        self._reduce_gradients(False)
        super().sampled_pass(forward)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        # `requires_grad` is that of the shards, and the gathered weights follow it.
        self._rows.reshard()
        with super()._frozen():
            yield
            self._rows.reshard()

    def _bring_gradients(self) -> None:
        """Torch has summed them over ranks."""
        for name, buffer in self._buffers.items():
            weight = self._rows.weights[name]
            if self._rows.local(name).data_ptr() != buffer.data_ptr():
                raise RunError("FSDP2 has moved a shard", where=f"parameter {name}")
            gradient: Any = weight.grad
            with torch.no_grad():
                buffer.grad = None if gradient is None else gradient.to_local()

    def _drop_gradients(self) -> None:
        for name, buffer in self._buffers.items():
            buffer.grad = self._rows.weights[name].grad = None

    # -- weights ------------------------------------------------------------------------------------------------

    @property
    def sharded(self) -> bool:
        """Ranks hold rows."""
        return True

    @property
    def dtype(self) -> str:
        """Number format of the gathered weights."""
        return str(self._dtype).removeprefix("torch.")

    def publish_weights(self) -> None:
        """The optimizer's buffers are the weights: only gathered copies of the old ones have to go."""
        self._rows.reshard()

    def gathered_state_dict(self, trainable_only: bool = True) -> dict[str, Tensor]:
        """Full parameters by name, in the type of the passes, on the CPU of rank 0; empty elsewhere; collective."""
        return self._rows.state_dict(trainable_only)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite weights; see `dsso.engines.protocol.Engine.load_weights`."""
        self._rows.load(self._known(tensors, self._rows.weights))

    def close(self) -> None:
        """Take dsso's hooks off the model and let go of gathered weights."""
        self._close_hooks()
        self._rows.reshard()
