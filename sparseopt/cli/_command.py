"""What every command shares: flag spelling, several values after one flag, and how errors end a program.

Exit codes: 0 success, 1 failure (one sentence on stderr, a traceback with ``--debug``), 2 bad usage, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperCommand, TyperGroup

__all__ = ["Command", "DebugFlag", "DeviceOption", "Group", "JsonFlag", "example", "group", "normalise", "print_json"]

DebugFlag = Annotated[bool, typer.Option("--debug", help="Print details, and tracebacks of errors.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, for machines.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto (CUDA where there is one), cpu, cuda or cuda:N.")]

# Several values may follow an option whose metavar ends like this: `--show a b c`.
SEVERAL = "..."


def normalise(args: Sequence[str], options: Sequence[Any]) -> list[str]:
    """Rewrites option names to the spelling that was declared, and spreads several values after one option.

    ``--model-name X`` becomes ``--model_name X``; values, and what follows ``--``, are left as they are.

    Args:
        args: the command's arguments.
        options: its parameters (click's or typer's), of which only options are looked at.
    """
    declared = {name: option for option in options if option.param_type_name == "option" for name in _names(option)}
    spelled = {name.replace("-", "_"): name for name in declared if name.startswith("--")}
    result: list[str] = []
    tokens = list(args)
    while tokens:
        token = tokens.pop(0)
        if token == "--":
            return [*result, token, *tokens]
        name, equals, value = token.partition("=")
        name = spelled.get(name.replace("-", "_"), name) if name.startswith("--") else name
        option = declared.get(name)
        result.append(f"{name}{equals}{value}" if option is not None else token)
        if option is None or getattr(option, "is_flag", False) or getattr(option, "count", False):
            continue
        if not equals and tokens:
            result.append(tokens.pop(0))  # the value, whatever it looks like
        if option.multiple and str(option.metavar or "").endswith(SEVERAL):
            while tokens and not _is_option(tokens[0], declared, spelled):
                result += [name, tokens.pop(0)]
    return result


def _names(option: Any) -> list[str]:
    return [*option.opts, *option.secondary_opts]


def _is_option(token: str, declared: dict[str, Any], spelled: dict[str, str]) -> bool:
    name = token.partition("=")[0]
    return token.startswith("--") or name in declared or name.replace("-", "_") in spelled


class Command(TyperCommand):
    """A command that takes both spellings of its flags and turns every error into an exit code and a sentence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # get_params adds --help to the command's own parameters.
        return super().parse_args(ctx, normalise(args, self.get_params(ctx)))

    def invoke(self, ctx: Any) -> Any:
        debug = bool(ctx.params.get("debug"))
        try:
            with warnings.catch_warnings():
                if not debug:
                    warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except KeyboardInterrupt:
            print("Interrupted: what was written is kept.", file=sys.stderr)
            raise typer.Exit(130) from None
        except BrokenPipeError:
            # `sparseopt ... | head`: nobody reads any more. Keep Python's last flush from complaining.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except Exception as error:
            # The outermost frame of a command: every error is told here and ends the program, none is swallowed.
            if _is_signal(error):
                raise
            report_error(error, debug=debug)
            raise typer.Exit(1) from error


class Group(TyperGroup):
    """A group of commands, in the order in which they were added."""


def group(name: str | None, help: str, epilog: str | None = None) -> typer.Typer:
    """A group of commands; its commands are added with ``@app.command(cls=Command, epilog=example(...))``."""
    return typer.Typer(
        name=name,
        help=help,
        epilog=epilog,
        cls=Group,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["--help", "-h"], "max_content_width": 110},
    )


def example(*lines: str) -> str:
    """The end of a help text: commands that can be copied."""
    return "\b\nExample:\n" + "\n".join(f"  {line}" for line in lines)


def print_json(value: Any) -> None:
    """Prints one JSON document on stdout."""
    import json

    print(json.dumps(value, indent=2, allow_nan=False))


def _is_signal(error: Exception) -> bool:
    """Whether the parser's own exceptions (bad usage, exit, abort) came by: it ends the program itself."""
    return isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "exit_code")


def report_error(error: Exception, *, debug: bool) -> None:
    """Prints what went wrong: one sentence, and the traceback with ``debug``."""
    if debug:
        traceback.print_exception(error)
        return
    print(f"Error: {_sentence(error)}", file=sys.stderr)


def _sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    backend = sys.modules.get("sparseopt._backend")
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing_module(error.name)
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}."
    expected = isinstance(error, (ValueError, TypeError, OSError, ImportError))
    if (expected or (backend is not None and isinstance(error, backend.BackendError))) and text:
        return text
    return f"{type(error).__name__}: {text or 'no details'} (run again with --debug for the traceback)"


def _missing_module(name: str) -> str:
    from sparseopt.doctor import extra_of

    top = name.partition(".")[0]
    found = extra_of(top)
    if found is None:
        broken = " (part of sparseopt: install it again)" if top == "sparseopt" else ""
        return f"The module {name!r} is not installed{broken}."
    extra, command = found
    return f"The package {top!r} is not installed; it belongs to the extra {extra!r}: {command}"


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    # Users can act on these; the rest is for developers, who use --debug.
    if issubclass(category, (UserWarning, RuntimeWarning)):
        print(f"Warning: {' '.join(str(message).split())}", file=sys.stderr)
