"""One of four ranks: sums at their owners, over all ranks and over the rows and columns of a 2 x 2 mesh at once."""

from __future__ import annotations

import os
import random

import torch
import torch.distributed as dist

from dsso.parallel.buckets import OwnerBuckets

LIKE = torch.zeros(())


def vectors(seed: int, count: int, ranks: int) -> list[tuple[tuple[int, ...], int]]:
    """Owners and sizes of some vectors, the same on every rank."""
    draw = random.Random(seed)
    return [
        (tuple(draw.sample(range(ranks), draw.randint(1, ranks))), draw.choice([0, 1, 2, 7, 50, 333]))
        for _ in range(count)
    ]


def content(rank: int, index: int, size: int) -> torch.Tensor:
    """What one rank adds to one vector: whole numbers, whose sums are exact."""
    return torch.randint(
        -50, 50, (size,), generator=torch.Generator().manual_seed(rank * 1000 + index)
    ).float()


def expected(members: list[int], me: int, plan: list[tuple[tuple[int, ...], int]]) -> list[torch.Tensor]:
    """Sums that `me`, a rank in the group, is to get."""
    return [
        torch.stack([content(member, i, size) for member in members]).sum(0)
        for i, (owners, size) in enumerate(plan)
        if me in owners
    ]


def round_trip(
    members: list[int], group: dist.ProcessGroup | None, capacity: int, seed: int
) -> tuple[OwnerBuckets, list[tuple[tuple[int, ...], int]]]:
    """Put all vectors; the round is not finished."""
    plan = vectors(seed, 12, len(members))
    coming = {r: sum(size for owners, size in plan if r in owners) for r in range(len(members))}
    buckets = OwnerBuckets(capacity, LIKE, torch.float32, group, coming=coming if seed % 2 else None)
    for index, (owners, size) in enumerate(plan):
        scratch = content(dist.get_rank(), index, size)
        buckets.put(owners, scratch)
        scratch.fill_(float("nan"))  # what was put may be reused at once
    return buckets, plan


def check(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    """Equal, one by one."""
    assert len(found) == len(wanted)
    for mine, right in zip(found, wanted, strict=True):
        assert torch.equal(mine, right), (mine, right)


def main() -> None:
    """Raise on any difference."""
    dist.init_process_group("gloo")
    rank, everyone = dist.get_rank(), list(range(4))
    for capacity in (1, 3, 64, 10**6):
        for seed in range(3):
            buckets, plan = round_trip(everyone, None, capacity, seed)
            check(buckets.finish(), expected(everyone, rank, plan))
    # Two pairs of groups of equal size: rows share data, columns too, and all of them have buckets under way at once.
    rows, columns = [[0, 1], [2, 3]], [[0, 2], [1, 3]]
    row_groups = [dist.new_group(members) for members in rows]
    column_groups = [dist.new_group(members) for members in columns]
    row, column = rank // 2, rank % 2
    for capacity in (5, 1000):
        first, first_plan = round_trip(rows[row], row_groups[row], capacity, 10 + row)
        second, second_plan = round_trip(columns[column], column_groups[column], capacity, 20 + column)
        check(second.finish(), expected(columns[column], rank // 2, second_plan))
        check(first.finish(), expected(rows[row], rank % 2, first_plan))
    narrow = OwnerBuckets(10, LIKE, torch.bfloat16)
    narrow.put([2], torch.full((25,), 1.0 + rank))
    got = narrow.finish()
    if rank == 2:
        assert got[0].dtype == torch.float32
        assert torch.equal(got[0], torch.full((25,), 10.0))
    dist.barrier()
    if rank == 0:
        print("buckets agree", flush=True)
    os._exit(0)


main()
