"""One number for all weights, the same on any number of ranks; and whether ranks that should hold the same do."""

from __future__ import annotations

import hashlib

from dsso.errors import RunError
from dsso.optim._probes import ForwardOptimizer
from dsso.parallel import collectives
from dsso.parallel.checksum import checksum


def digest(optimizer: ForwardOptimizer) -> str:
    """16 hexadecimal digits made from every bit of the trained weights, fp32 copies where there are some; collective.

    Args:
        optimizer: attached.

    Raises:
        RunError: on every rank, when two ranks hold the same piece of a parameter and it is not the same.
    """
    spans = optimizer.table.ranks[collectives.rank()]
    own = {
        (span.name, span.start, span.numel): checksum(view, span.start)
        for kind, span, view in optimizer.views(spans)
        if kind == "weight"
    }
    sums: dict[tuple[str, int, int], int] = {}
    for who, found in enumerate(collectives.gather_objects(own)):
        for key, value in found.items():
            if sums.setdefault(key, value) != value:
                raise RunError(
                    f"rank {who} holds other weights than the ranks before it",
                    where=f"parameter {key[0]}",
                    remedy="the ranks have gone apart: look for a model or data that are not the same on all ranks, or"
                    " for a faulty device, and go on from the last checkpoint with --resume auto",
                )
    whole: dict[str, int] = {}
    for (name, _, _), value in sums.items():
        whole[name] = (whole.get(name, 0) + value) % 2**64
    told = "\n".join(f"{name} {value}" for name, value in sorted(whole.items()))
    return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()
