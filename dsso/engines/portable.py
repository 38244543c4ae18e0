"""The checkpoint that every engine writes and every other one reads, at any number of ranks.

```
<tag>/dsso/
  engine.json                        by rank 0: who wrote it, the parameters, counters of the engine, client state
  partition_rankNNNNN.safetensors    pieces of fp32 weights and moments, by parameter and first element
  buffers_rankNNNNN.safetensors      the model's own buffers, where it has any that a checkpoint keeps
  method_rankNNNNN.safetensors       the method's state, by the names of its blocks
  counters_rankNNNNN.json            host-side state of optimizer and method
```
Weights are kept once, in the precision that is stepped; a working copy in bf16 or fp16 is made from them on
loading. Frozen weights are left out: they come from the model's source.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dsso.errors import OtherRankError, RunError
from dsso.files import save_file
from dsso.optim._partition import merge_extra_states
from dsso.parallel import collectives
from dsso.parallel.pieces import PieceFiles, piece_key, written_by

if TYPE_CHECKING:
    from dsso.engines.base import EngineBase

DIRECTORY = "dsso"
"""Folder of a checkpoint that holds all of it."""
DESCRIPTION = "engine.json"
FORMAT = 1


def write(engine: EngineBase, directory: Path, client_state: Mapping[str, Any]) -> None:
    """Write one checkpoint; collective.

    Args:
        engine: what is written.
        directory: `save_dir/tag`.
        client_state: JSON.

    Raises:
        RunError: on every rank, when one of them could not write.
    """
    _together(lambda: _write(engine, directory / DIRECTORY, client_state))


def _write(engine: EngineBase, folder: Path, client_state: Mapping[str, Any]) -> None:
    if engine.pending:
        raise RunError(
            f"{engine.pending} micro-batch(es) wait for the step of their window",
            where="save_checkpoint",
            remedy="save right after a step",
        )
    folder.mkdir(parents=True, exist_ok=True)
    optimizer, method, me = engine.optimizer, engine.optimizer.method, f"rank{engine.rank:05d}"
    pieces = {
        piece_key(kind, span.name, span.start): view
        for kind, span, view in optimizer.views(written_by(optimizer.table, engine.rank))
    }
    save_file(_on_host(pieces), folder / f"partition_{me}.safetensors")
    buffers = _persistent_buffers(engine)
    if buffers:
        save_file(_on_host(buffers), folder / f"buffers_{me}.safetensors")
    state = {} if method is None else method.state_tensors()
    save_file(_on_host(state), folder / f"method_{me}.safetensors")
    (folder / f"counters_{me}.json").write_text(json.dumps(optimizer.extra_state()), encoding="utf-8")
    if engine.rank == 0:
        text = json.dumps(_description(engine, client_state), indent=1) + "\n"
        (folder / DESCRIPTION).write_text(text, encoding="utf-8")


def _description(engine: EngineBase, client_state: Mapping[str, Any]) -> dict[str, Any]:
    scheduler = getattr(engine, "scheduler", None)
    return {
        "format": FORMAT,
        "engine": engine.name,
        "stage": engine.stage,
        "world_size": engine.world_size,
        "dtype": engine.dtype,
        "method": engine.optimizer.method_name,
        "global_steps": engine.global_steps,
        "lr": engine.lr(),
        "recipe_lr": engine.optimizer.defaults["lr"],
        "scheduler": None if scheduler is None else scheduler.state_dict(),
        "engine_state": engine.engine_state(),
        "client_state": _json(client_state),
        "parameters": _parameters(engine),
    }


def _parameters(engine: EngineBase) -> dict[str, dict[str, Any]]:
    """What has to be the same for the pieces to fit."""
    rules = engine.optimizer.rules
    return {
        name: {"shape": list(shape), "rule": rules[name].name, "moments": list(rules[name].moments)}
        for name, shape in engine.shapes.items()
    }


def _json(client_state: Mapping[str, Any]) -> dict[str, Any]:
    """The client state, unless it would come back as something else."""
    plain = dict(client_state)
    try:
        text = json.dumps(plain, allow_nan=False)
        same = json.loads(text) == plain
    except (TypeError, ValueError) as error:
        raise RunError(f"client_state is not JSON ({error})", where="save_checkpoint") from None
    if not same:
        raise RunError(
            "client_state would come back changed",
            where="save_checkpoint",
            allowed="dicts with strings as keys, lists (no tuples), strings, finite numbers, booleans, None",
        )
    return plain


def _persistent_buffers(engine: EngineBase) -> dict[str, Tensor]:
    """Buffers that a state dict of the model holds (running means, say; positions as a rule are not)."""
    module = engine.module
    hidden = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in part._non_persistent_buffers_set
    }
    return {name: buffer for name, buffer in module.named_buffers() if name not in hidden}


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Copies in any case: safetensors refuses tensors that share their memory.
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def describe(directory: Path) -> dict[str, Any]:
    """`engine.json` of a checkpoint.

    Args:
        directory: `save_dir/tag`.

    Raises:
        RunError: there is none, or one that this version cannot read.
    """
    path = directory / DIRECTORY / DESCRIPTION
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"the checkpoint has no {DIRECTORY}/{DESCRIPTION}",
            where=str(directory),
            remedy="it was written by something else, or by a version that had other files: go on with that one",
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"cannot be read ({error})", where=str(path)) from None
    if found.get("format") != FORMAT:
        raise RunError(
            "the format of the checkpoint is not known to this version",
            where=str(path),
            got=found.get("format"),
            allowed=str(FORMAT),
        )
    return found


def read(engine: EngineBase, directory: Path) -> dict[str, Any]:
    """Take over a checkpoint; collective.

    Args:
        engine: built from the same recipe, or from one with other ranks, ZeRO stage, engine or precision.
        directory: `save_dir/tag`.

    Returns:
        The client state.

    Raises:
        RunError: on every rank, when one of them finds that it does not fit.
    """
    found = describe(directory)
    _compare(engine, found, directory)
    _together(lambda: _read(engine, directory / DIRECTORY, found))
    engine.publish_weights()
    engine.global_steps = int(found["global_steps"])
    engine.load_engine_state(found["engine_state"] if found["engine"] == engine.name else {})
    _schedule(engine, found)
    client: dict[str, Any] = found["client_state"]
    return client


def _compare(engine: EngineBase, found: Mapping[str, Any], directory: Path) -> None:
    """Refuse, on all ranks alike, what was written by another model or optimizer."""

    def refuse(what: str, got: object, allowed: object, remedy: str) -> RunError:
        where = f"{directory / DIRECTORY / DESCRIPTION}"
        return RunError(
            what, where=where, got=got, allowed=None if allowed is None else str(allowed), remedy=remedy
        )

    method = engine.optimizer.method_name
    if found["method"] != method:
        raise refuse("written with another optimizer", method, found["method"], "resume with that optimizer")
    mine, theirs = _parameters(engine), found["parameters"]
    same_model = "resume with the same model and adapters"
    for name in [*mine, *(name for name in theirs if name not in mine)]:
        if name not in theirs:
            raise refuse(f"the checkpoint has no parameter {name}", None, None, same_model)
        if name not in mine:
            raise refuse(f"the model does not train the parameter {name}", None, None, same_model)
        if mine[name]["shape"] != theirs[name]["shape"]:
            what = f"parameter {name} has another shape"
            raise refuse(what, tuple(mine[name]["shape"]), tuple(theirs[name]["shape"]), same_model)
        if mine[name]["rule"] != theirs[name]["rule"]:
            what = f"parameter {name} has another base rule"
            raise refuse(
                what, mine[name]["rule"], theirs[name]["rule"], "resume with the same optimizer.params"
            )
        missing = [one for one in mine[name]["moments"] if one not in theirs[name]["moments"]]
        if missing:
            what = f"the checkpoint has no {missing[0]} of parameter {name}"
            raise refuse(what, None, None, "resume with the momentum that it was written with (0)")
    if (found["scheduler"] is None) != (getattr(engine, "scheduler", None) is None):
        state = {True: "no schedule", False: "a schedule"}
        was = found["scheduler"] is None
        raise refuse(
            "the learning rate had another kind of course",
            state[not was],
            state[was],
            "keep the scheduler section",
        )


def _read(engine: EngineBase, folder: Path, found: Mapping[str, Any]) -> None:
    """Fill this rank's tensors; touches nothing but them."""
    optimizer = engine.optimizer
    with torch.no_grad(), PieceFiles(sorted(folder.glob("partition_rank*.safetensors"))) as files:
        for kind, span, view in optimizer.views(optimizer.table.ranks[engine.rank]):
            files.read_into(kind, span.name, span.start, view)
    _read_buffers(engine, folder, int(found["world_size"]))
    if optimizer.method is not None:
        tensors: dict[str, Tensor] = {}
        for file in sorted(folder.glob("method_rank*.safetensors")):
            with safe_open(file, framework="pt", device="cpu") as archive:
                names: list[str] = archive.keys()
                tensors |= {n: archive.get_tensor(n) for n in names if optimizer.method.wants(n)}
        optimizer.method.load_state_tensors(tensors)
    counters = sorted(folder.glob("counters_rank*.json"))
    if len(counters) != found["world_size"]:
        raise RunError(
            f"{len(counters)} files counters_rank*.json", where=str(folder), allowed=str(found["world_size"])
        )
    states = [json.loads(path.read_text(encoding="utf-8")) for path in counters]
    optimizer.load_extra_state(merge_extra_states(states))


