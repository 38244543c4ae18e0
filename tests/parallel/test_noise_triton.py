"""The kernels for CUDA: run by Triton's interpreter on a CPU, compiled for a GPU that need not be there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from dsso.parallel import noise, noise_triton
from dsso.parallel.noise import MAX_STREAM, Direction
from dsso.parallel.rounding import add_stochastic, round_stochastic

# Kernels know when they are made whether they will be interpreted.
_TOLD = "TRITON_INTERPRET"
TRITON = importlib.util.find_spec("triton") is not None
interpreted = pytest.mark.skipif(
    not (TRITON and os.environ.get(_TOLD) == "1"),
    reason="started by test_all_of_it_in_the_interpreter" if TRITON else "Triton is not installed",
)
compiled = pytest.mark.skipif(not TRITON, reason="Triton is not installed")

CPU = torch.device("cpu")
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
    from dsso.parallel import philox_triton

    chosen = direction.kind if kind == "its own" else kind
    philox_triton.launch(out, base, direction.words, chosen, start, scale, rounding)


def cut(x: torch.Tensor) -> torch.Tensor:
    """Fp32 to bf16 as the interpreter does it: what is too much is cut off. (The compiler's code rounds, see below.)"""
    return (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()


class Broken:
    """In the place of the kernels: raises, or sets every element to a number."""

    def __init__(self, what: Exception | float) -> None:
        self.what = what

    def launch(self, out: torch.Tensor, *_: object) -> None:
        if isinstance(self.what, Exception):
            raise self.what
        out.fill_(self.what)


@pytest.mark.parametrize("what", [RuntimeError("no C compiler\nfound"), 1.0])
def test_where_triton_does_not_work_it_is_said_and_left(
    what: Exception | float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise_triton, "_kernels", lambda: Broken(what))
    noise_triton.works.cache_clear()
    expected = "no C compiler" if isinstance(what, Exception) else "other numbers"
    with pytest.warns(UserWarning, match=expected):
        assert not noise_triton.works(CPU)
    noise_triton.works.cache_clear()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSSO_NO_COMPILER", "1")
    noise_triton._kernels.cache_clear()
    assert noise_triton._kernels() is None
    noise_triton._kernels.cache_clear()


def test_the_first_signs_are_those_of_the_specification() -> None:
    """Where the answer that the kernels are tried with comes from."""
    words = noise.philox((torch.zeros(1, dtype=torch.int64),) * 4, (0, 0))
    assert noise_triton.known_signs() == [-1.0 if int(w) >> j & 1 else 1.0 for w in words for j in range(32)]


def test_tensors_on_a_cpu_are_left_to_others() -> None:
    x = torch.zeros(3)
    assert not noise_triton.add(x, x, (0, 0, 0, 0, 0), "gaussian", 0, 1.0)
    assert not x.any()


@compiled
def test_all_of_it_in_the_interpreter() -> None:
    if os.environ.get(_TOLD) == "1":
        pytest.skip("this is the interpreter")
    env = {**os.environ, _TOLD: "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "interpreted", __file__]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@interpreted
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_the_same_stream(kind: noise.Kind, start: int) -> None:
    direction = Direction(2**63 + 2**31 + 5, "layer.weight", MAX_STREAM - 1, kind)
    for count in (1, 5, 300, 9000):
        found = torch.zeros(count)
        launch(found, found, direction, start, 1.0)
        wanted = noise.sample(direction, start, count)
        if kind == "rademacher":
            assert torch.equal(found, wanted)
        else:
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-6)


@interpreted
@pytest.mark.parametrize("start", [0, 77, 128])
@pytest.mark.parametrize(("dtype", "wide"), FORMATS)
@pytest.mark.parametrize("scale", [1e-3, -0.7])
def test_interpreted_rounded_once(dtype: torch.dtype, wide: torch.dtype, scale: float, start: int) -> None:
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


@interpreted
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_in_place_and_not_finite(kind: noise.Kind) -> None:
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


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [False, True])
def test_interpreted_stochastic_rounding(dtype: torch.dtype, wide: bool) -> None:
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


@interpreted
def test_interpreted_the_known_answer() -> None:
    noise_triton.works.cache_clear()
    assert noise_triton.works(CPU)


COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dsso.parallel import philox_triton as file

kernel = file._add
for kind, stochastic, out, base in [
    (1, False, "bf16", "bf16"), (2, False, "bf16", "fp32"), (1, False, "fp32", "fp32"), (2, False, "fp16", "fp16"),
    (0, True, "bf16", "fp32"), (1, True, "bf16", "bf16"), (2, True, "fp16", "fp16"),
]:
    size = file._SIZES["fours" if kind != 1 or stochastic else "signs"]
    chosen = {"kind": kind, "stochastic": stochastic, "size": size}
    types = {"out": f"*{out}", "base": f"*{base}", "count": "i64", "shift": "i64", "first": "i64"}
    signature = {name: "constexpr" if name in chosen else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {(kernel.arg_names.index(n),): [["tt.divisibility", 16]] for n in ("out", "base", "count", "shift")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=chosen, attrs=aligned)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    products = len(re.findall(r"mul.*(?:-766435501|-845247145|3528531795|3449720151);", code))
    reads = set(re.findall(r"ld\\.global\\S*", code))
    rounded = len(re.findall(r"cvt\\.rn\\.(?:bf16|f16)(?:x2)?\\.f32", code)) > 0
    print(kind, stochastic, out, products, int(rounded), *reads)
"""


@compiled
def test_the_compiler_takes_it_and_words_are_made_once() -> None:
    """Compiled for an H100 without having one: 16 bytes are read at a time, and no thread makes words of another."""
    env = {name: value for name, value in os.environ.items() if name != _TOLD}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == 7
    for kind, stochastic, out, products, rounded, *reads in rows:
        assert reads == ["ld.global.v4.b32"]
        assert rounded == str(int(out != "fp32"))
        # A counter has ten rounds of two products. A thread has one for 32 signs, or for four of 16 other elements.
        makers = [20] if (kind, stochastic) == ("1", "False") else []
        makers += [4 * 20] * ((kind == "2") + (stochastic == "True"))
        makers += [20] * ((kind, stochastic) == ("1", "True"))
        # (One more or less: what is the same for all threads may be taken out.)
        assert 0 < int(products) <= sum(makers) + 2, rows
