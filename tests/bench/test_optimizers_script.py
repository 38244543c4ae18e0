"""The comparison of methods on whole matrices runs, and says what it promises."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import optimizers


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = optimizers.main(["--out", str(tmp_path), "--quick"])
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert list(last) == [
        "shampoo",
        "soap",
        "psgd",
        "spike",
        "lora_ratio",
        "lora_bytes_per_param",
        "refresh_speedup_2",
        "state_ratio_2",
    ]
    assert all(value > 0 for value in found.values())
    # Counted, not timed.
    assert last["state_ratio_2"] <= 0.55
    assert last["lora_bytes_per_param"] <= 8.2
    assert (tmp_path / "optimizers.png").stat().st_size > 5_000


def test_the_state_of_others_is_counted_once() -> None:
    import torch

    p = torch.nn.Linear(4, 3)
    contestant = optimizers.Theirs(p, lambda params: torch.optim.AdamW(params, lr=0.1))
    p(torch.ones(1, 4)).sum().backward()
    contestant.optimizer.step()
    # Two moments of 15 numbers, and a step count a parameter.
    assert contestant.state_bytes() == 2 * 15 * 4 + 2 * 4
    contestant.optimizer.state[p.weight]["again"] = [contestant.optimizer.state[p.weight]["exp_avg"]]
    assert contestant.state_bytes() == 2 * 15 * 4 + 2 * 4