def _read_buffers(engine: EngineBase, folder: Path, world_size: int) -> None:
    """Each rank its own where there are as many as before, else those of rank 0."""
    mine = _persistent_buffers(engine)
    if not mine:
        return
    source = engine.rank if world_size == engine.world_size else 0
    found = load_file(folder / f"buffers_rank{source:05d}.safetensors")
    for name, buffer in mine.items():
        if name not in found or found[name].shape != buffer.shape:
            raise RunError(f"the checkpoint has no buffer {name} of this shape", where=str(folder))
        buffer.copy_(found[name])


def _schedule(engine: EngineBase, found: Mapping[str, Any]) -> None:
    """Put the learning rate where it was; a constant one that the recipe has changed since stays as it is now."""
    optimizer, scheduler = engine.optimizer, getattr(engine, "scheduler", None)
    if scheduler is not None:
        scheduler.load_state_dict(found["scheduler"])
    elif found["recipe_lr"] != optimizer.defaults["lr"]:
        return
    for group in optimizer.param_groups:
        group["lr"] = found["lr"]


def _together(action: Callable[[], None]) -> None:
    """Run `action` on every rank; an error on one is raised on all, so that none waits for it."""
    problem: Exception | None = None
    try:
        action()
    except Exception as error:
        problem = error
    told = collectives.gather_objects(None if problem is None else f"{type(problem).__name__}: {problem}")
    if problem is not None:
        raise problem
    for who, words in enumerate(told):
        if words is not None:
            raise OtherRankError(f"rank {who}: {words}")
