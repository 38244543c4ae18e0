"""Forms of the factors and of their schedule: low rank, blocks, narrow storage, background, even load, even memory."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dsso.engines import make_optimizer
from dsso.engines.single import SingleEngine
from dsso.errors import RunError
from dsso.optim._factor import DenseBlock, Factor
from dsso.optim._forms import in_form
from dsso.optim._refresh import Stagger
from dsso.optim.kfac import Config, Method
from dsso.schedule import Interval

CPU = torch.device("cpu")
TOKENS = 40
INVERSE: dict[str, Any] = {"apply": "inverse"}


class Net(nn.Module):
    """Two layers whose inputs and output gradients have a spectrum that falls off."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(24, 40), nn.Linear(40, 12, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def _net(dtype: torch.dtype = torch.float64) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def _engine(model: nn.Module, **settings: Any) -> SingleEngine:
    defaults = {"lr": 0.05, "factor_interval": 1, "inverse_interval": 1, "damping_floor": 0.0}
    config = Config(**{**defaults, **settings})
    engine = SingleEngine(model, make_optimizer(model, "KFAC", config, CPU), CPU, 1, 8)
    engine.train()
    return engine


def _step(engine: SingleEngine, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(engine.module.parameters()).dtype
    x = torch.randn(TOKENS, 24, generator=generator, dtype=dtype) * torch.logspace(0, -2, 24, dtype=dtype)
    y = torch.randint(12, (TOKENS,), generator=generator)
    engine.backward(nn.functional.cross_entropy(engine(x), y), terms=TOKENS)
    engine.step()


def _weights(engine: SingleEngine) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in engine.module.parameters()])


def _after(steps: int, dtype: torch.dtype = torch.float64, **settings: Any) -> Tensor:
    engine = _engine(_net(dtype), **settings)
    for seed in range(steps):
        _step(engine, seed)
    return _weights(engine)


