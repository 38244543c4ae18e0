"""A slice of the invariance table on every run; the whole of it with --slow."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent


def _table() -> Any:
    spec = importlib.util.spec_from_file_location("invariance", HERE / "invariance.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["invariance"] = module
    spec.loader.exec_module(module)
    return module


def _half(row: int, turn: int) -> bool:
    """Whether an engine, by its number, is one of those in turn: three of the six."""
    return row % 6 in ((0, 3, 5), (1, 2, 4))[turn % 2]


def _check(chosen: list[Any], world_size: int, folder: Path) -> None:
    """fp32 within 1e-5; bf16 within twice what bf16 itself does to the single process."""
    lines = _table().run(chosen, world_size, folder)
    assert len(lines) == len(chosen)
    wrong = [line for line in lines if not line["worst"] <= (2 * line["rounding"] or 1e-5)]
    assert not wrong, wrong


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_two_ranks_take_the_step_of_one(tmp_path: Path) -> None:
    """Models and engines in turn, each with half of the others."""
    cases = _table().cases
    chosen = [case for row, case in enumerate(cases.few_cases(2)) if _half(row, row // 6)]
    assert {case.engine for case in chosen} == set(cases.ENGINES)
    assert {case.model for case in chosen} == set(cases.MODELS)
    assert {case.checkpointing for case in chosen} == set(cases.CHECKPOINTING)
    _check(chosen, 2, tmp_path)


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_bf16_weights_stay_within_their_rounding(tmp_path: Path) -> None:
    cases = _table().cases
    chosen = list(cases.bf16_cases(2))
    _check([one for row, one in enumerate(chosen) if row % 6 in (row // 6, row // 6 + 2)], 2, tmp_path)


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_no_setting_depends_on_how_it_is_computed(tmp_path: Path) -> None:
    cases = _table().cases
    chosen = list(cases.variant_cases(2))
    # Every setting with one model, the models and the engines in turn.
    picked = [chosen[4 * row + row % 4] for row in range(len(chosen) // 4)]
    engines = cases.ENGINES
    turned = [replace(case, engine=engines[row % len(engines)]) for row, case in enumerate(picked)]
    assert {case.engine for case in turned} == set(engines)
    _check(turned, 2, tmp_path)


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_other_methods_take_the_step_of_one(tmp_path: Path) -> None:
    """Every method with half of the engines, engines and models in turn."""
    cases = _table().cases
    chosen = []
    for turn, name in enumerate(cases.OTHERS):
        every = enumerate(cases.method_cases(name, 2))
        chosen += [case for row, case in every if row // 6 == (row + turn) % 4 and _half(row, turn)]
    assert {case.model for case in chosen} == set(cases.MODELS)
    assert {case.engine for case in chosen} == set(cases.ENGINES)
    _check(chosen, 2, tmp_path)


@pytest.mark.dist
@pytest.mark.timeout(900)
def test_products_of_curvature_are_those_of_one_process(tmp_path: Path) -> None:
    """Double backward passes, differences, drawn labels, each on some of the engines that have it."""
    cases = _table().cases
    every = enumerate(cases.option_cases(2))
    chosen = [case for row, case in every if row % 3 == row // 6 % 3]
    assert {case.engine for case in chosen} == set(cases.ENGINES)
    assert {(case.method, case.variant) for case in chosen} == {
        (method, name) for method, names in cases.OPTIONS.items() for name in names
    }
    _check(chosen, 2, tmp_path)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_whole_table_of_other_methods(world_size: int, tmp_path: Path) -> None:
    cases = _table().cases
    chosen = [case for name in cases.OTHERS for case in cases.method_cases(name, world_size)]
    _check([*chosen, *cases.option_cases(world_size)], world_size, tmp_path)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(900)
def test_three_ranks_with_shards_of_uneven_size_and_several_appliers(tmp_path: Path) -> None:
    cases = _table().cases
    _check([*cases.few_cases(3, cases.OWN_LAYOUT), *cases.variant_cases(3)], 3, tmp_path)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_the_whole_table(world_size: int, tmp_path: Path) -> None:
    cases = _table().cases
    chosen = list(cases.all_cases(world_size))
    if world_size == 2:
        chosen += [*cases.variant_cases(2), *cases.bf16_cases(2)]
    _check(chosen, world_size, tmp_path)
