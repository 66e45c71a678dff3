"""Linear layers whose masks are whole rows or columns: forwards that keep, and backwards that compute, what trains.

With inputs X [T, d_in] and output gradients G [T, d_out] a linear layer's weight gradient is dW = G^T X [d_out, d_in]. Of it

    dW[:, c] = G^T X[:, c]     needs the input features c only, all that the forward keeps of X;
    dW[r, :] = G[:, r]^T X     needs the output features r only.

The part is returned as the gradient of a leaf of its shape: entries of memory order, which is the order of the optimizer's
compact buffer. The leaf holds one number (its strides are 0) that nobody reads. Autograd does the rest: it adds up the uses of
a weight, stops below the lowest trained layer, recomputes under checkpointing, and traces under ``torch.compile``, where
a gradient has to leave the graph as the gradient of an input: an op that writes the optimizer's buffer from within the graph
would tie the graph to a buffer that is freed between steps. A hook of the leaf hands each gradient to the optimizer.
"""

from __future__ import annotations

import copyreg
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from sparseopt.masks._structured import structure_of, whole_groups

if TYPE_CHECKING:
    from sparseopt.optim.capture import _Slot

__all__ = [
    "ALIGNMENT",
    "Structured",
    "StructuredUse",
    "attach",
    "class_of",
    "connect",
    "disconnect",
    "follow",
    "freeze",
    "is_structured",
    "restore",
    "swap",
    "thaw",
    "use_of",
    "watch",
]

# Matrix products of 16-bit numbers are slow on GPUs where a row is not a multiple of 16 bytes: indices are filled up.
ALIGNMENT = {"cuda": 8}


