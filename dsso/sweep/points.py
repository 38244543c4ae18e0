"""The runs of a sweep: every combination of grid, draws and seeds, each with a name and a whole recipe.

A point's name follows from its values, `lr=0.05,tau=1,seed=0`, so it is the same whatever else the sweep file holds.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsso.errors import RecipeError
from dsso.recipe import Recipe, load_recipe, read_json
from dsso.sweep.format import SEED, Distribution, RandomSpace, SweepFile, short_names

MOST = 10_000
"""Points of a sweep; more are taken for a mistake."""
_TOLD = 5


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    index: int
    """Its number, from 0: the task of a Slurm array."""
    name: str
    """Name of its directory."""
    values: dict[str, Any]
    """Values of the variables by path; those of a setting, the same for all its seeds."""
    seed: int | None
    """`dsso.train.seed`; None: the recipe's."""
    recipe: dict[str, Any]
    """The whole recipe as written, everything set."""


def points(sweep: SweepFile, path: Path, more: Sequence[str] = (), ranks: int | None = 1) -> list[Point]:
    """All points, checked as far as a recipe can be without model and data.

    Seeds change slowest: a sweep that is not run to its end has every setting once before it has one twice.

    Args:
        sweep: the sweep file.
        path: where it was read from; its recipe's path is relative to that.
        more: `path.to.key=value`, set in all points.
        ranks: number of ranks of a run; None leaves out what depends on it.

    Raises:
        RecipeError: a recipe cannot be used, there are too many points, or two of them are the same.
    """
    base = read_json(path.parent / sweep.recipe)
    for override in more:
        given = override.partition("=")[0].strip()
        if given in {*sweep.variables, *([SEED] if sweep.seeds else [])}:
            raise RecipeError("is varied by the sweep", where="--set", got=override, remedy="leave it out")
    count = len(sweep.seeds or [0]) * (sweep.random.samples if sweep.random else 1)
    count *= math.prod(map(len, sweep.grid.values()))
    if count > MOST:
        raise RecipeError("has too many points", where="sweep", got=count, allowed=f"at most {MOST}")
    fixed = [*(_override(one, value) for one, value in sweep.set.items()), *more]
    names = short_names(sweep.variables)
    found: list[Point] = []
    problems: dict[str, list[str]] = {}
    twins: dict[str, str] = {}
    for index, (seed, values) in enumerate(_combinations(sweep)):
        name = _name(names, values, seed)
        overrides = [*fixed, *(_override(one, value) for one, value in values.items())]
        try:
            recipe = _seeded(base, overrides, seed)
            same = recipe.raw if ranks is None else recipe.resolved(ranks).to_json()
        except RecipeError as error:
            problems.setdefault(str(error), []).append(name)
            continue
        text = json.dumps(same, sort_keys=True)
        # The name tells equal numbers that are written differently, which recipes as written do not.
        twin = twins.get(text) or twins.get(name)
        if twin is not None:
            raise RecipeError(
                "two points are the same run",
                where="sweep",
                got=f"{twin} and {name}",
                remedy="remove a value that is there twice"
                if sweep.random is None
                else "draw fewer samples, or list the values in a grid",
            )
        twins[text] = twins[name] = name
        found.append(Point(index, name, values, seed, recipe.raw))
    if problems:
        raise _refusal(problems, len(found))
    return found


def _refusal(problems: Mapping[str, Sequence[str]], good: int) -> RecipeError:
    """What is wrong with points, each message once."""
    bad = sum(map(len, problems.values()))
    told = [f"{bad} of {bad + good} points cannot be used"]
    for message, names in list(problems.items())[:_TOLD]:
        more = f" and {len(names) - 1} others" if len(names) > 1 else ""
        told.append(f"{names[0]}{more}: {message}")
    if len(problems) > _TOLD:
        told.append(f"{len(problems) - _TOLD} other messages are left out")
    return RecipeError("\n  ".join(told), where="sweep")


def _seeded(base: Mapping[str, Any], overrides: Sequence[str], seed: int | None) -> Recipe:
    """The recipe of a point: the seed is that of the run, and of the directions of a method that has any."""
    if seed is None:
        return load_recipe(base, overrides)
    recipe = load_recipe(base, [*overrides, f"{SEED}={seed}"])
    own = "optimizer.params.seed"
    if "seed" not in type(recipe.optimizer_config).model_fields or any(
        one.startswith(f"{own}=") for one in overrides
    ):
        return recipe
    return load_recipe(base, [*overrides, f"{SEED}={seed}", f"{own}={seed}"])


def _combinations(sweep: SweepFile) -> Iterator[tuple[int | None, dict[str, Any]]]:
    """Seeds and values of the variables, in the order of the points."""
    draws = [{}] if sweep.random is None else [draw(sweep.random, i) for i in range(sweep.random.samples)]
    seeds: Sequence[int | None] = sweep.seeds or [None]
    for seed, drawn, values in itertools.product(seeds, draws, itertools.product(*sweep.grid.values())):
        yield seed, {**dict(zip(sweep.grid, values, strict=True)), **drawn}


def draw(space: RandomSpace, index: int) -> dict[str, Any]:
    """The values of one sample: a function of the space's seed, the sample's number and each path.

    Args:
        space: what to draw from.
        index: number of the sample, from 0.
    """
    # Seeds that are text go through SHA-512: the same draws on every machine and version of Python.
    return {
        path: _drawn(distribution, random.Random(f"{space.seed}/{index}/{path}"))
        for path, distribution in space.space.items()
    }


def _drawn(distribution: Distribution, source: random.Random) -> Any:
    if distribution.choice is not None:
        return distribution.choice[int(source.random() * len(distribution.choice))]
    if distribution.int_uniform is not None:
        first, last = distribution.int_uniform
        return first + int(source.random() * (last - first + 1))
    if distribution.log_uniform is not None:
        low, high = distribution.log_uniform
        value = math.exp(math.log(low) + source.random() * (math.log(high) - math.log(low)))
    else:
        assert distribution.uniform is not None
        low, high = distribution.uniform
        value = low + source.random() * (high - low)
    return min(max(float(f"{value:.4g}"), low), high)


def _override(path: str, value: object) -> str:
    return f"{path}={json.dumps(value)}"


def _name(names: Mapping[str, str], values: Mapping[str, Any], seed: int | None) -> str:
    """A directory's name that tells the values, and a digest of them where the text alone may not tell them apart."""
    parts, whole = [], True
    for path, value in values.items():
        number = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
        text = json.dumps(int(value) if number else value)
        if isinstance(value, str) and re.fullmatch(r"[A-Za-z]\w*", value) and not _is_json(value):
            text = value
        safe = re.sub(r"[^A-Za-z0-9.+_-]+", "_", text).strip("_")[:32]
        whole = whole and safe == text
        parts.append(f"{names[path]}={safe}")
    name = ",".join(parts)
    if not whole or len(name) > 160:
        digest = hashlib.sha256(json.dumps(dict(values), sort_keys=True).encode()).hexdigest()[:8]
        name = f"{name[:160]}~{digest}"
    return ",".join(part for part in (name, None if seed is None else f"seed={seed}") if part)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True
