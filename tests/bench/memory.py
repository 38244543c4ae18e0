"""What every method costs T5-3B by plan: bytes a rank, on the wire, and operations; 8 ranks, ZeRO-2 in bf16.

    python tests/bench/memory.py                 # LoRA (r = 8 on query and value) and all weights
    python tests/bench/memory.py --only KFAC     # one method

From the model's configuration on the meta device, as `--check` does it; nothing runs. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from dsso.results import text_table  # noqa: E402
from tests.plan.cases import adamw, forward, other, planned  # noqa: E402
from tests.plan.test_architectures import large  # noqa: E402

RANKS = 8
BLOCKED = {"block_side": 2048}
"""Of methods on layers, where all weights are trained: sides reach 16,384."""
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "AdamW": ("ADAMW", {}),
    "K-FAC": ("KFAC", {}),
    "K-FAC, low_rank 32": ("KFAC", {"low_rank": 32}),
    "EKFAC": ("EKFAC", {}),
    "Shampoo": ("SHAMPOO", {}),
    "SOAP": ("SOAP", {}),
    "PSGD": ("PSGD", {}),
    "Sophia": ("SOPHIA", {}),
    "Gauss-Newton": ("GAUSS_NEWTON", {"products": "double_backward"}),
    "MeZO": ("MEZO", {}),
    "HiZOO": ("HIZOO", {}),
}


def figures(kind: str, params: dict[str, Any], lora: bool, folder: Path) -> dict[str, float]:
    """Gigabytes of state and of everything on the fullest rank, megabytes a step on the wire, share of operations."""
    raw = large(folder, "t5-3b", lora)
    blocks = BLOCKED if kind in ("KFAC", "EKFAC") and not lora else {}
    if kind == "ADAMW":
        raw = adamw(raw)
    elif kind in ("MEZO", "HIZOO"):
        raw = forward(kind, {key: value for key, value in raw.items() if key != "data_types"}, **params)
    else:
        raw = other(kind, raw, **params, **blocks)
    found = planned(raw, RANKS)
    return {
        "state_gb": max(one.moments + one.factors + one.vectors for one in found.ranks) / 1e9,
        "peak_gb": found.worst.peak / 1e9,
        "wire_mb": found.wire.per_step / 1e6,
        "operations": found.operations.share,
    }


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="methods whose name contains this")
    arguments = parser.parse_args()
    every: dict[str, dict[str, dict[str, float]]] = {"lora": {}, "full": {}}
    for how, rows in every.items():
        for name, (kind, params) in ROWS.items():
            if arguments.only.lower() in f"{name} {kind}".lower():
                with tempfile.TemporaryDirectory() as folder:
                    rows[name] = figures(kind, params, how == "lora", Path(folder))
        head = [how, "state GB", "peak GB", "wire MB a step", "operations"]
        lines = [
            [
                name,
                f"{f['state_gb']:.3f}",
                f"{f['peak_gb']:.2f}",
                f"{f['wire_mb']:.0f}",
                f"{f['operations']:.1%}",
            ]
            for name, f in rows.items()
        ]
        print(text_table([head, *lines]) if lines else f"{how}: no such method")
        print()
    print(json.dumps(every))
    return 0 if all(every.values()) else 2


if __name__ == "__main__":
    sys.exit(main())
