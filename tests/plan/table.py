"""The table of docs/benchmarks/plan.md: `python -m tests.plan.table`."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from dsso.plan import Plan
from tests.plan.cases import planned
from tests.plan.test_architectures import ARCHITECTURES, large

ROWS: list[tuple[str, bool, dict[str, Any]]] = [
    ("t5-3b", True, {}),
    ("t5-3b", True, {"low_rank": 64}),
    ("t5-3b", True, {"low_rank": 32}),
    ("t5-3b", False, {"block_side": 4096}),
    ("t5-3b", False, {"block_side": 2048}),
    ("t5-3b", False, {"block_side": 1024}),
    *((name, peft, {}) for name in ARCHITECTURES if name != "t5-3b" for peft in (True, False)),
]


def _gb(count: float) -> str:
    return f"{count / 1e9:.2f}" if count >= 1e7 else f"{count / 1e9:.3f}"


def main() -> None:
    """Print one line a plan, for 8 ranks of 80 GB."""
    print(
        "| model | trained | K-FAC | K-FAC a rank | statistics, sent / kept | peak, sent / kept | 80 GB | seconds |"
    )
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, peft, params in ROWS:
            begun = time.monotonic()
            found = planned(large(Path(folder), name, peft, **params), 8, 80.0)
            seconds = time.monotonic() - begun
            whole = planned(large(Path(folder), name, peft, overlap=False, **params), 8)
            kind = ", ".join(f"{key} {value}" for key, value in params.items()) or "defaults"
            fits = "fits" if found.fits else _change(found)
            most = max(rank.factors for rank in found.ranks)
            statistics = f"{_gb(found.worst.statistics)} / {_gb(whole.worst.statistics)}"
            print(
                f"| {name} | {'LoRA r=8, q and v' if peft else 'all'} | {kind} | {_gb(most)} | {statistics} |"
                f" {_gb(found.worst.peak)} / {_gb(whole.worst.peak)} | {fits} | {seconds:.0f} |",
                flush=True,
            )


def _change(found: Plan) -> str:
    good = next((one for one in found.remedies if one.fits), None)
    return "does not fit" if good is None else f"with {good.change}: {_gb(good.peak)}"


if __name__ == "__main__":
    main()
