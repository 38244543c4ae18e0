"""One rank of the invariance table: runs the cases of a file, rank 0 writes the differences."""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu" if not os.environ.get("CUDA_VISIBLE_DEVICES") else "cuda")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import cases
import torch

from dsso.engines import launch_environment, start, stop
from dsso.parallel.collectives import gather_objects


def main() -> None:
    """`worker.py CASES REFERENCES OUT`."""
    source, references, out = map(Path, sys.argv[1:4])
    environment = launch_environment()
    start(environment, 5.0)
    torch.set_num_threads(1)
    wanted = pickle.loads(references.read_bytes())
    chosen = pickle.loads(source.read_bytes())
    for case in chosen:
        begun = time.monotonic()
        found = cases.sharded(case, environment.rank)
        every = gather_objects(cases.difference(found, wanted[case.reference]) if found else (0.0, ""))
        if environment.rank == 0:
            worst, where = max(every)
            if case.dtype == "bfloat16":
                exact = replace(case, dtype="float32").reference
                rounding, _ = cases.difference(wanted[case.reference], wanted[exact])
            else:
                rounding = 0.0
            line = {
                "case": str(case),
                "worst": worst,
                "where": where,
                "rounding": rounding,
                "seconds": time.monotonic() - begun,
            }
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    stop()


main()
