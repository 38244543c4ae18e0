"""The courses over the test functions, and the picture of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dsso import plots
from dsso import plots_functions as functions
from dsso.optim.mezo import Config, Method
from dsso.parallel import noise

matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
BY_TITLE = {function.title.split()[0].strip(","): function for function in functions.FUNCTIONS}


def value(title: str, x: float, y: float) -> float:
    return float(BY_TITLE[title].value(torch.tensor([x, y], dtype=torch.float64)))


def test_the_functions_are_those_of_the_paper() -> None:
    assert list(BY_TITLE) == ["(a)", "(b)", "(c)", "(d)", "Beale", "Rosenbrock"]
    assert value("(a)", -2, 1) == 3
    assert value("(b)", -2, 1) == pytest.approx(1.3)
    assert value("(c)", -2, 1) == pytest.approx(1.9)
    assert value("(d)", -2, 1) == pytest.approx(1.2)
    assert value("Beale", 0, 0) == pytest.approx(1.5**2 + 2.25**2 + 2.625**2)
    # As printed: x - y^2, where the function is usually written with y - x^2.
    assert value("Rosenbrock", 4, 2) == 1
    assert value("Rosenbrock", 2, 4) == 100 * 14**2 + 9
    for title, function in BY_TITLE.items():
        assert value(title, *function.minimum) == pytest.approx(0, abs=1e-20)
        assert value(title, *function.start) > 1
        assert max(map(abs, function.start)) < function.half
        assert set(function.rates) == set(functions.METHODS)


def test_mezo_is_the_method_that_trains_models() -> None:
    """Five steps from the equations."""
    function, rate = BY_TITLE["(c)"], 0.05
    course = functions.course(function, "MeZO", 5, rate, seed=3)
    w = torch.tensor(function.start, dtype=torch.float64)
    method = Method(Config(seed=3))
    for step, point in enumerate(course[1:]):
        z = noise.sample(method.direction("w", 0, step), 0, 2).double()
        up, down = function.value(w + 1e-3 * z), function.value(w - 1e-3 * z)
        w = w - rate * (up - down) / 2e-3 * z
        assert point == pytest.approx(w.tolist(), abs=1e-4)
    assert math.dist(course[0], course[-1]) > 0.1


@pytest.mark.parametrize("method", functions.METHODS)
@pytest.mark.parametrize("title", BY_TITLE)
def test_every_method_comes_down(title: str, method: str) -> None:
    course = functions.course(BY_TITLE[title], method, 100)
    found = functions.values(BY_TITLE[title], course)
    assert len(found) == 101
    assert found[0] == pytest.approx(value(title, *BY_TITLE[title].start), rel=1e-6)
    assert sum(found[-20:]) / 20 < 0.8 * found[0]
    assert functions.course(BY_TITLE[title], method, 100) == course


def test_a_course_that_leaves_all_bounds_ends() -> None:
    course = functions.course(BY_TITLE["Rosenbrock"], "MeZO", 50, 1.0)
    assert len(course) < 50
    assert all(abs(x) < 1e6 for point in course for x in point)


def test_the_picture_shows_the_courses() -> None:
    found = functions.all_courses(8)
    figure = functions.draw(found, plots.look)
    titled = {axis.get_title(loc="left"): axis for axis in figure.axes if axis.get_title(loc="left")}
    assert list(titled) == [function.title for function in functions.FUNCTIONS]
    below = [axis for axis in figure.axes if not axis.get_title(loc="left")]
    for function, courses, axis in zip(functions.FUNCTIONS, found, below, strict=True):
        drawn = {line.get_label(): line for line in titled[function.title].lines}
        heights = {line.get_label(): line for line in axis.lines}
        for number, (method, course) in enumerate(courses.items()):
            assert drawn[method].get_xydata().tolist() == [list(point) for point in course]
            assert drawn[method].get_color() == plots.COLOURS[number]
            assert heights[method].get_ydata().tolist() == functions.values(function, course)
    legend: Any = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [*functions.METHODS, "start", "end", "minimum"]


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = functions.all_courses
    monkeypatch.setattr(functions, "all_courses", lambda: plain(3))
    assert plots.main(["functions", "--out", str(tmp_path / "way.png")]) == 0
    assert (tmp_path / "way.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    told = capsys.readouterr().out
    assert told.splitlines()[0].split() == ["function", *functions.METHODS]
    last = functions.values(functions.FUNCTIONS[0], plain(3)[0]["Adam"])[-1]
    assert f"{last:.1e}" in told
    assert f"plot: {tmp_path / 'way.png'}" in told
    assert plots.main(["functions", "--out", str(tmp_path / "way.doc")]) == 2
    assert "unknown kind of picture" in capsys.readouterr().err
