"""The kernels for CUDA in Triton's interpreter, on a CPU; `test_noise_triton.py` runs this file with it switched on."""

from __future__ import annotations

import pytest
import torch

from dsso.parallel import noise, noise_triton, philox_triton
from dsso.parallel.noise import MAX_STREAM, Direction
from dsso.parallel.rounding import add_stochastic, round_stochastic

KINDS = ("rademacher", "gaussian")
FORMATS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
STARTS = (0, 1, 127, 128, 4096 * 3 + 5, 2**31 - 70, 2**32 - 3, 2**34 + 77, 2**41 + 130)


def launch(
    out: torch.Tensor,
    base: torch.Tensor,
    direction: Direction,
    start: int,
    scale: float,
    kind: str | None = "its own",
    rounding: int | None = None,
) -> None:
    chosen = direction.kind if kind == "its own" else kind
    philox_triton.launch(out, base, direction.words, chosen, start, scale, rounding)


def cut(x: torch.Tensor) -> torch.Tensor:
    """Fp32 to bf16 as the interpreter does it: what is too much is cut off. Compiled code rounds."""
    return (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_stream(kind: noise.Kind, start: int) -> None:
    direction = Direction(2**63 + 2**31 + 5, "layer.weight", MAX_STREAM - 1, kind)
    for count in (1, 5, 300, 9000):
        found = torch.zeros(count)
        launch(found, found, direction, start, 1.0)
        wanted = noise.sample(direction, start, count)
        if kind == "rademacher":
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("start", [0, 77, 128])
@pytest.mark.parametrize(("dtype", "wide"), FORMATS)
@pytest.mark.parametrize("scale", [1e-3, -0.7])
def test_rounded_once(dtype: torch.dtype, wide: torch.dtype, scale: float, start: int) -> None:
    """Signs give the very bits of the plain form; nothing beside the tensor is written to."""
    base = torch.randn(5000, generator=torch.Generator().manual_seed(0)).to(wide)
    direction = Direction(1, "w", 0, "rademacher")
    room = torch.full((5002,), 7.0, dtype=dtype)
    launch(room[1:-1], base, direction, start, scale)
    wide_sum = base.float() + noise.sample(direction, start, 5000) * torch.tensor(scale)
    assert torch.equal(room[1:-1], cut(wide_sum) if dtype == torch.bfloat16 else wide_sum.to(dtype))
    assert room[0] == room[-1] == 7.0
    normal = Direction(1, "w", 0, "gaussian")
    launch(room[1:-1], base, normal, start, scale)
    exact = base.double() + scale * noise.sample(normal, start, 5000).double()
    normalized = exact.abs().clamp(min=torch.finfo(dtype).tiny)
    unit = torch.finfo(dtype).eps * 2 ** torch.floor(torch.log2(normalized))
    off = (room[1:-1].double() - exact).abs()
    share = 1.0 if dtype == torch.bfloat16 else 0.5
    assert (off <= share * unit + 2**-23 * exact.abs() + 1e-5 * abs(scale)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_in_place_and_not_finite(kind: noise.Kind) -> None:
    direction = Direction(0, "w", 0, kind)
    values = torch.randn(600).bfloat16()
    wanted = torch.empty_like(values)
    launch(wanted, values, direction, 3, 1e-2)
    launch(values, values, direction, 3, 1e-2)
    assert torch.equal(values, wanted)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.float16)
    launch(odd, odd, direction, 3, 1e-2)
    assert torch.isnan(odd[0])
    assert odd[1:].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_stochastic_rounding(dtype: torch.dtype, wide: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    size = torch.randint(-45, 18, (7000,), generator=generator).double()
    value = (torch.randn(7000, generator=generator).double() * 2**size).float()
    value[:6] = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 65519.0])
    base = value if wide else value.to(dtype)
    direction = Direction(9, "w", 4, "rademacher")
    for start in (0, 5, 2**34 + 3):
        found, wanted = torch.empty(7000, dtype=dtype), torch.empty(7000, dtype=dtype)
        launch(found, base, direction, start, 0.0, None, MAX_STREAM + 4)
        round_stochastic(wanted, base, direction, start)
        number = ~torch.isnan(value)
        assert torch.equal(found.view(torch.int16)[number], wanted.view(torch.int16)[number])
        assert torch.isnan(found[~number]).all()
        launch(found, base, direction, start, 1e-2, "rademacher", MAX_STREAM + 4)
        add_stochastic(wanted, base, direction, start, 1e-2)
        assert torch.equal(found.view(torch.int16)[number], wanted.view(torch.int16)[number])


def test_the_known_answer() -> None:
    assert noise_triton.works(torch.device("cpu"))
