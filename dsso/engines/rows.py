"""A model cut into rows over the ranks by torch's `fully_shard`, and where dsso finds its pieces.

Each block of the model is one unit, the rest is the root's. A parameter is a `DTensor` cut along its first dimension
(`Shard(0)`), so that this rank's piece is one contiguous span of the flattened parameter, possibly an empty one. The
frozen weights are cut in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from dsso.engines.units import blocks, reduce_unused
from dsso.errors import RecipeError, RunError
from dsso.parallel import collectives
from dsso.parallel.averaging import same_everywhere


class Rows:
    """Cuts a model and keeps the account of the pieces.

    Args:
        module: the model, best still on the CPU: it is moved to the device unit by unit. Rank 0's weights count.
        device: of this rank.
        dtype: of the gathered weights.
        stored: type in which trained weights are kept; gradients are reduced in it.
        keep_root: weights of the root stay gathered after its forward pass, for a backward one.

    Attributes:
        units: cut modules, the root last.
        weights: all parameters, by name.
        starts: flat index of the first element that this rank holds of each parameter.
        gathered: called with the root when its weights have been gathered for `generate`.

    Raises:
        RecipeError: for a model that cannot be cut into rows.
        RunError: when torch cuts the parameters in another way than dsso reads.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        stored: torch.dtype = torch.float32,
        keep_root: bool = True,
    ) -> None:
        _check(module, dtype)
        self.device, self.dtype, self._stored = device, dtype, stored
        self.gathered: list[Callable[[nn.Module], None]] = []
        self.units = self._cut(module, keep_root)
        self.weights: dict[str, DTensor] = dict(module.named_parameters())  # type: ignore[arg-type]
        self.starts = self._first_elements()
        self._verify()

    def _cut(self, module: nn.Module, keep_root: bool) -> list[Any]:
        mesh = init_device_mesh(self.device.type, (collectives.world_size(),))
        mixed = self.dtype != self._stored
        units: list[Any] = []
        for unit in (*blocks(module), module):
            self._place(unit)
            policy = MixedPrecisionPolicy(
                param_dtype=self.dtype if mixed else None,
                reduce_dtype=self._stored if mixed else None,
                # Inside the model the types are its own business; only what the loop hands in is cast.
                cast_forward_inputs=unit is module,
            )
            again = None if unit is module and keep_root else True
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=again)
            units.append(unit)
        for unit in units:
            reduce_unused(unit, units)
        # T5's blocks return the position bias as a view and do not edit it.
        warnings.filterwarnings(
            "ignore", r"FSDP2-wrapped module \(FSDPT5Block\) returned a view", UserWarning
        )
        if hasattr(module, "generate"):
            self._register_generate(module)
        return units

    def _register_generate(self, module: Any) -> None:
        plain = module.generate

        def generate(*args: Any, **kwargs: Any) -> Any:
            for tell in self.gathered:
                tell(module)
            return plain(*args, **kwargs)

        module.generate = generate
        register_fsdp_forward_method(module, "generate")

    def _place(self, unit: nn.Module) -> None:
        """Move what is not cut yet to the device, in its type, with the values of rank 0."""
        own = [p for p in unit.parameters() if not isinstance(p, DTensor)]
        for parameter in own:
            value = parameter.detach().to(self.device)
            if value.is_floating_point() and self.dtype != torch.float32:
                # All engines start from the rounded weights; the trained ones may then move in another type.
                value = value.to(self.dtype)
                value = value.to(self._stored) if parameter.requires_grad else value
            parameter.data = value.contiguous()
        for holder in unit.modules():
            for name, buffer in holder.named_buffers(recurse=False):
                setattr(holder, name, buffer.to(self.device))
        same_everywhere(p.detach() for p in own)
        same_everywhere(unit.buffers())

    @torch.no_grad()
    def local(self, name: str) -> Tensor:
        """This rank's rows of a parameter, a view."""
        found: Tensor = self.weights[name].to_local()
        return found

    def _first_elements(self) -> dict[str, int]:
        """Where this rank's piece of each parameter starts, from the numbers of rows that the ranks hold."""
        wrong = [n for n, w in self.weights.items() if tuple(w.placements) != (Shard(0),)]
        if wrong:
            raise RunError("fully_shard has not cut a parameter into rows", where=wrong[0])
        rows = collectives.gather_objects([self.local(name).shape[0] for name in self.weights])
        me = collectives.rank()
        return {
            name: sum(held[index] for held in rows[:me]) * (weight.numel() // weight.shape[0])
            for index, (name, weight) in enumerate(self.weights.items())
        }

    def _verify(self) -> None:
        """Compare every trained piece with torch's own gathered parameter; all ranks fail together."""
        wrong = ""
        for name, weight in self.weights.items():
            if not weight.requires_grad:
                continue
            whole, local = weight.full_tensor().detach().reshape(-1), self.local(name).detach()
            piece = whole[self.starts[name] : self.starts[name] + local.numel()]
            if not torch.equal(piece, local.reshape(-1)):
                wrong = wrong or name
        found = collectives.first_named(wrong)
        if found:
            raise RunError(
                "FSDP2's shards are not the rows that dsso reads them to be",
                where=f"parameter {found}",
                remedy="use a version of torch that dsso is tested with",
            )

    def reshard(self) -> None:
        """Let go of gathered weights: after a pass without a backward one, the root may keep its own."""
        for unit in self.units:
            unit.reshard()

    def state_dict(self, trainable_only: bool) -> dict[str, Tensor]:
        """Full parameters by name, in the type of the passes, on the CPU of rank 0; empty elsewhere; collective."""
        out: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            if trainable_only and not weight.requires_grad:
                continue
            whole = weight.full_tensor().detach()
            if collectives.rank() == 0:
                dtype = self.dtype if weight.requires_grad and self.dtype != torch.float32 else None
                out[name] = whole.to("cpu", dtype, copy=True)
        return out

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite weights with full ones, the same on every rank."""
        for name, value in tensors.items():
            local, start = self.local(name), self.starts[name]
            local.copy_(value.reshape(-1)[start : start + local.numel()].view(local.shape))
        self.reshard()


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
