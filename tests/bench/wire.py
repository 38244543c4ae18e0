"""One of two ranks: what a measurement of workload R puts on the wire, over an unpacked all-reduce of all factors.

A ring all-reduce sends every number twice (less 1/W), a reduction to one rank once (less 1/W): the ratio of what the
calls move is half of the ratio of their sizes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import workload_r as workload  # noqa: E402
from kfac import VARIANTS, method  # noqa: E402


def main() -> None:
    """Print `{variant: ratio}` on rank 0."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    out = {}
    for name, settings in VARIANTS.items():
        model = workload.model()
        found = method(model, dist.get_rank(), dist.get_world_size(), **settings)
        ids, labels = workload.batch(dist.get_rank())
        found.begin_window(0, False)
        found.before_backward(1.0, float(labels.numel()), last=True)
        workload.loss(model(ids), labels).backward()
        bad = found.measured_badly()
        assert bad is not None
        found.update(0, bad)
        unpacked = sum(layer.side_a**2 + layer.outputs**2 for layer in found.layers)
        out[name] = found.statistics.sent / (2 * unpacked)
    if dist.get_rank() == 0:
        print(json.dumps(out), flush=True)
    dist.barrier()


main()
