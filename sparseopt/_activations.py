"""What autograd keeps of a decoder's forward pass, operator by operator: bytes from shapes, before anything runs.

bf16 weights, eager transformers, flash attention (SDPA). N tokens, widths as in :class:`Architecture`; bytes in brackets:

* RMSNorm: its input in fp32 (4 N h), the reciprocal root (4 N), the normalised bf16 value if its weight trains (2 N h).
  LayerNorm: its input (2 N h), mean and reciprocal deviation (8 N).
* What linear layers read, once for those that share it (2 N width), if the weight trains or an adapter in bf16 reads it.
  Adapters in fp32 (PEFT's default) read an fp32 copy, one each (4 N width). LoRA's A gives N r, kept for B. Where only k input
  features train (``sparse_linear``), each layer keeps its own (2 N k, k filled up to a multiple of 8), and the input itself
  goes; where output features do, all of the input stays.
* Attention: rotated q and k, v (2 N (q + 2 kv)), output (2 N q), log-sum-exp (4 N heads). GPT-2: q, k, v are one tensor.
* SwiGLU: gate, silu(gate), up (6 N i), their product where the next linear layer reads it. GELU by its formula: 8 N i.
* Residual additions, rotary embedding, softmax scale: nothing. Dropout: a byte an element.
* Gradient checkpointing: each layer's input (2 N h).

tests/test_planning.py compares this with what autograd keeps on a CPU, where SDPA keeps the same tensors as flash attention
on a GPU (which adds two words of random state) and LayerNorm keeps its statistics in bf16. Left out: ids, rotary tables;
counted though not kept where the embedding is frozen but norms train: the first layer's norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["WORKLOADS", "Architecture", "Job", "Structure", "activations", "architecture"]

GATED = ("llama", "mistral", "qwen2", "qwen3")
WORKLOADS = ("lm", "dpo", "grpo")
FILLED = 8  # indices of structured layers on a GPU: see sparseopt.optim.structured


@dataclass(frozen=True)
class Architecture:
    """What a plan needs to know of a model.

    Attributes:
        family: "gated" (Llama, Mistral, Qwen2, Qwen3) or "gpt2".
        parameters: of the whole model, tied ones once.
        embeddings: of those, in embeddings and the head.
        linears: (inputs, outputs) of every linear layer but the head.
        largest: entries of the largest parameter that is no embedding.
        layers, hidden (h), heads, kv_heads, head_dim, intermediate (i), vocabulary: as in the configuration.
        tied: whether the head is the embedding.
        qk_norm: whether queries and keys are normalised.
        tensors: parameters that are no embedding.
        gelu: whether GELU is computed by its formula ("gelu_new"), tensor by tensor.
        dropout: whether residual dropout is on in training.
    """

    family: str
    parameters: int
    embeddings: int
    linears: tuple[tuple[int, int], ...]
    largest: int
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    tied: bool
    tensors: int
    qk_norm: bool = False
    gelu: bool = False
    dropout: bool = False


@dataclass(frozen=True)
class Job:
    """One training step.

    Attributes:
        batch: sequences (dpo: pairs).
        seq: tokens of a sequence.
        workload: "lm": every position is predicted. "dpo": two sequences a pair; "grpo": one; both predict the second half.
        gradient_checkpointing: recompute each layer in the backward pass.
    """

    batch: int
    seq: int
    workload: str = "lm"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name, value in (("batch", self.batch), ("seq", self.seq)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.workload not in WORKLOADS:
            raise ValueError(f"unknown workload {self.workload!r}: expected one of {', '.join(WORKLOADS)}.")

    @property
    def tokens(self) -> int:
        return self.batch * self.seq * (2 if self.workload == "dpo" else 1)

    @property
    def predicted(self) -> int:
        return self.tokens if self.workload == "lm" else self.tokens // 2


@dataclass(frozen=True)
class Structure:
    """Masks of whole rows or columns of every linear layer's weight, as ``sparse_linear`` computes them.

    Embeddings, head, norms and biases are frozen.

    Attributes:
        kind: "row" or "column" of the weight as it is stored (GPT-2's Conv1D holds it transposed).
        density: share of the rows or columns of each layer that train, at least one.
    """

    kind: str
    density: float

    def by_input(self, arch: Architecture) -> bool:
        """Whether input features train (columns of nn.Linear, rows of Conv1D): only they are kept for the backward."""
        return (self.kind == "column") != (arch.family == "gpt2")

    def chosen(self, size: int) -> int:
        return max(1, round(self.density * size))

    def active(self, arch: Architecture) -> int:
        """Entries that train."""
        by_input = self.by_input(arch)
        return sum(self.chosen(i) * o if by_input else i * self.chosen(o) for i, o in arch.linears)

    def kept(self, width: int) -> int:
        """Input features that a layer by input keeps, filled up; ``width`` where all of them train."""
        return min(-(-self.chosen(width) // FILLED) * FILLED, width)


def architecture(config: PretrainedConfig) -> Architecture:
    """Reads an architecture from a transformers configuration; parameters are counted on the meta device.

    Raises:
        ValueError: a model type whose activations are not known here.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    kind = config.model_type
    if kind not in (*GATED, "gpt2"):
        raise ValueError(f"no plan for models of type {kind!r}: expected {', '.join(GATED)} or gpt2.")
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    embeddings = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    embeddings[id(head.weight)] = head.weight
    linears = [
        (m.weight.shape[0], m.weight.shape[1]) if isinstance(m, Conv1D) else (m.weight.shape[1], m.weight.shape[0])
        for m in model.modules()
        if isinstance(m, (nn.Linear, Conv1D)) and m is not head
    ]
    config = config.get_text_config()
    heads, hidden = config.num_attention_heads, config.hidden_size
    gpt2 = kind == "gpt2"
    return Architecture(
        family="gpt2" if gpt2 else "gated",
        parameters=sum(p.numel() for p in model.parameters()),
        embeddings=sum(p.numel() for p in embeddings.values()),
        linears=tuple(linears),
        largest=max(p.numel() for p in model.parameters() if id(p) not in embeddings),
        layers=config.num_hidden_layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads if gpt2 else config.num_key_value_heads,
        head_dim=(None if gpt2 else getattr(config, "head_dim", None)) or hidden // heads,
        intermediate=(config.n_inner or 4 * hidden) if gpt2 else config.intermediate_size,
        vocabulary=config.vocab_size,
        tied=head.weight is model.get_input_embeddings().weight,
        tensors=sum(id(p) not in embeddings for p in model.parameters()),
        qk_norm=kind == "qwen3",
        gelu=gpt2 and config.activation_function == "gelu_new",
        dropout=gpt2 and config.resid_pdrop > 0,
    )


def activations(
    arch: Architecture,
    job: Job,
    *,
    rank: int | None = None,
    adapter_bytes: int = 2,
    train_head: bool = False,
    structure: Structure | None = None,
) -> dict[str, int]:
    """Bytes that autograd keeps for the backward pass.

    Args:
        arch: the model.
        job: the step; without checkpointing in ``layers``, and with it in ``checkpoints`` and ``layer``.
        rank: of LoRA's adapters; None where the weights themselves train.
        adapter_bytes: of an adapter's entry: 2 (bf16) or 4 (fp32).
        train_head: whether the head's weight needs a gradient.
        structure: of the masks, where layers compute only what trains.

    Returns:
        ``layer``: of one layer; ``layers``: kept of all layers (of their inputs only, under checkpointing); ``end``: final
        norm and head's input; ``loss``: fp32 log-probabilities.
    """
    n = job.tokens
    reader = _Reader(n, rank, adapter_bytes, structure if structure and structure.by_input(arch) else None)
    trained = rank is None and structure is None  # norms
    parts = _gated(arch, n, reader, trained) if arch.family == "gated" else _gpt2(arch, n, reader)
    layer = sum(parts.values())
    norm = _norm(arch, n, arch.hidden, trained)
    kept = 2 * n * arch.hidden if job.gradient_checkpointing else layer
    layers = kept * arch.layers
    if structure is not None and not job.gradient_checkpointing:
        layers -= norm  # nothing before the first linear layer trains
    return {
        "layer": layer,
        "layers": layers,
        "end": norm + (2 * n * arch.hidden if train_head else 0),
        "loss": 4 * job.predicted * arch.vocabulary,
    }


def _norm(arch: Architecture, n: int, width: int, trained: bool) -> int:
    if arch.family == "gpt2":
        return 2 * n * width + 8 * n
    return 4 * n * width + 4 * n + (2 * n * width if trained else 0)


@dataclass(frozen=True)
class _Reader:
    """What linear layers keep of their input."""

    n: int
    rank: int | None
    adapter_bytes: int
    inputs: Structure | None  # of which features train

    def keeps(self, width: int, layers: int = 1, anyway: bool = False) -> int:
        """Of an input of so many features that ``layers`` share, and that somebody else may keep ``anyway``."""
        n = self.n
        if self.inputs is not None and self.inputs.chosen(width) < width:
            return layers * 2 * n * self.inputs.kept(width)
        if self.rank is None:
            return 0 if anyway else 2 * n * width
        own = layers * self.adapter_bytes * n * self.rank
        if self.adapter_bytes == 4:
            return layers * 4 * n * width + own
        return own + (0 if anyway else 2 * n * width)


def _gated(arch: Architecture, n: int, reader: _Reader, trained: bool) -> dict[str, int]:
    h, i = arch.hidden, arch.intermediate
    q, kv = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    qk = (4 + 2 * trained) * n * (q + kv) + 4 * n * (arch.heads + arch.kv_heads)
    return {
        "norms": 2 * _norm(arch, n, h, trained),
        "q, k, v input": reader.keeps(h, 3),
        "q and k norms": qk if arch.qk_norm else 0,
        "attention": 2 * n * (2 * q + 2 * kv) + 4 * n * arch.heads,
        "output projection": reader.keeps(q, anyway=True),
        "gate, up input": reader.keeps(h, 2),
        "gate, silu, up": 6 * n * i,
        "down input": reader.keeps(i),
    }


def _gpt2(arch: Architecture, n: int, reader: _Reader) -> dict[str, int]:
    h, i = arch.hidden, arch.intermediate
    return {
        "norms": 2 * _norm(arch, n, h, True),
        "c_attn input": reader.keeps(h),
        "attention": 8 * n * h + 4 * n * arch.heads,
        "output projection": reader.keeps(h, anyway=True),
        "c_fc input": reader.keeps(h),
        "gelu": (8 if arch.gelu else 2) * n * i,
        "c_proj input": reader.keeps(i),
        "dropout": 2 * n * h if arch.dropout else 0,
    }
