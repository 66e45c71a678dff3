"""What describes masks and deltas in a repository: the metadata of a step, and the README.md (the Hub's model card)."""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from sparseopt._version import __version__

__all__ = ["SCHEMA", "default_name", "delta_card", "describe_step", "mask_card", "merge_card", "to_json"]

# The keys that the metadata of a step always has; unknown ones are null.
SCHEMA = ("step", "timestamp", "tolerance", "total_parameters", "active_parameters", "active_fraction", "sparsity",
          "base_model", "beta", "epsilon")  # fmt: skip
HUB_NAME = re.compile(r"[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?/[A-Za-z0-9](?:[\w.-]*[A-Za-z0-9])?", re.ASCII)
# The README between these lines is written anew with every step; what people write around it stays.
BEGIN, END = "<!-- sparseopt: begin -->", "<!-- sparseopt: end -->"
SHOWN = 200  # steps listed in a card


def describe_step(step: int, metadata: Mapping[str, Any], base_model: str | None = None) -> dict[str, Any]:
    """Metadata of a step: the schema's keys first, then what else is known.

    A local folder as base model is named without where it lies: repositories are read by others.
    """
    name = public_name(base_model or metadata.get("base_model"))
    timestamp = metadata.get("timestamp") or datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    known = {**metadata, "step": step, "timestamp": timestamp, "base_model": name}
    return {**{key: known.get(key) for key in SCHEMA}, **{k: v for k, v in known.items() if k not in SCHEMA}}


def to_json(metadata: Mapping[str, Any]) -> bytes:
    """Indented JSON.

    Raises:
        ValueError: a number is not finite.
        TypeError: something is not what JSON can hold.
    """
    return (json.dumps(metadata, indent=2, allow_nan=False) + "\n").encode()


def public_name(base_model: object) -> str | None:
    """A model's name as others may read it: Hub names stay, of a folder only its own name."""
    if not isinstance(base_model, str) or not base_model:
        return None
    text = base_model.rstrip("/\\")
    if os.path.isabs(text) or text.startswith((".", "~")) or "\\" in text or text.count("/") > 1:
        return re.split(r"[/\\]", text)[-1]
    return text


def default_name(base_model: object, suffix: str) -> str:
    """``{base_model}-{suffix}`` without the base model's owner; the repository then belongs to who is logged in.

    Raises:
        ValueError: no base model is known.
    """
    name = public_name(base_model)
    if name is None:
        raise ValueError("no repository was named, and no base model to name it after is known: pass repo_id.")
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name.split("/")[-1]).strip("-.")[: 95 - len(suffix)] + f"-{suffix}"


def mask_card(repository: str, steps: Mapping[int, Mapping[str, int]], latest: Mapping[str, Any]) -> str:
    """The card of a mask repository.

    Args:
        repository: its name, as loaders take it.
        steps: step -> {path of a mask file: bytes}, in order.
        latest: metadata of the last step.
    """
    title = repository.rstrip("/").split("/")[-1]
    last = max(steps, default=0)
    listed = list(steps.items())[-SHOWN:]
    rows = [
        f"| {step} | {', '.join(f'`{path}`' for path in files)} | {sum(files.values()):,} |" for step, files in listed
    ]
    left_out = [f"({len(steps) - SHOWN} earlier steps are not listed.)"] if len(steps) > SHOWN else []
    about = [f"| {key} | {_cell(latest[key])} |" for key in SCHEMA if latest.get(key) is not None]
    body = [
        f"# {title}",
        "",
        f"Gradient masks{_of(latest.get('base_model'))}: which parameters of the model matter, one bit per entry.",
        "",
        "```python",
        "from sparseopt import SparseAdamW",
        "from sparseopt.hub import list_available_mask_steps, load_mask_metadata_from_hf, load_masks_from_hf",
        "",
        f'steps = list_available_mask_steps("{repository}")',
        f'masks = load_masks_from_hf("{repository}", {last})',
        f'metadata = load_mask_metadata_from_hf("{repository}", {last})',
        "optimizer = SparseAdamW(model.named_parameters(), lr=1e-5, masks=masks)  # trains the active entries only",
        "```",
        "",
        f"## Step {last}",
        "",
        "| | |",
        "|---|---|",
        *about,
        "",
        "## Files",
        "",
        "| step | masks | bytes |",
        "|---:|---|---:|",
        *rows,
        *left_out,
        "",
        "`masks/step_N.safetensors` holds packed bits, `masks/step_N.pt` a dict of bool tensors;",
        "`metadata/step_N_info.json` says how a step's masks were made. `tolerance` applies to the squared gradient.",
    ]
    return _card(["gradient-masks", "sparse-training"], latest.get("base_model"), body)


def delta_card(repository: str, file: str, delta: Mapping[str, Any], base_model: str | None) -> str:
    """The card of a repository that holds a trained delta; ``delta`` is what the table says."""
    title = repository.rstrip("/").split("/")[-1]
    body = [
        f"# {title}",
        "",
        f"A sparse delta{_of(base_model)}: the entries that training changed, with their new values (bit-exact).",
        "",
        "```python",
        "from huggingface_hub import hf_hub_download",
        "from sparseopt import Delta",
        "",
        f'Delta.load(hf_hub_download("{repository}", "{file}")).apply_(model)  # model: the base model, as it was',
        "```",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in delta.items() if value is not None),
    ]
    return _card(["sparse-delta", "sparse-training"], base_model, body)


def merge_card(existing: str | None, generated: str) -> str | None:
    """The README to write: new between the marks, everything else as people left it.

    None: there is a README without the marks; it belongs to somebody else and stays.
    """
    if existing is None:
        return generated
    head, begin, rest = existing.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        return None
    section = generated.partition(BEGIN)[2].partition(END)[0]
    return f"{head}{BEGIN}{section}{END}{tail}"


def _card(tags: Sequence[str], base_model: object, body: Sequence[str]) -> str:
    # The Hub refuses cards whose base_model is not the name of a repository.
    base = [f"base_model: {base_model}"] if isinstance(base_model, str) and HUB_NAME.fullmatch(base_model) else []
    head = ["---", *base, "library_name: sparseopt", "tags:", "- sparseopt", *(f"- {tag}" for tag in tags), "---"]
    foot = f"Written by sparseopt {__version__}."
    return "\n".join([*head, "", BEGIN, "", *body, "", foot, "", END, ""])


def _of(base_model: object) -> str:
    return f" of `{_plain(base_model)}`" if base_model else ""


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else _plain(value)
    return text.replace("|", "\\|")


def _plain(value: object) -> str:
    """One line without marks of ours or backticks that would end the text around it."""
    return " ".join(str(value).split()).replace("`", "'").replace("<!--", "<! --")
