"""Sweep files: what they may hold, and the points that follow from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dsso import recipe_docs
from dsso.errors import RecipeError
from dsso.recipe import load_recipe
from dsso.sweep.format import RandomSpace, SweepFile, read, short_names
from dsso.sweep.points import Point, draw, points
from tests.sweep.files import LR, TAU, write_sweep

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted((ROOT / "configs" / "sweeps").glob("*.json"))


def of(path: Path, *more: str) -> list[Point]:
    return points(read(path), path, more)


def test_a_grid_with_seeds(tmp_path: Path) -> None:
    found = of(write_sweep(tmp_path, grid={LR: [0.01, 0.1], TAU: [1, 2.5]}, seeds=[0, 7]))
    assert [one.index for one in found] == list(range(8))
    # every setting once before one comes twice
    assert [one.seed for one in found] == [0] * 4 + [7] * 4
    assert found[0].name == "lr=0.01,tau=1,seed=0"
    assert found[5].name == "lr=0.01,tau=2.5,seed=7"
    assert found[5].values == {LR: 0.01, TAU: 2.5}
    params = found[5].recipe["optimizer"]["params"]
    assert (params["lr"], params["tau"]) == (0.01, 2.5)
    assert found[5].recipe["dsso"]["train"]["seed"] == 7


def test_what_is_set_is_in_all_points_and_null_removes(tmp_path: Path) -> None:
    path = write_sweep(
        tmp_path, set={"dsso.train.max_steps": 3, "dsso.task.eval_examples": None}, grid={LR: [0.1, 0.2]}
    )
    for point in of(path, "dsso.train.log_interval=1"):
        assert point.recipe["dsso"]["train"]["max_steps"] == 3
        assert point.recipe["dsso"]["train"]["log_interval"] == 1
        assert load_recipe(point.recipe).dsso.task.eval_examples is None
        # a point is whole: its recipe needs neither the base nor overrides
        assert load_recipe(point.recipe).raw == point.recipe


def test_draws_depend_on_seed_sample_and_path_alone(tmp_path: Path) -> None:
    space: dict[str, Any] = {LR: {"log_uniform": [1e-4, 1.0]}}
    few = RandomSpace.model_validate({"samples": 2, "space": space}, strict=False)
    more = {**space, TAU: {"uniform": [0.5, 2]}, "dsso.peft.bottleneck": {"int_uniform": [4, 6]}}
    many = RandomSpace.model_validate({"samples": 500, "space": more}, strict=False)
    other = RandomSpace.model_validate({"samples": 2, "seed": 1, "space": space}, strict=False)
    assert [draw(few, i)[LR] for i in range(2)] == [draw(many, i)[LR] for i in range(2)]
    assert draw(few, 0) != draw(few, 1)
    assert draw(few, 0) != draw(other, 0)
    # of the first sample of seed 0, for ever
    assert draw(few, 0) == {LR: 0.04969}
    every = [draw(many, i) for i in range(500)]
    assert {one["dsso.peft.bottleneck"] for one in every} == {4, 5, 6}
    assert all(0.5 <= one[TAU] <= 2 for one in every)
    logs = [math.log10(one[LR]) for one in every]
    assert -4 <= min(logs) < -3.9
    assert -0.1 < max(logs) <= 0
    assert sum(logs) / 500 == pytest.approx(-2, abs=0.15)


def test_every_sample_is_run_at_every_point_of_the_grid(tmp_path: Path) -> None:
    found = of(
        write_sweep(
            tmp_path, grid={TAU: [1, 2]}, random={"samples": 3, "space": {LR: {"log_uniform": [0.01, 1]}}}
        )
    )
    assert len(found) == 6
    drawn = [one.values[LR] for one in found]
    assert drawn[::2] == drawn[1::2]
    assert len(set(drawn)) == 3


def test_seeds_are_those_of_the_directions_too(tmp_path: Path) -> None:
    mezo = {"optimizer": {"type": "MeZO", "params": {"lr": 1e-3}}}
    found = of(write_sweep(tmp_path, mezo, seeds=[3, 4]))
    assert [one.recipe["optimizer"]["params"]["seed"] for one in found] == [3, 4]
    found = of(write_sweep(tmp_path, mezo, seeds=[3, 4], set={"optimizer.params.seed": 9}))
    assert [one.recipe["optimizer"]["params"]["seed"] for one in found] == [9, 9]
    assert "seed" not in of(write_sweep(tmp_path, seeds=[3]))[0].recipe["optimizer"]["params"]


def test_names_tell_values_of_any_kind_apart(tmp_path: Path) -> None:
    intervals = [5, [[0, 1], [20, 10]], [[0, 1], [20, 100]]]
    found = of(write_sweep(tmp_path, grid={"optimizer.params.factor_interval": intervals}))
    names = [one.name for one in found]
    assert names[0] == "factor_interval=5"
    assert len(set(names)) == 3
    assert all("/" not in name and " " not in name for name in names)
    # the same values give the same name in another sweep
    again = of(write_sweep(tmp_path, grid={"optimizer.params.factor_interval": intervals[2:]}))
    assert again[0].name == names[2]


def test_short_names() -> None:
    found = short_names(["optimizer.params.lr", "optimizer.params.base.lr", "gradient_clipping"])
    assert list(found.values()) == ["params.lr", "base.lr", "gradient_clipping"]


BAD: list[Any] = [
    pytest.param({}, ["nothing to vary"], id="nothing"),
    pytest.param({"grid": {}}, ["nothing to vary"], id="empty-grid"),
    pytest.param({"grid": {LR: []}}, [f"the grid of {LR} is empty"], id="empty-list"),
    pytest.param(
        {"grid": {"optimizer.params.taau": [1]}},
        ["1 of 1 points", "optimizer.params.taau", "nearest: 'tau'"],
        id="path",
    ),
    pytest.param(
        {"grid": {"optimiser.params.lr": [1]}}, ["optimiser", "nearest: 'optimizer'"], id="first-part"
    ),
    pytest.param({"grid": {"dsso.train.max_step": [1, 2]}}, ["2 of 2", "nearest: 'max_steps'"], id="train"),
    pytest.param({"grid": {"optimizer..lr": [1]}}, ["is no path of a recipe"], id="no-path"),
    pytest.param({"grid": {LR: [0.1, -1]}}, ["1 of 2 points", "lr=-1", "got: -1"], id="value"),
    pytest.param({"grid": {LR: 0.1}}, ["sweep.grid", "got: 0.1"], id="no-list"),
    pytest.param({"gird": {LR: [0.1]}}, ["sweep.gird", "nearest: 'grid'"], id="key"),
    pytest.param({"grid": {LR: [0.1, 0.1]}}, ["two points are the same run", "lr=0.1"], id="twice"),
    pytest.param({"grid": {LR: [1, 1.0]}}, ["two points are the same run"], id="equal-numbers"),
    pytest.param({"grid": {LR: [0.1]}, "set": {LR: 0.2}}, ["is set in two places"], id="set-and-grid"),
    pytest.param(
        {"grid": {"dsso.peft": [{"type": "none"}], "dsso.peft.type": ["lora"]}},
        ["dsso.peft and dsso.peft.type set the same value"],
        id="inside",
    ),
    pytest.param({"grid": {"dsso.train.seed": [1, 2]}}, ["seeds have a place of their own"], id="seed"),
    pytest.param({"seeds": []}, ["sweep.seeds"], id="no-seeds"),
    pytest.param({"seeds": [0, 0]}, ["two points are the same run"], id="seed-twice"),
    pytest.param({"seeds": [-1]}, ["a seed is out of range", "got: -1"], id="negative-seed"),
    pytest.param({"grid": {"dsso.output_dir": ["a"]}}, ["is not for a sweep to set"], id="output_dir"),
    pytest.param({"grid": {LR: [1]}, "recipe": "recpie.json"}, ["did you mean", "recipe.json"], id="recipe"),
    pytest.param(
        {"random": {"samples": 2, "space": {LR: {"log_unifrom": [0.1, 1]}}}},
        [f"sweep.random.space.{LR}.log_unifrom", "nearest: 'log_uniform'"],
        id="distribution",
    ),
    pytest.param(
        {"random": {"samples": 2, "space": {LR: {"normal": [0, 1]}}}},
        ["unknown key", "allowed: choice, int_uniform, log_uniform, uniform"],
        id="other-distribution",
    ),
    pytest.param(
        {"random": {"samples": 2, "space": {LR: {}}}}, ["exactly one way", "log_uniform"], id="none"
    ),
    pytest.param(
        {"random": {"samples": 2, "space": {LR: {"log_uniform": [0, 1]}}}}, ["both above 0"], id="log-zero"
    ),
    pytest.param(
        {"random": {"samples": 2, "space": {LR: {"uniform": [2, 1]}}}}, ["got: [2.0, 1.0]"], id="bounds"
    ),
    pytest.param(
        {"random": {"samples": 3, "space": {LR: {"choice": [0.1, 0.2]}}}},
        ["two points are the same run", "draw fewer samples"],
        id="drawn-twice",
    ),
    pytest.param({"random": {"samples": 0, "space": {}}}, ["sweep.random.samples"], id="no-samples"),
    pytest.param({"grid": {LR: [0.1]}, "diverged": {"factor": 1.0}}, ["sweep.diverged.factor"], id="factor"),
    pytest.param(
        {"grid": {"dsso.train.max_steps": list(range(1, 10_002))}},
        ["too many points", "got: 10001"],
        id="many",
    ),
]


@pytest.mark.parametrize(("keys", "words"), BAD)
def test_what_cannot_be_used_is_told(keys: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        of(write_sweep(tmp_path, **keys))
    for word in words:
        assert word in str(caught.value)


def test_a_value_that_is_varied_cannot_be_set_besides(tmp_path: Path) -> None:
    path = write_sweep(tmp_path, grid={LR: [0.1]})
    with pytest.raises(RecipeError, match="is varied by the sweep"):
        of(path, f"{LR}=0.3")


def test_what_depends_on_the_number_of_ranks(tmp_path: Path) -> None:
    changes = {"train_batch_size": 6, "gradient_accumulation_steps": None}
    path = write_sweep(tmp_path, changes, grid={LR: [0.1]})
    with pytest.raises(RecipeError, match="train_batch_size"):
        of(path)
    assert len(points(read(path), path, ranks=None)) == 1
    path = write_sweep(tmp_path, grid={LR: [1, 1.0]})
    with pytest.raises(RecipeError, match="two points are the same run"):
        points(read(path), path, ranks=None)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_every_point_of_a_shipped_sweep_is_valid(file: Path) -> None:
    sweep = read(file)
    found = of(file)
    assert sweep.comment
    assert f"{len(found)} points" in sweep.comment
    method = found[0].recipe["optimizer"]["type"].lower()
    assert file.stem.startswith(f"{method}_")
    # The base recipe's name, as far as it goes, and what the sweep is about.
    assert Path(sweep.recipe).stem.startswith("_".join(file.stem.split("_")[:3]))


def test_the_grids_of_the_paper_are_shipped() -> None:
    for peft in ("lora", "adapter"):
        kfac = read(ROOT / "configs" / "sweeps" / f"kfac_roberta_large_{peft}_mrpc.json")
        assert kfac.grid == {
            LR: [0.01, 0.05, 0.1, 0.5],
            TAU: [0.1, 1.0, 1.5, 2.0],
            "optimizer.params.damping": [1e-2, 1e-3, 1e-4, 1e-5, 1e-6],
        }
        adamw = read(ROOT / "configs" / "sweeps" / f"adamw_roberta_large_{peft}_mrpc.json")
        assert adamw.grid == {LR: [1e-2, 1e-3, 1e-4, 3e-5], "gradient_clipping": [0.1, 1.0, 10.0]}


def test_the_page_is_up_to_date_and_its_example_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    assert recipe_docs.fill(text) == text, "run: python -m dsso --update docs/sweeps.md"
    assert "| `log_uniform` | list of 2 x number or null |" in text
    path = tmp_path / "sweep.json"
    path.write_text(text.split("```json\n")[1].split("```")[0].replace("../", f"{ROOT}/configs/"))
    assert "180 points" in text
    assert len(of(path)) == 180


def test_a_sweep_file_reads_back(tmp_path: Path) -> None:
    for file in SHIPPED:
        written = json.loads(json.dumps(read(file).model_dump(mode="json")))
        path = tmp_path / "again.json"
        path.write_text(json.dumps(written))
        assert isinstance(read(path), SweepFile)
        assert read(path) == read(file)
