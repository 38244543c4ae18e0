"""The engine of methods that need only losses, on weights that FSDP2 shards: a rank keeps and moves its own rows.

Weights that are stepped themselves (fp32, or 16 bits with stochastic rounding) are perturbed where they have been
gathered, so nothing is kept beside the rows but the unit that runs. Other weights in 16 bits have a master copy of the
rows, from which these are written for every perturbation; and where a perturbation depends on state, which a rank has
for its own rows only, there is a copy in every format.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.hooks import RemovableHandle

from dsso.engines.forward import ForwardEngine
from dsso.engines.rows import Rows
from dsso.engines.shown import MasterWeights, OwnWeights, copied, decayed, trained
from dsso.optim._probes import Piece
from dsso.parallel.noise import clean


class GatheredWeights(OwnWeights):
    """Rows that are stepped themselves, perturbed in the gathered copies that the model computes with.

    Args:
        module: cut already.
        rows: its pieces; they must not stay gathered after a forward pass.
        pieces: of this rank, the rows themselves.
    """

    def __init__(self, module: nn.Module, rows: Rows, pieces: Sequence[Piece]) -> None:
        super().__init__()
        self.pieces = pieces
        self._rows = rows
        self._own = {id(unit): self._parameters(unit) for unit in rows.units}
        self._names = {id(p): clean(n) for n, p in rows.weights.items() if p.requires_grad}
        self._shards = {key: [holder._parameters[a] for holder, a in own] for key, own in self._own.items()}
        self._perturbed: set[int] = set()
        self._handles: list[RemovableHandle] = []
        for unit in rows.units:
            if self._own[id(unit)]:
                # Around torch's own hooks: before they gather, and after they have.
                self._handles += [
                    unit.register_forward_pre_hook(self._expect, prepend=True),
                    unit.register_forward_pre_hook(lambda unit, _args: self._perturb(unit)),
                ]
        rows.gathered.append(self._perturb_anew)

    def _parameters(self, unit: nn.Module) -> list[tuple[nn.Module, str]]:
        """Holders and attributes of the trained parameters that are gathered with a unit, each parameter once."""
        others = {
            id(part) for other in self._rows.units if other is not unit for part in _inside(other, unit)
        }
        found: dict[int, tuple[nn.Module, str]] = {}
        for holder in unit.modules():
            if id(holder) in others:
                continue
            for attribute, parameter in holder._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    found.setdefault(id(parameter), (holder, attribute))
        return list(found.values())

    def _expect(self, unit: nn.Module, _args: Any) -> None:
        """What is still cut will be gathered afresh."""
        holder, attribute = self._own[id(unit)][0]
        if isinstance(holder._parameters[attribute], DTensor):
            self._perturbed.discard(id(unit))

    def _perturb_anew(self, unit: nn.Module) -> None:
        self._perturbed.discard(id(unit))
        self._perturb(unit)

    @torch.no_grad()
    def _perturb(self, unit: nn.Module) -> None:
        if self._write is None or id(unit) in self._perturbed:
            return
        self._perturbed.add(id(unit))
        for (holder, attribute), shard in zip(self._own[id(unit)], self._shards[id(unit)], strict=True):
            whole: Any = holder._parameters[attribute]
            flat = whole.detach().view(-1)
            self._write(self._names[id(shard)], 0, flat, flat)

    def publish(self) -> None:
        """The rows are the weights; gathered copies of them go."""
        self._rows.reshard()
        self._perturbed.clear()

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._rows.gathered.remove(self._perturb_anew)


def _inside(other: nn.Module, unit: nn.Module) -> Iterator[nn.Module]:
    """Modules of another unit, where it lies within this one."""
    if any(part is other for part in unit.modules()):
        yield from other.modules()


class ForwardFSDP2Engine(ForwardEngine):
    """Evaluates a model whose rows are spread over the ranks; see `ForwardEngine`.

    The type of the weights is that of the model's trained parameters.
    """

    def _hold(self, module: nn.Module) -> Any:
        shrinking = decayed(module)
        dtype = next(iter(trained(module).values())).dtype
        self._rows = Rows(module, self.device, dtype, dtype, keep_root=False)
        self._first = next(module.parameters())
        local = {n: self._rows.local(n).detach() for n, w in self._rows.weights.items() if w.requires_grad}
        self._forward.param_groups[0]["params"] = list(local.values())
        wide = dtype in (torch.float32, torch.float64)
        method = self._forward.forward_method
        gathered = (wide or method.stochastic) and not method.shows_state
        pieces, shown = [], []
        for name, rows in local.items():
            start, flat = self._rows.starts[name], rows.view(-1)
            base = flat if gathered else copied(rows, method.stochastic)
            pieces.append(Piece(clean(name), start, base, clean(name) in shrinking))
            shown.append(flat)
        return GatheredWeights(module, self._rows, pieces) if gathered else MasterWeights(pieces, shown)

    @property
    def name(self) -> str:
        """Name of the engine, as a recipe writes it."""
        return "fsdp2"

    @property
    def dtype(self) -> str:
        """Number format of the weights."""
        return str(self._rows.dtype).removeprefix("torch.")

    def publish_weights(self) -> None:
        """Bring the model's weights in line with master copies, and let go of gathered ones."""
        super().publish_weights()
        self._rows.reshard()

    def gathered_state_dict(self, trainable_only: bool = True) -> dict[str, Tensor]:
        """Full parameters by name on the CPU of rank 0; empty elsewhere; collective."""
        return self._rows.state_dict(trainable_only)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite weights; see `dsso.engines.protocol.Engine.load_weights`."""
        self._rows.load(self._known(tensors, self._rows.weights))

    def close(self) -> None:
        """Take the hooks off the model and let go of gathered weights."""
        super().close()
        self._rows.reshard()
