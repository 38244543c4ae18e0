"""Lets accelerate run on a CPU what it starts on GPUs alone: DeepSpeed, FSDP2, and ranks without `use_cpu`.

As a script, `hf_cpu.py PROGRAM …` runs a program so, as a user's own machine would.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def allow() -> None:
    """Teach accelerate, in this process."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    backend_of, init = PartialState._prepare_backend, AcceleratorState.__init__

    def prepare_backend(self: Any, cpu: bool = False, *args: Any, **kwargs: Any) -> Any:
        backend, kind = backend_of(self, cpu, *args, **kwargs)
        if "LOCAL_RANK" in os.environ and kind is DistributedType.NO:
            return "gloo", DistributedType.MULTI_CPU
        return backend, kind

    def initialize(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type is DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = plugin

    PartialState._prepare_backend = prepare_backend
    AcceleratorState.__init__ = initialize


if __name__ == "__main__":
    allow()
    # `deepspeed` puts --local_rank before the words that it was given.
    sys.argv = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    runpy.run_path(sys.argv[0], run_name="__main__")
