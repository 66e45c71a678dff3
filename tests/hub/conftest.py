"""The real client of the Hub, against a server of ours on loopback; nothing here touches the network."""

from __future__ import annotations

import importlib.util
import socket
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparseopt as so


def _server_module() -> Any:
    """The package `server` beside this file, whichever way pytest imports tests."""
    name, folder = "sparseopt_test_hub_server", Path(__file__).with_name("server")
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """A Hub server; the installed client talks to it, with a token, a cache of its own, and short waits."""
    module = _server_module()
    from huggingface_hub import constants
    from huggingface_hub.utils import _http

    with module.HubServer() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        # Requests that the client makes on its own account go where the module's constant says.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        outside = _refuse_the_network(monkeypatch)
        # What the client reads from the environment when it is imported, and for processes that are started here.
        settings = {
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }
        for name, value in settings.items():
            monkeypatch.setenv(name, value if isinstance(value, str) else str(int(value)))
            if hasattr(constants, name):
                monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", module.TOKEN)
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for variable in ("RANK", "LOCAL_RANK"):
            monkeypatch.delenv(variable, raising=False)
        _shorten_waits(monkeypatch, _http)
        yield server
        assert server.complaints == []
        assert outside == []


def _refuse_the_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Hosts other than this one cannot be found; those that were looked for."""
    found: list[str] = []
    resolve = socket.getaddrinfo

    def local(host: Any, *args: Any, **options: Any) -> Any:
        if host not in ("127.0.0.1", "localhost", None):
            found.append(str(host))
            raise socket.gaierror(socket.EAI_NONAME, "tests have no network")
        return resolve(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", local)
    return found


def _shorten_waits(monkeypatch: pytest.MonkeyPatch, module: types.ModuleType) -> None:
    """The client's own retries wait for seconds; here they do not."""
    if hasattr(module, "time"):
        short = types.SimpleNamespace(**vars(time))
        short.sleep = lambda seconds: time.sleep(min(seconds, 0.01))
        monkeypatch.setattr(module, "time", short)


@pytest.fixture
def masks() -> so.MaskSet:
    """4096 + 24 entries at 3%."""
    shapes = {"model.layers.0.w": torch.empty(64, 64), "model.layers.1.b": torch.empty(24)}
    about = {"tolerance": 1e-5, "beta": 0.99, "epsilon": 1e-8, "base_model": "org/tiny-model", "step": 7}
    return so.MaskSet.random(shapes, density=0.03, seed=3, metadata=about)
