"""Stochastic rounding: to neighbours only, right on average, the same however the elements are cut, in both forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from dsso.parallel import noise, noise_cpu
from dsso.parallel.noise import MAX_STREAM, Direction
from dsso.parallel.rounding import add_stochastic, round_stochastic

FORMATS = (torch.bfloat16, torch.float16)


@pytest.fixture(params=["compiled", "plain"], autouse=True)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(noise_cpu, "_library", lambda: None)
    elif noise_cpu._library() is None:
        pytest.skip("no compiler is here")
    return str(request.param)


def rounded(value: Tensor, dtype: torch.dtype, direction: Direction, start: int = 0) -> Tensor:
    out = torch.full(value.shape, 7.0, dtype=dtype)
    round_stochastic(out, value, direction, start)
    return out


def magnitudes(dtype: torch.dtype) -> Tensor:
    """All numbers from zero on, and the one that infinity stands for, in float64."""
    last = 0x7F80 if dtype == torch.bfloat16 else 0x7C00
    table = torch.arange(last + 1, dtype=torch.int16).view(dtype).double()
    table[-1] = 2 * table[-2] - table[-3]
    return table


def samples(count: int) -> Tensor:
    """Fp32 over all of its range, half of it where fp16 has its numbers."""
    generator = torch.Generator().manual_seed(0)
    exponent = torch.where(
        torch.arange(count) % 2 == 0,
        torch.randint(-149, 128, (count,), generator=generator),
        torch.randint(-40, 17, (count,), generator=generator),
    )
    size = torch.rand(count, generator=generator, dtype=torch.float64) + 1
    sign = 1.0 - 2.0 * torch.randint(0, 2, (count,), generator=generator)
    return (sign * torch.ldexp(size, exponent)).clamp(-3.4e38, 3.4e38).float()


@pytest.mark.parametrize("dtype", FORMATS)
def test_what_can_be_kept_is_kept_bit_by_bit(dtype: torch.dtype) -> None:
    """All 65,536 of them: zeros of both signs, subnormal numbers, infinities."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    number = ~torch.isnan(every)
    for stream in range(3):
        for given in (every, every.float()):
            found = rounded(given, dtype, Direction(5, "w", stream))
            assert torch.equal(found.view(torch.int16)[number], every.view(torch.int16)[number])
            assert torch.isnan(found[~number]).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_against_float64(dtype: torch.dtype) -> None:
    """A neighbour, and the one that the random bits say: exact arithmetic on the table of all numbers of the type."""
    value, direction, start = samples(100_000), Direction(2**64 - 1, "layer.weight", 3), 2**34 + 1
    found = rounded(value, dtype, direction, start)
    table = magnitudes(dtype)
    exact = value.double().abs()
    inside = exact < table[-1]
    assert torch.isinf(found[~inside]).all()
    below = (torch.searchsorted(table, exact, right=True) - 1).clamp(max=len(table) - 2)
    low, high = table[below], table[below + 1]
    share = (exact - low) / (high - low)
    words = noise.words_of(direction, MAX_STREAM + 3, 4, start, len(value), "cpu").view(-1)[start % 4 :][
        : len(value)
    ]
    up = (torch.floor(share * 2**32) + words.double() >= 2**32) & (share > 0)
    wanted = torch.where(up, high, low)
    wanted = torch.where(wanted == table[-1], math.inf, wanted)
    assert torch.equal(found.double().abs()[inside], wanted[inside])
    assert torch.equal(torch.signbit(found), torch.signbit(value))
    assert 0.3 < up.double().mean() < 0.7 if dtype == torch.bfloat16 else up.any()


@pytest.mark.parametrize("dtype", FORMATS)
def test_right_on_average(dtype: torch.dtype) -> None:
    count = 400_000
    table = magnitudes(dtype)
    for low, high in ((table[9], table[10]), (table[0], table[1]), (table[0x3C00 - 1], table[0x3C00])):
        for share in (2.0**-7, 0.25, 0.5, 0.9375):
            exact = low + share * (high - low)
            value = exact.float()
            assert value.double() == exact
            for sign in (1.0, -1.0):
                found = rounded((sign * value).expand(count).contiguous(), dtype, Direction(1, f"{share}"))
                up = (found.double().abs() == high).double().mean()
                assert ((found.double().abs() == high) | (found.double().abs() == low)).all()
                assert abs(up - share) < 5 * math.sqrt(share * (1 - share) / count), (low, share)


def test_beyond_the_largest_number() -> None:
    count = 200_000
    found = rounded(torch.full((count,), 65519.0), torch.float16, Direction(0, "w"))
    infinite = torch.isinf(found)
    assert (found[~infinite] == 65504.0).all()
    assert abs(infinite.double().mean() - 15 / 32) < 5 * 0.5 / math.sqrt(count)
    largest = torch.finfo(torch.float32).max
    for dtype, value in ((torch.float16, 65536.0), (torch.float16, -largest), (torch.bfloat16, math.inf)):
        found = rounded(torch.full((999,), value), dtype, Direction(0, "w"))
        assert (found.float() == math.copysign(math.inf, value)).all()
    found = rounded(torch.full((count,), -largest), torch.bfloat16, Direction(0, "w"))
    assert (torch.isinf(found) | (found == torch.finfo(torch.bfloat16).min)).all()
    assert abs(torch.isinf(found).double().mean() - (1 - 2**-16)) < 5 * 2**-8 / math.sqrt(count)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
