"""Every zeroth-order method beside its equations for whole vectors in float64, and what is particular to some."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dsso.errors import RunError
from dsso.optim import available, is_forward, resolve
from dsso.parallel import noise
from dsso.seedlog import Start
from tests.optim.forward import closure, made

ROOT = Path(__file__).resolve().parents[2]
EPS, LR, DECAY, SEED = 1e-3, 1e-2, 0.1, 5
ADAMU = {"t3": 6}
METHODS: dict[str, dict[str, Any]] = {
    "zo_adam": {"betas": (0.8, 0.9)},
    # A memory so short that second moments also fall.
    "zo_adamm": {"betas": (0.8, 0.3)},
    "zo_adamu": ADAMU,
    "hizoo": {"smooth": 0.1},
}
CASES = [*METHODS.items(), ("zo_adamu", {**ADAMU, "mode": "paper"})]
each = pytest.mark.parametrize(("kind", "settings"), CASES, ids=lambda x: x if isinstance(x, str) else "")


def test_every_method_is_here_and_has_its_page() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    found = {name.lower() for name in available() if is_forward(name)}
    assert found == {*METHODS, "mezo"}
    for name in found:
        assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()
        assert f"methods/{name}\n" in index


# -- the equations --------------------------------------------------------------------------------------------------


def normal(name: str, stream: int, step: int, numel: int, kind: noise.Kind) -> Tensor:
    """z by torch's own operations, in float64."""
    direction = noise.Direction((step << 32) | SEED, name, stream, kind)
    return noise.sample(direction, 0, numel).double()


class Twin:
    """Directions z, and no state."""

    passes = 0
    """At the weights themselves."""

    def __init__(self, settings: dict[str, Any], numels: dict[str, int]) -> None:
        self.settings, self.numels = settings, numels
        self.n, self.kind = settings["directions"], settings["noise"]
        self.zero = {name: torch.zeros(numel, dtype=torch.float64) for name, numel in numels.items()}

    def z(self, name: str, stream: int, step: int) -> Tensor:
        return normal(name, stream, step, self.numels[name], self.kind)

    def direction(self, name: str, k: int, step: int) -> Tensor:
        return self.z(name, k, step)

    def estimate(self, name: str, slopes: list[float], step: int) -> Tensor:
        return sum((g * self.z(name, k, step) for k, g in enumerate(slopes)), self.zero[name]) / self.n

    def step(self, name: str, slopes: list[float], bends: list[float], step: int) -> Tensor:
        """What is taken from the weights."""
        raise AssertionError


class AdamTwin(Twin):
    """Kingma and Ba 2015, algorithm 1."""

    def __init__(self, settings: dict[str, Any], numels: dict[str, int]) -> None:
        super().__init__(settings, numels)
        self.m, self.v = dict(self.zero), dict(self.zero)

    def step(self, name: str, slopes: list[float], bends: list[float], step: int) -> Tensor:
        h, t, (b1, b2) = self.estimate(name, slopes, step), step + 1, self.settings["betas"]
        self.m[name] = b1 * self.m[name] + (1 - b1) * h
        self.v[name] = b2 * self.v[name] + (1 - b2) * h**2
        return LR * (self.m[name] / (1 - b1**t)) / ((self.v[name] / (1 - b2**t)).sqrt() + 1e-8)


class AdammTwin(AdamTwin):
    """Chen et al. 2019, algorithm 1 without constraints."""

    def __init__(self, settings: dict[str, Any], numels: dict[str, int]) -> None:
        super().__init__(settings, numels)
        self.most = dict(self.zero)

    def step(self, name: str, slopes: list[float], bends: list[float], step: int) -> Tensor:
        super().step(name, slopes, bends, step)
        self.most[name] = torch.maximum(self.most[name], self.v[name])
        return LR * self.m[name] / (self.most[name].sqrt() + 1e-8)


