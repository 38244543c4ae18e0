"""Weights that a model computes with for a while, in the place of its own: perturbed, and back again bit by bit.

Two forms. Weights that are stepped themselves (in fp32, or rounded at random) are swapped block by block: while a
block runs, its parameters point to a perturbed copy, and then to themselves again; at any time there is a copy of one
block only, and nothing is ever written over. Of embeddings outside the blocks only the rows that are looked up are
copied, and linear layers there (heads) go through their rows in parts no larger than a block. Other weights in 16
bits have a master copy in fp32, from which they are written as a whole, and a last time when the step is done; so
have sharded ones, of which a rank writes just its own pieces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dsso.engines.units import blocks
from dsso.optim._probes import Piece, Write
from dsso.parallel.noise import clean

_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm")


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Trained parameters by cleaned name, a tied one under the first of its names."""
    return {clean(n): p for n, p in module.named_parameters() if p.requires_grad}


def decayed(module: nn.Module) -> set[str]:
    """Names of trained parameters that weight decay applies to: matrices, but not those of norms, by the owner's type.

    Args:
        module: not sharded yet.
    """
    out = set()
    for owner in module.modules():
        if any(part in type(owner).__name__ for part in _NORMS):
            continue
        out |= {id(p) for name, p in owner.named_parameters(recurse=False) if name != "bias" and p.dim() > 1}
    return {name for name, p in trained(module).items() if id(p) in out}


@contextmanager
def meeting(module: nn.Module) -> Iterator[set[str]]:
    """Within it names of trained parameters are gathered whose block runs, or whose own module outside of blocks.

    Args:
        module: the model.
    """
    names = {id(p): n for n, p in trained(module).items()}
    units = blocks(module)
    inside = {id(part) for unit in units for part in unit.modules()}
    owned = [(unit, [*unit.parameters()]) for unit in units]
    owned += [(p, [*p.parameters(recurse=False)]) for p in module.modules() if id(p) not in inside]
    met: set[str] = set()
    handles = []
    for part, parameters in owned:
        own = {names[id(p)] for p in parameters if id(p) in names}
        if own:
            handles.append(part.register_forward_pre_hook(lambda *_, own=own: met.update(own)))
    try:
        yield met
    finally:
        for handle in handles:
            handle.remove()


class MasterWeights:
    """Weights that are written anew for every perturbation, from a copy that is stepped.

    Args:
        pieces: copies of what this rank holds.
        shown: what the model computes with, for each piece; contiguous.
    """

    def __init__(self, pieces: Sequence[Piece], shown: Sequence[Tensor]) -> None:
        self.pieces = pieces
        self._shown = shown
        self._moved = False

    @classmethod
    def of_replica(cls, module: nn.Module) -> MasterWeights:
        """For a model that every rank has all of."""
        shrinking = decayed(module)
        pieces, shown = [], []
        for name, parameter in trained(module).items():
            parameter.data = parameter.data.contiguous()
            pieces.append(Piece(name, 0, copied(parameter.detach()), name in shrinking))
            shown.append(parameter.data.view(-1))
        return cls(pieces, shown)

    @contextmanager
    def showing(self, write: Write | None) -> Iterator[None]:
        """See `dsso.optim._probes.Weights`."""
        if write is None and self._moved:
            self.publish()
        if write is not None:
            self._moved = True
            for piece, out in zip(self.pieces, self._shown, strict=True):
                write(piece.name, piece.start, piece.base, out)
        yield

    def publish(self) -> None:
        """Round the master copies to the model's weights."""
        for piece, out in zip(self.pieces, self._shown, strict=True):
            out.copy_(piece.base)
        self._moved = False

    def close(self) -> None:
        """Nothing was put on the model."""


def copied(weights: Tensor, stochastic: bool = False) -> Tensor:
    """A flat copy to be stepped: in fp32, or as the weights are where steps are rounded at random.

    Shapes:
        weights: any, contiguous.
        result: [numel].
    """
    return weights.to(weights.dtype if stochastic else torch.float32, copy=True).view(-1)


class OwnWeights(ABC):
    """Weights that are stepped themselves, perturbed in copies while modules run."""

    def __init__(self) -> None:
        self._write: Write | None = None

    @contextmanager
    def showing(self, write: Write | None) -> Iterator[None]:
        """See `dsso.optim._probes.Weights`."""
        self.publish()
        self._write = write
        try:
            yield
        finally:
            self._write = None
            self.publish()

    @abstractmethod
    def publish(self) -> None:
        """The pieces are the weights: copies that a pass has left behind, one that was broken off say, go."""


