"""The script about the quality of curvature: what it claims, on a shorter run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import curvature_quality


def test_iterations_help_one_and_examples_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = curvature_quality.main(["--out", str(tmp_path), "--iterations", "600"])
    printed = capsys.readouterr().out.splitlines()
    assert json.loads(printed[-1]) == found
    assert (tmp_path / "curvature_quality.png").stat().st_size > 10_000
    for line in found.values():
        assert line["psgd_first"] > 1.5
        assert line["psgd_last"] <= 1.05
    assert found["16"]["kfac_one"] > 2
    assert found["1024"]["kfac_one"] <= 1.02
    # An average over iterations makes up for small batches.
    assert found["16"]["kfac_averaged"] < 0.6 * found["16"]["kfac_one"]