class AdamuTwin(Twin):
    """Jiang et al. 2024, algorithm 1 as it is read here, with T1 : T2 : T3 = 1 : 4 : 6."""

    def __init__(self, settings: dict[str, Any], numels: dict[str, int]) -> None:
        super().__init__(settings, numels)
        self.m, self.signed = dict(self.zero), settings.get("mode") != "paper"
        self.sigma = settings.get("sigma", 1e-8)

    @staticmethod
    def annealed(step: int) -> list[float]:
        s = max(min(step + 1, 4) - 1, 0)
        return [0.5 + 0.5 * math.cos(math.pi * s / (6 - phi * s * 2 / 3)) for phi in (0.1, 1.0, 1.5)]

    def parts(self, name: str, k: int, step: int) -> tuple[Tensor, Tensor]:
        a = self.annealed(step)[0]
        dotted = a**0.5 * self.z(name, 2 * k, step)
        return dotted, self.m[name] + (1 - a) ** 0.5 * self.z(name, 2 * k + 1, step)

    def direction(self, name: str, k: int, step: int) -> Tensor:
        dotted, dotted_twice = self.parts(name, k, step)
        return self.annealed(step)[1] * dotted + (1 - self.annealed(step)[1]) * dotted_twice

    def step(self, name: str, slopes: list[float], bends: list[float], step: int) -> Tensor:
        move, memory, b2 = self.zero[name], self.zero[name], self.annealed(step)[2]
        for k, g in enumerate(slopes):
            d, (dotted, dotted_twice) = self.direction(name, k, step), self.parts(name, k, step)
            below = (b2 * dotted**2 + (1 - b2) * dotted_twice**2 + self.sigma).sqrt()
            if self.signed:
                below = torch.maximum(below, torch.tensor(0.1))
            move = move + g * d / below
            memory = memory + (math.copysign(1.0, g) if self.signed else 1.0) * d
        self.m[name] = memory / self.n
        return LR * move / self.n


class HizooTwin(Twin):
    """Zhao et al. 2024, algorithm 1, with Sigma in the place of 1 / H."""

    passes = 1

    def __init__(self, settings: dict[str, Any], numels: dict[str, int]) -> None:
        super().__init__(settings, numels)
        self.sigma = {name: torch.ones(numel, dtype=torch.float64) for name, numel in numels.items()}

    def direction(self, name: str, k: int, step: int) -> Tensor:
        return self.sigma[name] ** 0.5 * self.z(name, k, step)

    def step(self, name: str, slopes: list[float], bends: list[float], step: int) -> Tensor:
        share = self.settings["smooth"]
        found = [c / 2 * (self.z(name, k, step) / self.sigma[name] ** 0.5) ** 2 for k, c in enumerate(bends)]
        mean = (sum(found, self.zero[name]) / self.n).abs()
        self.sigma[name] = 1 / ((1 - share) / self.sigma[name] + share * mean).clamp(1e-3, 1e6)
        return LR * self.sigma[name] ** 0.5 * self.estimate(name, slopes, step)


TWINS = {"zo_adam": AdamTwin, "zo_adamm": AdammTwin, "zo_adamu": AdamuTwin, "hizoo": HizooTwin}


@each
@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize("drawn", ["gaussian", "rademacher"])
def test_the_equations(kind: str, settings: dict[str, Any], sides: int, drawn: str) -> None:
    """Six steps on weights in float64, so that slopes are known to the last digits of what fp32 state can tell."""
    if kind == "hizoo" and (sides == 1 or drawn == "rademacher"):
        with pytest.raises(ValueError, match=r"both sides|squares of signs"):
            resolve(kind).Config(**settings, sides=sides, noise=drawn)
        return
    if settings.get("mode") == "paper":
        # Without a floor an element whose random parts cancel is divided by what rounding leaves of it.
        settings = settings | {"sigma": 1e-3}
    settings = settings | {"sides": sides, "directions": 3, "noise": drawn, "lr": LR, "eps": EPS}
    engine = made(torch.float64, kind, **settings, weight_decay=DECAY, seed=SEED)
    other = made(torch.float64)
    other.close()
    other.module.eval()
    weights = {n: p.detach().clone().view(-1) for n, p in other.module.named_parameters()}
    first = {name: value.clone() for name, value in weights.items()}
    twin = TWINS[kind](settings, {name: value.numel() for name, value in weights.items()})
    for step in range(6):
        engine.step(closure(engine, step))

        def loss(k: int, scale: float, step: int = step) -> float:
            for name, p in other.module.named_parameters():
                p.data = (weights[name] + scale * twin.direction(name, k, step)).view(p.shape)
            with torch.no_grad():
                found = closure(other, step)()
            return float(found[0] / found[1])

        middle = loss(0, 0.0)
        pairs = [(loss(k, EPS), loss(k, -EPS) if sides == 2 else middle) for k in range(3)]
        slopes = [(up - down) / (2 * EPS if sides == 2 else EPS) for up, down in pairs]
        bends = [(up + down - 2 * middle) / EPS**2 for up, down in pairs]
        for name, value in weights.items():
            if name.startswith(("embed", "layers")) and name.endswith("weight"):
                value *= 1 - LR * DECAY
            value -= twin.step(name, slopes, bends, step)
        assert engine.health()["forwards"] == (6 if sides == 2 else 4) + twin.passes
    for name, p in engine.module.named_parameters():
        length = (weights[name] - first[name]).norm()
        assert length > 3e-3
        assert (p.detach().view(-1) - weights[name]).norm() < 2e-4 * length, name


