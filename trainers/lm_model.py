"""The model and the tokenizer of ``sparseopt train lm``: an architecture with fresh weights, or a pretrained model."""

from __future__ import annotations

import difflib
import warnings
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from sparseopt import models
from sparseopt.shapes import SHAPES, shape_config

__all__ = ["build_model", "load_tokenizer", "weights_of"]

Config = dict[str, dict[str, Any]]

# Names of the Hub behind those of shapes, for their tokenizers.
PUBLISHED: dict[str, str] = {name: f"openai-community/{name}" for name in SHAPES if name.startswith("gpt2")}
GAUSSIAN_STD = 0.02


# ---- tokenizers ------------------------------------------------------------------------------------------------------
def load_tokenizer(settings: dict[str, Any]) -> tuple[Any, str]:
    """The tokenizer of a run.

    Args:
        settings: the section ``model``. Without ``tokenizer`` it is the model's own. Where that cannot be reached and the
            weights are fresh, any tokenizer will do: SmolLM2's, where installed, else bytes; a warning says so.

    Returns:
        (tokenizer, what it is called).

    Raises:
        FileNotFoundError: the tokenizer that was asked for, or that of a pretrained model, cannot be loaded.
    """
    tokenizer, name = _load_tokenizer(settings)
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        # Blocks need no padding, and models leave the embedding of what is theirs untrained.
        tokenizer.pad_token = None
    return tokenizer, name


def _load_tokenizer(settings: dict[str, Any]) -> tuple[Any, str]:
    asked = settings["tokenizer"]
    if asked == "bytes":
        return byte_tokenizer(), "bytes"
    if asked is not None:
        return models.load_tokenizer(asked), asked
    own = PUBLISHED.get(settings["name"].lower(), settings["name"])
    try:
        return models.load_tokenizer(own, settings["revision"]), settings["name"]
    except FileNotFoundError as error:
        if settings["pretrained"]:
            raise
        found, name = _any_tokenizer()
        warnings.warn(
            f"The tokenizer of {settings['name']!r} cannot be loaded ({str(error).rstrip('.')}): with fresh weights, "
            f"that of {name!r} takes its place. model.tokenizer names another.",
            stacklevel=3,
        )
        return found, name


