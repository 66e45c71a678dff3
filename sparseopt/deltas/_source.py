"""Where a base's tensors are read from: tensors in memory, or safetensors files of a folder, the Hub's cache or the Hub."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from sparseopt._files import FormatError
from sparseopt._safetensors import TensorFile
from sparseopt.masks.maskset import normalize_name

__all__ = ["Read", "TensorFiles", "chunks", "files_of", "memory", "names_of"]

Read = Callable[[str, int, int], Tensor]  # (name, start, stop) -> these entries of the flat tensor, as stored

INDEX_FILE, MODEL_FILE = "model.safetensors.index.json", "model.safetensors"
CHUNK = 1 << 22  # entries that are compared, hashed or written at a time


def names_of(name: str, tied: Mapping[str, str]) -> list[str]:
    """Names under which a source may hold a tensor, itself first (``tied``: alias -> name)."""
    owner = tied.get(name, name)
    return [name, owner, *(alias for alias, first in tied.items() if first == owner)]


def memory(state: Mapping[str, Tensor], tied: Mapping[str, str]) -> Read:
    """A reader of tensors in memory."""
    # Flattening copies a tensor that is not contiguous: the last one is kept, because pieces come in order.
    last: dict[str, Tensor] = {}

    def read(name: str, start: int, stop: int) -> Tensor:
        tensor = next(state[key] for key in names_of(name, tied) if key in state).detach()
        if tensor.is_contiguous():
            return tensor.view(-1)[start:stop]
        if name not in last:
            last.clear()
            last[name] = tensor.reshape(-1)
        return last[name][start:stop]

    return read


class TensorFiles:
    """Tensors by name in one safetensors file or several."""

    def __init__(self, files: Iterable[TensorFile]) -> None:
        self._places = {normalize_name(key): (file, key) for file in files for key in file.dtypes}
        self.contents = {name: (file.shapes[key], file.dtypes[key]) for name, (file, key) in self._places.items()}

    @classmethod
    def folder(cls, folder: Path) -> TensorFiles:
        """Of a model folder, in one file or several with an index."""
        index = folder / INDEX_FILE
        if not index.is_file():
            if not (folder / MODEL_FILE).is_file():
                raise FileNotFoundError(f"'{folder}' holds no {MODEL_FILE} and no {INDEX_FILE}.")
            return cls([TensorFile(folder / MODEL_FILE)])
        try:
            shards = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            raise FormatError(f"'{index}' is damaged: it has no readable weight_map.") from error
        for shard in shards:
            if not isinstance(shard, str) or Path(shard).name != shard or not (folder / shard).is_file():
                raise FileNotFoundError(f"'{folder}' lacks {shard!r}, which its {INDEX_FILE} lists.")
        return cls(TensorFile(folder / shard) for shard in shards)

    def read(self, wanted: Iterable[str], tied: Mapping[str, str]) -> Read:
        """A reader of the tensors ``wanted`` and of those ``tied`` to them; of these, files may hold any name."""
        found = {}
        for name in (*wanted, *tied):
            found[name] = next((self._places[n] for n in names_of(name, tied) if n in self._places), None)

        def read(name: str, start: int, stop: int) -> Tensor:
            place = found[name]
            if place is None:
                raise KeyError(name)
            return place[0].read(place[1], start, stop)

        return read


def files_of(name: str, revision: str | None, download: bool) -> TensorFiles:
    """The files of a model by name, from a folder, the Hub's local cache, or the Hub."""
    from sparseopt import models

    source = models.resolve(name)
    if os.path.isdir(source):
        return TensorFiles.folder(Path(source))
    if os.path.isabs(name) or name.startswith((".", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"model folder {name!r} does not exist.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    wanted = ["model*.safetensors", INDEX_FILE]
    try:
        return TensorFiles.folder(
            Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
        )
    except HFValidationError as error:
        raise FileNotFoundError(f"model {name!r} is neither a local folder nor a valid Hub name.") from error
    except FileNotFoundError as error:
        if not download:
            raise FileNotFoundError(f"model {name!r} is not in the local Hugging Face cache.") from error
    _, options = models._locate(name, revision)
    return TensorFiles.folder(Path(snapshot_download(name, allow_patterns=wanted, **options)))


def chunks(n: int) -> Iterator[tuple[int, int]]:
    """Ranges of a few million entries that make up 0..n."""
    return ((start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))
