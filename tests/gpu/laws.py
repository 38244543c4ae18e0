"""Invariance and the absence of host synchronization on one device, through the engines that it can run.

    python tests/gpu/laws.py [--device cpu]

Five K-FAC steps in fp32 on tiny models: accumulated against whole batches, DeepSpeed ZeRO 0-3, FSDP2 and DDP in a group
of one rank against the single engine; every form of the factors. Then steps under
`torch.cuda.set_sync_debug_mode("error")` on the single engine, and a checkpoint with factorizations under way. The last
line is `worst <number>`; the exit status is 1 when it is above 1e-5, a step synchronizes or a resumed run is another.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "dist")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import nn  # noqa: E402

LIMIT = 1e-5


def start_group(device: torch.device) -> None:
    """A process group of this process alone."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group(backend, init_method=f"file://{store.name}.group", rank=0, world_size=1)


def invariance(device: torch.device) -> float:
    """Largest relative difference of a parameter to the single engine on the whole batch."""
    import cases

    worst = 0.0
    chosen = [
        cases.Case(model, engine, 1, gas, "non_reentrant" if gas > 1 else "none", True)
        for model in cases.MODELS
        for engine, gas in zip(cases.ENGINES, (1, 4, 1, 4, 1, 4), strict=True)
    ]
    chosen += [
        cases.Case("llama-full", "zero-2", 1, 4, "none", True, variant=variant)
        for variant in cases.VARIANTS
        if variant
    ]
    references: dict[Any, Any] = {}
    for case in chosen:
        if case.reference not in references:
            references[case.reference] = cases.reference(case, device)
        found, where = cases.difference(cases.sharded(case, 0, device), references[case.reference])
        worst = max(worst, found)
        print(f"{case}  {found:.2e}  {where}", flush=True)
    return worst


def no_synchronization(device: torch.device) -> None:
    """Steps of every form of the factors while CUDA refuses to wait; raises where one does."""
    import cases

    from dsso.engines import make_optimizer
    from dsso.engines.single import SingleEngine
    from dsso.optim.kfac import Config

    forms = {name: cases.VARIANTS[name] for name in ("", "low-rank", "blocks", "delayed")}
    for name, settings in forms.items():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 8)).to(device)
        config = Config(factor_interval=2, inverse_interval=4, **settings)
        engine = SingleEngine(model, make_optimizer(model, "KFAC", config, device), device, 1, 32)
        engine.train()
        batches = [
            (torch.randn(32, 40, device=device), torch.randint(8, (32,), device=device)) for _ in range(4)
        ]
        for step in range(24):
            if step == 8 and device.type == "cuda":
                torch.cuda.set_sync_debug_mode("error")
            x, y = batches[step % 4]
            engine.backward(nn.functional.cross_entropy(engine(x), y), terms=32)
            engine.step()
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
            print(f"no host synchronization in 16 steps: {name or 'dense'}", flush=True)
        else:
            print(f"16 steps, not watched (only CUDA refuses to wait): {name or 'dense'}", flush=True)


def resumes_exactly(device: torch.device) -> bool:
    """A checkpoint with factorizations under way in the background goes on as the uninterrupted run, bit by bit."""
    import cases

    from dsso.engines import make_optimizer
    from dsso.engines.single import SingleEngine
    from dsso.optim.kfac import Config

    def made(settings: dict[str, Any]) -> SingleEngine:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 8)).to(device)
        config = Config(factor_interval=1, inverse_interval=2, **settings)
        engine = SingleEngine(model, make_optimizer(model, "KFAC", config, device), device, 1, 32)
        engine.train()
        return engine

    def step(engine: SingleEngine, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        x, y = torch.randn(32, 40, generator=generator), torch.randint(8, (32,), generator=generator)
        engine.backward(nn.functional.cross_entropy(engine(x.to(device)), y.to(device)), terms=32)
        engine.step()

    same = True
    for form in ("delayed", "mixture"):
        settings = {key: cases.VARIANTS[form][key] for key in cases.SHAPING if key in cases.VARIANTS[form]}
        straight, resumed = made(settings), made(settings)
        with tempfile.TemporaryDirectory() as folder:
            for number in range(12):
                if number == 7:
                    straight.save_checkpoint(folder, "here", {})
                step(straight, number)
            resumed.load_checkpoint(folder, "here")
        for number in range(7, 12):
            step(resumed, number)
        mine, theirs = resumed.gathered_state_dict(), straight.gathered_state_dict()
        exact = all(torch.equal(mine[name], theirs[name]) for name in theirs)
        print(f"resumed in the middle, {form}: {'the same bits' if exact else 'NOT the same'}", flush=True)
        same = same and exact
    return same


def main() -> None:
    """Run all, print, and exit with what they found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda":
        torch.cuda.set_device(0)
        device = torch.device("cuda", 0)
        # fp32 means fp32 here.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    no_synchronization(device)
    same = resumes_exactly(device)
    start_group(device)
    worst = invariance(device)
    print(f"worst {worst:.3e}", flush=True)
    sys.stdout.flush()
    os._exit(int(not (same and worst <= LIMIT)))


if __name__ == "__main__":
    main()
