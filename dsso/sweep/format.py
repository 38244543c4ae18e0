"""A sweep file: one recipe, the values to change in it, seeds, and when a run counts as diverged.

    {
      "recipe": "../kfac_roberta_large_lora.json",
      "grid": {"optimizer.params.lr": [0.01, 0.1], "optimizer.params.tau": [0.5, 1.0]},
      "seeds": [0, 1, 2]
    }

Paths are those of `launch/train.py --set`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from dsso.config import StrictModel, parse, problem
from dsso.recipe import read_json

SEED = "dsso.train.seed"
"""What `seeds` sets."""
_PLACED = ("dsso.output_dir", "dsso.comment")
"""What the sweep itself decides, and what makes no difference."""


class Distribution(StrictModel):
    """How a value is drawn; exactly one of the fields is given. Numbers are rounded to four digits."""

    uniform: tuple[float, float] | None = None
    """Lowest and highest number, every one between them as likely."""
    log_uniform: tuple[float, float] | None = None
    """Lowest and highest number above 0; their logarithm is drawn, so every power of ten is as likely."""
    int_uniform: tuple[int, int] | None = None
    """Lowest and highest integer, both included."""
    choice: list[Any] | None = Field(default=None, min_length=1)
    """Values of any kind, each as likely."""

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise problem(
                "exactly one way to draw a value must be given",
                got=", ".join(given) or "none",
                allowed=", ".join(type(self).model_fields),
            )
        if given[0] == "choice":
            return self
        low, high = getattr(self, given[0])
        least = 0.0 if given[0] == "log_uniform" else float("-inf")
        if not least < low < high:
            raise problem(
                f"{given[0]} takes a lower and a higher bound" + (", both above 0" if least == 0.0 else ""),
                got=[low, high],
            )
        return self


class RandomSpace(StrictModel):
    """Settings that are drawn."""

    samples: int = Field(ge=1, le=10_000)
    """How many settings are drawn."""
    seed: int = Field(default=0, ge=0)
    """Of the draws. A value depends on this seed, the number of the sample and its own path, on nothing else: more
    samples, or another path, leave the others as they are."""
    space: dict[str, Distribution] = Field(min_length=1)
    """How the value of each path is drawn."""


class Diverged(StrictModel):
    """When a run is stopped, and recorded as diverged: at a logged loss that is not finite, or too high."""

    factor: float | None = Field(default=3.0, gt=1.0)
    """A loss above so many times the first logged one is too high; null: there is no such bound."""
    loss: float | None = None
    """A loss above this is too high; null: there is no such bound."""
    after: int = Field(default=20, ge=0)
    """Steps at the start in which no loss counts."""
    in_a_row: int = Field(default=1, ge=1)
    """So many logged losses, one behind the other, must be too high."""


class SweepFile(StrictModel):
    """A base recipe and what is changed in it, run by run."""

    comment: str | None = None
    """What the sweep is for."""
    recipe: str = Field(min_length=1)
    """The recipe that everything is changed in; a path relative to the sweep file."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Values by path that are the same in all runs; null removes a key."""
    grid: dict[str, list[Any]] = Field(default_factory=dict)
    """Lists of values by path; every combination is a setting."""
    random: RandomSpace | None = None
    """Settings that are drawn; beside a grid, every sample is run at every point of the grid."""
    seeds: list[int] | None = Field(default=None, min_length=1)
    """Values of `dsso.train.seed`, and of `optimizer.params.seed` with methods from forward passes; every setting is
    run with each of them. null: the recipe's own, once."""
    diverged: Diverged | None = Diverged()
    """When a run is stopped as diverged; null: never."""

    @property
    def variables(self) -> list[str]:
        """Paths that differ between settings, the grid's first."""
        return [*self.grid, *(self.random.space if self.random else ())]

    @model_validator(mode="after")
    def _something_varies(self) -> Self:
        for path, values in self.grid.items():
            if not values:
                raise problem(
                    f"the grid of {path} is empty", got=[], remedy="list its values, or remove the path"
                )
        if not self.variables and self.seeds is None:
            raise problem(
                "there is nothing to vary: the grid is empty, nothing is drawn, and there are no seeds",
                remedy='write "grid": {"optimizer.params.lr": [0.01, 0.1]}',
            )
        for seed in self.seeds or ():
            if not 0 <= seed < 2**32:
                raise problem("a seed is out of range", got=seed, allowed="0 to 4294967295")
        return self

    @model_validator(mode="after")
    def _every_path_once(self) -> Self:
        for path in (*self.set, *self.variables):
            if not re.fullmatch(r"[^\s=.]+(\.[^\s=.]+)*", path):
                raise problem("is no path of a recipe", got=path, allowed="path.to.key")
            if path in _PLACED:
                raise problem(f"{path} is not for a sweep to set", got=path, remedy="remove it")
        if SEED in self.variables or (SEED in self.set and self.seeds is not None):
            raise problem("seeds have a place of their own", got=SEED, remedy='write "seeds": [0, 1, 2]')
        for path, others in self._pairs():
            for other in others:
                if other == path or other.startswith(f"{path}."):
                    raise problem(
                        f"{path} and {other} set the same value"
                        if other != path
                        else f"{path} is set in two places",
                        got=path,
                        remedy="keep one of them",
                    )
        return self

    def _pairs(self) -> Iterator[tuple[str, list[str]]]:
        """Every variable with all other paths that are set before it or beside it."""
        variables = self.variables
        for index, path in enumerate(variables):
            yield path, [*variables[:index], *variables[index + 1 :], *self.set]


def read(path: Path) -> SweepFile:
    """Read and check a sweep file; its recipe is not read.

    Raises:
        RecipeError: it cannot be used.
    """
    return parse(SweepFile, read_json(path), "sweep")


def short_names(paths: Mapping[str, object] | list[str]) -> dict[str, str]:
    """The shortest ends of paths that tell them apart, e.g. `lr` and `base.lr`."""
    ends = {path: path.split(".") for path in paths}

    def end(path: str, depth: int) -> str:
        return ".".join(ends[path][-depth:])

    found = {}
    for path, parts in ends.items():
        depth = next(
            (
                depth
                for depth in range(1, len(parts))
                if all(end(other, depth) != end(path, depth) for other in ends if other != path)
            ),
            len(parts),
        )
        found[path] = end(path, depth)
    return found
