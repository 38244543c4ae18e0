"""What is in a checkpoint, without the model: `python -m dsso.inspect PATH [--json] [--quick]`.

PATH is a run's output directory, its `checkpoints/`, or one checkpoint. Exit status: 0, 2 where no checkpoint is at
the path, 1 where there is one that cannot be used.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from dsso import checkpoint
from dsso.checkpoint import Checkpoint, Skipped
from dsso.diagnostics import jsonable
from dsso.engines.portable import DESCRIPTION, DIRECTORY, describe
from dsso.errors import DssoError, RecipeError, RunError
from dsso.optim import _block_figures
from dsso.optim._figures import factor_keys, figures
from dsso.optim._partition import merge_extra_states

LARGEST_SIDE = 2048
"""Eigenvalues of larger factors are left out unless `--all`: they take minutes."""


def inspect(
    path: Path, quick: bool = False, largest_side: int = LARGEST_SIDE, against: Path | None = None
) -> dict[str, Any]:
    """What is in a checkpoint.

    Args:
        path: a run, a directory of checkpoints (the newest is taken), or one checkpoint.
        quick: compare no contents with their hashes and compute no eigenvalues.
        largest_side: eigenvalues of factors up to this side are computed.
        against: another checkpoint of the same model, whose curvature the misfits are measured with.

    Returns:
        The description (step, ranks, engine, sizes …), `factors`, a dict for each Kronecker factor or side of a block,
        and `skipped`, what cannot be used.

    Raises:
        RecipeError: no checkpoint is there, or `against` has no curvature of any factor of it.
        RunError: it is damaged.
    """
    directory, skipped = _choose(path, quick)
    found = describe(directory)
    folder = directory / DIRECTORY
    other = None if against is None else _places(_choose(against, quick, "--against")[0] / DIRECTORY)
    try:
        counters = [
            json.loads(file.read_text(encoding="utf-8"))
            for file in sorted(folder.glob("counters_rank*.json"))
        ]
        state = merge_extra_states(counters)
        factors = _factors(folder, state, 0 if quick else largest_side, other)
    except Exception as error:
        raise RunError(f"cannot be read ({type(error).__name__}: {error})", where=str(folder)) from error
    if against is not None and not quick and all(one["misfit"] is None for one in factors):
        raise RecipeError(
            "it has no curvature of the same factors or blocks",
            where="--against",
            got=str(against),
            remedy="give a checkpoint of the same model and the same blocks, for PSGD one of Shampoo or SOAP",
        )
    parameters = found["parameters"]
    sizes: dict[str, int] = {}
    for file in sorted(one for one in directory.rglob("*") if one.is_file()):
        kind = file.name.partition("_rank")[0] if file.parent == folder else "other"
        sizes[kind] = sizes.get(kind, 0) + file.stat().st_size
    return {
        "path": str(directory),
        "skipped": skipped,
        **{key: found[key] for key in ("engine", "stage", "world_size", "dtype", "method", "lr")},
        "steps": found["global_steps"],
        "skipped_steps": state["skipped"],
        "parameters": len(parameters),
        "elements": sum(_product(one["shape"]) for one in parameters.values()),
        "bytes": {**sizes, "total": sum(sizes.values())},
        "factors": factors,
    }


def _choose(path: Path, quick: bool, where: str = "PATH") -> tuple[Path, list[str]]:
    """The checkpoint that a path means, and what was passed over."""
    sealed = (path / checkpoint.MANIFEST).exists() or path.name.startswith("step_")
    if (path / DIRECTORY / DESCRIPTION).is_file() and not sealed:
        return path, []  # written by a loop of its own: nothing to compare it with
    place = checkpoint.locate(path, where)
    good: list[Checkpoint] = []
    bad: list[Skipped] = []
    if place.name.startswith("step_") or (place / checkpoint.MANIFEST).exists():
        try:
            good = [checkpoint.read(place)]
        except ValueError as error:
            bad = [Skipped(place, str(error))]
    else:
        good, bad = checkpoint.find(place)
    told = [f"{one.path.name}: {one.reason}" for one in bad]
    for one in good:
        changed = None if quick else checkpoint.changed_file(one)
        if changed is None:
            return one.path, told
        told.append(f"{one.path.name}: the content of {changed} is not what was written")
    if told:
        raise RunError(f"no checkpoint can be used: {'; '.join(told)}", where=str(place))
    raise RecipeError("no checkpoint is there", where=where, got=str(path))


def _product(shape: Sequence[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def _places(folder: Path) -> dict[str, Path]:
    """Files of a checkpoint with the tensors of its method, by their names."""
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("method_rank*.safetensors")):
        with safe_open(file, framework="pt", device="cpu") as archive:
            found |= dict.fromkeys(archive.keys(), file)
    return found


def _measured(key: str, places: Mapping[str, Path] | None) -> dict[str, Tensor] | None:
    """What another checkpoint has under that name, and of names below it; None where there is no other."""
    if places is None:
        return None
    found: dict[str, Tensor] = {}
    for name, file in places.items():
        if name == key or name.startswith(f"{key}/"):
            with safe_open(file, framework="pt", device="cpu") as archive:
                found[name] = archive.get_tensor(name)
    return found


def _factors(
    folder: Path, state: dict[str, Any], largest_side: int, other: Mapping[str, Path] | None
) -> list[dict[str, Any]]:
    """One dict a Kronecker factor or side of a block, in the order of their names."""
    owned = {} if state["method"] is None else state["method"]["owned"]
    out = []
    files = sorted(folder.glob("method_rank*.safetensors"))
    for owner, file in enumerate(files):
        with safe_open(file, framework="pt", device="cpu") as archive:
            names = dict.fromkeys(archive.keys())
            holders = {key: key for key in factor_keys(names)} | _block_figures.side_keys(names)
            # eigenvalues take minutes where factors are wide; disable=None shows a bar on a terminal only
            title = f"rank {owner + 1} of {len(files)}"
            for key, holder in tqdm(holders.items(), desc=title, unit="factor", leave=False, disable=None):
                # one at a time: all of them may be larger than the memory
                told = owned.get(holder, {})
                if holder == key:
                    mine = {n: archive.get_tensor(n) for n in names if n.startswith(f"{key}/")}
                    found = figures(key, mine, largest_side, _measured(key, other))
                else:
                    mine = {n: archive.get_tensor(n) for n in _block_figures.names_of(key, names)}
                    measured = _measured(_block_figures.moment_of(key), other)
                    usable = bool(told.get("usable"))
                    found = _block_figures.figures(key, mine, usable, largest_side, measured)
                refreshed = told.get("refreshed_at")
                out.append(
                    {
                        "factor": key,
                        "owner": owner,
                        **asdict(found),
                        "age": None if refreshed is None else state["steps"] - 1 - refreshed,
                        "failed": bool(told.get("failed")),
                        "attempt": int(told.get("attempt", 0)),
                        "pending": len(told.get("pending", [])),
                        "bytes": sum(t.numel() * t.element_size() for t in mine.values()),
                    }
                )
    return sorted(out, key=lambda factor: str(factor["factor"]))


def words(found: dict[str, Any]) -> str:
    """The same as a text."""
    place = f"{found['world_size']} rank(s), {found['engine']}"
    place += "" if found["stage"] is None else f", ZeRO {found['stage']}"
    sizes = ", ".join(f"{name} {_size(count)}" for name, count in found["bytes"].items())
    lines = [
        found["path"],
        f"  step {found['steps']} ({found['skipped_steps']} skipped), lr {found['lr']:.3e}, {found['dtype']}",
        f"  written by {place}; optimizer {found['method'] or 'of the base rules'}",
        f"  {found['parameters']} trained parameters with {found['elements']} elements",
        f"  {sizes}",
    ]
    lines += [f"  passed over: {one}" for one in found["skipped"]]
    if found["factors"]:
        head = ("factor", "kind", "sides", "owner", "age", "rank", "mean", "condition", "misfit", "remarks")
        rows = [head, *(_row(factor) for factor in found["factors"])]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines.append("")
        lines += ["  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in rows]
    return "\n".join(lines)


def _kind(factor: dict[str, Any]) -> str:
    kind, kept, used = str(factor["kind"]), factor["kept"], factor["used"]
    if kept is None:
        return kind
    return f"{kind} {kept}" if used in (None, kept) else f"{kind} {kept}, {used} in use"


def _row(factor: dict[str, Any]) -> tuple[str, ...]:
    remarks = ["failed"] * factor["failed"] + [f"{factor['pending']} under way"] * bool(factor["pending"])
    if factor["attempt"]:
        remarks.append(f"attempt {factor['attempt']}")
    if not factor["ready"]:
        remarks.append("no factorization yet")
    sides = factor["sides"]
    same = len(set(sides)) == 1 and len(sides) > 1
    rank = "-" if factor["rank"] is None else str(factor["rank"])
    return (
        factor["factor"],
        _kind(factor),
        f"{len(sides)}x{sides[0]}" if same else "+".join(map(str, sides)),
        str(factor["owner"]),
        "-" if factor["age"] is None else str(factor["age"]),
        rank,
        f"{factor['mean']:.2e}",
        "-" if factor["condition"] is None else f"{factor['condition']:.2e}",
        "-" if factor["misfit"] is None else f"{factor['misfit']:.3f}",
        ", ".join(remarks),
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what is in a checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser("python -m dsso.inspect", description="Say what is in a checkpoint.")
    parser.add_argument("path", type=Path, help="a run, its checkpoints/, or one checkpoint")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument(
        "--quick", action="store_true", help="compare no contents with their hashes, compute no eigenvalues"
    )
    parser.add_argument(
        "--all", action="store_true", help=f"eigenvalues of factors beyond a side of {LARGEST_SIDE} as well"
    )
    parser.add_argument(
        "--against", type=Path, help="measure misfits with the curvature of this run or checkpoint"
    )
    given = parser.parse_args(arguments)
    try:
        found = inspect(given.path, given.quick, 2**62 if given.all else LARGEST_SIDE, given.against)
    except DssoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    print(json.dumps(jsonable(found), indent=1) if given.json else words(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
