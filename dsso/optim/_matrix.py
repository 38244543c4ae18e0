"""Methods that precondition blocks of matrices from gradients alone, on one backend.

A method is a class of blocks (`dsso.optim._blocks`): what one keeps, how it takes in a gradient, how it is refreshed,
how it acts. Everything else is here: which parameters there are and who owns them, which blocks are stacked, when which
block is refreshed, what happens to a step that is not finite or a refresh that fails, and what a checkpoint holds.

A rank averages and refreshes the blocks of the parameters that it owns; gradients come to it and updates go back by
`dsso.parallel.fragments`. That the whole step is finite is agreed upon before any block looks at its gradient, so a
dropped step leaves every block as it was. Refreshes may ask the device whether a decomposition has worked; other steps
do not.
"""

from __future__ import annotations

import itertools
import math
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dsso.errors import RecipeError
from dsso.optim._blocks import MatrixBlocks, Take
from dsso.optim._matrix_config import MatrixConfig
from dsso.optim._refresh import Stagger
from dsso.optim._rules import Rule
from dsso.optim._tensors import Chosen, TensorBlock, blocks_of, choose
from dsso.optim.base import GradientMethod, state_like, take_over
from dsso.parallel.placement import owners_by_cost

STACKED = 2**20
"""Elements of a stack at most, but for a single block: beyond them a copy costs more than calls save."""


def take(model: nn.Module, config: MatrixConfig) -> Chosen:
    """The parameters that the method takes, and the others with the reason.

    Raises:
        RecipeError: when the model has no matrix for it.
    """
    chosen = choose(model, config.exclude, config.embeddings)
    if not chosen.shapes:
        raise RecipeError(
            "the model has no matrix for this method",
            where="optimizer.type",
            got=", ".join(sorted(set(chosen.rest.values())) or ["no parameter is trainable"]),
            allowed="trainable parameters of two or more dimensions",
            remedy="train matrices (LoRA, adapters, all weights), set optimizer.params.embeddings, or use AdamW",
        )
    return chosen


class MatrixLayout:
    """Blocks and owners: a pure function of shapes, parameters and the number of ranks.

    Args:
        shapes: of the parameters that the method takes, unsharded, in model order.
        config: of the method.
        block: its class of blocks.
        world_size: number of ranks.

    Attributes:
        blocks: of every parameter.
        costs: of every block, by key.
        owners: of every parameter.
    """

    def __init__(
        self,
        shapes: Mapping[str, Sequence[int]],
        config: MatrixConfig,
        block: type[MatrixBlocks],
        world_size: int,
    ) -> None:
        self.blocks: dict[str, tuple[TensorBlock, ...]] = blocks_of(shapes, config.block_side)
        self.costs = {b.key: block.cost(b.sides, config) for bs in self.blocks.values() for b in bs}
        totals = [[self.costs[b.key] for b in bs] for bs in self.blocks.values()]
        found = owners_by_cost(
            [sum(one.refresh for one in costs) for costs in totals],
            [sum(one.elements for one in costs) for costs in totals],
            world_size,
        )
        self.owners = dict(zip(self.blocks, found, strict=True))

    def held_by(self, rank: int) -> list[TensorBlock]:
        """Blocks of a rank, in model order."""
        return [b for name, bs in self.blocks.items() if self.owners[name] == rank for b in bs]


