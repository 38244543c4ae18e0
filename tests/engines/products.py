"""Products with curvature on every engine, of one vector that is known everywhere.

As a script, one rank of a process group: `products.py FOLDER` makes every product on every engine. Rank 0 writes what
came out (`<engine> <kind> <how>.pt`), every rank the words of a refusal (`.txt`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
from torch import Tensor, nn

from dsso.curvature.labels import sample_labels
from dsso.engines import estimates, launch_environment, start, stop
from dsso.engines.ddp import DDPEngine
from dsso.engines.fsdp2 import FSDP2Engine
from dsso.engines.single import SingleEngine
from dsso.errors import RunError
from dsso.optim._elementwise import ElementwiseMethod
from dsso.optim._estimating import Estimate, Pieces, State
from dsso.optim._partition import Clipping, PartitionOptimizer
from dsso.optim._rules import Rule
from dsso.parallel import noise
from dsso.parallel.collectives import gather_objects

CPU = torch.device("cpu")
EXAMPLES, GAS, TOKENS, CLASSES = 16, 2, 6, 5
ENGINES = ("single", "ddp", "0", "1", "2", "3", "fsdp2")
SHARDED = ("3", "fsdp2")
PRODUCTS = (
    ("ggn", "difference"),
    ("ggn", "double_backward"),
    ("ggn_sampled", "difference"),
    ("ggn_sampled", "double_backward"),
    ("gradient_pair", "difference"),
    ("hessian", "double_backward"),
)
SEED = 11


class Net(nn.Module):
    """Attention by torch's own kernel, layers of uneven sizes, dropout, a layer that no loss reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.norm = nn.Linear(8, 8), nn.LayerNorm(8)
        self.hidden, self.drop = nn.Linear(8, 17), nn.Dropout(0.0)
        self.last, self.unused = nn.Linear(17, CLASSES, bias=False), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).view(len(x), TOKENS, 2, 4).transpose(1, 2)
        met = nn.functional.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(len(x), TOKENS, 8)
        return self.last(self.drop(torch.tanh(self.hidden(self.norm(met + x)))))


def net() -> Net:
    """The same weights every time."""
    torch.manual_seed(0)
    return Net()


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, labels, and which tokens count: unevenly shared by ranks and micro-batches."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(EXAMPLES, TOKENS, 8, generator=generator)
    y = torch.randint(CLASSES, (EXAMPLES, TOKENS), generator=generator)
    mask = torch.rand(EXAMPLES, TOKENS, generator=generator) < torch.linspace(0.2, 0.9, EXAMPLES)[:, None]
    return x, y, mask


def drawn(scores: Tensor, examples: Tensor, places: Tensor) -> Tensor:
    """One label a token that counts."""
    return sample_labels(scores.detach(), "cross_entropy", 0, 0, examples, places)


def batches(engine: Any) -> Iterator[estimates.MicroBatch]:
    """This rank's."""
    x, y, mask = data()
    terms = float(mask.sum()) / (engine.world_size * GAS)
    for part in torch.arange(EXAMPLES).chunk(engine.world_size)[engine.rank].chunk(GAS):
        where = mask[part].nonzero()
        examples, places = part[where[:, 0]], where[:, 1]

        def scores(part: Tensor = part) -> Tensor:
            return engine(x[part])[mask[part]]  # type: ignore[no-any-return]

        def loss(f: Tensor, wanted: Tensor) -> Tensor:
            return nn.functional.cross_entropy(f, wanted, reduction="sum") / terms

        yield estimates.MicroBatch(
            terms,
            scores,
            lambda f, part=part: loss(f, y[part][mask[part]]),
            lambda f, e=examples, p=places: loss(f, drawn(f, e, p)),
        )


class Probing(ElementwiseMethod):
    """Asks for one product and keeps it."""

    def __init__(self, names: Sequence[str], kind: Estimate, how: Any) -> None:
        self.rest, self.workers, self.owners = {}, {}, {}
        self.taken, self.kind, self.products, self.device = frozenset(names), kind, how, CPU
        self.probed = self.taken
        self.displacement = torch.zeros(())
        self.ended, self.calls = False, 0

    def wants_estimate(self, step: int) -> Estimate | None:
        return None if self.ended else self.kind

    def had_estimate(self, step: int) -> None:
        self.ended = True

    def direction(self, pieces: Pieces, step: int) -> Sequence[Tensor]:
        return pieces.probe(SEED, step)

    def estimate(
        self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor, pieces: Pieces
    ) -> None:
        assert take
        self.calls += 1
        for g, state in zip(gradients, states, strict=True):
            found = state["found"]
            if self.kind != "gradient_pair":
                found.copy_(g)
            elif self.calls == 1:
                found.copy_(g / (2 * self.displacement))
            else:
                found.sub_(g / (2 * self.displacement))

    def rules(self) -> dict[str, Rule]:
        return {name: Rule("sgd", kept=("found",)) for name in self.taken}

    def begin_window(self, step: int, retry: bool) -> None: ...

    def before_backward(self, scale: Any, terms: Any, last: bool = False) -> None: ...

    def measured_badly(self) -> None:
        return None

    def act(self, gradients: Sequence[Tensor], states: Sequence[State], take: Tensor) -> list[Tensor]:
        return [torch.zeros_like(g) for g in gradients]

    def counts(self) -> Tensor:
        return torch.zeros(1)

    def note(self, counts: Tensor) -> None: ...

    def health(self) -> dict[str, float]:
        return {}

    def counters(self) -> dict[str, Any]:
        return {"common": {}, "owned": {}}

    def load_counters(self, counters: Mapping[str, Any]) -> None: ...


