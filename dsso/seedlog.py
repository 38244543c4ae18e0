"""The seed log: what a run of a method from forward passes remembers, so that any of its weights can be made again.

Directions follow from seeds, so a step is a few numbers. `seed_log.jsonl` has a line a step, written by rank 0 before
the next step begins:

    {"step": 12, "seed": 0, "lr": 1e-06, "measures": [[0.31]]}       a step; `measures` as the method calls them
    {"step": 13, "skipped": true, …}                                 a step that left the weights alone
    {"step": 0, "start": {…}}                                        a start: of the run, or where it was gone on with

`step` counts steps that have been taken, as in `metrics.jsonl`; `digest`, now and then, is that of the weights after
it.
The numbers are written so that they come back exactly.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsso.errors import RunError

FILE = "seed_log.jsonl"


@dataclass(frozen=True)
class Start:
    """Where a run began, or went on.

    Attributes:
        step: steps taken before.
        method: `optimizer.type`, lower case.
        params: its parameters, JSON.
        parameters: number of elements of each trained parameter.
        left: trained parameters that are not moved.
        digest: of the weights at that point.
        dtype: of the model.
    """

    step: int
    method: str
    params: dict[str, Any]
    parameters: dict[str, int]
    left: tuple[str, ...]
    digest: str
    dtype: str

    def line(self) -> dict[str, Any]:
        """As a line of the log."""
        told = {k: v for k, v in vars(self).items() if k != "step"} | {"left": list(self.left)}
        return {"step": self.step, "start": told}


@dataclass(frozen=True)
class SeedLog:
    """What a file holds.

    Attributes:
        path: of it.
        starts: in order.
        records: the steps, in order; each number once, without gaps from the last gap on.
        torn: its last line was cut short, and is left out.
    """

    path: Path
    starts: tuple[Start, ...]
    records: tuple[Mapping[str, Any], ...]
    torn: bool = False

    @property
    def first(self) -> int:
        """Steps taken before the first record."""
        return int(self.records[0]["step"]) - 1 if self.records else self.last

    @property
    def last(self) -> int:
        """Steps taken with the last record."""
        if self.records:
            return int(self.records[-1]["step"])
        return self.starts[-1].step if self.starts else 0

    def between(self, step: int, end: int) -> list[tuple[Start, Mapping[str, Any]]]:
        """Records of the steps after `step` up to `end`, each with the start that it belongs to.

        Raises:
            RunError: some of them are not in the log.
        """
        found = [record for record in self.records if step < record["step"] <= end]
        if len(found) != end - step:
            raise RunError(
                f"the log has steps {self.first + 1} to {self.last}, and steps {step + 1} to {end} are needed",
                where=str(self.path),
                remedy="go back to a checkpoint at or after the first of them, or ask for a step in between",
            )
        out = []
        for record in found:
            start = [one for one in self.starts if one.step < record["step"]][-1]
            out.append((start, record))
        return out


def _start(found: Mapping[str, Any]) -> Start:
    """A start from its line.

    Raises:
        KeyError, TypeError: it is not one.
    """
    told = found["start"]
    start = Start(found["step"], **{**told, "left": tuple(told["left"])})
    kinds = {"step": int, "method": str, "params": dict, "parameters": dict, "digest": str, "dtype": str}
    wrong = [name for name, kind in kinds.items() if type(getattr(start, name)) is not kind]
    if wrong:
        raise TypeError(wrong[0])
    return start


def read(path: Path) -> SeedLog:
    """Read a log.

    Args:
        path: the file.

    Raises:
        RunError: it is not there, or a line other than the last is not one of a log.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RunError(f"there is no seed log ({error.strerror})", where=str(path)) from None
    lines = content.splitlines(keepends=True)
    starts: list[Start] = []
    records: list[Mapping[str, Any]] = []
    torn = False
    for number, line in enumerate(lines, 1):
        try:
            found: Any = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            found = None
        if found is None and number == len(lines):
            torn = True  # the run ended while it was written
            continue
        try:
            if "start" in found:
                starts.append(_start(found))
                continue
            numbers = type(found["step"]) is int and type(found["lr"]) in (int, float)
            if not starts or not numbers or not isinstance(found["measures"], list):
                raise KeyError("step")
        except (KeyError, TypeError):
            raise RunError(
                "this line is not one of a seed log",
                where=f"{path}, line {number}",
                remedy="the file has been changed or cut; steps after this line cannot be made again from it",
            ) from None
        if records and found["step"] != records[-1]["step"] + 1:
            records = []  # lines are missing: what came before leads nowhere
        records.append(found)
    return SeedLog(path, tuple(starts), tuple(records), torn)
