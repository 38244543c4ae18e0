"""Every zeroth-order method beside its equations for whole vectors in float64, and what all of them must keep."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dsso.errors import RunError
from dsso.optim import _spsa, available, is_forward, resolve
from dsso.optim._probes import Piece, Probe
from dsso.parallel import noise
from dsso.seedlog import Start
from tests.optim.forward import bits, closure, kept, made

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


# -- exactness ------------------------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_of_no_length_change_no_bit(kind: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    engine = made(dtype, kind, **settings, weight_decay=DECAY)
    engine.optimizer.param_groups[0]["lr"] = 0.0
    before, state = bits(engine), {name: value.clone() for name, value in kept(engine).items()}
    for step in range(50):
        engine.step(closure(engine, step % 3))
    assert all(torch.equal(value, before[name]) for name, value in bits(engine).items())
    assert all(not torch.equal(value, state[name]) for name, value in kept(engine).items())
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in kept(engine).values())
    assert engine.health()["skipped_steps"] == 0


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_goes_on_exactly(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    straight, resumed = (made(dtype, kind, **settings, lr=1e-3, directions=2) for _ in range(2))
    for step in range(6):
        if step == 3:
            straight.save_checkpoint(tmp_path, "here", {"at": 3})
        straight.step(closure(straight, step))
    assert resumed.load_checkpoint(tmp_path, "here") == {"at": 3}
    for step in range(3, 6):
        resumed.step(closure(resumed, step))
    for mine, theirs in ((bits(resumed), bits(straight)), (kept(resumed), kept(straight))):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())


@each
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic")],
)
def test_a_log_makes_the_same_weights_and_state(
    kind: str, settings: dict[str, Any], dtype: torch.dtype, rounding: str
) -> None:
    """From what JSON keeps of the parameters and of the steps, in an engine that was made with other parameters."""
    other = made(dtype, kind, **settings, rounding=rounding)
    settings = {**settings, "lr": 1e-3, "directions": 2, "rounding": rounding}
    straight = made(dtype, kind, **settings)
    params = resolve(kind).Config(**settings).model_dump(mode="json")
    lines = []
    for step in range(5):
        straight.step(closure(straight, step))
        lines.append(json.dumps(straight.record))
    start = Start(0, kind, json.loads(json.dumps(params)), {}, (), "", straight.dtype)
    other.replay((start, json.loads(line)) for line in lines)
    for mine, theirs in ((bits(other), bits(straight)), (kept(other), kept(straight))):
        assert all(torch.equal(mine[name], value) for name, value in theirs.items())


def test_parameters_of_a_log_that_a_method_does_not_know() -> None:
    engine = made(torch.float32, "MeZO")
    start = Start(0, "mezo", {"lr": 1.0, "new": 3}, {}, (), "", "float32")
    with pytest.raises(RunError, match="parameters of the log are not those of this method"):
        engine.replay([(start, {"step": 1, "lr": 0.1, "measures": [[0.5]]})])


@each
def test_absurd_slopes_are_skipped_and_large_ones_cut(kind: str, settings: dict[str, Any]) -> None:
    engine = made(torch.float32, kind, **settings, lr=1e-3, skip_slope=1e4, max_slope=1.0)
    engine.step(closure(engine, 0))
    before = bits(engine)
    plain = closure(engine, 1)
    engine.step(lambda: plain() * torch.tensor([1e7, 1.0]))
    assert engine.health()["skipped_steps"] == 1
    assert all(torch.equal(value, before[name]) for name, value in bits(engine).items())
    engine.step(lambda: plain() * torch.tensor([10.0, 1.0]))
    assert engine.health()["skipped_steps"] == 1
    assert engine.health()["slope"] <= 1.0


@each
def test_a_step_does_not_depend_on_how_the_weights_are_cut(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit by bit, for pieces that are cut anywhere, and parts of them that begin anywhere."""
    monkeypatch.setattr(_spsa, "CHUNK", 256)
    module, numel = resolve(kind), 1500
    whole = torch.randn(numel, generator=torch.Generator().manual_seed(0))
    found = []
    for cuts in ([0, numel], [0, 37, 801, numel]):
        out = [torch.empty(0), torch.empty(0)]
        for first, end in pairwise(cuts):
            method = module.Method(module.Config(**settings, directions=2, lr=1e-3))
            piece = Piece("w", first, whole[first:end].clone(), True)
            method.attach([piece])
            shown = torch.empty(end - first, dtype=torch.bfloat16)
            for step in range(4):
                measures = torch.tensor([[0.7, 2.0], [-1.3, 5.0]], dtype=torch.float64)
                method.update([piece], measures, step, 1e-2)
            write = method.write(Probe(1, 1e-3), 4)
            assert write is not None
            write("w", first, piece.base, shown)
            out = [torch.cat([out[0], piece.base]), torch.cat([out[1], shown.float()])]
        found.append(out)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, whole)


class Largest(TorchDispatchMode):
    """Remembers the largest storage that an operation makes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.most, self.known = 0, {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@each
def test_nothing_of_the_size_of_a_parameter_is_made(
    kind: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_spsa, "CHUNK", 256)
    module = resolve(kind)
    method = module.Method(module.Config(**settings, directions=2))
    piece, out = Piece("w", 0, torch.randn(4096), True), torch.empty(4096, dtype=torch.bfloat16)
    method.attach([piece])
    measures, write = torch.ones(2, 2, dtype=torch.float64), method.write(Probe(0, 1e-3), 0)
    assert write is not None
    with Largest([piece.base, out, *method.state["w"].values()]) as seen:
        method.update([piece], measures, 0, 1e-3)
        write("w", 0, piece.base, out)
    assert 0 < seen.most <= 256


# -- what must not go wrong -----------------------------------------------------------------------------------------


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_slopes_of_zero_move_nothing(kind: str, settings: dict[str, Any], dtype: torch.dtype) -> None:
    engine = made(dtype, kind, **settings, lr=1e-2)
    before = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    for step in range(6):
        plain = closure(engine, step)
        engine.step(lambda plain=plain: plain() * 0 + torch.tensor([3.0, 1.0]))
    assert engine.health()["skipped_steps"] == 0
    assert all(torch.equal(p, before[name]) for name, p in engine.module.named_parameters())
    assert all(value.isfinite().all() for value in kept(engine).values())


@each
def test_losses_that_no_state_could_take_in_are_skipped(kind: str, settings: dict[str, Any]) -> None:
    engine = made(torch.float32, kind, **settings, lr=1e-3)
    engine.step(closure(engine, 0))
    before, state = bits(engine), {name: value.clone() for name, value in kept(engine).items()}
    for scale in (float("nan"), 1e30):
        plain = closure(engine, 1)
        engine.step(lambda plain=plain, scale=scale: plain() * torch.tensor([scale, 1.0]))
    assert engine.health()["skipped_steps"] == 2
    assert all(torch.equal(value, before[name]) for name, value in bits(engine).items())
    assert all(torch.equal(value, state[name]) for name, value in kept(engine).items())
    engine.step(closure(engine, 1))
    assert all(p.isfinite().all() for p in engine.module.parameters())


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
