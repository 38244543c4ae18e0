"""What tests of benchmark scripts share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def made_up_sst2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A few lines in the place and the form of SST-2, where `DSSO_DATA` says."""
    data = tmp_path / "data" / "sst2"
    data.mkdir(parents=True)
    for split in ("train", "validation"):
        lines = [json.dumps({"label": row % 2, "sentence": f"film {row}"}) for row in range(64)]
        (data / f"{split}.jsonl").write_text("\n".join(lines))
    monkeypatch.setenv("DSSO_DATA", str(data.parent))
