"""Directions: known answers, the same elements however they are cut, the same stream in both forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsso.parallel import noise, noise_cpu
from dsso.parallel.noise import Direction

# Random123's known answers of philox4x32 with ten rounds: counter, key, result.
KNOWN = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
KINDS = ("rademacher", "gaussian")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(params=["compiled", "plain"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "plain":
        monkeypatch.setattr(noise_cpu, "_library", lambda: None)
    elif noise_cpu._library() is None:
        pytest.skip("no compiler is here")
    return str(request.param)


def test_a_kernel_is_used_by_all_ranks_or_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if noise_cpu._library() is None:
        pytest.skip("no compiler is here")
    monkeypatch.setattr(noise, "_FUSED", [True])
    monkeypatch.setattr(noise.collectives, "gather_objects", lambda mine: [mine, False])
    used = []
    monkeypatch.setattr(noise_cpu, "add", lambda *_: used.append(1) or True)
    direction, w = Direction(1, "w"), torch.zeros(8)
    noise.add(w, w, direction, 0, 1.0)
    assert used == [1]
    with pytest.warns(UserWarning, match=r"rank\(s\) 1 cannot build or use the kernel"):
        noise.agree(torch.device("cpu"))
    noise.add(w, w, direction, 0, 1.0)
    assert used == [1]
    assert w.any()
    monkeypatch.setattr(noise.collectives, "gather_objects", lambda mine: [mine, True])
    noise.agree(torch.device("cpu"))
    assert noise.fused_allowed()


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers(counter: list[int], key: list[int], wanted: list[int]) -> None:
    words = noise.philox(tuple(torch.tensor([c]) for c in counter), (key[0], key[1]))
    assert [int(word) for word in words] == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_any_piece_is_a_piece_of_the_whole(form: str, kind: noise.Kind) -> None:
    direction = Direction(2**63 + 5, "layer.weight", 3, kind)
    whole = torch.zeros(5000)
    noise.add(whole, whole, direction, 0, 1.0)
    for start, count in ((0, 1), (1, 127), (127, 2), (128, 300), (255, 4000), (4999, 1)):
        piece = torch.zeros(count)
        noise.add(piece, piece, direction, start, 1.0)
        assert torch.equal(piece, whole[start : start + count]), (start, count)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    start=st.one_of(st.integers(0, 10**6), st.integers(2**34 - 200, 2**34 + 200)),
    count=st.integers(1, 3000),
    stream=st.integers(0, noise.MAX_STREAM - 1),
)
def test_both_forms_give_one_stream(seed: int, start: int, count: int, stream: int) -> None:
    if noise_cpu._library() is None:
        pytest.skip("no compiler is here")
    for kind in KINDS:
        direction = Direction(seed, "w", stream, kind)
        fast = torch.zeros(count)
        noise.add(fast, fast, direction, start, 1.0)
        plain = noise.sample(direction, start, count)
        if kind == "rademacher":
            assert torch.equal(fast, plain)
        else:
            torch.testing.assert_close(fast, plain, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_distribution(form: str, kind: noise.Kind) -> None:
    count = 2_000_000
    z = torch.zeros(count)
    noise.add(z, z, Direction(7, "w", 0, kind), 0, 1.0)
    other = torch.zeros(count)
    noise.add(other, other, Direction(7, "v", 0, kind), 0, 1.0)
    z, other = z.double(), other.double()
    bound = 5 / math.sqrt(count)
    assert abs(z.mean()) < bound
    assert abs(z.square().mean() - 1) < 2 * bound
    # No correlation with the neighbour, with another parameter, or between the halves of a pair.
    for shift in (1, 2, 3, 4, 32, 128):
        assert abs((z[shift:] * z[:-shift]).mean()) < bound
    assert abs((z * other).mean()) < bound
    if kind == "gaussian":
        assert abs(z.pow(3).mean()) < bound * math.sqrt(15)
        assert abs(z.pow(4).mean() - 3) < bound * math.sqrt(96)
        for edge in (0.5, 1.0, 2.0, 3.0):
            share = math.erfc(edge / math.sqrt(2))
            assert abs((z.abs() > edge).double().mean() - share) < bound * math.sqrt(share)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wide", [False, True])
def test_rounded_once(form: str, kind: noise.Kind, dtype: torch.dtype, wide: bool) -> None:
    base = torch.randn(3000, generator=torch.Generator().manual_seed(0)).to(torch.float32 if wide else dtype)
    out = torch.full((3000,), float("nan"), dtype=dtype)
    direction = Direction(1, "w", 0, kind)
    noise.add(out, base, direction, 17, 1e-3)
    z = noise.sample(direction, 17, 3000).double()
    exact = base.double() + float(torch.tensor(1e-3)) * z
    # Half a unit in the last place of the type, and what fp32 has rounded before.
    unit = torch.finfo(dtype).eps * 2 ** torch.floor(torch.log2(exact.abs()))
    assert ((out.double() - exact).abs() <= 0.5 * unit + 1.5 * 2**-24 * exact.abs() + 1e-8).all()


def test_in_place_and_nothing_but_finite_numbers_is_kept(form: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0], dtype=dtype)
        noise.add(values, values, Direction(0, "w", 0, "rademacher"), 0, 0.0)
        assert torch.isnan(values[0])
        assert values[1:].tolist() == [float("inf"), -float("inf"), 0.0, 0.0]


def test_names_without_their_wrappers() -> None:
    plain = Direction(3, "model.layers.0.weight")
    for name in (
        "module.model.layers.0.weight",
        "_orig_mod.model.layers.0.weight",
        "module.module.model.layers.0._checkpoint_wrapped_module.weight",
        "_fsdp_wrapped_module.model.layers.0._fsdp_wrapped_module.weight",
    ):
        assert Direction(3, name).words == plain.words
    assert Direction(3, "model.module.weight").words != Direction(3, "model.weight").words
    assert Direction(4, "model.layers.0.weight").words != plain.words


def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(4, 4)
    with pytest.raises(ValueError, match="contiguous"):
        noise.add(x.mT, x, Direction(0, "w"), 0, 1.0)
    with pytest.raises(ValueError, match="one size"):
        noise.add(x, torch.zeros(3), Direction(0, "w"), 0, 1.0)
    with pytest.raises(ValueError, match="int64"):
        noise.add(torch.zeros(4, dtype=torch.int64), torch.zeros(4), Direction(0, "w"), 0, 1.0)
    with pytest.raises(ValueError, match="stream"):
        Direction(0, "w", 2**24)
    with pytest.raises(ValueError, match="seed"):
        Direction(-1, "w")
