"""``sparseopt train``: flags and files become a configuration; :mod:`sparseopt.trainers` does the work."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Annotated, Any

import typer

from sparseopt._processes import is_first
from sparseopt.cli import train_lm
from sparseopt.cli._command import SEVERAL, Command, DebugFlag, JsonFlag, example, group, print_json

app = group("train", help="Train a model: every weight, a LoRA adapter, or only the weights of a mask.")

_TEXT = {
    "dpo": "Direct preference optimization: find or load a mask, train its weights, evaluate before and after.",
    "grpo": "Group relative policy optimization with verifiable rewards, and a table of sampled completions.",
    "sft": "Supervised fine-tuning: the cold start before preferences or rewards.",
}
_EXAMPLES = {
    "dpo": (
        "sparseopt train dpo --config configs/quickstart.yaml",
        "sparseopt train dpo --model_name meta-llama/Llama-3.1-8B",
        "sparseopt train dpo --mask masks/sparsity_97.5pct_fisher_step50.safetensors --n_steps 100 --batch_size 1",
        "sparseopt train dpo --config configs/quickstart.yaml --set training.beta=0.2 data.n_train=500",
    ),
    "grpo": (
        "sparseopt train grpo --model_name Qwen/Qwen2.5-0.5B-Instruct",
        "sparseopt train grpo --model_name smollm2 --data reasoning_gym:chain_sum --sparsity 0.975 --n_steps 50",
        "sparseopt train grpo --checkpoint checkpoints_google_gemma_3_270m_it_grpo/checkpoint-1000 --mlp_only \\",
        "    --mask masks/sparsity_90.0pct_magnitude_step100.safetensors --set rewards.functions=[answer,my_rewards:short]",
    ),
    "sft": (
        "sparseopt train sft --model_name smollm2 --data reasoning_gym:chain_sum --n_steps 50",
        "sparseopt train sft --model_name google/gemma-3-270m-it --data conversations.jsonl --lora",
    ),
}


def _method(name: str) -> Callable[..., None]:
    """The command of one method; all take the same flags."""

    def command(
        config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="YAML or TOML file.")] = None,
        set_: Annotated[
            list[str] | None,
            typer.Option(
                "--set", metavar=f"SECTION.KEY=VALUE{SEVERAL}", help="Override settings of the file; repeatable."
            ),
        ] = None,
        model_name: Annotated[
            str | None, typer.Option("--model_name", help="Hub name, local folder or smollm2 (model.name).")
        ] = None,
        checkpoint: Annotated[
            str | None,
            typer.Option(
                "--checkpoint", metavar="FOLDER", help="Begin with these weights, or None (model.checkpoint)."
            ),
        ] = None,
        data: Annotated[
            str | None, typer.Option("--data", help="Hub dataset, local file or reasoning_gym:TASK (data.name).")
        ] = None,
        subset_size: Annotated[
            int | None, typer.Option("--subset_size", help="Rows of it to train on (data.n_train).")
        ] = None,
        mask: Annotated[str | None, typer.Option("--mask", metavar="FILE", help="Mask file (mask.path).")] = None,
        sparsity: Annotated[
            float | None,
            typer.Option(
                "--sparsity", help="Share of inactive entries of the mask that is found from gradients (mask.sparsity)."
            ),
        ] = None,
        mlp_only: Annotated[
            bool, typer.Option("--mlp_only", help="Train the mask's MLP entries only (mask.mlp_only).")
        ] = False,
        structured: Annotated[
            str | None,
            typer.Option(
                "--structured",
                metavar="auto|off",
                help="Spare work under masks of rows or columns (optimizer.structured).",
            ),
        ] = None,
        lora: Annotated[bool, typer.Option("--lora", help="Train a LoRA adapter instead (lora.enabled).")] = False,
        n_steps: Annotated[int | None, typer.Option("--n_steps", help="Optimizer steps (training.n_steps).")] = None,
        batch_size: Annotated[
            int | None, typer.Option("--batch_size", help="Rows per micro-batch (training.batch_size).")
        ] = None,
        learning_rate: Annotated[
            float | None, typer.Option("--learning_rate", help="Peak learning rate (optimizer.learning_rate).")
        ] = None,
        delta_log: Annotated[
            str | None,
            typer.Option(
                "--delta_log", metavar="STEPS", help="Steps to log: 10,20 or 10:80:10 or none (delta_log.schedule)."
            ),
        ] = None,
        delta_log_dir: Annotated[
            str | None, typer.Option("--delta_log_dir", metavar="FOLDER", help="Where (delta_log.dir).")
        ] = None,
        report_to: Annotated[
            list[str] | None,
            typer.Option(
                "--report_to",
                metavar=f"NAME{SEVERAL}",
                help="wandb, trackio, tensorboard or none (tracking.report_to).",
            ),
        ] = None,
        run_name: Annotated[str | None, typer.Option("--run_name", help="Its name there (tracking.run_name).")] = None,
        save_model: Annotated[
            bool | None,
            typer.Option(
                "--save_model/--no_save_model", help="Save the trained model as a folder (output.save_model)."
            ),
        ] = None,
        seed: Annotated[int | None, typer.Option("--seed", help="Seed of everything random (training.seed).")] = None,
        device: Annotated[
            str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N (training.device).")
        ] = None,
        output_dir: Annotated[
            str | None, typer.Option("--output_dir", metavar="FOLDER", help="Run folder (output.dir).")
        ] = None,
        resume: Annotated[
            bool, typer.Option("--resume", help="Continue the interrupted run in the run folder (training.resume).")
        ] = False,
        json: JsonFlag = False,
        debug: DebugFlag = False,
    ) -> None:
        if structured not in (None, "auto", "off"):
            raise typer.BadParameter(f"--structured must be auto or off, got {structured!r}.")
        flags: dict[str, Any] = {
            "model_name": model_name,
            "checkpoint": checkpoint,
            "data": data,
            "subset_size": subset_size,
            "mask": mask,
            "sparsity": sparsity,
            "mlp_only": mlp_only or None,
            "structured": None if structured is None else structured == "auto",
            "lora": lora or None,
            "n_steps": n_steps,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "delta_log": delta_log,
            "delta_log_dir": delta_log_dir,
            "report_to": [part for text in report_to for part in text.split(",")] if report_to else None,
            "run_name": run_name,
            "save_model": save_model,
            "seed": seed,
            "device": device,
            "output_dir": output_dir,
            "resume": resume or None,
        }
        settings = _configuration(name, config, set_ or [], flags)
        folder = importlib.import_module(f"sparseopt.trainers.{name}").run(settings)
        if not is_first():
            return
        if json:
            print_json({"output_dir": str(folder)})
        else:
            print(f"Results: {folder}")

    command.__doc__ = f"""{_TEXT[name]}

    Without a mask (no --mask, no --sparsity, no mask.method in the file) every weight trains, or with --lora an adapter.
    Settings come from defaults, the file, --set and flags; the later wins.
    """
    return command


def _configuration(
    method: str, config: str | None, overrides: list[str], flags: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Bad flags and overrides are bad usage (exit code 2); a bad file is a failure (exit code 1)."""
    from sparseopt import config as configuration
    from sparseopt.schemas import FLAGS, METHODS

    if flags["mask"] is not None and flags["sparsity"] is not None:
        raise typer.BadParameter("--mask names a mask and --sparsity asks for another: give one of them.")
    if flags["lora"] and (flags["mask"] is not None or flags["sparsity"] is not None):
        raise typer.BadParameter(
            "--lora trains an adapter, --mask and --sparsity weights of the model: give one of them."
        )
    given = {FLAGS[flag]: value for flag, value in flags.items()}
    try:
        settings = configuration.load(METHODS[method], config, overrides, given)
    except configuration.OverrideError as error:
        raise typer.BadParameter(str(error)) from error
    if flags["mask"] is not None or flags["lora"]:
        settings["mask"]["method"] = None
    if flags["sparsity"] is not None or flags["lora"]:
        settings["mask"]["path"] = None
    if flags["sparsity"] is not None:
        settings["mask"]["method"] = settings["mask"]["method"] or "gradient"
    if settings["model"]["checkpoint"] == "None":  # as it is written where no value may be left out
        settings["model"]["checkpoint"] = None
    return settings


