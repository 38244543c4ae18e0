"""MeZO on one process: exact weights, the published equations, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsso.engines import make_forward_optimizer
from dsso.engines.forward import ForwardEngine
from dsso.engines.shown import SwappedWeights
from dsso.errors import RunError
from dsso.optim.mezo import Config, Method
from dsso.parallel import noise
from tests.optim.forward import CPU, Net, bits, closure, made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", [{}, {"noise": "rademacher"}, {"sides": 1, "directions": 2}])
def test_steps_of_no_length_change_no_bit(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    engine = made(dtype, **settings)
    engine.optimizer.param_groups[0]["lr"] = 0.0
    before = bits(engine)
    for step in range(1000 if settings == {} else 50):
        engine.step(closure(engine, step % 3))
    assert all(torch.equal(value, before[name]) for name, value in bits(engine).items())
    assert engine.health()["slope"] > 0


@pytest.mark.parametrize("sides", [1, 2])
@pytest.mark.parametrize(
    ("dtype", "kind", "steps"),
    [
        (torch.float32, "gaussian", 4),
        (torch.float32, "rademacher", 4),
        # In bf16 a last bit of a master decides over a rounding of a weight, and a slope is a difference of such.
        (torch.bfloat16, "rademacher", 1),
    ],
)
def test_the_equations(dtype: torch.dtype, sides: int, kind: noise.Kind, steps: int) -> None:
    """Against the paper's algorithm written down for whole vectors in float64, tied weights once."""
    settings = {"sides": sides, "directions": 3, "noise": kind, "lr": 1e-2, "weight_decay": 0.1, "seed": 5}
    engine, twin = made(dtype, **settings), made(dtype, **settings)
    masters = {n: p.detach().double() for n, p in twin.module.named_parameters()}
    twin.close()
    method = Method(Config(**settings))
    for step in range(steps):
        engine.step(closure(engine, step))

        def loss(stream: int, scale: float, step: int = step) -> float:
            for name, p in twin.module.named_parameters():
                z = noise.sample(method.direction(name, stream, step), 0, p.numel()).double().view(p.shape)
                p.data = (masters[name] + scale * z).to(torch.float32).to(dtype)
            twin.module.eval()
            with torch.no_grad():
                found = closure(twin, step)()
            return float(found[0] / found[1])

        slopes = []
        for stream in range(3):
            up, down = loss(stream, 1e-3), loss(stream, -1e-3 if sides == 2 else 0.0)
            slopes.append((up - down) / (2e-3 if sides == 2 else 1e-3))
        for name, value in masters.items():
            keep = 1 - 1e-2 * 0.1 if name.startswith(("embed", "layers")) and value.dim() == 2 else 1.0
            value *= keep
            for stream, slope in enumerate(slopes):
                z = noise.sample(method.direction(name, stream, step), 0, value.numel()).double()
                value -= 1e-2 / 3 * slope * z.view(value.shape)
    pieces = {piece.name: piece.base for piece in engine._weights.pieces}
    assert pieces.keys() == masters.keys()
    for name, value in masters.items():
        # Slopes are differences of losses in fp32 over 2e-3: that is what they are known to.
        torch.testing.assert_close(pieces[name].double(), value.view(-1), rtol=0, atol=3e-4)
    moved = {
        n: (p.double() - made(dtype).module.get_parameter(n).detach().double().view(-1)).abs().max()
        for n, p in pieces.items()
    }
    assert all(distance > 3e-4 for distance in moved.values()), moved


def test_a_perturbation_is_a_copy_of_one_block_at_a_time() -> None:
    engine = made()
    weights = engine._weights
    assert isinstance(weights, SwappedWeights)
    away: list[int] = []
    for layer in engine.module.layers:  # type: ignore[union-attr]
        layer[0].register_forward_hook(
            lambda *_: away.append(sum(p.numel() for p, _, uses in weights._away.values() if uses))
        )
    engine.step(closure(engine, 0))
    own = sum(p.numel() for p in engine.module.layers[0].parameters())  # type: ignore[union-attr, index]
    # The root's own vector is in use as long as the root runs.
    assert set(away) == {0, own + 8}
    assert not weights._away


def test_embeddings_and_heads_are_perturbed_in_parts() -> None:
    """Rows that are looked up, and rows of the head a few at a time, give what whole copies give."""
    engine = made()
    weights, heard = engine._weights, []
    assert isinstance(weights, SwappedWeights)
    wide = engine.module.embed.weight.numel()  # type: ignore[union-attr]
    weights._largest = 24  # three rows of the head
    room = weights._room

    def heed(numel: int, like: Tensor) -> Tensor:
        heard.append(numel)
        return room(numel, like)

    weights._room = heed  # type: ignore[method-assign]
    ids = torch.tensor([[1, 4, 4, 9]])

    def write(name: str, start: int, base: Tensor, out: Tensor) -> None:
        noise.add(out, base, noise.Direction(3, name), start, 0.1)

    engine.eval()
    with torch.no_grad(), weights.showing(write):
        found = engine(ids)
    assert 24 in heard
    assert wide not in heard
    engine.close()
    for name, p in engine.module.named_parameters():
        whole = torch.empty(p.numel())
        write(name, 0, p.detach().view(-1), whole)
        p.data = whole.view(p.shape)
    with torch.no_grad():
        torch.testing.assert_close(found, engine.module(ids))


