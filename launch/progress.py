"""What rank 0 prints while a run goes on: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

_SHOWN = (
    ("loss", "loss", "{:.4f}"),
    ("lr", "lr", "{:.2e}"),
    ("update_norm", "|u|", "{:.3g}"),
    ("clip_scale", "clip", "{:.3g}"),
    ("cos_update_grad", "cos", "{:.3f}"),
)


class Progress:
    """Progress of one run.

    Args:
        start: steps already taken.
        total: steps that the run will take.
        speak: rank 0.
    """

    def __init__(self, start: int, total: int, speak: bool) -> None:
        self.total = total
        self.speak = speak
        self._bar = (
            tqdm(total=total, initial=start, unit="step", dynamic_ncols=True)
            if speak and sys.stderr.isatty()
            else None
        )

    def step(self) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update()

    def figures(self, step: int, line: Mapping[str, Any]) -> None:
        """Show the figures of a logged step."""
        shown = []
        for key, label, form in _SHOWN:
            if key in line:
                shown.append(f"{label} {form.format(line[key])}" if line[key] is not None else f"{label} -")
        if self._bar is not None:
            self._bar.set_postfix_str("  ".join(shown))
        else:
            self.say(f"step {step}/{self.total}  {'  '.join(shown)}  {line['seconds']:.1f} s")

    def say(self, message: str) -> None:
        """Print a message without tearing the bar."""
        if not self.speak:
            return
        if self._bar is not None:
            self._bar.write(message)
        else:
            print(message, flush=True)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
