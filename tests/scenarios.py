"""Checks that need several ranks: scenarios that run one after another in one process group.

A script calls `report` for each of them on every rank; a test module runs the script once with `run` and looks at what
it found with `check`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
Found = list[dict[str, Any]]


def report(
    out: Path, scenario: Callable[..., list[str]], arguments: tuple[Any, ...], **settings: Any
) -> None:
    """Run one scenario on this rank; rank 0 writes a JSON line with what went wrong on any rank (nothing is good)."""
    from dsso.engines import launch_environment
    from dsso.parallel.collectives import gather_objects

    try:
        problems = scenario(*arguments, **settings)
    except Exception:
        problems = [traceback.format_exc()]
    every = [problem for found in gather_objects(problems) for problem in found]
    if launch_environment().rank == 0:
        with out.open("a") as file:
            name = f"{scenario.__name__}{arguments}{settings or ''}"
            file.write(json.dumps({"name": name, "problems": every}) + "\n")


def run(script: Path, out: Path, ranks: int, timeout: float, more: Sequence[str] = ()) -> Found:
    """Run a script on that many ranks, with `out` and `more` as its arguments; the lines that it wrote to `out`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(script), str(out), *more],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, (out.read_text() if out.exists() else "") + done.stderr[-4000:]
    return [json.loads(line) for line in out.read_text().splitlines()]


def check(scenario: str, expected: Mapping[str, int], lines: Found) -> None:
    """All cases of a scenario were run, and nothing was wrong."""
    mine = [line for line in lines if str(line["name"]).startswith(f"{scenario}(")]
    assert len(mine) == expected[scenario]
    wrong = [line for line in mine if line["problems"]]
    assert not wrong, "\n".join(f"{line['name']}: {line['problems']}" for line in wrong)
