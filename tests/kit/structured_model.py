"""A model of linear layers of both kinds, and masks of whole rows and columns for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

VOCAB, WIDTH, HIDDEN = 13, 16, 24


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.fused = nn.Linear(WIDTH, 3 * WIDTH)  # as q/k/v in one
        self.up = Conv1D(HIDDEN, 3 * WIDTH)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(torch.tanh(self.fused(self.norm(x))))))


class Model(nn.Module):
    """Embedding, three blocks that may be checkpointed or be one block used three times, and a head that may be tied."""

    def __init__(self, checkpointing: str | None = None, tied: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.checkpointing, self.shared = checkpointing, shared
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.checkpointing == "reentrant" and torch.is_grad_enabled() and not x.requires_grad:
            x.requires_grad_()  # as enable_input_require_grads does
        for block in [self.blocks[0]] * 3 if self.shared else self.blocks:
            x = (
                block(x)
                if self.checkpointing is None
                else checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            )
        return self.head(x)


def make_model(dtype: torch.dtype = torch.float32, **options: object) -> Model:
    torch.manual_seed(0)
    model = Model(**options).to(dtype)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "up.weight" in name:
                param.mul_(10)  # Conv1D begins small
    return model


def group_mask(shape: tuple[int, ...], grain: str, indices: list[int]) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    if grain == "row":
        mask[indices] = True
    else:
        mask[:, indices] = True
    return mask


# Rows and columns of Linear and Conv1D, one index and many, the first and the last; a layer with nothing, one with all.
MIXED = {
    "blocks.0.fused.weight": ("column", [1, 5, 15]),
    "blocks.0.up.weight": ("column", [23]),
    "blocks.0.down.weight": ("row", [0, 3, 4, 15]),
    "blocks.1.fused.weight": ("row", [2, 47]),
    "blocks.1.up.weight": ("row", [0, 9, 10, 11, 47]),
    "blocks.1.down.weight": ("column", [0]),
    "blocks.2.fused.weight": ("column", []),
    "blocks.2.up.weight": ("column", list(range(HIDDEN))),
    "blocks.2.down.weight": ("column", list(range(1, HIDDEN))),
    "head.weight": ("column", [7, 8]),
}


def make_masks(model: nn.Module, grain: str | None = None) -> dict[str, Tensor]:
    """Masks of every parameter: as in ``MIXED``, or of one grain; vectors at random, the embedding frozen."""
    generator = torch.Generator().manual_seed(1)
    masks = {}
    for name, param in model.named_parameters():
        kind, indices = MIXED.get(name, ("", []))
        shape = tuple(param.shape)
        if "embedding" in name:
            masks[name] = torch.zeros(shape, dtype=torch.bool)
        elif not kind:
            masks[name] = torch.rand(shape, generator=generator) < 0.4
        elif grain is None:
            masks[name] = group_mask(shape, kind, indices)
        else:
            size = shape[0 if grain == "row" else 1]
            masks[name] = group_mask(shape, grain, torch.randperm(size, generator=generator)[:3].tolist())
    return masks


def loss_of(model: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(0, VOCAB, (4, 5), generator=torch.Generator().manual_seed(seed))
    return F.cross_entropy(model(tokens).float().flatten(0, 1), tokens.roll(1, 1).flatten())
