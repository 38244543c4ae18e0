"""Adapters between a training engine and dsso; nothing else imports deepspeed."""

from dsso.engines.build import build, make_forward_optimizer, make_optimizer
from dsso.engines.environment import arrange, launch_environment, settle, start, stop
from dsso.engines.launchers import Environment

__all__ = [
    "Environment",
    "arrange",
    "build",
    "launch_environment",
    "make_forward_optimizer",
    "make_optimizer",
    "settle",
    "start",
    "stop",
]
