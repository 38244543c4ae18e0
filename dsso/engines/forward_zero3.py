"""The engine of methods that need only losses, on weights that DeepSpeed shards (ZeRO stage 3), without its optimizer.

DeepSpeed without an optimizer keeps slices of the weights and gathers them module by module; there are no gradients
and no states. A rank writes its own slices for every perturbation, from a copy of them (in fp32, or as they are where
steps are rounded at random): a tied weight is gathered several times in one pass, so what is gathered cannot be
perturbed. The slices may lie on the host (`offload_param`).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from dsso.engines import zero3
from dsso.engines.deepspeed import release_shared_memory
from dsso.engines.forward import ForwardEngine
from dsso.engines.quiet import quiet
from dsso.engines.shown import MasterWeights, copied, decayed
from dsso.errors import RunError
from dsso.optim._probes import ForwardOptimizer, Piece
from dsso.parallel import collectives
from dsso.parallel.averaging import same_everywhere
from dsso.parallel.noise import clean

_ALWAYS = {
    # A weight that stays gathered would not see what is written to its slices.
    "stage3_param_persistence_threshold": 0,
    "stage3_model_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
}


class ForwardZero3Engine(ForwardEngine):
    """Evaluates a model that DeepSpeed gathers module by module; see `ForwardEngine`.

    Args:
        module: the model; rank 0's weights count.
        optimizer: carries the method; it is attached here.
        device: of this rank.
        ds_config: a configuration that DeepSpeed can parse, without an optimizer section.
        scheduler: learning-rate scheduler on the optimizer, or None.

    Raises:
        RunError: when DeepSpeed's slices are not what dsso reads them to be.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: ForwardOptimizer,
        device: torch.device,
        ds_config: Mapping[str, Any],
        scheduler: Any = None,
    ) -> None:
        self._config = {key: value for key, value in ds_config.items() if key != "scheduler"}
        zero = dict(self._config["zero_optimization"]) | _ALWAYS
        self._config["zero_optimization"] = zero
        gas = int(ds_config["gradient_accumulation_steps"])
        micro = int(ds_config["train_micro_batch_size_per_gpu"])
        super().__init__(module, optimizer, device, gas, micro, scheduler, stage=3)

    def _hold(self, module: nn.Module) -> Any:
        quiet()
        import deepspeed  # heavy, and not needed by the other engines

        shrinking = decayed(module)
        same_everywhere(p.detach() for p in chain(module.parameters(), module.buffers()))
        self._ds, *_ = deepspeed.initialize(model=module, config=self._config, dist_init_required=False)
        release_shared_memory(self.device)
        pieces, shown = [], []
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            cut: Any = parameter
            start, numel = zero3.piece(cut, self.rank)
            held = cut.ds_tensor.detach().view(-1).narrow(0, 0, numel)
            stochastic = self._forward.forward_method.stochastic
            pieces.append(Piece(clean(name), start, copied(held, stochastic), clean(name) in shrinking))
            shown.append(held)
        self._verify(module, pieces)
        return MasterWeights(pieces, shown)

    def _verify(self, module: nn.Module, pieces: list[Piece]) -> None:
        """Compare every slice with DeepSpeed's own gathered parameter; all ranks fail together."""
        from deepspeed import zero

        wrong = ""
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            piece = next(one for one in pieces if one.name == clean(name))
            with zero.GatheredParameters([parameter]):
                flat = parameter.detach().reshape(-1)[piece.start : piece.start + piece.base.numel()]
                if not torch.equal(flat.to(piece.base), piece.base):
                    wrong = wrong or name
        found = collectives.first_named(wrong)
        if found:
            raise RunError(
                "DeepSpeed's slices do not hold the weights where its own tables say",
                where=f"zero_optimization.stage 3, parameter {found}",
                remedy="use a DeepSpeed version that dsso is tested with",
            )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Forward pass through DeepSpeed."""
        return self._ds(*args, **kwargs)

    def gathered_state_dict(self, trainable_only: bool = True) -> dict[str, Tensor]:
        """Full parameters by name on the CPU of rank 0, empty elsewhere; collective."""
        return zero3.state_dict(self.module, trainable_only, self.rank)

    def load_weights(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite weights; see `dsso.engines.protocol.Engine.load_weights`."""
        zero3.load(self.module, self._known(tensors, dict(self.module.named_parameters())))

    def close(self) -> None:
        """Take the hooks off the model and let DeepSpeed release what it holds."""
        super().close()
        self._ds.destroy()