def _any_tokenizer() -> tuple[Any, str]:
    try:
        return models.load_tokenizer("smollm2"), "smollm2"
    except FileNotFoundError:
        return byte_tokenizer(), "bytes"


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """UTF-8 bytes as tokens 0 to 255, and the end of a text as 256."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end)


# ---- models ----------------------------------------------------------------------------------------------------------
def build_model(config: Config, tokenizer: Any, *, own: bool) -> PreTrainedModel:
    """The model to train, on the CPU, in fp32; fresh weights are drawn from torch's global generator.

    Args:
        config: the sections of :data:`sparseopt.schemas.LM`.
        tokenizer: as :func:`load_tokenizer` gives it.
        own: whether it is the model's own; otherwise a fresh model gets a vocabulary of its size.

    Raises:
        FileNotFoundError: no such model.
        ValueError: settings that do not fit the architecture.
    """
    settings: dict[str, Any] = config["model"]
    length = settings["context_length"]
    if settings["pretrained"]:
        if settings["config"]:
            raise ValueError("model.config changes an architecture, which weights of model.pretrained do not follow.")
        if config["run"]["init_type"] != "normal" or any(v is not None for v in config["initialization"].values()):
            raise ValueError("model.pretrained brings its own weights: leave out run.init_type and initialization.")
        source = str(PUBLISHED.get(settings["name"].lower(), settings["name"]))
        model = models.load_model(source, "float32", revision=settings["revision"])
        longest = getattr(model.config, "max_position_embeddings", length)
        if length > longest:
            raise ValueError(
                f"model.context_length is {length}, and {settings['name']!r} reads at most {longest} tokens."
            )
        _check_vocabulary(model.config, tokenizer)
        return model
    architecture = _architecture(settings, tokenizer, own)
    _initializer_range(architecture, config)
    model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
    if model.loss_type is None:
        # GPT-2's class is not named as others are. Left so, the trainer would count the labels of a sequence without the
        # shift by one, and losses and gradients would be too small by 1/context_length.
        model.loss_type = "ForCausalLM"
    if config["run"]["init_type"] == "gaussian":
        _gaussian(model, config["initialization"])
    return model


def weights_of(config: Config) -> str:
    """Where the weights come from, in words."""
    run, given = config["run"], config["initialization"]
    if run["checkpoint"] is not None:
        return f"weights of {run['checkpoint']}"
    if config["model"]["pretrained"]:
        return "pretrained weights"
    if run["init_type"] == "gaussian":
        std = GAUSSIAN_STD if given["init_std"] is None else given["init_std"]
        return f"fresh weights, gaussian with mean {given['init_mean'] or 0.0:g} and standard deviation {std:g}"
    return "fresh weights, the model's own initialization" + (
        "" if given["init_std"] is None else f" with standard deviation {given['init_std']:g}"
    )


def _architecture(settings: dict[str, Any], tokenizer: Any, own: bool) -> PretrainedConfig:
    name, changes = settings["name"], dict(settings["config"])
    shape = SHAPES.get(name.lower())
    config: PretrainedConfig
    if shape is not None and shape.family == "gpt2":  # with its dropout, which a shape leaves out
        config = GPT2Config(n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads)
    elif shape is not None:
        config = shape_config(name)
    else:
        config = models.load_config(name, settings["revision"])
    for key in changes:
        if not hasattr(config, key):
            known = [*config.to_dict(), *config.attribute_map]
            near = difflib.get_close_matches(key, known, n=1)
            hint = f": did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"model.config has {key!r}, which a {config.model_type} configuration does not{hint}")
    if not own:
        changes.setdefault("vocab_size", len(tokenizer))
    changes["max_position_embeddings"] = settings["context_length"]
    values = config.to_dict()
    # What follows from the sizes is computed anew.
    for derived, cause in (("layer_types", "num_hidden_layers"), ("head_dim", "hidden_size")):
        if cause in changes and derived not in changes:
            values.pop(derived, None)
    names: dict[str, str] = config.attribute_map
    values |= {str(names.get(key, key)): value for key, value in changes.items()}
    values |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    values |= {"pad_token_id": None, "architectures": None}
    values.pop("loss_type", None)
    built = type(config).from_dict(values)
    _check_vocabulary(built, tokenizer)
    return built


def _check_vocabulary(config: PretrainedConfig, tokenizer: Any) -> None:
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens and the model {config.vocab_size:,}: name another."
        )


def _initializer_range(architecture: PretrainedConfig, config: Config) -> None:
    """``normal`` with a given deviation: the model's own scheme, scaled."""
    given = config["initialization"]
    if given["init_std"] is not None and given["init_std"] < 0:
        raise ValueError(f"initialization.init_std must not be negative, got {given['init_std']}.")
    if config["run"]["init_type"] == "gaussian":
        return
    if given["init_mean"]:
        raise ValueError(
            f"initialization.init_mean is {given['init_mean']}: a mean other than 0 needs run.init_type gaussian."
        )
    if given["init_std"] is not None:
        if not hasattr(architecture, "initializer_range"):
            raise ValueError(
                f"initialization.init_std: a {architecture.model_type} has no such setting; run.init_type gaussian does."
            )
        architecture.initializer_range = given["init_std"]


def _gaussian(model: nn.Module, given: dict[str, Any]) -> None:
    """Every matrix, embeddings included, from one normal distribution; biases zero; the norms' gains stay one."""
    std = GAUSSIAN_STD if given["init_std"] is None else given["init_std"]
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.dim() >= 2:
                param.normal_(given["init_mean"] or 0.0, std)
            elif name.endswith("bias"):
                param.zero_()
