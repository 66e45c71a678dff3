"""The model that a run trains: where its weights come from, which of them train, and what of them is kept.

Three ways to train: ``sparse`` (the entries of a mask), ``lora`` (a PEFT adapter), ``dense`` (every weight).
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

import sparseopt as so
from sparseopt import models
from sparseopt._files import atomic_folder
from sparseopt.masks.find import is_mlp
from sparseopt.masks.granularity import granularity_of
from sparseopt.trainers.attachment import resolve_names
from sparseopt.trainers.scoring import gradient_scores, scored_parameters

__all__ = ["Way", "find_masks", "frozen_digest", "given_masks", "keep_outcome", "load_policy", "lora_config",
           "restore_outcome", "way_of"]  # fmt: skip

Config = dict[str, dict[str, Any]]
Way = Literal["sparse", "lora", "dense"]

# What a finished training leaves in the run folder, by way.
OUTCOMES: dict[Way, str] = {"sparse": "trained_entries.safetensors", "lora": "adapter", "dense": "model"}


def way_of(config: Config) -> Way:
    """How a run trains.

    Raises:
        ValueError: a mask and LoRA were both asked for, or two masks.
    """
    loading = config["mask_loading"]
    masked = config["mask"]["path"] is not None or config["mask"]["method"] is not None
    if loading["enabled"]:
        if not loading["hf_repo_id"]:
            raise ValueError("mask_loading.enabled needs mask_loading.hf_repo_id, such as 'user/model-gradient-masks'.")
        if masked:
            raise ValueError("mask_loading takes a mask from the Hub: leave out mask.path and mask.method.")
        masked = True
    if config["lora"]["enabled"]:
        if masked:
            raise ValueError("LoRA trains an adapter, a mask weights of the model: ask for one of them.")
        return "lora"
    if config["mask"]["mlp_only"] and not masked:
        raise ValueError("mask.mlp_only restricts a mask: give mask.path or mask.method with it.")
    return "sparse" if masked else "dense"


def load_policy(config: Config, device: torch.device) -> PreTrainedModel:
    """The model to train, on its device.

    ``model.checkpoint`` may be a folder with a model in it (a checkpoint of a trainer, a reconstructed one), or the
    folder of a run: its ``model``, or its base with the trained entries.

    Raises:
        FileNotFoundError: there is no such model or checkpoint.
        ValueError: the checkpoint's entries belong to another model.
    """
    settings = config["model"]
    checkpoint, dtype = settings["checkpoint"], settings["dtype"]
    if checkpoint is None or checkpoint == "None":
        return models.load_model(settings["name"], dtype, device, revision=settings["revision"])
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"Checkpoint folder {checkpoint!r} does not exist.")
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file() and any(candidate.glob("*.safetensors*")):
            if (candidate / OUTCOMES["sparse"]).is_file():
                continue  # a run folder: its config.json holds settings
            return models.load_model(str(candidate), dtype, device)
    entries = folder / OUTCOMES["sparse"]
    if entries.is_file():
        model = models.load_model(settings["name"], dtype, device, revision=settings["revision"])
        so.Delta.load(entries).apply_(model)
        return model
    raise FileNotFoundError(
        f"Checkpoint folder {checkpoint!r} holds no weights: expected a model (config.json and .safetensors), or a run "
        f"folder with {OUTCOMES['sparse']} or model/ in it."
    )


# ---- masks -------------------------------------------------------------------------------------------------------------
def given_masks(config: Config, model: PreTrainedModel) -> so.MaskSet | None:
    """The masks of ``mask.path`` or the Hub, which must cover every parameter; or checks that the patterns leave some."""
    settings, source = config["mask"], config["mask"]["path"]
    if config["mask_loading"]["enabled"]:
        from sparseopt.hub import load_masks_from_hf

        source, step = config["mask_loading"]["hf_repo_id"], config["mask_loading"]["step"]
        loaded = load_masks_from_hf(source, "latest" if step is None else step)
    elif source is not None:
        loaded = so.MaskSet.load(source)
    else:
        if settings["method"] is not None:
            scored_parameters(model, _include(settings), _exclude(settings, model))
        return None
    masks = resolve_names(model, loaded)
    missing = [name for name, _ in model.named_parameters() if name not in masks]
    if missing:
        raise ValueError(f"the mask {source!r} lacks {len(missing)} parameters of the model, such as {missing[0]!r}.")
    if settings["mlp_only"]:
        kept = {
            name: masks.packed(name) if is_mlp(name) else torch.zeros_like(masks.packed(name)) for name in masks.names
        }
        masks = so.MaskSet(kept, masks.shapes, {**masks.metadata, "mlp_only": True})
    if not masks.active_parameters:
        where = " in MLP parameters" if settings["mlp_only"] else ""
        raise ValueError(f"the mask {source!r} has no active entry{where}: nothing would train.")
    return masks


def find_masks(config: Config, trainer: Trainer, model: PreTrainedModel) -> so.MaskSet:
    """The masks of ``mask.method``, over every parameter of the model."""
    settings = config["mask"]
    include, exclude = _include(settings) or None, _exclude(settings, model) or None
    found: dict[str, Any] = {"base_model": config["model"]["name"]}
    if settings["method"] == "gradient":
        # Parameters that are not scored need no memory: one zero, expanded.
        scores = {name: torch.zeros(()).expand(p.shape) for name, p in model.named_parameters()}
        measured = gradient_scores(trainer, settings["batches"], include, exclude)
        if not any(bool(score.any()) for score in measured.values()):
            raise ValueError(
                f"the gradients of {settings['batches']} batches are all zero, they cannot choose weights (in GRPO: no group "
                "of completions had different rewards); give more mask.batches, an easier task, or a mask file."
            )
        scores.update(measured)
        found["batches"] = settings["batches"] * trainer.args.world_size
    else:
        generator = torch.Generator().manual_seed(config["training"]["seed"])
        scores = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
    return so.find_masks(
        scores, settings["sparsity"], settings["scope"], granularity_of(settings["granularity"]),
        include=include, exclude=exclude, method=settings["method"], metadata=found,
    )  # fmt: skip


def _include(settings: dict[str, Any]) -> list[str]:
    return settings["include"] or (["mlp"] if settings["mlp_only"] else [])


def _exclude(settings: dict[str, Any], model: PreTrainedModel) -> list[str]:
    """The patterns given, or the names of embedding and output head.

    Their gradients are the largest, and where the two are tied the head's would wait in backward for the embedding's.
    """
    if settings["exclude"] is not None:
        return settings["exclude"]
    ends = {id(m.weight) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}
    return [name for name, param in model.named_parameters() if id(param) in ends]


def lora_config(config: Config) -> Any:
    """PEFT's configuration of the adapter."""
    from peft import LoraConfig

    settings = config["lora"]
    modules = settings["target_modules"]
    return LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=modules[0] if modules == ["all-linear"] else modules,
        task_type="CAUSAL_LM",
    )


