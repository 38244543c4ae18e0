"""Law L1 as a table: five K-FAC steps in every cell, against a single process on the whole batch.

    python tests/dist/invariance.py            # the whole matrix
    python tests/dist/invariance.py --few      # a slice of it
    python tests/dist/invariance.py --ranks 2  # one number of ranks only

The last line is `worst <number>`: the largest relative difference of a parameter in fp32; the exit status is 1 where
that is above 1e-5.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

LIMIT = 1e-5
"""Largest relative difference of a parameter in fp32."""
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import cases  # noqa: E402


def run(
    chosen: Sequence[cases.Case], world_size: int, folder: Path, timeout: float = 3000.0
) -> list[dict[str, object]]:
    """Run cases of one number of ranks in one process group; lines as `worker.py` writes them."""
    references = {}
    for case in chosen:
        for needed in (case, replace(case, dtype="float32")):
            if needed.reference not in references:
                references[needed.reference] = cases.reference(needed)
    source, wanted, out = folder / "cases", folder / "references", folder / f"out_{world_size}.jsonl"
    source.write_bytes(pickle.dumps(list(chosen)))
    wanted.write_bytes(pickle.dumps(references))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={world_size}",
    ]
    command += [str(HERE / "worker.py"), str(source), str(wanted), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(HERE), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        start_new_session=True,
    )
    if done.returncode:
        sys.stderr.write(out.read_text() if out.exists() else "no case ended\n")
        sys.stderr.write(done.stdout[-4000:] + done.stderr[-8000:])
        raise RuntimeError(f"the workers ended with status {done.returncode}")
    return [json.loads(line) for line in out.read_text().splitlines()]


def main() -> int:
    """Print the table; 0 where all is within the limit."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="a slice of the matrix")
    parser.add_argument("--only", default="", help="cases whose line contains this")
    parser.add_argument(
        "--bf16", action="store_true", help="bf16 cases at 2 ranks as well, against one process in bf16"
    )
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 3, 4, 8], help="numbers of ranks")
    arguments = parser.parse_args()
    worst, rounded, ran = 0.0, 0.0, False
    with tempfile.TemporaryDirectory() as folder:
        for world_size in arguments.ranks:
            chosen = list(cases.few_cases(world_size) if arguments.few else cases.all_cases(world_size))
            if 2 <= world_size <= 3:
                chosen += list(cases.variant_cases(world_size))
            if world_size <= 3:
                chosen += [case for name in cases.OTHERS for case in cases.method_cases(name, world_size)]
                chosen += list(cases.option_cases(world_size))
            if arguments.bf16 and world_size == 2:
                chosen += list(cases.bf16_cases(world_size))
            chosen = [case for case in chosen if arguments.only in str(case)]
            if not chosen:
                continue
            ran = True
            for line in run(chosen, world_size, Path(folder)):
                note = f"  bf16 itself {line['rounding']:.2e}" if line["rounding"] else ""
                print(f"{line['case']}  {line['worst']:.2e}{note}  {line['where']}", flush=True)
                if " bfloat16 " in str(line["case"]):
                    rounded = max(rounded, float(line["worst"]))
                else:
                    worst = max(worst, float(line["worst"]))
    if not ran:
        parser.error(f"no case at {arguments.ranks} ranks has {arguments.only!r} in its line")
    if arguments.bf16:
        print(f"worst in bf16 {rounded:.3e}")
    print(f"worst {worst:.3e}")
    # `few` and `only` have to keep to it as well: the law knows no exceptions.
    return int(not worst <= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