def test_dropout_that_cannot_be_switched_off_is_told() -> None:
    class Noisy(Net):
        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.dropout(super().forward(ids), 0.5, training=True)

    torch.manual_seed(0)
    net = Noisy()
    engine = ForwardEngine(net, make_forward_optimizer(net, "MeZO", Config(lr=1e-2)), CPU, 1, 4)
    with pytest.raises(RunError, match=r"(?s)something random is on in evaluation mode.*switch off dropout"):
        engine.step(closure(engine, 0))


def test_what_no_pass_goes_through_is_told_and_left_alone() -> None:
    class Odd(Net):
        """A layer that nothing uses, and one whose weight another module multiplies with by itself."""

        def __init__(self) -> None:
            super().__init__()
            self.unused, self.beside = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + (self.embed(ids) @ self.beside.weight).sum()

    torch.manual_seed(0)
    net = Odd()
    engine = ForwardEngine(net, make_forward_optimizer(net, "MeZO", Config(lr=1e-2)), CPU, 1, 4)
    before = bits(engine)
    with pytest.warns(
        UserWarning, match=r"3 trained parameter\(s\) stay as they are.*beside.weight, unused.bias"
    ):
        engine.step(closure(engine, 0))
    engine.step(closure(engine, 1))
    same = {name for name, value in bits(engine).items() if torch.equal(value, before[name])}
    assert same == {"unused.weight", "unused.bias", "beside.weight"}


def test_modes_and_random_numbers_are_left_alone() -> None:
    engine = made()
    engine.module.layers[1].eval()  # type: ignore[union-attr, index]
    modes = [part.training for part in engine.module.modules()]
    state = torch.random.get_rng_state()
    engine.step(closure(engine, 0))
    assert [part.training for part in engine.module.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(p.grad is None for p in engine.module.parameters())


def test_what_breaks_off_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = made(lr=1e-3)
    before, calls = bits(engine), [0]

    def breaks(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyError("a surprise")

    engine.module.layers[1].register_forward_hook(breaks)  # type: ignore[union-attr, index]
    with pytest.raises(KeyError):
        engine.step(closure(engine, 0))
    assert all(torch.equal(value, before[name]) for name, value in bits(engine).items())


def test_it_learns() -> None:
    engine = made(lr=3e-2, directions=4, noise="rademacher")
    losses = [float(engine.step(closure(engine, 0))) for _ in range(150)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize(
    "settings",
    [
        {"eps": 0.0},
        {"eps": -1.0},
        {"directions": 0},
        {"sides": 3},
        {"lr": 0},
        {"normalize": True},
        {"normalize": True, "sides": 1},
        {"normalize": True, "directions": 8},
    ],
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Config(**settings)


def test_closures_that_cannot_be_used() -> None:
    engine = made()
    with pytest.raises(RunError, match=r"engine.step\(closure\)"):
        engine.step()
    with pytest.raises(RunError, match="two numbers"):
        engine.step(lambda: torch.zeros(3))
    with pytest.raises(RunError, match="no gradients"):
        engine.backward(torch.zeros(()))
    random = made()
    with pytest.raises(RunError, match="two evaluations of the same batch differ"):
        random.step(lambda: torch.stack([torch.rand(()), torch.ones(())]))


def test_a_normalized_step_is_divided_by_the_deviation_of_the_losses() -> None:
    """FZOO: w - lr / deviation * mean of g z, whatever the loss is measured in."""
    settings = {"sides": 1, "directions": 4, "noise": "rademacher", "lr": 1e-5}
    engine = made(torch.float64, normalize=True, **settings)
    start = {n: p.detach().clone() for n, p in engine.module.named_parameters()}
    method, losses = Method(Config(**settings)), []
    for stream in (None, 0, 1, 2, 3):
        other = made(torch.float64)
        for name, p in other.module.named_parameters() if stream is not None else ():
            noise.add(p.data, p.data, method.direction(name, stream, 0), 0, 1e-3)
        other.module.eval()
        with torch.no_grad():
            found = closure(other, 0)()
        losses.append(float(found[0] / found[1]))
    over = torch.tensor(losses[1:], dtype=torch.float64).std()
    for scale in (1.0, 100.0):
        engine = made(torch.float64, normalize=True, **settings)
        plain = closure(engine, 0)
        engine.step(lambda plain=plain, scale=scale: plain() * torch.tensor([scale, 1.0]))
        for name, p in engine.module.named_parameters():
            move = sum(
                (loss - losses[0]) / 1e-3 * noise.sample(method.direction(name, k, 0), 0, p.numel()).double()
                for k, loss in enumerate(losses[1:])
            )
            expected = start[name].flatten() - 1e-5 / 4 * move / over
            torch.testing.assert_close(p.detach().flatten(), expected, rtol=0, atol=1e-8)
            assert (expected - start[name].flatten()).abs().max() > 1e-3


def test_a_normalized_step_of_losses_that_are_all_alike_has_no_length() -> None:
    engine = made(normalize=True, sides=1, directions=3, lr=1e-3)
    before, plain = bits(engine), closure(engine, 0)
    engine.step(lambda: plain() * 0 + torch.tensor([3.0, 1.0]))
    assert all(torch.equal(value, before[name]) for name, value in bits(engine).items())
    assert engine.health()["skipped_steps"] == 0