def frozen_digest(model: nn.Module, masks: so.MaskSet) -> dict[str, str]:
    """SHA-256 of the bits of each parameter with its active entries zeroed: equal digests, identical frozen entries."""
    result = {}
    for name, param in model.named_parameters():
        value = param.detach().masked_fill(masks[name].to(param.device), 0).cpu().contiguous()
        result[name] = hashlib.sha256(value.view(-1).view(torch.uint8).numpy().data).hexdigest()
    return result


# ---- what is kept ------------------------------------------------------------------------------------------------------
def keep_outcome(way: Way, model: Any, delta: so.Delta | None, folder: Path) -> None:
    """Writes what training made, whole or not at all: the trained entries, the adapter, or the model."""
    target = folder / OUTCOMES[way]
    if way == "sparse":
        assert delta is not None
        delta.save(target)
    else:
        save_folder(model, target)


def save_folder(model: Any, target: Path, tokenizer: Any = None) -> None:
    """``save_pretrained`` into a folder that appears when it is complete."""
    with atomic_folder(target, replace=True) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def restore_outcome(way: Way, model: PreTrainedModel, folder: Path) -> Any:
    """The model as training left it, from what :func:`keep_outcome` wrote."""
    source = folder / OUTCOMES[way]
    if way == "sparse":
        so.Delta.load(source).apply_(model)
        return model
    if way == "lora":
        from peft import PeftModel

        return PeftModel.from_pretrained(model, str(source))
    trained = models.load_model(str(source), model.dtype, model.device)
    model.load_state_dict(trained.state_dict())
    return model
