"""Workload R: the model on which K-FAC implementations are compared here.

A pre-norm encoder of 6 layers, width 512, feed-forward 2048, 8 heads; 8 x 128 tokens a step with a cross-entropy at
every token; the base is frozen, LoRA of rank 8 sits on query, key, value, output, up and down: 36 pairs, 72
Kronecker layers; fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LAYERS, WIDTH, HIDDEN, HEADS, RANK, VOCABULARY = 6, 512, 2048, 8, 8, 1024
BATCH, TOKENS = 8, 128


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable pair of low rank beside it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.base = nn.Linear(inputs, outputs, bias=False)
        self.base.requires_grad_(False)
        self.lora_A = nn.Linear(inputs, RANK, bias=False)
        self.lora_B = nn.Linear(RANK, outputs, bias=False)
        # Not zero, as it is after some training: with B = 0 half of the statistics are zero.
        nn.init.normal_(self.lora_B.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """W x + 2 B A x."""
        out: Tensor = self.base(x) + 2.0 * self.lora_B(self.lora_A(x))
        return out


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.q, self.k, self.v, self.o = (LoraLinear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = LoraLinear(WIDTH, HIDDEN), LoraLinear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        batch, tokens, _ = x.shape
        h = self.norm1(x)
        q, k, v = (
            one(h).view(batch, tokens, HEADS, WIDTH // HEADS).transpose(1, 2)
            for one in (self.q, self.k, self.v)
        )
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, WIDTH)
        x = x + self.o(h)
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class Encoder(nn.Module):
    """The whole model; `forward` gives logits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.embed.requires_grad_(False)
        self.head.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, [batch, tokens, vocabulary]."""
        # The path to the first layer asks for a gradient, as it does in a model that trains its embeddings.
        x = self.embed(ids).requires_grad_()
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(x)
        return out


def model() -> Encoder:
    """The model, the same every time."""
    torch.manual_seed(0)
    return Encoder()


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels of one step, [batch, tokens] each; a rule that can be learnt."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=generator)
    return ids, (ids * 7 + 3) % VOCABULARY


def loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over tokens."""
    return F.cross_entropy(logits.view(-1, VOCABULARY), labels.view(-1))
