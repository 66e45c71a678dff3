"""``sparseopt doctor``: prints :func:`sparseopt.doctor.report`."""

from __future__ import annotations

from typing import Any

import typer

from sparseopt.cli._command import DebugFlag, DeviceOption, JsonFlag, example, print_json

EXAMPLE = example("sparseopt doctor", "sparseopt doctor --device cpu --json")


def doctor(device: DeviceOption = "auto", json: JsonFlag = False, debug: DebugFlag = False) -> None:
    """Say which versions are installed, what each device will use and why, and what is missing.

    Runs a few ops on each device (or on --device only) and compares them with plain PyTorch. Exits with 1 if something
    is broken.
    """
    from sparseopt.doctor import report

    result = report(device)
    if json:
        print_json(result)
    else:
        _print(result, debug=debug)
    if result["problems"]:
        raise typer.Exit(1)


def _print(result: dict[str, Any], *, debug: bool) -> None:
    print("Versions")
    for name, version in result["versions"].items():
        print(f"  {name:<16} {version or 'not installed'}")
    print("Devices")
    for device in result["devices"]:
        print(f"  {device['device']:<16} {device['name']}")
        print(f"  {'':<16} kernels: {device['backend']} ({device['reason']}); self-check: {device['self_check']}")
    extension = result["extension"]
    print("Compiled CPU kernels")
    print(f"  {extension['path'] or 'not installed'}")
    if extension["build"]:
        print("  " + ", ".join(f"{name} {value}" for name, value in extension["build"].items()))
    missing = [extra for extra in result["extras"] if extra["missing"]]
    print("Extras" if result["extras"] else "Extras: unknown, sparseopt is not installed")
    for extra in result["extras"]:
        state = f"missing {', '.join(extra['missing'])}" if extra["missing"] else "complete"
        print(f"  {extra['extra']:<16} {state}")
    for extra in missing:
        print(f"  for {extra['extra']}: {extra['command']}")
    for note in result["notes"]:
        print(f"Note: {note}")
    for problem in result["problems"]:
        print(f"Problem: {problem}")
    if not result["problems"]:
        print("Everything works.")
    if debug:
        print(f"sparseopt is imported from {result['location']}")
