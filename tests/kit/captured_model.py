"""A model whose gradients are captured: blocks that may be checkpointed or shared, a head that may be tied."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import sparseopt as so

VOCAB, WIDTH = 13, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 16)
        self.down = nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.norm(x))))


class Model(nn.Module):
    """Embedding, blocks that may be checkpointed, and a head that may be tied to the embedding."""

    def __init__(self, checkpointing: str | None = None, tied: bool = False, shared_block: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.unused = nn.Parameter(torch.ones(3))
        self.checkpointing, self.shared_block = checkpointing, shared_block
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        blocks = [self.blocks[0]] * 3 if self.shared_block else self.blocks
        for block in blocks:
            x = self.run(block, x)
        return self.head(x)

    def run(self, block: nn.Module, x: Tensor) -> Tensor:
        if self.checkpointing is None:
            return block(x)
        return checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")


def make_model(dtype: torch.dtype = torch.float32, **kwargs: object) -> Model:
    torch.manual_seed(0)
    return Model(**kwargs).to(dtype)  # type: ignore[arg-type]


def make_masks(model: nn.Module, density: float = 0.3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters()}


def loss_of(model: Model, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCAB, (4, 5), generator=generator)
    return nn.functional.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())


def optimizer_for(model: Model, capture: bool = True, **kwargs: object) -> so.SparseAdamW:
    return so.SparseAdamW(
        model.named_parameters(), lr=0.02, masks=make_masks(model), capture_gradients=capture, **kwargs
    )  # type: ignore[arg-type]


def captured(opt: so.SparseAdamW) -> dict[str, Tensor]:
    """Compact gradients by parameter name."""
    return {
        name: arena.gradient_buffer()[arena.plan.arena(t)].clone()
        for arena in opt._arenas
        for t, name in enumerate(arena.names)
        if opt._capture.present(arena)[t]  # type: ignore[union-attr]
    }


def assert_equal_weights(a: nn.Module, b: nn.Module) -> None:
    for (name, x), y in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y), name
