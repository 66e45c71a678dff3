"""``sparseopt train`` as a launcher starts it, several commands one after another, since starting takes longer than they do."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from torch import distributed as dist

from sparseopt.cli import main
from sparseopt.trainers.callbacks import InterruptGuard

RANK = int(os.environ.get("RANK", "0"))


def command(words: list[str], interrupted_at: int) -> Any:
    """The exit code; after a number of steps the last process alone gets a signal."""
    steps, agree = 0, InterruptGuard.agree

    def counting(guard: InterruptGuard, device: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == interrupted_at and int(os.environ["WORLD_SIZE"]) == RANK + 1:
            os.kill(os.getpid(), signal.SIGTERM)
        agree(guard, device)

    InterruptGuard.agree = counting  # type: ignore[method-assign]
    if RANK and "--resume" in words:
        time.sleep(1)  # the first process is ahead: what it has begun by then must not stop the others
    try:
        sys.argv = ["sparseopt", *words]
        main()
    except SystemExit as end:
        return end.code
    finally:
        InterruptGuard.agree = agree  # type: ignore[method-assign]
        if dist.is_initialized():  # a launcher starts no command before the one before has ended on all processes
            dist.barrier()
    return 0


if __name__ == "__main__":
    folder, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
    codes = [command(words, interrupted_at) for words, interrupted_at in commands]
    Path(folder, f"codes_{RANK}.json").write_text(json.dumps(codes))
    if dist.is_initialized():
        dist.destroy_process_group()
