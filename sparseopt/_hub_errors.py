"""What went wrong on the way to the Hub: one sentence for people, and whether trying again can help."""

from __future__ import annotations

import contextlib
import email.utils
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["Problem", "explain", "hub_failures", "one_sentence"]

# 409 and 412: somebody else committed in between; the next attempt builds on that commit.
RETRY_STATUS = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
LONGEST_WAIT = 3600.0  # seconds; a server that asks for more is asked again after that
LOGIN = "log in with `hf auth login`"


@dataclass(frozen=True)
class Problem:
    """One failure, told.

    Attributes:
        sentence: what happened, for people.
        kind: the built-in exception that says so.
        retry: whether the same call can succeed later.
        wait: seconds that the server asked to wait; None = it did not say.
    """

    sentence: str
    kind: type[Exception]
    retry: bool = False
    wait: float | None = None


@cache
def _network_errors() -> tuple[type[Exception], ...]:
    """Base classes of the HTTP library that the installed client is built on (it has changed over its releases)."""
    from huggingface_hub.errors import HfHubHTTPError

    found = [base for base in HfHubHTTPError.__mro__ if base.__name__ in ("HTTPError", "RequestException")]
    return tuple(base for base in found if issubclass(base, Exception))


@cache
def hub_failures() -> tuple[type[Exception], ...]:
    """Every class of error that the Hub's client raises for a bad network, server, answer or name."""
    # Malformed answers surface as lookups and conversions that fail; uploads wrap their cause in a RuntimeError.
    return (*_network_errors(), OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)


@contextlib.contextmanager
def one_sentence(repository: str) -> Iterator[None]:
    """Turns the errors of the Hub's client into a built-in exception with one sentence."""
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, OfflineModeIsEnabled

    told: tuple[type[Exception], ...] = (
        *_network_errors(), OfflineModeIsEnabled, HFValidationError, EntryNotFoundError, RuntimeError
    )  # fmt: skip
    try:
        yield
    except told as error:
        problem = explain(error, repository)
        raise problem.kind(problem.sentence) from error


def explain(error: BaseException, repository: str) -> Problem:
    """Says what an error of the client means; its cause is looked through too."""
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RevisionNotFoundError,
    )

    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, HFValidationError):
            text = f"{repository!r} is neither a local folder nor a valid Hub name (such as user/model-gradient-masks)."
            return Problem(text, ValueError)
        if isinstance(link, RevisionNotFoundError):
            return Problem(f"{repository!r} has no such revision on the Hub.", FileNotFoundError)
        status = _status(link)
        if status is not None:
            return _explain_status(link, status, repository)
    for link in chain:
        if isinstance(link, OfflineModeIsEnabled):
            return Problem(
                f"{repository!r} cannot be reached: offline mode is on (HF_HUB_OFFLINE).", ConnectionError, retry=True
            )
    for link in chain:
        if isinstance(link, (LocalEntryNotFoundError, ConnectionError, TimeoutError, *_network_errors())):
            reason = _first_line(chain[-1])
            return Problem(
                f"the Hub cannot be reached for {repository!r}, and the local cache does not hold it ({reason})."
                if isinstance(link, LocalEntryNotFoundError)
                else f"the Hub cannot be reached for {repository!r} ({reason}).",
                ConnectionError,
                retry=True,
            )
    # An error that this package told already, or something about local files: it stands as it is.
    if isinstance(error, (RuntimeError, LookupError, AttributeError, json.JSONDecodeError)):
        return Problem(f"the Hub's answer for {repository!r} makes no sense ({_first_line(error)}).", ValueError, True)
    return Problem(_first_line(error), OSError if isinstance(error, OSError) else ValueError)


def _explain_status(error: BaseException, status: int, repository: str) -> Problem:
    if status == 401:
        # The Hub answers 401 for repositories that do not exist, too, when nobody is logged in.
        text = f"{repository!r} is private or does not exist, or the token is not valid (401): {LOGIN}."
        return Problem(text, PermissionError)
    if status == 403:
        return Problem(
            f"access to {repository!r} was refused (403): {LOGIN} with a token that may write there.", PermissionError
        )
    if status == 404:
        text = f"{repository!r} is not on the Hub (404); if it is private, {LOGIN}."
        return Problem(text, FileNotFoundError)
    wait = _wait(error) if status in (429, 503) else None
    if status in RETRY_STATUS:
        what = {409: "is being changed by somebody else", 412: "is being changed by somebody else"}.get(
            status, "is rate-limited by the Hub" if status == 429 else "could not be handled by the Hub"
        )
        return Problem(f"{repository!r} {what} (HTTP {status}); try again later.", ConnectionError, True, wait)
    return Problem(f"the Hub refused the request for {repository!r} (HTTP {status}): {_server_says(error)}", ValueError)


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) and status >= 400 else None


def _wait(error: BaseException) -> float | None:
    """Seconds from ``Retry-After`` (a number or a date) or from the Hub's ``RateLimit`` header."""
    headers: Any = getattr(getattr(error, "response", None), "headers", None) or {}
    text = str(headers.get("retry-after") or headers.get("Retry-After") or "").strip()
    seconds: float | None = None
    if text.isdigit():
        seconds = float(text)
    elif text:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except ValueError:
            seconds = None
    if seconds is None:
        match = re.search(r"\bt=(\d+)", str(headers.get("ratelimit") or ""))
        seconds = float(match[1]) if match else None
    return None if seconds is None else min(max(seconds, 0.0), LONGEST_WAIT)


def _server_says(error: BaseException) -> str:
    message = getattr(error, "server_message", None)
    return " ".join(message.split()) if isinstance(message, str) and message.strip() else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
