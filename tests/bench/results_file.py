"""Results files: a line of JSON a finished run, appended as it ends, so that a script can be stopped at any time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    """Finished lines; one that was cut short by an interruption is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a finished run."""
    # the newline first: a line that was cut short must not swallow this one
    cut = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a", encoding="utf-8") as file:
        file.write(("\n" if cut else "") + json.dumps(line) + "\n")


def finite(value: float) -> float | None:
    """The value to six digits, None where it is no finite number: JSON has no others."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
