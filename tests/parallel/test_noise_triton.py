"""The kernels for CUDA: run by Triton's interpreter on a CPU, compiled for a GPU that need not be there."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dsso.parallel import noise, noise_triton

TRITON = importlib.util.find_spec("triton") is not None
compiled = pytest.mark.skipif(not TRITON, reason="Triton is not installed")
CPU = torch.device("cpu")


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
    # Kernels know when they are made whether they will be interpreted.
    env = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    tests = Path(__file__).with_name("noise_interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout


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
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
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