# -- what is particular to some --------------------------------------------------------------------------------------


def test_parameters_of_a_log_that_a_method_does_not_know() -> None:
    engine = made(torch.float32, "MeZO")
    start = Start(0, "mezo", {"lr": 1.0, "new": 3}, {}, (), "", "float32")
    with pytest.raises(RunError, match="parameters of the log are not those of this method"):
        engine.replay([(start, {"step": 1, "lr": 0.1, "measures": [[0.5]]})])


@each
def test_slopes_are_bounded_and_directions_scheduled(kind: str, settings: dict[str, Any]) -> None:
    directions = {"type": "piecewise", "points": [[0, 1], [2, 3]]}
    engine = made(torch.float32, kind, **settings, max_slope=1e-4, directions=directions)
    more, forwards = 1 if kind == "hizoo" else 0, []
    for step in range(4):
        engine.step(closure(engine, step))
        forwards.append(engine.health()["forwards"] - more)
        assert engine.health()["slope"] == pytest.approx(1e-4)
    assert forwards == [2, 2, 6, 6]


LEARNING = {"zo_adam": 3e-3, "zo_adamm": 1e-3, "zo_adamu": 1e-2, "hizoo": 3e-2}


@pytest.mark.parametrize("kind", METHODS)
def test_it_learns(kind: str) -> None:
    more = {"zo_adamu": {"t3": 150}, "hizoo": {"smooth": 1e-3}}
    engine = made(torch.float32, kind, **more.get(kind, {}), lr=LEARNING[kind], directions=4)
    losses = [float(engine.step(closure(engine, 0))) for _ in range(150)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        ("zo_adam", {"betas": [1.0, 0.9]}, "betas"),
        ("zo_adam", {"eps_adam": 0.0}, "eps_adam"),
        ("zo_adamm", {"betas": [0.9, -0.1]}, "betas"),
        ("zo_adamm", {"eps_adam": 0.0}, "eps_adam"),
        ("zo_adamm", {"normalize": True}, "normalize"),
        ("zo_adamu", {}, "t3"),
        ("zo_adamu", {"t3": 60, "t1": 50, "t2": 50}, "must follow each other"),
        ("zo_adamu", {"t3": 60, "t2": 61}, "must follow each other"),
        ("zo_adamu", {"t3": 60, "t1": 5, "t2": 20}, "annealing is not defined"),
        ("zo_adamu", {"t3": 60, "mode": "paper", "floor": 0.1}, "mode 'paper' has no floor"),
        ("zo_adamu", {"t3": 60, "sigma": 0.0}, "sigma"),
        ("hizoo", {"smooth": 0.0}, "smooth"),
        ("hizoo", {"bounds": [2.0, 3.0]}, "within the bounds"),
        ("hizoo", {"bounds": [0.0, 3.0]}, "bounds"),
        ("hizoo", {"sides": 1}, "on both sides and at the weights"),
        ("hizoo", {"noise": "rademacher"}, "squares of signs"),
    ],
)
def test_settings_that_are_refused(kind: str, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        resolve(kind).Config.model_validate(settings, strict=False)


def test_steps_that_are_none_do_not_shorten_the_first_step_of_adam() -> None:
    engine = made(torch.float32, "ZO_Adam", lr=1e-3)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    engine.step(closure(engine, 0))
    first = {name: p.detach() - before[name] for name, p in engine.module.named_parameters()}
    skipping = made(torch.float32, "ZO_Adam", lr=1e-3)
    plain = closure(skipping, 0)
    with skipping._evaluating():
        skipping._check(plain)
    for _ in range(3):
        skipping.step(lambda: plain() * float("nan"))
    skipping.step(plain)
    assert skipping.health()["skipped_steps"] == 3
    for name, p in skipping.module.named_parameters():
        # Every element moves by the learning rate, whatever its slope: the first moments cancel their own roots.
        moved = (p.detach() - before[name]).abs()
        torch.testing.assert_close(moved, first[name].abs(), rtol=1e-3, atol=1e-6)