class MatrixMethod(GradientMethod):
    """A method on blocks of matrices, on a model.

    Args:
        config: its parameters.
        model: the unwrapped model.
        device: where state lives.
        rank, world_size: this process among those that share the blocks.
        example: not used: nothing is measured.

    Raises:
        RecipeError: when the model has no matrix for it.
    """

    block: ClassVar[type[MatrixBlocks]]
    """What the method does to blocks."""

    def __init__(
        self,
        config: Any,
        model: nn.Module,
        device: torch.device,
        rank: int,
        world_size: int,
        example: Mapping[str, Any] | None = None,
    ) -> None:
        self.config: MatrixConfig = config
        chosen = take(model, config)
        self.rest = chosen.rest
        self.layout = MatrixLayout(chosen.shapes, config, self.block, world_size)
        self.owners = self.layout.owners
        self.workers = {name: (owner,) for name, owner in self.owners.items()}
        self._like = state_like(model, device)
        self._mine = [name for name in self.layout.blocks if self.owners[name] == rank]
        self._stacks = list(self._stacked(self.layout.held_by(rank)))
        self._places = {b.key: (state, i) for bs, state in self._stacks for i, b in enumerate(bs)}
        self._refreshed: dict[str, int | None] = {b.key: None for b in self.layout.held_by(rank)}
        self._stagger = Stagger({key: c.refresh for key, c in self.layout.costs.items()}, config.stagger)
        self._matrices = {n for n, p in model.named_parameters() if p.requires_grad and p.dim() > 1}
        self._steps = 0
        self._all = True
        self._bad = torch.zeros((), dtype=torch.bool, device=device)

    def _stacked(self, blocks: Sequence[TensorBlock]) -> Iterator[tuple[list[TensorBlock], MatrixBlocks]]:
        """Blocks of the same sides together, no more of them than are worth a copy."""
        for sides, same in itertools.groupby(sorted(blocks, key=lambda b: b.sides), key=lambda b: b.sides):
            rest = list(same)
            most = max(1, STACKED // math.prod(sides))
            for at in range(0, len(rest), most):
                chosen = rest[at : at + most]
                state = self.block(len(chosen), sides, self.config, self._like)
                state.seeds = [zlib.crc32(block.key.encode()) for block in chosen]
                yield chosen, state

    def rules(self) -> dict[str, Rule]:
        """SGD with momentum for the matrices, the base method for the rest."""
        return self.config.rules(self.owners, self.rest, self._matrices)

    # -- a window: nothing is measured in it --------------------------------------------------------------------

    def begin_window(self, step: int, retry: bool) -> None:
        """Refresh all blocks at first and after a lost step, else those that are due."""
        self._all = retry or self._steps == 0

    def before_backward(self, scale: float | Tensor, terms: float | Tensor, last: bool = False) -> None:
        """Nothing is measured."""

    def sampled_pass(self) -> AbstractContextManager[None]:
        """There is none."""
        return nullcontext()

    def wants_sampled_pass(self) -> bool:
        """Never."""
        return False

    def measured_badly(self) -> Tensor:
        """Nothing of its own, but the gradients are its statistics: all ranks have to agree that they are finite."""
        return torch.zeros_like(self._bad)

    def update(self, step: int, bad: Tensor | None) -> None:
        """Learn whether the gradients of this step are taken in."""
        self._steps = step + 1
        self._bad = torch.zeros_like(self._bad) if bad is None else bad

    # -- the update ---------------------------------------------------------------------------------------------

    def precondition(self, gradients: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """Take the gradients in, refresh what is due, and let the blocks act."""
        step, take = self._steps - 1, Take(~self._bad, torch.ones_like(self._like))
        due = self._due(step)
        if due and bool(self._bad):
            due = set()  # nothing new to learn from; the next window renews all of them
        updates = {name: torch.empty_like(gradients[name]) for name in self._mine}
        failed = missing = 0
        waiting = self._like
        for blocks, state in self._stacks:
            given = [block.of(gradients[block.name]) for block in blocks]
            # Methods do not write into what they are given: a single block needs no copy.
            stacked = given[0].unsqueeze(0) if len(given) == 1 else torch.stack(given)
            gradient_KS = take.only(stacked)
            state.average(gradient_KS, take)
            if not state.refreshed_last:
                failed += self._refresh(blocks, state, due, step)
            for block, update in zip(blocks, state.act(gradient_KS, step), strict=True):
                block.of(updates[block.name]).copy_(update)
            if state.refreshed_last:
                failed += self._refresh(blocks, state, due, step)
            for index, gradient in enumerate(gradient_KS):
                if not state.ready(index, step):
                    missing += 1
                    # A parameter that the loss does not reach is not waited for.
                    waiting = waiting + (gradient.abs().max() > 0).to(waiting.dtype)
        host = torch.tensor([failed, missing], dtype=waiting.dtype, device="cpu")
        return updates, torch.cat([waiting.reshape(1), host.to(waiting.device, non_blocking=True)])

    def _due(self, step: int) -> set[str]:
        """Blocks whose preconditioner is renewed in that step."""
        return set(self._places if self._all else self._stagger.due(self.config.refresh_interval, step))

    def _refresh(
        self, blocks: Sequence[TensorBlock], state: MatrixBlocks, due: Collection[str], step: int
    ) -> int:
        """Renew the preconditioners that are due; how many failed."""
        failed = 0
        for index, block in enumerate(blocks):
            if block.key in due:
                self._refreshed[block.key] = step
                failed += state.refresh(index)
        return failed

    # -- state --------------------------------------------------------------------------------------------------

    def health(self) -> dict[str, float]:
        """Age of the oldest preconditioner of this rank, in steps."""
        known = [at for at in self._refreshed.values() if at is not None]
        whole = known and len(known) == len(self._refreshed)
        return {"factor_age": float(self._steps - 1 - min(known)) if whole else -1.0}

    def state_bytes(self) -> int:
        """Bytes of the blocks on this rank."""
        return sum(t.numel() * t.element_size() for t in self.state_tensors().values())

    def state_tensors(self) -> dict[str, Tensor]:
        """Tensors of the blocks that this rank owns."""
        return {
            f"{key}/{name}": t
            for key, (state, index) in self._places.items()
            for name, t in state.state(index).items()
        }

    def wants(self, name: str) -> bool:
        """Whether this rank owns the block that a tensor belongs to."""
        return "/".join(name.split("/")[:2]) in self._places

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the state of the blocks that this rank owns; ages come with `load_counters`."""
        take_over(
            self.state_tensors(), tensors, "was it written with another block_side, sides, beta1 or grafting?"
        )

    def counters(self) -> dict[str, Any]:
        """Host-side state: `common`, the same on every rank, and `owned`, by block."""
        owned = {
            key: {"refreshed_at": self._refreshed[key], "usable": state.usable[index]}
            for key, (state, index) in self._places.items()
        }
        return {"common": {"steps": self._steps}, "owned": owned}

    def load_counters(self, counters: Mapping[str, Any]) -> None:
        """Take over what `counters` returned, `owned` of all ranks together."""
        self._steps = int(counters["common"]["steps"])
        for key, (state, index) in self._places.items():
            found = counters["owned"][key]
            self._refreshed[key], state.usable[index] = found["refreshed_at"], bool(found["usable"])

    def close(self) -> None:
        """There are no hooks."""
