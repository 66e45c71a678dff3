"""What kind of module a parameter belongs to, by its name."""

from __future__ import annotations

import re

from sparseopt.masks.find import is_mlp

__all__ = ["KINDS", "kind_of"]

KINDS = ("attention", "mlp", "embedding", "norm", "other")

# Asked in this order: `post_attention_layernorm` and `self_attn.q_norm` are norms, `mlp.gate` is an MLP's.
NORM = re.compile(r"norm|(?:^|\.)ln_?[0-9a-z]*(?:\.|$)", re.IGNORECASE)
EMBEDDING = re.compile(r"embed|(?:^|\.)(?:wte|wpe|lm_head)(?:\.|$)", re.IGNORECASE)
ATTENTION = re.compile(r"attn|attention|(?:^|\.)[qkvo]_proj(?:\.|$)", re.IGNORECASE)
EXPERTS = re.compile(r"(?:^|\.)(?:experts?|\w*moe|fc_?[0-9]|intermediate)(?:\.|$)", re.IGNORECASE)


def kind_of(name: str) -> str:
    """One of :data:`KINDS` for a parameter name; ``lm_head`` counts as embedding, tied or not, experts as MLP."""
    if NORM.search(name):
        return "norm"
    if EMBEDDING.search(name):
        return "embedding"
    if ATTENTION.search(name):
        return "attention"
    return "mlp" if is_mlp(name) or EXPERTS.search(name) else "other"
