"""Adapters between a training engine and dsso; nothing else imports deepspeed."""

from dsso.engines.build import build, make_forward_optimizer, make_optimizer
from dsso.engines.environment import Environment, launch_environment, start, stop

__all__ = [
    "Environment",
    "build",
    "launch_environment",
    "make_forward_optimizer",
    "make_optimizer",
    "start",
    "stop",
]