class SwappedWeights(OwnWeights):
    """Weights that are stepped themselves, perturbed block by block in copies.

    Args:
        module: the model; every rank has all of it.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        parameters = trained(module)
        for parameter in parameters.values():
            if not parameter.is_contiguous():
                parameter.data = parameter.data.contiguous()
        shrinking = decayed(module)
        self.pieces: Sequence[Piece] = [
            Piece(name, 0, p.detach().view(-1), name in shrinking) for name, p in parameters.items()
        ]
        self._names = {id(p): n for n, p in parameters.items()}
        # Kept: memory that is taken anew comes page by page, which costs more than to fill it.
        self._scratch: Tensor | None = None
        # Parameters that point to a copy: themselves, what they point to otherwise, and by how many modules they are
        # in use (a tied one may be met again within another's forward pass).
        self._away: dict[int, tuple[nn.Parameter, Tensor, int]] = {}
        self._handles: list[RemovableHandle] = []
        self._wrapped: list[nn.Module] = []
        units: list[nn.Module] = list(blocks(module))
        inside = {id(part) for unit in units for part in unit.modules()}
        for unit in units:
            self._watch(unit, list(unit.parameters()))
        self._largest = max((sum(p.numel() for p in unit.parameters()) for unit in units), default=0)
        for part in module.modules():
            if id(part) in inside:
                continue
            if type(part) is nn.Embedding and id(part.weight) in self._names:
                self._watch_rows(part)
            elif type(part) is nn.Linear and id(part.weight) in self._names and self._largest:
                self._watch_parts(part)
            else:
                self._watch(part, list(part.parameters(recurse=False)))

    def _watch(self, unit: nn.Module, parameters: list[nn.Parameter]) -> None:
        own = [p for p in parameters if id(p) in self._names]
        if not own:
            return
        self._handles.append(unit.register_forward_pre_hook(lambda *_: self._swap(own), prepend=True))
        # Also where the forward pass fails: what points to a copy must not stay so.
        self._handles.append(unit.register_forward_hook(lambda *_: self._back(own), always_call=True))

    def _watch_rows(self, part: nn.Embedding) -> None:
        """An embedding outside the blocks: of its weight only the rows that are looked up are copied."""
        plain, weight = part.forward, cast("nn.Parameter", part.weight)

        def forward(input: Tensor) -> Tensor:
            # On a GPU the rows would have to be asked for; there all of them are copied.
            whole = weight.device.type != "cpu" or id(weight) in self._away or part.max_norm is not None
            if self._write is None or whole:
                self._swap([weight])
                try:
                    return plain(input)
                finally:
                    self._back([weight])
            rows, places = torch.unique(input, return_inverse=True)
            home, width = weight.data, weight.shape[1]
            copy = self._room(rows.numel() * width, weight).narrow(0, 0, rows.numel() * width)
            for index, row in enumerate(rows.tolist()):
                self._write(
                    self._names[id(weight)], row * width, home[row], copy.narrow(0, index * width, width)
                )
            # Without padding_idx, which only gradients would know and which is not a row of these.
            return nn.functional.embedding(places, copy.view(-1, width))

        part.forward = forward  # type: ignore[method-assign]
        self._wrapped.append(part)

    def _watch_parts(self, part: nn.Linear) -> None:
        """A linear layer outside the blocks: its rows are perturbed and multiplied with in parts."""
        plain, weight = part.forward, part.weight
        own = [p for p in part.parameters(recurse=False) if id(p) in self._names]

        def forward(x: Tensor) -> Tensor:
            if self._write is None or id(weight) in self._away:
                self._swap(own)
                try:
                    return plain(x)
                finally:
                    self._back(own)
            bias: Tensor | None = part.bias
            # A bias that a module around this one holds as well points to its copy already.
            if bias is not None and id(bias) in self._names and id(bias) not in self._away:
                moved = torch.empty_like(bias)
                self._write(self._names[id(bias)], 0, bias.data, moved)
                bias = moved
            outputs, inputs = weight.shape
            count = max(1, min(outputs, self._largest // inputs))
            room = self._room(count * inputs, weight)
            out = x.new_empty(*x.shape[:-1], outputs)
            for first in range(0, outputs, count):
                rows = weight.data[first : first + count]
                copy = room.narrow(0, 0, rows.numel())
                self._write(self._names[id(weight)], first * inputs, rows.view(-1), copy)
                some = None if bias is None else bias[first : first + count]
                out[..., first : first + count] = nn.functional.linear(x, copy.view(rows.shape), some)
            return out

        part.forward = forward  # type: ignore[method-assign, assignment]
        self._wrapped.append(part)

    def _swap(self, parameters: list[nn.Parameter]) -> None:
        if self._write is None:
            return
        fresh = [parameter for parameter in parameters if id(parameter) not in self._away]
        room, at = self._room(sum(parameter.numel() for parameter in fresh), parameters[0]), 0
        for parameter in fresh:
            home = parameter.data
            copy = room.narrow(0, at, home.numel())
            at += home.numel()
            self._write(self._names[id(parameter)], 0, home.view(-1), copy)
            parameter.data = copy.view(home.shape)
            self._away[id(parameter)] = (parameter, home, 0)
        for parameter in parameters:
            _, home, uses = self._away[id(parameter)]
            self._away[id(parameter)] = (parameter, home, uses + 1)

    def _room(self, numel: int, like: Tensor) -> Tensor:
        """Room for the copies of one unit: the same every time, unless another unit's copies are in it."""
        if self._away:
            return torch.empty(numel, dtype=like.dtype, device=like.device)
        if self._scratch is None or self._scratch.numel() < numel:
            self._scratch = None  # before the larger one is made
            self._scratch = torch.empty(numel, dtype=like.dtype, device=like.device)
        return self._scratch

    def _back(self, parameters: list[nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) not in self._away:
                continue
            _, home, uses = self._away.pop(id(parameter))
            if uses > 1:
                self._away[id(parameter)] = (parameter, home, uses - 1)
            else:
                parameter.data = home

    def publish(self) -> None:
        """The pieces are the weights; what a pass that was broken off has left away comes back."""
        for parameter, home, _ in self._away.values():
            parameter.data = home
        self._away.clear()

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        for part in self._wrapped:
            del part.forward


def weights_of(module: nn.Module, stochastic: bool = False) -> SwappedWeights | MasterWeights:
    """The form that fits the model's number format.

    Args:
        module: the model.
        stochastic: weights of 16 bits are stepped themselves, and rounded at random.

    Raises:
        ValueError: trained parameters of several formats, or of one that is not floating.
    """
    kinds = {p.dtype for p in trained(module).values()}
    if len(kinds) > 1:
        raise ValueError(f"trained parameters of one number format are needed, got {sorted(map(str, kinds))}")
    wide = kinds <= {torch.float32, torch.float64}
    return SwappedWeights(module) if wide or stochastic else MasterWeights.of_replica(module)
