"""A sweep's command that notes what it does, and what it noted."""

from __future__ import annotations

from pathlib import Path

# Notes its start and end; in between it waits while `hold` is there, and fails where `fail_X` is.
COMMAND = """
import os, pathlib, sys, time, yaml
folder = pathlib.Path(sys.argv[1])
config = yaml.safe_load(open(sys.argv[2]))
name = f"{config['p']['a']}-{config['p']['b']}"
def note(word):
    out = os.open(folder / "notes", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(out, f"{word} {name}\\n".encode())
try:
    note("start")
    if (folder / "hold").exists():
        note((folder / "hold").read_text() or "held")
    while (folder / "hold").exists():
        time.sleep(0.01)
except KeyboardInterrupt:
    note("interrupted")
    sys.exit(1)
print("output of", name)
if (folder / f"fail_{name}").exists():
    sys.exit(3)
note("done")
"""


def write_command(folder: Path) -> str:
    """Writes the command into a folder; returns what ``sparseopt sweep --command`` takes."""
    (folder / "command.py").write_text(COMMAND)
    return f"{{python}} {folder / 'command.py'} {folder} {{config}}"


def notes(folder: Path, word: str) -> list[str]:
    """Names of the runs that noted a word, in the order in which they did."""
    path = folder / "notes"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split()[1] for line in lines if line.split()[0] == word]
