"""Forward, backward and projection of a batch as one CUDA graph: small batches are otherwise bound by launches."""

from __future__ import annotations

import torch
from torch import Tensor

from sparseopt.projection.projector import GradientProjector

__all__ = ["GraphedProjection"]


class GraphedProjection:
    """The passes of batches of one shape, recorded at the first call and replayed from then on.

    Use it inside ``with projector:``, which it must not outlive: the recording holds the projector's matrices and leaves.
    Weights are read where they are, so that they may change in place.
    """

    def __init__(self, projector: GradientProjector, batch: int, length: int, *, warm_up: int = 3) -> None:
        """Nothing is recorded yet.

        Args:
            projector: entered.
            batch, length: of the tokens.
            warm_up: passes before recording: kernels are compiled and chosen there.
        """
        self._projector, self._shape, self._warm_up = projector, (batch, length), warm_up
        self._graph: torch.cuda.CUDAGraph | None = None
        self._tokens: Tensor
        self._mask: Tensor
        self._rows: Tensor
        self._losses: Tensor

    def fits(self, tokens: Tensor) -> bool:
        """Whether a batch has the recorded shape."""
        return tuple(tokens.shape) == self._shape

    def __call__(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Projects a batch.

        Args:
            tokens: int64 [batch, length] on the GPU.
            mask: [batch, length], 0 for padding.

        Returns:
            (rows [batch, total_dim], losses fp32 [batch]); copies.

        Raises:
            ValueError: another shape.
        """
        if not self.fits(tokens):
            raise ValueError(f"the graph was made for batches of {self._shape}, got {tuple(tokens.shape)}.")
        if self._graph is None:
            self._record(tokens, mask)
        assert self._graph is not None
        self._tokens.copy_(tokens)
        self._mask.copy_(mask)
        self._graph.replay()
        return self._rows.clone(), self._losses.clone()

    def _record(self, tokens: Tensor, mask: Tensor) -> None:
        self._tokens, self._mask = tokens.clone(), mask.clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self._warm_up):
                self._pass()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._rows, self._losses = self._pass()

    def _pass(self) -> tuple[Tensor, Tensor]:
        losses = self._projector.losses(self._tokens, self._mask)
        losses.sum().backward()
        return self._projector.collect(), losses.detach()
