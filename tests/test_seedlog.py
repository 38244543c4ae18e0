"""Reading seed logs: what is whole, what is torn, what leads nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dsso import seedlog
from dsso.errors import RunError
from dsso.parallel.checksum import checksum
from dsso.seedlog import Start

START = Start(0, "mezo", {"lr": 0.1}, {"w": 3}, (), "00", "float32")


def record(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "seed": 0, "lr": 0.1, "measures": [[0.1 * step]], **more}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return path


def test_a_whole_log(tmp_path: Path) -> None:
    later = Start(2, "mezo", {"lr": 0.2}, {"w": 3}, ("w",), "01", "float32")
    log = seedlog.read(write(tmp_path / "log", START.line(), record(1), record(2), later.line(), record(3)))
    assert (log.first, log.last, log.torn) == (0, 3, False)
    assert log.starts == (START, later)
    assert [(start, found["step"]) for start, found in log.between(1, 3)] == [(START, 2), (later, 3)]
    assert log.between(0, 1)[0][1]["measures"] == [[0.1]]


def test_half_a_line_at_the_end_is_left_out(tmp_path: Path) -> None:
    text = json.dumps(record(2))
    for cut in (1, len(text) // 2, len(text)):
        log = seedlog.read(write(tmp_path / "log", START.line(), record(1), text[:cut]))
        assert log.torn
        assert log.last == 1


@pytest.mark.parametrize(
    "bad",
    [
        "not JSON\n",
        "[1]\n",
        '{"step": 2}\n',
        '{"start": {}}\n',
        '"step"\n',
        "7\n",
        '{"step": 2, "lr": null, "measures": [[1.0]]}\n',
        '{"step": 2, "lr": "x", "measures": [[1.0]]}\n',
        '{"step": true, "lr": 0.1, "measures": [[1.0]]}\n',
        '{"step": 2, "lr": 0.1, "measures": 3}\n',
        json.dumps({**START.line(), "step": "0"}) + "\n",
        json.dumps({"step": 0, "start": {**START.line()["start"], "params": [1]}}) + "\n",
    ],
)
def test_a_bad_line_within_is_named(tmp_path: Path, bad: str) -> None:
    with pytest.raises(RunError, match="line 3"):
        seedlog.read(write(tmp_path / "log", START.line(), record(1), bad, record(3)))


def test_steps_before_a_gap_lead_nowhere(tmp_path: Path) -> None:
    log = seedlog.read(write(tmp_path / "log", START.line(), record(1), record(2), record(4), record(5)))
    assert (log.first, log.last) == (3, 5)
    with pytest.raises(RunError, match="has steps 4 to 5, and steps 3 to 5 are needed"):
        log.between(2, 5)
    assert len(log.between(3, 5)) == 2


def test_a_log_without_a_start_is_none(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="line 1"):
        seedlog.read(write(tmp_path / "log", record(1), record(2)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_checksums_of_pieces_add_up_and_see_every_bit(dtype: torch.dtype) -> None:
    weights = torch.randn(600_001, generator=torch.Generator().manual_seed(0)).to(dtype)
    whole = checksum(weights)
    parts = [(0, 7), (7, 300_000), (300_000, 600_001)]
    assert sum(checksum(weights[a:b], a) for a, b in parts) % 2**64 == whole
    assert checksum(weights[:0], 5) == 0
    for place in (0, 299_999, 600_000):
        other = weights.clone()
        other[place] = -other[place]
        assert checksum(other) != whole
    zeros = torch.zeros(4, dtype=dtype)
    assert checksum(zeros) != checksum(zeros[:3])
    assert checksum(zeros) != checksum(-zeros)
    swapped = weights.clone()
    swapped[[3, 4]] = weights[[4, 3]]
    assert checksum(swapped) != whole
