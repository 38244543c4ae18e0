"""Workload S: the model on which methods on whole matrices are compared here; and the shapes of LoRA.

A pre-norm decoder of 4 layers, width 256, feed-forward 1024, 4 heads, a vocabulary of 1024; 8 x 64 tokens a step with a
cross-entropy at every token; all 3.7 million parameters are trained, fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, WIDTH, HIDDEN, HEADS, VOCABULARY = 4, 256, 1024, 4, 1024
BATCH, TOKENS = 8, 64
LORA_RANK, LORA_WIDTH, LORA_PAIRS = 16, 1024, 12


class Block(nn.Module):
    """Pre-norm attention and feed-forward, without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        h = self.norm1(x)
        q, k, v = (
            one(h).view(*h.shape[:2], HEADS, WIDTH // HEADS).transpose(1, 2)
            for one in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(h.transpose(1, 2).reshape(x.shape))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Decoder(nn.Module):
    """The whole model; `forward` gives the loss of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, number: int) -> Tensor:
        """The mean loss of the batch of that number."""
        ids = torch.randint(VOCABULARY, (BATCH, TOKENS + 1), generator=torch.Generator().manual_seed(number))
        x = self.embedding(ids[:, :-1])
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), ids[:, 1:].flatten())


class LoraShapes(nn.Module):
    """Pairs of adapter matrices by themselves: the loss makes any gradient, of full rank, and costs next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.ParameterList(
            nn.Parameter(torch.randn(LORA_RANK, LORA_WIDTH) * 0.02) for _ in range(LORA_PAIRS)
        )
        self.b = nn.ParameterList(
            nn.Parameter(torch.randn(LORA_WIDTH, LORA_RANK) * 0.02) for _ in range(LORA_PAIRS)
        )

    def forward(self, number: int) -> Tensor:
        """A loss whose gradient is the parameter plus noise of that number."""
        generator = torch.Generator().manual_seed(number)
        loss = torch.zeros(())
        for p in [*self.a, *self.b]:
            loss = loss + (p * (p.detach() + torch.randn(p.shape, generator=generator))).sum()
        return loss / LORA_WIDTH


def decoder() -> Decoder:
    """The same weights every time."""
    torch.manual_seed(0)
    return Decoder()


def lora() -> LoraShapes:
    """The same weights every time."""
    torch.manual_seed(0)
    return LoraShapes()