class _Linear(torch.autograd.Function):
    """y = x W^T + b (nn.Linear) or x W + b (Conv1D); the leaf gets the part of dW that trains."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., d_in]
        weight: Tensor,
        bias: Tensor | None,
        leaf: Tensor,  # of the shape of the part
        index: Tensor,  # int64 [k or more], sorted, the last one repeated
        by_input: bool,
        conv1d: bool,
    ) -> Tensor:
        if conv1d:
            flat = x.reshape(-1, x.shape[-1])
            y = flat @ weight if bias is None else torch.addmm(bias, flat, weight)
            y = y.view(*x.shape[:-1], weight.shape[1])
        else:
            y = F.linear(x, weight, bias)
        kept = x.index_select(-1, index) if by_input else x
        if kept.dtype != y.dtype:  # under autocast, whose dtype F.linear keeps its input in
            kept = kept.to(y.dtype)
        ctx.conv1d, ctx.dtype, ctx.shape = conv1d, x.dtype, leaf.shape
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, kept, None if by_input else index)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The host's time counts where a GPU is fast: nothing is called that need not be.
        weight, kept, index = ctx.saved_tensors
        needs = ctx.needs_input_grad
        outputs = grad.reshape(-1, grad.shape[-1])
        dx = bias = part = None
        if needs[0]:
            matrix = weight if weight.dtype == grad.dtype else weight.to(grad.dtype)
            dx = outputs @ (matrix.t() if ctx.conv1d else matrix)
            dx = dx.view(*grad.shape[:-1], dx.shape[-1])
            if dx.dtype != ctx.dtype:
                dx = dx.to(ctx.dtype)
        if needs[2]:
            bias = outputs.sum(0)
        if needs[3]:
            inputs = kept.reshape(-1, kept.shape[-1])
            if index is not None:
                outputs = outputs.index_select(1, index)
            part = inputs.t() @ outputs if ctx.conv1d else outputs.t() @ inputs
            if part.shape != ctx.shape:  # indices were filled up
                part = part[: ctx.shape[0], : ctx.shape[1]].contiguous()
        return dx, None, bias, part, None, None, None


class StructuredUse:
    """The layer of one weight, while its module is of a class made by :func:`swap`.

    Attributes:
        module: it holds the weight, and nobody else does.
        name: of the weight.
        attribute: the weight's name in the module.
        kind: "row" or "column", of the weight as it is stored; None: its mask is neither, and all of dW is computed.
        index: int64 on the CPU, the rows or columns.
        paused: somebody wants to see dense gradients.
    """

    attribute = "weight"

    def __init__(self, module: Any, name: str, kind: str, index: Tensor) -> None:
        self.module, self.name = module, name
        self.conv1d = not isinstance(module, nn.Linear)
        self.paused = False
        self.kind: str | None
        self.leaf: Tensor | None = None
        self.set(kind, index)

    def set(self, kind: str | None, index: Tensor) -> None:
        """Takes over another mask."""
        self.kind, self.index, self.leaf = kind, index.cpu(), None
        self.by_input = (kind == "column") != self.conv1d
        if kind is not None:
            self.place()

    def place(self) -> Tensor:
        """Makes the leaf where the weight is now, in its dtype."""
        weight = self.module._parameters[self.attribute]
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{self.name!r} was moved to {weight.dtype} on {weight.device} after sparse_linear(): call "
                "sparse_linear() when the model is where it trains."
            )
        shape = self.lay_out(weight)
        # One number, and no view of it: nobody reads the values.
        leaf = torch.empty_strided(shape, (0,) * len(shape), dtype=weight.dtype, device=weight.device).requires_grad_()
        leaf.register_post_accumulate_grad_hook(_Deliver(weight, _link(weight)))
        for fixed in (leaf, self.where):
            # As torch._dynamo.mark_static_address() does, whose import takes seconds: like a parameter, neither moves, and CUDA
            # graphs of torch.compile need no copies.
            fixed._dynamo_static_input_type = "unguarded"  # type: ignore[attr-defined]
        self.leaf = leaf
        return leaf

    def lay_out(self, weight: Tensor) -> tuple[int, ...]:
        """Indices where the weight is -> the shape of the part."""
        rows, columns = weight.shape
        count, step = self.index.numel(), ALIGNMENT.get(weight.device.type, 1)
        filled = torch.cat([self.index, self.index[-1:].expand(-count % step)])
        self.where = filled.to(weight.device)
        return (count, columns) if self.kind == "row" else (rows, count)

    def add_to(self, gradient: Tensor, part: Tensor) -> None:
        """Adds the part to a dense gradient."""
        gradient.index_add_(0 if self.kind == "row" else 1, self.where[: self.index.numel()], part)

    def install(self) -> None:
        self.module.__class__ = class_of(type(self.module), _OfConv1D if self.conv1d else _OfLinear)
        self.module._structured = self

    def uninstall(self) -> None:
        module = self.module
        if module.__dict__.get("_structured") is self:
            del module._structured
            module.__class__ = module._own

    def current_leaf(self, weight: Tensor) -> Tensor | None:
        """The leaf, if the layer is to compute in part now."""
        leaf = self.leaf
        if leaf is None or self.paused or not torch.is_grad_enabled() or not weight.requires_grad:
            return None
        return self.place() if leaf.device != weight.device or leaf.dtype != weight.dtype else leaf


# ---- modules ---------------------------------------------------------------------------------------------------------
# A class of its own for the time being, rather than a forward in the module's dictionary: torch.compile takes what hangs
# on modules of torch's own classes for constant, and would compile each layer anew whose rows or columns are of another number.
def _forward(module: Any, x: Tensor) -> Tensor:
    use = module._structured
    weight = module.weight
    leaf = use.current_leaf(weight)
    if leaf is None:
        return module._own.forward(module, x)
    return _Linear.apply(x, weight, module.bias, leaf, use.where, use.by_input, use.conv1d)


class Structured:
    """What classes made by :func:`swap` have beside their own; copies and pickles are of their own class."""

    _own: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {key: value for key, value in vars(self).items() if key != "_structured"}
        return copyreg._reconstructor, (self._own, object, None), state  # type: ignore[attr-defined]


class _OfLinear(Structured):
    def forward(self, input: Tensor) -> Tensor:
        return _forward(self, input)


class _OfConv1D(Structured):
    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x)


_classes: dict[type, type] = {}


def class_of(own: type, base: type) -> type:
    """``own`` with the forward of ``base``."""
    if own not in _classes:
        bases = (base, own)
        content = {"__module__": __name__, "__doc__": own.__doc__, "_own": own}
        _classes[own] = type(own.__name__, bases, content)
    return _classes[own]


def swap(use: StructuredUse) -> None:
    """The module computes through ``use`` from now on."""
    use.install()


def restore(use: StructuredUse) -> None:
    """The end of :func:`swap`."""
    use.uninstall()
    use.kind = use.leaf = None


def is_structured(module: nn.Module) -> bool:
    return isinstance(module, Structured)


class _Deliver:
    """The hook of a leaf: owned by it, so it must not hold the parameter."""

    def __init__(self, param: Tensor, link: _Link) -> None:
        self.param, self.link = weakref.ref(param), link

    def __call__(self, leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        param = self.param()
        if gradient is None or param is None:
            return
        link = self.link
        use = link.use() if link.use is not None else None
        if use is None or use.leaf is not leaf:
            raise RuntimeError(
                "the masks of structured layers changed, or remove() was called, between forward and backward."
            )
        if link.slot is None or not link.slot.take_compact(param, gradient):
            _accumulate(param, use, gradient)


@torch.no_grad()
def _accumulate(param: Tensor, use: StructuredUse, part: Tensor) -> None:
    """Nobody captures: ``param.grad`` is dense, 0 where nothing trains."""
    part = part.detach()
    if param.grad is None:
        param.grad = torch.zeros_like(param)
    use.add_to(param.grad, part)


# ---- who captures, and who computes ----------------------------------------------------------------------------------
class _Link:
    """What is known about a parameter: the optimizer's slot for its gradients, and the layer that computes a part."""

    __slots__ = ("frozen", "slot", "use")

    def __init__(self) -> None:
        self.slot: _Slot | None = None
        self.use: weakref.ref[StructuredUse] | None = None
        self.frozen = False  # by sparse_linear()