def test_the_step_is_that_of_the_dense_factors_in_each_form() -> None:
    """A step with each form against float64 algebra on that form's own matrix."""
    low = {"low_rank": 4, "low_rank_above": 8}
    forms: tuple[dict[str, Any], ...] = ({}, low, {"block_side": 9}, {**low, "block_side": 13}, INVERSE)
    for settings in forms:
        engine = _engine(_net(), damping_mode="absolute_each", damping=0.01, **settings)
        for seed in range(3):
            _step(engine, seed)
        method = engine.optimizer.method
        gradients = {n: torch.randn(p.numel()).double() for n, p in engine.module.named_parameters()}
        updates, _ = method.precondition(gradients)
        for layer, dims in zip(method.layers, method.placement.layers, strict=True):
            a = method.factors[dims.a.key].matrix() + 0.01 * torch.eye(layer.side_a).double()
            g = method.factors[dims.g.key].matrix() + 0.01 * torch.eye(layer.outputs).double()
            m = gradients[layer.weight].view(layer.outputs, layer.inputs)
            if layer.bias:
                m = torch.cat([m, gradients[layer.bias].view(-1, 1)], 1)
            wanted = torch.linalg.solve(g, torch.linalg.solve(a, m.mT).mT)
            found = updates[layer.weight].view(layer.outputs, layer.inputs)
            torch.testing.assert_close(found, wanted[:, : layer.inputs], rtol=1e-8, atol=1e-10)
            if layer.bias:
                torch.testing.assert_close(updates[layer.bias], wanted[:, -1], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("form", [{}, {"block_side": 9}, INVERSE], ids=str)
def test_the_floor_is_a_share_of_the_mean_curvature_of_all_layers(form: dict[str, Any]) -> None:
    engine = _engine(_net(), damping=0.04, damping_floor=0.3, **form)
    _step(engine, 0)
    method = engine.optimizer.method
    pairs = [(method.factors[d.a.key], method.factors[d.g.key]) for d in method.placement.layers]
    means = [tuple(one.matrix().diagonal().mean() for one in pair) for pair in pairs]
    floor = 0.3 * fmean(float(a * g) for a, g in means)
    for (a, g), (mean_a, mean_g) in zip(pairs, means, strict=True):
        for factor, shift in ((a, 0.2 * mean_a), (g, (0.04 * mean_a * mean_g + floor) / (0.2 * mean_a))):
            eye = torch.eye(factor.dims.side).double()
            torch.testing.assert_close(factor.solve(factor.matrix() + shift * eye), eye, rtol=1e-8, atol=1e-8)


def test_blocks_are_those_of_the_dense_factor() -> None:
    dense, cut = _engine(_net()), _engine(_net(), block_side=11)
    for seed in range(2):
        # The same weights for both: only what is measured is compared.
        for engine in (dense, cut):
            engine.optimizer.param_groups[0]["lr"] = 0.0
            _step(engine, seed)
    whole, blocks = dense.optimizer.method.factors, cut.optimizer.method.factors
    for key, factor in blocks.items():
        assert len(factor.dims.blocks) > 1
        mask = torch.block_diag(*[torch.ones(n, n) for n in factor.dims.blocks]).double()
        torch.testing.assert_close(factor.matrix(), whole[key].matrix() * mask)


def test_more_rank_is_closer_to_the_exact_step() -> None:
    exact = _after(8)
    start = _weights(_engine(_net()))
    angles = [
        torch.cosine_similarity(
            _after(8, low_rank=rank, low_rank_above=10) - start, exact - start, dim=0
        ).item()
        for rank in (2, 6, 11)
    ]
    assert angles == sorted(angles)
    assert angles[-1] > 0.9


def test_narrow_storage_halves_the_memory_and_stays_close() -> None:
    wide, narrow = _engine(_net(torch.float32)), _engine(_net(torch.float32), storage="bfloat16")
    start = _weights(wide).clone()
    for seed in range(6):
        _step(wide, seed)
        _step(narrow, seed)
    ratio = narrow.optimizer.method.state_bytes() / wide.optimizer.method.state_bytes()
    assert 0.5 < ratio < 0.55
    assert torch.cosine_similarity(_weights(narrow) - start, _weights(wide) - start, dim=0) > 0.999


@pytest.mark.parametrize("delay", [1, 3])
def test_a_factorization_in_the_background_is_used_exactly_so_much_later(
    delay: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"factor_interval": [[0, 1], [1, None]], "inverse_interval": [[0, 1], [1, None]]}
    engine = _engine(_net(), async_delay=delay, **settings)
    states = []
    for seed in range(delay + 2):
        _step(engine, seed)
        states.append(bool(engine.optimizer.method.factors["one/a"].ready))
    assert states == [False] * delay + [True] * 2
    # Whatever the timing, the run is the same.
    undisturbed = _after(9, async_delay=delay)
    honest, chance = Factor.jobs, random.Random(delay)

    def late(factor: Factor, *arguments: Any) -> list[Any]:
        def wait(job: Any) -> Any:
            time.sleep(chance.uniform(0.0, 0.02))
            return job()

        return [partial(wait, job) for job in honest(factor, *arguments)]

    monkeypatch.setattr(Factor, "jobs", late)
    assert torch.equal(_after(9, async_delay=delay), undisturbed)


@pytest.mark.parametrize(
    "settings",
    [
        {"async_delay": 2},
        {"async_delay": 3, "low_rank": 4, "low_rank_above": 8},
        {"block_side": 9, "storage": "bfloat16"},
        {"block_side": 9, **INVERSE},
    ],
)
def test_a_checkpoint_in_the_middle_goes_on_exactly(settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**settings, "factor_interval": 2, "inverse_interval": 4}
    straight = _engine(_net(torch.float32), **settings)
    for seed in range(12):
        if seed == 6:
            straight.save_checkpoint(tmp_path, "here", {})
        _step(straight, seed)
    resumed = _engine(_net(torch.float32), **settings)
    resumed.load_checkpoint(tmp_path, "here")
    for seed in range(6, 12):
        _step(resumed, seed)
    assert torch.equal(_weights(straight), _weights(resumed))


@pytest.mark.parametrize("kept", ["solve", "inverse"])
def test_a_run_goes_on_with_the_other_form(kept: str, tmp_path: Path) -> None:
    """Factorizations in use and under way are turned into it: the course is the same up to rounding."""
    settings: dict[str, Any] = {
        "factor_interval": 2,
        "inverse_interval": 4,
        "async_delay": 3,
        "low_rank": 4,
        "low_rank_above": 30,
    }
    straight = _engine(_net(), apply=kept, **settings)
    for seed in range(14):
        if seed == 6:
            straight.save_checkpoint(tmp_path, "here", {})
            assert any("pending" in name for name in straight.optimizer.method.state_tensors())
        _step(straight, seed)
    other = {"solve": "inverse", "inverse": "solve"}[kept]
    resumed = _engine(_net(), apply=other, **settings)
    resumed.load_checkpoint(tmp_path, "here")
    for seed in range(6, 14):
        _step(resumed, seed)
    torch.testing.assert_close(_weights(resumed), _weights(straight), rtol=1e-9, atol=1e-11)


def test_a_form_that_cannot_be_turned_is_refused() -> None:
    square = -torch.eye(3)
    with pytest.raises(RunError, match=r"(?s)cannot be turned.*positive definite"):
        in_form({"one/a/0/square_inverse": square}, inverse=False)
    assert in_form({"one/a/0/square_inverse": square}, inverse=True)["one/a/0/square_inverse"] is square


def test_inverses_lose_no_more_than_solves() -> None:
    """Where the factors are badly conditioned, in float32, against float64."""
    torch.manual_seed(0)
    basis_DD, _ = torch.linalg.qr(torch.randn(200, 200, dtype=torch.float64))
    x_DD = basis_DD * torch.logspace(0, -4, 200, dtype=torch.float64) @ basis_DD.mT
    for v_DR in (basis_DD[:, :8], basis_DD[:, -8:], torch.randn(200, 8, dtype=torch.float64)):
        wanted = torch.linalg.solve(x_DD, v_DR)
        errors = []
        for inverse in (False, True):
            block = DenseBlock(200, torch.zeros(()), torch.float32, inverse)
            sum_DD = x_DD.float()
            block.average(sum_DD, None, torch.tensor(0.0), torch.tensor(True))
            found = block.job(torch.tensor(1.0), torch.tensor(0.0), 0.0, torch.float32)()
            block.keep(found, ~found[1])
            errors.append(float((block.solve(v_DR.float()) - wanted).norm() / wanted.norm()))
        assert errors[1] < 5 * errors[0] < 0.05, errors


@pytest.mark.parametrize(
    ("settings", "on_accelerator", "inverse"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"inverse_interval": 5}, True, False),
        ({"inverse_interval": [[0, 1], [50, None]]}, True, True),
        ({"storage": "bfloat16"}, True, False),
        ({"apply": "solve"}, True, False),
        ({"apply": "inverse", "inverse_interval": 1}, False, True),
    ],
)
def test_the_form_is_chosen_by_device_and_interval(
    settings: dict[str, Any], on_accelerator: bool, inverse: bool
) -> None:
    assert Config(**settings).keeps_inverses(on_accelerator) is inverse


