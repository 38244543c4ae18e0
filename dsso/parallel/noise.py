"""Random directions that are never stored: element i of a parameter's z can be made anywhere, at any time.

z depends on (seed, name of the parameter, unsharded flat index i, stream) alone, so every rank makes just the elements
that it holds, whatever the sharding, and the same direction is made again to take a step along it.

Specification. Philox4x32-10 (Salmon et al. 2011) with

    key      (seed mod 2^32, seed div 2^32)
    counter  (b mod 2^32, h mod 2^32, h div 2^32, stream 2^8 + b div 2^32)

with h the 64-bit BLAKE2b hash of the cleaned name, little-endian, and b the number of a block of elements. It gives
four words w of 32 bits.

Rademacher
: 128 elements a block: element 128 b + 32 k + j is -1 where bit j of w_k is set, else +1. The same on every device.

Gaussian
: four elements a block, by Box and Muller: elements 4 b + 2 k and 4 b + 2 k + 1 are r cos and r sin of 2 pi t / 2^24,
  with t = w_(2k+1) div 2^8, r = sqrt(-2 ln u) and u = (w_2k div 2) / 2^31 + 2^-32. The same up to the rounding of
  logarithm, sine and cosine in fp32.

`out = base + scale z` is computed in fp32 and rounded once.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dsso.parallel import collectives, noise_cpu, noise_triton
from dsso.phases import phased

Kind = Literal["rademacher", "gaussian"]

MAX_STREAM = 2**23
"""Streams of one seed and name; as many above them are those of `rounding.py`."""
PER_BLOCK: dict[Kind, int] = {"rademacher": 128, "gaussian": 4}
"""Elements that one counter gives."""
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_ROUNDS = 10
_CHUNK = 1 << 20
"""Elements that the plain form makes at a time, a multiple of every block."""
_FUSED = [True]
"""Kernels may be used: set by `agree`, in a list so that all modules see it."""
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def clean(name: str) -> str:
    """The name of a parameter without what compilers, engines and checkpointing put into it."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


@dataclass(frozen=True)
class Direction:
    """The z of one parameter.

    Attributes:
        seed: 64 bits.
        name: of the parameter; cleaned by `clean`.
        stream: tells apart several directions of one seed, below 2^23.
        kind: its distribution.
    """

    seed: int
    name: str
    stream: int = 0
    kind: Kind = "gaussian"

    def __post_init__(self) -> None:
        if not 0 <= self.stream < MAX_STREAM:
            raise ValueError(f"a stream is a number from 0 to {MAX_STREAM - 1}, got {self.stream}")
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"a seed is a number from 0 to 2^64 - 1, got {self.seed}")

    @property
    def words(self) -> tuple[int, int, int, int, int]:
        """The parts of key and counter that do not depend on the element: seed (2), hash (2), stream."""
        digest = hashlib.blake2b(clean(self.name).encode(), digest_size=8).digest()
        name = int.from_bytes(digest, "little")
        return self.seed & _WORD, self.seed >> 32, name & _WORD, name >> 32, self.stream


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10.

    Args:
        counter: four words, int64 tensors of one shape with values below 2^32.
        key: two words.

    Returns:
        Four words of the same shape.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The product wraps around 2^64; its halves are right whatever the sign.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((p1 >> 32) & _WORD) ^ c1 ^ k0, p1 & _WORD
        c2, c3 = ((p0 >> 32) & _WORD) ^ c3 ^ k1, p0 & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def words_of(
    direction: Direction, stream: int, per: int, start: int, count: int, device: torch.device | str
) -> Tensor:
    """Philox's words of the blocks that elements start, …, start + count - 1 lie in.

    Args:
        direction: seed and name.
        stream: in the place of the direction's own.
        per: elements a block.
        start: first flat index.
        count: number of elements.
        device: where.

    Shapes:
        result: [blocks, 4], int64.
    """
    seed_0, seed_1, name_0, name_1, _ = direction.words
    block = torch.arange(start // per, -(-(start + count) // per), device=device, dtype=torch.int64)
    counter = (
        block & _WORD,
        torch.full_like(block, name_0),
        torch.full_like(block, name_1),
        (block >> 32) | (stream << 8),
    )
    return torch.stack(philox(counter, (seed_0, seed_1)), 1)


def sample(direction: Direction, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Elements start, …, start + count - 1 of z, in fp32: the specification in torch's own operations.

    Args:
        direction: which.
        start: first flat index.
        count: number of elements.
        device: where.

    Shapes:
        result: [count].
    """
    per = PER_BLOCK[direction.kind]
    words = words_of(direction, direction.stream, per, start, count, device)
    if direction.kind == "rademacher":
        bits = (words.unsqueeze(2) >> torch.arange(32, device=device)) & 1
        z = 1.0 - 2.0 * bits.to(torch.float32)
    else:
        u = (words[:, 0::2] >> 1).to(torch.float32) * 2.0**-31 + 2.0**-32
        turn = (words[:, 1::2] >> 8).to(torch.float32) * (2.0 * torch.pi / 2.0**24)
        radius = torch.sqrt(-2.0 * torch.log(u))
        z = torch.stack([radius * torch.cos(turn), radius * torch.sin(turn)], 2)
    return z.reshape(-1).narrow(0, start % per, count)


@torch.no_grad()
def fused_allowed() -> bool:
    """Whether kernels may be used, see `agree`."""
    return _FUSED[0]


def agree(device: torch.device) -> None:
    """Have all ranks make directions in the same way: by a kernel only where each of them has one; collective.

    The forms give the same stream up to the rounding of log, sin and cos, which replicas must not differ in.

    Args:
        device: where the weights are.
    """
    mine = noise_triton.works(device) if device.type == "cuda" else noise_cpu.works()
    every = collectives.gather_objects(mine)
    _FUSED[0] = all(every)
    if any(every) and not all(every) and collectives.rank() == 0:
        lacking = ", ".join(str(index) for index, works in enumerate(every) if not works)
        warnings.warn(
            f"random directions are made by torch's own operations on all ranks, which is slower: rank(s) {lacking}"
            " cannot build or use the kernel for them",
            stacklevel=3,
        )


@phased("noise")
def add(out: Tensor, base: Tensor, direction: Direction, start: int, scale: float) -> None:
    """Set `out` to base + scale z, computed in fp32 and rounded once to the type of `out`.

    Args:
        out: contiguous; may be `base` itself.
        base: contiguous, of as many elements, of the type of `out` or in fp32.
        direction: z.
        start: unsharded flat index of the first element.
        scale: of z; rounded to fp32.

    Raises:
        ValueError: tensors that do not fit, are not contiguous, or of a type that is not floating.
    """
    if out.numel() != base.numel() or not (out.is_contiguous() and base.is_contiguous()):
        raise ValueError("two contiguous tensors of one size are needed")
    if not (out.is_floating_point() and base.is_floating_point()):
        raise ValueError(f"no noise can be added to {base.dtype} and kept in {out.dtype}")
    if not out.numel():
        return
    fused = noise_triton if out.is_cuda else noise_cpu
    if fused_allowed() and fused.add(out, base, direction.words, direction.kind, start, scale):
        return
    into, of = out.view(-1), base.view(-1)
    for at in range(0, out.numel(), _CHUNK):
        length = min(_CHUNK, out.numel() - at)
        z = sample(direction, start + at, length, out.device)
        wide = torch.float64 if out.dtype == torch.float64 else torch.float32
        moved = of.narrow(0, at, length).to(wide) + z.to(wide) * torch.tensor(scale, dtype=torch.float32)
        into.narrow(0, at, length).copy_(moved)