_links: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _link(param: Tensor) -> _Link:
    link = _links.get(param)
    if link is None:
        link = _links[param] = _Link()
    return link


def connect(param: Tensor, slot: _Slot) -> None:
    """Gradients of ``param`` go to ``slot`` from now on."""
    _link(param).slot = slot
    use = use_of(param)
    if use is not None:
        use.paused = slot.capture.observer is not None


def disconnect(param: Tensor, slot: _Slot) -> None:
    link = _links.get(param)
    if link is not None and link.slot is slot:
        link.slot = None


def attach(param: Tensor, use: StructuredUse) -> None:
    """``use`` computes the gradients of ``param``; compared with the mask of an optimizer that has its state already."""
    link = _link(param)
    link.use = weakref.ref(use)
    if link.slot is not None:
        use.paused = link.slot.capture.observer is not None
        known, packed = link.slot.mask(param)
        if known:
            follow(param, packed, False, use.name)


def freeze(param: Tensor) -> None:
    param.requires_grad_(False)
    _link(param).frozen = True


def thaw(param: Tensor) -> None:
    """The end of :func:`freeze`."""
    link = _link(param)
    if link.frozen:
        param.requires_grad_(True)
        link.frozen = False


def use_of(param: Tensor) -> StructuredUse | None:
    """The layer that computes a part of ``param``'s gradient, if there is one."""
    link = _links.get(param)
    return None if link is None or link.use is None else link.use()


def watch(param: Tensor, observed: bool) -> None:
    """While somebody observes dense gradients, they are computed."""
    use = use_of(param)
    if use is not None:
        use.paused = observed


def follow(param: Tensor, packed: Tensor | None, changed: bool, name: str) -> None:
    """Compares a layer with the optimizer's mask; one that ``changed`` is taken over.

    Raises:
        ValueError: they differ.
    """
    link = _links.get(param)
    if link is None:
        return
    if link.frozen and changed and (packed is None or bool(packed.any())):
        param.requires_grad_(True)
        link.frozen = False
    use = use_of(param)
    if use is None or (use.kind is None and not changed):
        return
    groups = None if packed is None else whole_groups(packed, param.shape)
    same = groups is not None and groups[0] == use.kind and torch.equal(groups[1], use.index)
    if same:
        return
    if not changed:
        raise ValueError(
            f"the optimizer's mask of {name!r} is not the one that sparse_linear() was given: give both the same masks."
        )
    if groups is None or groups[1].numel() in (0, structure_of(param.shape, groups[0])[0]):
        use.set(None, use.index)
    else:
        use.set(*groups)
