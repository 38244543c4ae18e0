"""The six test functions of ZO-AdaMU's figure 2, and the way of four optimizers over them.

    python -m dsso.plots functions [--out functions.png]

Adam and AdaMax are torch's, with exact gradients; MeZO and ZO-AdaMU are the methods that train models here, on a
parameter of two elements. The functions are those of the paper, Rosenbrock's with x and y as printed there. The paper
gives no starting points, learning rates or numbers of steps: points are chosen here, away from axes and minima, and
each method has the learning rate, out of 0.0001, 0.0003, …, 1, with the lowest mean value along its course (for methods
with random directions, the median over three seeds). A step of MeZO and ZO-AdaMU is two values, one of Adam and AdaMax
a gradient.

Source: Jiang et al. 2024, section "Trajectory visualization on test functions".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dsso.optim import resolve
from dsso.optim._probes import ForwardOptimizer, Piece, Write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STEPS = 500
"""Of every method."""
METHODS = ("Adam", "AdaMax", "MeZO", "ZO-AdaMU")
EPS = 1e-3
"""Length of a perturbation."""

LEAST = 1e-12
"""Smaller values are drawn as this one."""

Course = list[tuple[float, float]]
"""Points, the first one included."""


@dataclass(frozen=True)
class Function:
    """One of the functions.

    Attributes:
        title: its name in the paper, and what it is.
        value: of a point, [2].
        minimum: where it is zero.
        half: its domain reaches from -half to half on both axes.
        start: where all methods begin.
        rates: learning rate of each method.
    """

    title: str
    value: Callable[[Tensor], Tensor]
    minimum: tuple[float, float]
    half: float
    start: tuple[float, float]
    rates: Mapping[str, float]


def _absolute(w: Tensor) -> Tensor:
    return w[0].abs() + w[1].abs()


def _crossed(w: Tensor) -> Tensor:
    return (w[0] + w[1]).abs() + (w[0] - w[1]).abs() / 10


def _squared(w: Tensor) -> Tensor:
    return (w[0] + w[1]) ** 2 + (w[0] - w[1]) ** 2 / 10


def _uneven(w: Tensor) -> Tensor:
    return w[0].abs() / 10 + w[1].abs()


def _beale(w: Tensor) -> Tensor:
    x, y = w[0], w[1]
    return (1.5 - x + x * y) ** 2 + (2.25 - x + x * y**2) ** 2 + (2.625 - x + x * y**3) ** 2


def _rosenbrock(w: Tensor) -> Tensor:
    return 100 * (w[0] - w[1] ** 2) ** 2 + (1 - w[1]) ** 2


def _rates(*rates: float) -> dict[str, float]:
    return dict(zip(METHODS, rates, strict=True))


FUNCTIONS = (
    Function("(a) |x| + |y|", _absolute, (0, 0), 3, (-2.5, 1.7), _rates(0.3, 0.3, 0.03, 0.1)),
    Function("(b) |x + y| + |x − y| / 10", _crossed, (0, 0), 3, (-2.5, 1.2), _rates(0.1, 1, 0.03, 0.03)),
    Function("(c) (x + y)² + (x − y)² / 10", _squared, (0, 0), 3, (-2.5, 1.2), _rates(1, 1, 0.3, 0.1)),
    Function("(d) |x| / 10 + |y|", _uneven, (0, 0), 3, (-2.5, 1.7), _rates(0.3, 0.3, 0.1, 0.1)),
    Function("Beale", _beale, (3, 0.5), 4.5, (1.0, 1.5), _rates(0.3, 1, 0.01, 0.01)),
    Function(
        "Rosenbrock, 100 (x − y²)² + (1 − y)²",
        _rosenbrock,
        (1, 1),
        4.5,
        (2.5, -1.5),
        _rates(0.1, 0.1, 3e-4, 3e-4),
    ),
)
"""In the order of the paper."""


class _Point:
    """A parameter of two elements in the place of a model."""

    def __init__(self, start: tuple[float, float]) -> None:
        self.home = torch.tensor(start, dtype=torch.float32)
        self.shown = self.home
        self.pieces: Sequence[Piece] = [Piece("w", 0, self.home, False)]

    @contextmanager
    def showing(self, write: Write | None) -> Iterator[None]:
        """See `dsso.optim._probes.Weights`."""
        if write is not None:
            self.shown = torch.empty_like(self.home)
            write("w", 0, self.home, self.shown)
        yield
        self.shown = self.home

    def publish(self) -> None:
        """The piece is the weight."""
        self.shown = self.home


def course(function: Function, method: str, steps: int = STEPS, rate: float = 0.0, seed: int = 0) -> Course:
    """The points that a method goes through.

    Args:
        function: what is minimized.
        method: one of `METHODS`.
        steps: at most; a course that leaves all bounds ends.
        rate: learning rate; 0 takes the function's own.
        seed: of the directions.
    """
    rate = rate or function.rates[method]
    walk = _with_gradients if method in ("Adam", "AdaMax") else _without
    points = [function.start]
    for point in walk(function, method, steps, rate, seed):
        if not all(math.isfinite(x) and abs(x) < 1e6 for x in point):
            break
        points.append(point)
    return points


def _with_gradients(
    function: Function, method: str, steps: int, rate: float, _seed: int
) -> Iterator[tuple[float, float]]:
    w = torch.tensor(function.start, requires_grad=True)
    kind = torch.optim.Adam if method == "Adam" else torch.optim.Adamax
    optimizer = kind([w], lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        function.value(w).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        yield (float(w.detach()[0]), float(w.detach()[1]))


def _without(
    function: Function, method: str, steps: int, rate: float, seed: int
) -> Iterator[tuple[float, float]]:
    kind = "mezo" if method == "MeZO" else "zo_adamu"
    module, more = resolve(kind), {} if method == "MeZO" else {"t3": steps}
    # A course that leaves all bounds is a result here, not an accident.
    config = module.Config(lr=rate, eps=EPS, seed=seed, skip_slope=None, **more)
    point = _Point(function.start)
    optimizer = ForwardOptimizer([point.home], rate, module.Method(config), kind)
    optimizer.attach(point, {"w": 2})
    for _ in range(steps):
        # In fp64, as losses of models are added up: differences of values are what counts.
        optimizer.step(lambda: torch.stack([function.value(point.shown.double()), torch.ones(()).double()]))
        yield float(point.home[0]), float(point.home[1])


def values(function: Function, points: Course) -> list[float]:
    """Value of the function along a course."""
    with torch.no_grad():
        return [float(function.value(torch.tensor(point, dtype=torch.float64))) for point in points]


def table(courses: Sequence[Mapping[str, Course]]) -> list[list[str]]:
    """Last values, with a header.

    Args:
        courses: of every function, by method.
    """
    rows = [["function", *METHODS]]
    for function, found in zip(FUNCTIONS, courses, strict=True):
        rows.append([function.title, *(f"{values(function, found[name])[-1]:.1e}" for name in METHODS)])
    return rows


def all_courses(steps: int = STEPS) -> list[dict[str, Course]]:
    """Of every function, by method."""
    return [{name: course(function, name, steps) for name in METHODS} for function in FUNCTIONS]


def draw(courses: Sequence[Mapping[str, Course]], look: Callable[[int], dict[str, Any]]) -> Figure:
    """Draw trajectories over level lines, and below each the values against the steps.

    Args:
        courses: of every function, by method.
        look: colour and line style by the number of the method.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(14.1, 14.6), dpi=110, layout="constrained")
        axes = figure.subplots(4, 3, height_ratios=[2.6, 1, 2.6, 1])
        for index, (function, found) in enumerate(zip(FUNCTIONS, courses, strict=True)):
            row, column = 2 * (index // 3), index % 3
            _levels(axes[row][column], function)
            for number, name in enumerate(METHODS):
                line = look(number)
                x, y = zip(*found[name], strict=True)
                axes[row][column].plot(x, y, linewidth=1.2, alpha=0.85, label=name, **line)
                axes[row][column].plot(
                    *found[name][-1],
                    "D",
                    color=line["color"],
                    markersize=6,
                    markeredgecolor="white",
                    zorder=5,
                )
                seen = [max(value, LEAST) for value in values(function, found[name])]
                axes[row + 1][column].plot(seen, linewidth=1.0, label=name, **line)
            _marks(axes[row][column], function)
            axes[row + 1][column].set_yscale("log")
            axes[row + 1][column].set_xlabel("step")
            axes[row + 1][column].set_ylabel("value")
            if any(min(values(function, points)) < LEAST for points in found.values()):
                axes[row + 1][column].set_ylabel(f"value (≥ {LEAST:g})")
            axes[row + 1][column].grid(True, color="#DDDDDD", linewidth=0.6)
        handles = [
            Line2D([], [], linewidth=1.8, label=name, **look(number)) for number, name in enumerate(METHODS)
        ]
        marks: dict[str, Any] = {"color": "#222222", "linestyle": "none"}
        handles.append(Line2D([], [], marker="o", markersize=6, label="start", **marks))
        handles.append(Line2D([], [], marker="D", markersize=6, label="end", **marks))
        handles.append(Line2D([], [], marker="*", markersize=11, label="minimum", **marks))
        figure.legend(
            handles=handles, loc="outside upper center", ncols=7, frameon=False, fontsize=12, handlelength=3.2
        )
    return figure


def _levels(axis: Axes, function: Function) -> None:
    """Level lines, evenly spaced in the logarithm."""
    grid = torch.linspace(-function.half, function.half, 241, dtype=torch.float64)
    x, y = torch.meshgrid(grid, grid, indexing="xy")
    height = torch.log10(function.value(torch.stack([x, y])) + 1e-3)
    axis.contourf(x.numpy(), y.numpy(), height.numpy(), levels=14, cmap="Greys_r", alpha=0.35)
    axis.set_title(function.title, loc="left", fontsize=11, fontweight="bold")
    axis.set_xlabel("x")
    axis.set_ylabel("y")


def _marks(axis: Axes, function: Function) -> None:
    """Start and minimum on top of the lines, and the paper's domain."""
    axis.plot(*function.start, "o", color="#222222", markersize=6, zorder=5)
    axis.plot(*function.minimum, "*", color="#222222", markersize=11, markeredgecolor="white", zorder=6)
    axis.set_xlim(-function.half, function.half)
    axis.set_ylim(-function.half, function.half)
    axis.set_aspect("equal")
