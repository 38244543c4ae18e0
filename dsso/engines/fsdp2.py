"""FSDP2: weights, gradients and optimizer state in rows over the ranks, by torch's `fully_shard`.

Each block of the model is one unit, the rest is the root's. A parameter is a `DTensor` cut along its first dimension
(`Shard(0)`), so that this rank's piece is one contiguous span of the flattened parameter, possibly an empty one. The
local pieces are the buffers that dsso's optimizer steps, the frozen weights are cut in the same way.

With bf16 the trained weights are kept in fp32 and gathered in bf16, gradients are reduced in fp32.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from dsso.engines.units import blocks, reduce_unused
from dsso.engines.window import WindowEngine
from dsso.errors import RecipeError, RunError
from dsso.optim._partition import PartitionOptimizer
from dsso.parallel import collectives
from dsso.parallel.averaging import same_everywhere
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
        _check(module, dtype)
        total = sum(p.numel() for p in module.parameters())
        # Whole gradients between micro-batches save a reduction each, where they take no more room than this rank's
        # share of the weights (adapters). Where all weights are trained, gradients stay sharded.
        self._hold = sum(sizes.values()) * self.world_size <= total
        self._units = self._shard(module)
        self._weights: dict[str, DTensor] = dict(module.named_parameters())  # type: ignore[arg-type]
        self._starts = self._first_elements()
        self._buffers = {n: self._local(self._weights[n]).detach() for n in sizes}
        spans = [Span(n, self._starts[n], b.numel(), i, 0) for i, (n, b) in enumerate(self._buffers.items())]
        self._verify()
        # What still refers to the whole parameters lets them go.
        self._first = next(module.parameters())
        optimizer.param_groups[0]["params"] = list(self._buffers.values())
        optimizer.attach(list(self._buffers.values()), spans, sizes)

    # -- sharding -----------------------------------------------------------------------------------------------

    def _shard(self, module: nn.Module) -> list[Any]:
        """Cut the blocks and the root; the units, root last."""
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        half = self._dtype != torch.float32
        units: list[Any] = []
        for unit in (*blocks(module), module):
            self._place(unit)
            policy = MixedPrecisionPolicy(
                param_dtype=self._dtype if half else None,
                reduce_dtype=torch.float32 if half else None,
                # Inside the model the types are its own business; only what the loop hands in is cast.
                cast_forward_inputs=unit is module,
            )
            fully_shard(unit, mesh=mesh, mp_policy=policy)
            units.append(unit)
        for unit in units:
            reduce_unused(unit, units)
        # T5's blocks return the position bias as a view and do not edit it.
        warnings.filterwarnings(
            "ignore", r"FSDP2-wrapped module \(FSDPT5Block\) returned a view", UserWarning
        )
        if hasattr(module, "generate"):
            register_fsdp_forward_method(module, "generate")
        return units

    def _place(self, unit: nn.Module) -> None:
        """Move what is not cut yet to the device, in its type, with the values of rank 0."""
        own = [p for p in unit.parameters() if not isinstance(p, DTensor)]
        for parameter in own:
            value = parameter.detach().to(self.device)
            if value.is_floating_point() and self._dtype != torch.float32:
                # All engines start from the rounded weights; the trained ones then move in fp32.
                value = value.to(self._dtype)
                value = value.to(torch.float32) if parameter.requires_grad else value
            parameter.data = value.contiguous()
        for holder in unit.modules():
            for name, buffer in holder.named_buffers(recurse=False):
                setattr(holder, name, buffer.to(self.device))
        same_everywhere(p.detach() for p in own)
        same_everywhere(unit.buffers())

    @torch.no_grad()
    def _local(self, weight: DTensor) -> Tensor:
        local: Tensor = weight.to_local()
        return local

    def _first_elements(self) -> dict[str, int]:
        """Where this rank's piece of each parameter starts, from the numbers of rows that the ranks hold."""
        wrong = [n for n, w in self._weights.items() if tuple(w.placements) != (Shard(0),)]
        if wrong:
            raise RunError("fully_shard has not cut a parameter into rows", where=wrong[0])
        rows = collectives.gather_objects([self._local(w).shape[0] for w in self._weights.values()])
        return {
            name: sum(held[index] for held in rows[: self.rank]) * (weight.numel() // weight.shape[0])
            for index, (name, weight) in enumerate(self._weights.items())
        }

    def _verify(self) -> None:
        """Compare every piece with torch's own gathered parameter; all ranks fail together."""
        wrong = ""
        for name, buffer in self._buffers.items():
            whole = self._weights[name].full_tensor().detach().reshape(-1)
            piece = whole[self._starts[name] : self._starts[name] + buffer.numel()]
            if not torch.equal(piece, buffer.reshape(-1)):
                wrong = wrong or name
        found = [name for name in collectives.gather_objects(wrong) if name]
        if found:
            raise RunError(
                "FSDP2's shards are not the rows that dsso reads them to be",
                where=f"parameter {found[0]}",
                remedy="use a version of torch that dsso is tested with",
            )

    def _reshard(self) -> None:
        """Let go of gathered weights: after a pass without a backward one, the root keeps its own."""
        for unit in self._units:
            unit.reshard()

    # -- passes -------------------------------------------------------------------------------------------------

    def _begin_pass(self, last: bool) -> None:
        self._reduce_gradients(last or not self._hold)

    def _reduce_gradients(self, reduce: bool) -> None:
        self._units[-1].set_requires_gradient_sync(reduce)

    def sampled_pass(self, forward: Callable[[], Tensor]) -> None:
        """Measure output gradients on sampled labels; nothing is reduced."""
        self._reduce_gradients(False)
        super().sampled_pass(forward)

    @contextmanager
    def _frozen(self) -> Iterator[None]:
        # `requires_grad` is that of the shards, and the gathered weights follow it.
        self._reshard()
        with super()._frozen():
            yield
            self._reshard()

    def _bring_gradients(self) -> None:
        """Torch has summed them over ranks."""
        for name, buffer in self._buffers.items():
            weight = self._weights[name]
            if self._local(weight).data_ptr() != buffer.data_ptr():
                raise RunError("FSDP2 has moved a shard", where=f"parameter {name}")
            gradient: Any = weight.grad
            with torch.no_grad():
                buffer.grad = None if gradient is None else gradient.to_local()

    def _drop_gradients(self) -> None:
        for name, buffer in self._buffers.items():
            buffer.grad = self._weights[name].grad = None

    # -- weights ------------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> str:
        """Number format of the gathered weights."""
        return str(self._dtype).removeprefix("torch.")

    def publish_weights(self) -> None:
        """The optimizer's buffers are the weights: only gathered copies of the old ones have to go."""
        self._reshard()

    def gathered_state_dict(self, trainable_only: bool = True) -> dict[str, Tensor]:
        """Full parameters by name, in the type of the passes, on the CPU of rank 0; empty elsewhere; collective."""
        out: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            if trainable_only and name not in self._buffers:
                continue
            whole = weight.full_tensor().detach()
            if self.rank == 0:
                dtype = self._dtype if name in self._buffers and self._dtype != torch.float32 else None
                out[name] = whole.to("cpu", dtype, copy=True)
        return out

    @torch.no_grad()
    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite weights; see `dsso.engines.protocol.Engine.load_weights`."""
        for name, value in self._known(tensors, self._weights).items():
            local = self._local(self._weights[name])
            start = self._starts[name]
            local.copy_(value.reshape(-1)[start : start + local.numel()].view(local.shape))
        self._reshard()

    def close(self) -> None:
        """Take dsso's hooks off the model and let go of gathered weights."""
        self._close_hooks()
        self._reshard()


def _check(module: nn.Module, dtype: torch.dtype) -> None:
    """Refuse what `fully_shard` cannot cut, before anything is moved."""
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0:
            raise RecipeError(
                "FSDP2 cuts parameters into rows, and a scalar has none",
                where="dsso.engine",
                got=f"fsdp2, with the scalar parameter {name}",
                remedy="use 'ddp' or 'deepspeed', or give the parameter the shape (1,)",
            )
        low = parameter.requires_grad and parameter.dtype not in (torch.float32, torch.float64)
        if low and dtype == torch.float32:
            raise RecipeError(
                f"the trained parameter {name} is {parameter.dtype}, and the recipe computes in fp32",
                where="bf16.enabled",
                allowed="true, or a model in fp32",
                remedy='set "bf16": {"enabled": true}',
            )
