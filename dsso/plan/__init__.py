"""What a run will need before it starts: memory of every rank, bytes on the wire, operations, and what fits.

In a program::

    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(config)
    found = plan(model, load_recipe("recipe.json"), world_size=8, gpu_gb=80)
    print(text(found))

Everything follows from shapes: a model on the meta device does, and no process group is needed. Counted are weights,
gradients, optimizer state, factors, statistics, and the buffers that dsso and the engine make. **Activations are not
counted**, nor are temporary results inside single operations, the allocator's gaps and the context of the device
(about half a gigabyte on a GPU): what is left beside the peak has to hold them.
"""

from __future__ import annotations

from dsso.plan.planner import STRATEGIES, plan, resolve
from dsso.plan.report import Operations, Plan, RankBytes, Remedy, StrategyRow, Wire
from dsso.plan.words import text

__all__ = [
    "STRATEGIES",
    "Operations",
    "Plan",
    "RankBytes",
    "Remedy",
    "StrategyRow",
    "Wire",
    "plan",
    "resolve",
    "text",
]
