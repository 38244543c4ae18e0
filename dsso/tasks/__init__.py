"""What is learnt: tasks, models, parameter-efficient fine-tuning, batches and metrics.

The order of use is `load_task`, `models.load`, `adapters.apply`, `prepare`::

    task = tasks.load_task(config.task, config.train.seed)
    bundle = tasks.models.load(config.model, task, config.task)
    bundle = tasks.adapters.apply(bundle, config.peft)
    ready = tasks.prepare(task, bundle, config.task)
"""

from dsso.tasks import adapters, data, models, objectives, outline
from dsso.tasks.data import Batch
from dsso.tasks.loading import available, load_task, without_data
from dsso.tasks.prepared import PreparedTask, prepare
from dsso.tasks.source import DataMissing

__all__ = [
    "Batch",
    "DataMissing",
    "PreparedTask",
    "adapters",
    "available",
    "data",
    "load_task",
    "models",
    "objectives",
    "outline",
    "prepare",
    "without_data",
]
