"""A rank that torchrun starts: in the first attempt one of them is killed, in the second they add up their numbers.

With `plain` as its argument the process group is torch's own from the environment.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist

from dsso.engines.environment import launch_environment, start, stop

SECONDS = 15.0

if __name__ == "__main__":
    place = launch_environment()
    if sys.argv[1:] == ["plain"]:
        dist.init_process_group("gloo", timeout=timedelta(seconds=SECONDS))
    else:
        start(place, SECONDS / 60.0)
    dist.all_reduce(torch.ones(1))
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        if place.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    number = torch.tensor([place.rank + 1.0])
    dist.all_reduce(number)
    if place.rank == 0:
        print(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}: {number.item():.0f}", flush=True)
    stop()