for _name in _TEXT:
    app.command(_name, cls=Command, epilog=example(*_EXAMPLES[_name]))(_method(_name))


app.command("lm", cls=Command, epilog=train_lm.EXAMPLE)(train_lm.lm)


@app.command(
    "chain",
    cls=Command,
    epilog=example(
        "sparseopt train chain --config configs/chain.yaml",
        "sparseopt train chain --config configs/chain.yaml --set chain.dir=chain2 dpo.training={n_steps: 40}",
    ),
)
def chain(
    config: Annotated[str | None, typer.Option("--config", metavar="FILE", help="YAML or TOML file.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar=f"SECTION.KEY=VALUE{SEVERAL}", help="Override settings of the file; repeatable."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N (chain.device).")] = None,
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", metavar="FOLDER", help="Folder of the chain (chain.dir).")
    ] = None,
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """The whole way: dense DPO with a delta log, masks by every method, sparse DPO and GRPO, timing, reconstruction, report.

    A chain that was stopped goes on where it was: run the same command again.
    """
    from sparseopt import config as configuration
    from sparseopt.schemas import CHAIN

    flags = {"chain.device": device, "chain.dir": output_dir}
    try:
        settings = configuration.load(CHAIN, config, set_ or [], flags)
    except configuration.OverrideError as error:
        raise typer.BadParameter(str(error)) from error

    from sparseopt.trainers.chain import run

    folder = run(settings)
    if json:
        print_json({"output_dir": str(folder)})
    else:
        print(f"Report: {folder / 'report.md'}")
