"""``sparseopt train lm``: flags and files become a configuration; :mod:`sparseopt.trainers.lm` does the work."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from sparseopt._processes import is_first
from sparseopt.cli._command import SEVERAL, DebugFlag, JsonFlag, example, print_json
from sparseopt.cli.runs import BaseDirOption

__all__ = ["EXAMPLE", "lm"]


EXAMPLE = example(
    "sparseopt train lm --config configs/train_config.yaml",
    "sparseopt train lm --config configs/train_config.yaml --set training.learning_rate=3e-4 run.name=slower",
    "sparseopt train lm --config configs/train_config.yaml --set run.checkpoint=saved_models/RUN_ID/checkpoint_1000",
    "sparseopt train lm --resume RUN_ID",
    "torchrun --nproc_per_node 4 -m sparseopt train lm --config my_config.yaml --set deepspeed=zero2.json",
)


def lm(
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="YAML or TOML file.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar=f"KEY=VALUE{SEVERAL}", help="Override settings, or add some; repeatable."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume", metavar="RUN_ID", help="Go on with a run that was interrupted or killed.")
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda (training.device).")] = None,
    base_dir: BaseDirOption = Path("saved_models"),
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Train a language model on text: GPT-2 or any causal model, fresh or pretrained, in full or under a mask.

    Any section and key may be added to the file: all of them are kept with the run.
    """
    from sparseopt import config as configuration
    from sparseopt.runs.registry import RunManager
    from sparseopt.schemas import LM

    if (config is None) == (resume is None):
        raise typer.BadParameter("give --config FILE for a new run, or --resume RUN_ID for one to go on with.")
    overrides = [*(set_ or []), *([] if device is None else [f"training.device={device}"])]
    source = config if resume is None else RunManager(base_dir).get_run_config(resume)
    try:
        settings, given = configuration.load_open(LM, source, overrides)
    except configuration.OverrideError as error:
        raise typer.BadParameter(str(error)) from error

    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed, where it is installed, writes notes to stdout
        from sparseopt.trainers.lm import train

        folder = train(settings, given, base_dir, resume=resume)
    if not is_first():
        return
    if json:
        print_json({"run_id": folder.name, "output_dir": str(folder)})
    else:
        print(f"Results: {folder}")
