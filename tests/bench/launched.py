"""Runs of `launch/train.py` for benchmarks of losses: started once, read back from their logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def lines(
    recipe: str, place: Path, settings: Sequence[str], threads: int = 1, allowed: str | None = None
) -> list[dict[str, Any]]:
    """What a run has logged; trains only if it has not ended before.

    Args:
        recipe: file name in `configs/`.
        place: output directory; what an unfinished run left there is overwritten.
        settings: `KEY=VALUE`, as for `--set`.
        threads: of the run's process.
        allowed: words of an error that is an outcome like any other.

    Raises:
        RuntimeError: the run failed.
    """
    if not (place / "summary.json").exists():
        command = [
            sys.executable,
            str(ROOT / "launch" / "train.py"),
            "--output_dir",
            str(place),
            "--overwrite",
        ]
        command += ["--ds_config", str(ROOT / "configs" / recipe)]
        for setting in settings:
            command += ["--set", setting]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        expected = allowed is not None and allowed in done.stderr + done.stdout
        if done.returncode and not expected:
            raise RuntimeError(f"{place.name}: status {done.returncode}\n{done.stderr[-3000:]}")
    written = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in written]