def test_narrow_inverses_are_refused() -> None:
    with pytest.raises(ValidationError, match="indefinite"):
        Config(apply="inverse", storage="bfloat16")


@pytest.mark.parametrize("every", [4, 10])
def test_work_is_spread_over_the_interval_and_all_is_done_once(every: int) -> None:
    costs = {f"f{i}": float(1 + i % 7) for i in range(60)}
    stagger, interval = Stagger(costs, True), Interval.parse([[0, 1], [5, every]])
    assert stagger.due(interval, 3) == list(costs)
    steps = [stagger.due(interval, step) for step in range(5, 5 + every)]
    assert sorted(key for keys in steps for key in keys) == sorted(costs)
    loads = [sum(costs[key] for key in keys) for keys in steps]
    assert max(loads) < 1.15 * fmean(loads)
    assert stagger.due(interval, 5 + every) == steps[0]
    assert Stagger(costs, False).due(interval, 5) == list(costs)
    assert Stagger(costs, False).due(interval, 6) == []


def test_every_part_of_a_cut_unit_is_damped_and_factorized() -> None:
    """Where one tensor is read by more layers than a rank can take, each part has a copy of A and some of the G."""

    class Fan(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 20, bias=False) for _ in range(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.stack([layer(x) for layer in self.layers]).sum()

    held: set[str] = set()
    for rank in range(3):
        torch.manual_seed(0)
        model = Fan()
        method = Method(Config(), model, CPU, rank, 3, {"x": torch.randn(1, 6)})
        assert len({layer.a.key for layer in method.placement.layers}) == 1
        method.begin_window(0, False)
        method.before_backward(1.0, 4.0, last=True)
        model(torch.randn(4, 6, requires_grad=True)).backward()
        bad = method.measured_badly()
        assert bad is not None
        # One process stands for each rank: its own sums are all there are.
        for key, found in method.capture.sums.items():
            if key in method.factors:
                method.factors[key].average(found, torch.tensor(4.0), bad, 0.9)
        method.refresh.run(list(method.placement.factors), 0, 0.1, 0.0)
        assert all(bool(factor.ready) for factor in method.factors.values())
        held |= set(method.factors)
    assert held == set(method.placement.factors)


@pytest.mark.parametrize("settings", [{}, {"low_rank": 8, "low_rank_above": 16}])
def test_memory_is_an_even_share(settings: dict[str, Any]) -> None:
    """Law of sharding: bytes counted from the tensors of every simulated rank."""

    def model() -> nn.Module:
        return nn.Sequential(*[nn.Linear(20 + 7 * i, 27 + 7 * i) for i in range(12)])

    def count(rank: int, world: int) -> int:
        method = Method(Config(**settings), model(), CPU, rank, world)
        counted = method.state_bytes()
        assert counted == pytest.approx(method.placement.factor_bytes(rank), rel=0.02)
        return counted

    whole = count(0, 1)
    largest = 4 * max(u.elements for u in Method(Config(**settings), model(), CPU, 0, 8).placement.units)
    for world in (2, 4, 8):
        held = [count(rank, world) for rank in range(world)]
        assert sum(held) == whole
        assert max(held) <= whole / world + 1.02 * largest


@pytest.mark.parametrize(
    "settings",
    [
        {"low_rank": 5, "low_rank_above": 8},
        {"block_side": 9},
        {"storage": "bfloat16"},
        {"strategy": "communication_optimal"},
        {"async_delay": 1},
        INVERSE,
    ],
)
def test_no_form_synchronizes_with_the_host(
    forbid_host_sync: Callable[[], None], settings: dict[str, Any]
) -> None:
    engine = _engine(_net(torch.float32), factor_interval=2, inverse_interval=3, **settings)
    for seed in range(4):
        _step(engine, seed)
    forbid_host_sync()
    for seed in range(12):
        _step(engine, seed)
