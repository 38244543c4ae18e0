"""In the place of `launch/train.py` under `launch/sweep.py --launcher`: short runs that end as their lr says.

    python tests/launch/stub.py launch/train.py --ds_config R --output_dir D --resume auto

0.9 diverges and goes on until it is signalled, 0.8 fails, 0.7 waits for a signal the first time, 0.6 diverges and is
deaf, 0.5 is out of time at once; others finish.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from types import FrameType

STEPS = 10


def main() -> int:
    """Write what a run writes; returns the exit status."""
    words = dict(zip(sys.argv[2::2], sys.argv[3::2], strict=True))
    assert Path(sys.argv[1]).name == "train.py"
    assert words["--resume"] == "auto"
    recipe = json.loads(Path(words["--ds_config"]).read_text())
    out = Path(words["--output_dir"])
    lr, seed = recipe["optimizer"]["params"]["lr"], recipe["dsso"]["train"].get("seed", 0)
    tau = recipe["optimizer"]["params"].get("tau") or 1.0
    print(f"stub: lr {lr} seed {seed}", flush=True)
    if lr == 0.8:
        print("\nrecipe error: dsso.task.data_dir: there is no such directory\n  got: 'x'", file=sys.stderr)
        return 2
    if lr == 0.5:
        return 128 + signal.SIGUSR1
    before = (out / "metrics.jsonl").exists()
    heard: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        heard.append(signum)

    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(one, signal.SIG_IGN if lr == 0.6 else note)
    with (out / "metrics.jsonl").open("w") as log:
        for step in range(1, STEPS + 1):
            loss = 2.0 * step if lr in (0.6, 0.9) else (1.0 + 0.1 * seed) / (1 + step * lr)
            print(json.dumps({"step": step, "loss": loss, "seconds": float(step)}), file=log, flush=True)
            if step == 5 and lr == 0.7 and not before:
                return wait(heard)
        if lr in (0.6, 0.9):
            return wait(heard)
        value = 0.5 + lr - 0.1 * tau + 0.01 * seed
        line = {"split": "validation", "step": STEPS, "metrics": {"f1": value, "loss": 1 - value}}
        print(json.dumps({"step": STEPS, "eval": line}), file=log)
    summary = {"main_metric": "f1", "best_metric": value, "wall_seconds": 10.0, "train_loss": loss}
    (out / "summary.json").write_text(json.dumps(summary))
    return 0


def wait(heard: list[int]) -> int:
    """The status of a run that stops at a signal; 99 when none comes."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if heard:
            print("stopped; --resume auto goes on", flush=True)
            return 128 + heard[0]
        time.sleep(0.01)
    return 99


if __name__ == "__main__":
    sys.exit(main())