@pytest.mark.parametrize("origin", [0, 2**34 - 1000])
def test_any_piece_is_a_piece_of_the_whole(dtype: torch.dtype, kind: noise.Kind, origin: int) -> None:
    direction = Direction(2**63 + 5, "layer.weight", 3, kind)
    value = torch.randn(5000)
    whole, moved = rounded(value, dtype, direction, origin), value.to(dtype)
    add_stochastic(moved, moved, direction, origin, 1e-3)
    for start, count in ((0, 1), (1, 127), (127, 2), (130, 4001), (4999, 1)):
        part = value[start : start + count]
        assert torch.equal(rounded(part, dtype, direction, origin + start), whole[start : start + count])
        piece = part.to(dtype)
        add_stochastic(piece, piece, direction, origin + start, 1e-3)
        assert torch.equal(piece, moved[start : start + count])


def test_pieces_longer_than_a_part_of_the_plain_form() -> None:
    value, direction = torch.randn(600_000), Direction(3, "w", 1, "rademacher")
    whole = rounded(value, torch.bfloat16, direction, 77)
    for at in (1 << 18, (1 << 19) + 5):
        part = value[at : at + 300]
        assert torch.equal(rounded(part, torch.bfloat16, direction, 77 + at), whole[at : at + 300])


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("wide", [False, True])
def test_noise_is_added_in_fp32_and_rounded_once(dtype: torch.dtype, wide: bool) -> None:
    base = torch.randn(20_000).to(torch.float32 if wide else dtype)
    direction, start = Direction(8, "w", 2, "rademacher"), 13
    out = torch.empty(20_000, dtype=dtype)
    add_stochastic(out, base, direction, start, -3e-4)
    value = base.float() + torch.tensor(-3e-4) * noise.sample(direction, start, 20_000)
    assert torch.equal(out, rounded(value, dtype, direction, start))
    # Normal numbers differ in their last bits between the forms, so at most a few elements fall the other way.
    normal = Direction(8, "w", 2, "gaussian")
    add_stochastic(out, base, normal, start, -3e-4)
    value = base.float() + torch.tensor(-3e-4) * noise.sample(normal, start, 20_000)
    assert (out != rounded(value, dtype, normal, start)).double().mean() < 2e-3


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("form", ["compiled"], indirect=True)
def test_both_forms_give_the_same_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    value, direction = samples(50_000), Direction(4, "w", 9, "rademacher")
    fast, moved = rounded(value, dtype, direction, 5), value.to(dtype)
    add_stochastic(moved, moved, direction, 5, 0.1)
    monkeypatch.setattr(noise_cpu, "_library", lambda: None)
    plain, slowly = rounded(value, dtype, direction, 5), value.to(dtype)
    add_stochastic(slowly, slowly, direction, 5, 0.1)
    assert torch.equal(fast.view(torch.int16), plain.view(torch.int16))
    assert torch.equal(moved.view(torch.int16), slowly.view(torch.int16))


@pytest.mark.parametrize("dtype", FORMATS)
def test_small_steps_are_kept_on_average(dtype: torch.dtype) -> None:
    """Rounded to the nearest, none of these steps would move the weights."""
    weight = torch.ones(20_000, dtype=dtype)
    step = float(torch.finfo(dtype).eps) / 16
    assert torch.equal((weight.float() - step).to(dtype), weight)
    for number in range(200):
        round_stochastic(weight, weight.float() - step, Direction(number, "w"), 0)
    # Below 1 neighbours lie half as far apart; each of the 200 roundings has at most a quarter of their square.
    bound = 5 * math.sqrt(200 / len(weight)) * float(torch.finfo(dtype).eps) / 2
    assert abs(weight.double().mean() - (1 - 200 * step)) < bound


def test_streams_names_and_directions_have_bits_of_their_own() -> None:
    value = torch.full((100_000,), 1 + 2.0**-9)
    first = rounded(value, torch.bfloat16, Direction(1, "w", 0)) == 1
    assert torch.equal(first, rounded(value, torch.bfloat16, Direction(1, "module.w", 0)) == 1)
    # z of the same stream must not say which way its own step is rounded.
    signs = noise.sample(Direction(1, "w", 0, "rademacher"), 0, 100_000) > 0
    for other in (
        rounded(value, torch.bfloat16, Direction(1, "w", 1)) == 1,
        rounded(value, torch.bfloat16, Direction(1, "v", 0)) == 1,
        rounded(value, torch.bfloat16, Direction(2, "w", 0)) == 1,
        signs,
    ):
        both = torch.stack([first, other]).double()
        assert abs(torch.corrcoef(both)[0, 1]) < 5 / math.sqrt(100_000)


def test_what_does_not_fit_is_refused() -> None:
    x, w = torch.zeros(4, 4), Direction(0, "w")
    with pytest.raises(ValueError, match="contiguous"):
        round_stochastic(x.bfloat16(), x.T, w, 0)
    with pytest.raises(ValueError, match="one size"):
        round_stochastic(torch.zeros(3).half(), x, w, 0)
    with pytest.raises(ValueError, match=r"float32 cannot be rounded to torch\.float32"):
        round_stochastic(x.clone(), x, w, 0)
    with pytest.raises(ValueError, match=r"float64 cannot be rounded to torch\.bfloat16"):
        add_stochastic(x.bfloat16(), x.double(), w, 0, 1.0)
    empty = torch.zeros(0).half()
    add_stochastic(empty, empty, w, 0, 1.0)
    with pytest.raises(ValueError, match="stream"):
        Direction(0, "w", MAX_STREAM)
