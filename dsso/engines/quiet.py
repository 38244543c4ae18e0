"""Remarks of DeepSpeed that a run without any fault draws, and that read as if there were one."""

from __future__ import annotations

import logging

IRRELEVANT = (
    # A schedule is asked for its first rate before the first step, by DeepSpeed itself.
    "Attempting to get learning rate from scheduler before it has started",
    # Any optimizer but DeepSpeed's own. dsso compares the partition with the model before the first step.
    "You are using ZeRO with an untested optimizer",
    # The machine has no accelerator, which the user knows and the run says.
    "Setting accelerator to CPU. If you have GPU",
)
"""How these messages are told from all others, which stay."""


def _relevant(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(part in message for part in IRRELEVANT)


def quiet() -> None:
    """Drop them, and nothing else; to be called before DeepSpeed is imported."""
    logger = logging.getLogger("DeepSpeed")
    if _relevant not in logger.filters:
        logger.addFilter(_relevant)
