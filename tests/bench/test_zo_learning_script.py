"""The benchmark of what methods without gradients learn runs and says what it says it does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import zo_learning


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("made_up_sst2")
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    zo_learning.main(["--out", str(tmp_path / "out"), "--quick", "--workers", "2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["quick"] is True
    assert set(found) == {"model", "forwards", "quick", *zo_learning.PASSES}
    for method, passes in zo_learning.PASSES.items():
        assert 4.0 < found[method]["mean"] < 6.5
        run = next((tmp_path / "out").glob(f"tiny-roberta_{method}_*"))
        logged = json.loads((run / "summary.json").read_text())
        assert logged["optimizer"] == method.upper()
        assert logged["steps"] * passes == found["forwards"] == 12


def test_without_the_data_it_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DSSO_DATA", raising=False)
    zo_learning.main(["--out", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"skipped": "DSSO_DATA is not set"}
