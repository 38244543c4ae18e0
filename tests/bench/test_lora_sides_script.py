"""The benchmark of which sides of an adapter to precondition runs and says what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import lora_sides


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("made_up_sst2")
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora_sides.main(["--out", str(tmp_path / "out"), "--quick", "--workers", "2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(found) == {"steps", "quick", *lora_sides.VARIANTS}
    for variant, settings in lora_sides.VARIANTS.items():
        assert 0.3 < found[variant]["train"][0] < 1.2
        run = next((tmp_path / "out").glob(f"{variant.replace(', ', '_')}_*"))
        written = json.loads((run / "config.json").read_text())
        assert written["resolved"]["optimizer"]["params"].get("sides") == (
            settings[1].rpartition("=")[2] if settings[1:] else None
        )


def test_without_the_data_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DSSO_DATA", raising=False)
    lora_sides.main(["--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"skipped": "DSSO_DATA is not set"}