def build(engine: str, kind: Estimate, how: str, world_size: int) -> Any:
    """An engine that wants one product."""
    model = net()
    names = [name for name, _ in model.named_parameters()]
    method = Probing(names, kind, how)
    optimizer = PartitionOptimizer(model.parameters(), 0.1, method.rules(), method, Clipping())
    micro = EXAMPLES // (GAS * world_size)
    if engine in ("single", "ddp"):
        made: Any = (SingleEngine if engine == "single" else DDPEngine)(model, optimizer, CPU, GAS, micro)
    elif engine == "fsdp2":
        made = FSDP2Engine(model, optimizer, CPU, GAS, micro)
    else:
        from dsso.engines.deepspeed import DeepSpeedEngine

        config = {
            "train_batch_size": EXAMPLES,
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": GAS,
            "gradient_clipping": 0.0,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(engine), "sub_group_size": 10**12},
            "steps_per_print": 10**9,
        }
        made = DeepSpeedEngine(model, optimizer, CPU, config)
    made.train()
    return made


def found(engine: str, kind: Estimate, how: str, world_size: int) -> dict[str, Tensor]:
    """The product, flat, by parameter; on every rank."""
    made = build(engine, kind, how, world_size)
    try:
        estimates.run(made, lambda: batches(made))
        assert made.global_steps == made.optimizer.steps == 0
        own = [
            (span.name, span.start, view.clone())
            for one, span, view in made.optimizer.views(made.optimizer.table.ranks[made.rank])
            if one == "found"
        ]
        whole = {name: torch.zeros(size) for name, size in made.optimizer.table.sizes.items()}
        for pieces in gather_objects(own):
            for name, at, view in pieces:
                whole[name][at : at + len(view)] = view
        return whole
    finally:
        made.close()


def vector() -> dict[str, Tensor]:
    """The vector, flat, by parameter."""
    return {
        name: noise.sample(noise.Direction(SEED, name, 0, "rademacher"), 0, p.numel())
        for name, p in net().named_parameters()
    }


def dense(kind: str) -> dict[str, Tensor]:
    """The product from whole matrices in float64, by parameter."""
    model = net().double()
    x, y, mask = data()
    names = [name for name, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    sizes = [p.numel() for p in model.parameters()]
    w = torch.cat([p.detach().flatten() for p in model.parameters()])

    def scores(flat: Tensor) -> Tensor:
        parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        with torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.MATH]):
            whole: Tensor = torch.func.functional_call(
                model, dict(zip(names, parts, strict=True)), (x.double(),)
            )
        return whole[mask]

    z = torch.cat(list(vector().values())).double()
    if kind in ("gradient_pair", "hessian"):
        h = torch.autograd.functional.hessian(lambda v: nn.functional.cross_entropy(scores(v), y[mask]), w)
        out = h @ z
    else:
        j = torch.autograd.functional.jacobian(lambda v: scores(v), w)  # [N, C, P]
        f = scores(w)
        p = f.softmax(-1)
        if kind == "ggn":
            bent = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        else:
            where = mask.nonzero()
            s = p - nn.functional.one_hot(drawn(f.float(), where[:, 0], where[:, 1]), CLASSES)
            bent = s[:, :, None] * s[:, None, :]
        out = torch.einsum("ncp,ncd,nd->p", j, bent, j @ z) / len(f)
    return dict(zip(names, out.split(sizes), strict=True))


def main() -> None:
    """One rank."""
    folder = Path(sys.argv[1])
    environment = launch_environment()
    start(environment, 5.0)
    torch.set_num_threads(1)
    for engine in ENGINES[1:]:
        for kind, how in PRODUCTS:
            name = f"{engine} {kind} {how}"
            try:
                whole = found(engine, kind, how, environment.world_size)  # type: ignore[arg-type]
            except RunError as error:
                (folder / f"{name}.{environment.rank}.txt").write_text(str(error))
                continue
            if environment.rank == 0:
                torch.save(whole, folder / f"{name}.pt")
    stop()


if __name__ == "__main__":
    main()
