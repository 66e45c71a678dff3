"""Dense gradients for growth: added up over the micro-batches of a step, only where somebody asked for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sparseopt.optim.dynamic.layers import Layer

__all__ = ["DenseGradients"]


class DenseGradients:
    """The gradients of some layers, 4 bytes an entry: fp32, or as they came where there is a single 16-bit one.

    Attributes:
        layers: whose gradients.
        by_name: what was added up since the last :meth:`close`, in the parameters' shapes.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.by_name: dict[str, Tensor] = {}
        self._handles: list[torch.utils.hooks.RemovableHandle] = []

    def listen(self) -> None:
        """From now on adds up what backward produces."""
        for layer in self.layers:
            self._handles.append(layer.param.register_hook(self._hook(layer.name)))

    @property
    def listening(self) -> bool:
        return bool(self._handles)

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            self.add(name, gradient)

        return hook

    @torch.no_grad()
    def add(self, name: str, gradient: Tensor) -> None:
        before = self.by_name.get(name)
        if before is None:
            # 16-bit gradients stay so while there is one.
            narrow = gradient.dtype.itemsize == 2
            self.by_name[name] = gradient.clone() if narrow else gradient.to(torch.float32, copy=True)
        else:
            self.by_name[name] = before.float().add_(gradient.detach())

    def read(self) -> None:
        """Takes what is in ``.grad`` instead."""
        self.close()
        for layer in self.layers:
            if layer.param.grad is not None:
                self.add(layer.name, layer.param.grad)

    def pop(self, layer: Layer) -> Tensor:
        """Hands over a layer's gradient; zeros where the layer took no part in this step."""
        gradient = self.by_name.pop(layer.name, None)
        return torch.zeros(layer.shape, device=layer.param.device) if gradient is None else gradient

    def close(self) -> None:
        """Removes the hooks and forgets the gradients."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.by_name.clear()
