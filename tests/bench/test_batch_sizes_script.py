"""The benchmark of batch sizes runs, goes on where it was stopped, and tunes as it says."""

from __future__ import annotations

import json
import sys

import pytest

from tests.bench import batch_sizes, pair_runs, results_file

FIRST = pair_runs.Case("mrpc", "KFAC", 8, {}, 0.1)


def losses(by_rung):
    """Runs that would end with these validation losses."""
    asked = []

    def run(cases):
        asked.extend(case.rung for case in cases)
        return [{"validation_loss": by_rung(case.rung)} for case in cases]

    return run, asked


@pytest.mark.parametrize(
    ("by_rung", "best", "asked"),
    [
        (lambda rung: abs(rung - 1), (1, True), [-2, -1, 0, 1, 2]),
        (lambda rung: abs(rung - 3), (3, True), [-2, -1, 0, 1, 2, 3, 4]),
        (lambda rung: abs(rung + 3), (-3, True), [-2, -1, 0, 1, 2, -3, -4]),
        (lambda rung: -rung, (6, False), [-2, -1, 0, 1, 2, 3, 4, 5, 6]),
        (lambda rung: None if rung > 0 else -rung, (0, True), [-2, -1, 0, 1, 2]),
    ],
)
def test_a_grid_grows_until_the_best_is_inside(by_rung, best, asked):
    run, found = losses(by_rung)
    assert pair_runs.tune(FIRST, run, "validation_loss") == best
    assert found == asked


def test_rates_are_half_decades_apart():
    rates = [pair_runs.Case("mrpc", "AdamW", 8, {}, 1e-3, rung).lr for rung in (-1, 0, 1, 2)]
    assert rates == [3.16e-4, 1e-3, 3.16e-3, 1e-2]


def test_batches_are_whole_and_meet_every_example_once_a_pass():
    found = list(pair_runs.batches(10, 3, 2, 0))
    assert [len(one) for one in found] == [3] * 6
    for passed in (found[:3], found[3:]):
        assert len({int(i) for one in passed for i in one}) == 9
    assert [len(one) for one in pair_runs.batches(10, 10, 2, 0)] == [10, 10]


def test_the_script_runs_and_goes_on_where_it_was_stopped(command, tmp_path, capsys):
    argv = ["--tasks", "builtin", "--model", "tiny-bert", "--epochs", "1", "--limit", "16"]
    argv += ["--batches", "8", "0", "--jobs", "1", "--out", str(tmp_path)]
    done = command([sys.executable, batch_sizes.__file__, *argv])
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert last.keys() == {"builtin/8", "builtin/all"}
    assert all(found.keys() == {"AdamW", "KFAC", "Shampoo"} for found in last.values())
    assert all(0 < one["train_loss"] < 2 for found in last.values() for one in found.values())
    assert (tmp_path / "batch_sizes.png").stat().st_size > 5000
    file = tmp_path / "runs.jsonl"
    lines = results_file.read(file)
    assert {(one["case"]["batch"], one["steps"]) for one in lines} == {(8, 2), (0, 1)}
    assert {one["case"]["seed"] for one in lines} == {0, 1, 2, 3}

    # A line that was cut short is run again, and ends as it did.
    whole = file.read_text()
    file.write_text(whole[: len(whole) - 40])
    assert batch_sizes.main(argv) == last
    printed = capsys.readouterr().out.splitlines()
    assert len([line for line in printed if "validation loss" in line]) == 1
    assert results_file.read(file)[-1] == lines[-1]


def test_seeds_that_agree_are_drawn(tmp_path):
    equal = {"lr": 1e-3, "inside": True, "values": [0.74, 0.74, 0.74]}
    one = {"task": "mrpc", "batch": 8, "steps": 1, "train_loss": equal, "test_score": equal}
    batch_sizes.draw([{**one, "method": method} for method in batch_sizes.METHODS], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_the_script_skips_without_data(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("DSSO_DATA", raising=False)
    assert batch_sizes.main(["--out", str(tmp_path)]) == {}
    assert "DSSO_DATA is not set" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
