"""``sparseopt train dpo``: find or load a mask, train its weights with TRL's DPOTrainer, check, evaluate, report.

The run folder holds everything: ``config.json``, ``mask.safetensors``, ``before.json`` (with the reference's
log-probabilities), ``metrics.jsonl``, ``checkpoint-N/`` until training is done, ``training.json`` (its cost),
``trained_entries.safetensors``, ``results.json``, ``training.png``, ``report.md`` and, if asked for, ``model/``.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
from datasets import disable_progress_bars
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, set_seed
from transformers.utils import logging as transformers_logging
from trl import DPOConfig, DPOTrainer

import sparseopt as so
from sparseopt import data, evaluate, models
from sparseopt._files import atomic_write
from sparseopt.masks.maskset import granularity_of
from sparseopt.progress import Progress, announce_device
from sparseopt.trainers.attach import attach, resolve_names, sparse_optimizer
from sparseopt.trainers.callbacks import InterruptGuard, MetricsFile, TrainProgress
from sparseopt.trainers.report import write_report
from sparseopt.trainers.run_folder import RunFolder
from sparseopt.trainers.scoring import gradient_scores, scored_parameters

__all__ = ["frozen_digest", "run"]


def run(config: dict[str, dict[str, Any]]) -> Path:
    """Runs a whole sparse DPO job; returns its folder.

    Args:
        config: the sections of :data:`sparseopt.config.DPO`.

    Raises:
        KeyboardInterrupt: stopped by the user; a checkpoint was saved and ``training.resume`` continues from it.
        RuntimeError: an entry outside the mask changed (never, unless something else writes to the model).
    """
    _check(config)
    folder = RunFolder(
        Path(config["output"]["dir"] or f"checkpoints_{models.sanitize_name(config['model']['name'])}_dpo"), config
    )
    try:
        return _run(config, folder)
    except KeyboardInterrupt:
        if folder.record.is_file() and not (folder.path / "results.json").is_file():
            _say(f"Stopped: the same command with --resume --output_dir {folder.path} continues.")
        raise


def _run(config: dict[str, dict[str, Any]], folder: RunFolder) -> Path:
    began, path = time.monotonic(), folder.path
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()  # its bars of an instant would fill a log
    training, output = config["training"], config["output"]
    device = announce_device(training["device"])
    set_seed(training["seed"])

    model = models.load_model(
        config["model"]["name"], config["model"]["dtype"], device, revision=config["model"]["revision"]
    )
    tokenizer = models.load_tokenizer(config["model"]["name"], revision=config["model"]["revision"])
    given = _given_masks(config, model)
    train_pairs, held_out = _load_pairs(config)
    arguments = _arguments(config, path, device)  # wrong settings show before anything long begins
    _say(f"Data: {len(train_pairs):,} pairs to train on, {len(held_out):,} held out.")
    folder.begin(training["resume"])
    if training["resume"]:
        where = "its evaluation" if folder.trained else folder.checkpoint.name if folder.checkpoint else "its beginning"
        _say(f"Resuming the run in {path} from {where}.")

    before = _evaluate(model, tokenizer, held_out, config, "before", path / "before.json", None)
    if folder.trained:
        masks = so.MaskSet.load(path / "mask.safetensors")
        so.Delta.load(path / "trained_entries.safetensors").apply_(model)
    else:
        trainer = _make_trainer(model, tokenizer, train_pairs, arguments)
        masks = _masks(config, trainer, model, path, given)
        _train(trainer, masks, config, folder)
        del trainer  # with the optimizer's state

    reference = (torch.tensor(before["chosen_logps"]), torch.tensor(before["rejected_logps"]))
    after = _evaluate(model, tokenizer, held_out, config, "after", None, reference)
    if output["save_model"]:
        model.save_pretrained(path / "model")
        tokenizer.save_pretrained(path / "model")
    results = {
        "before": _without_logps(before),
        "after": _without_logps(after),
        "active_parameters": masks.active_parameters,
        "total_parameters": masks.total_parameters,
        "mask_fingerprint": masks.fingerprint,
        "mask": {k: v for k, v in masks.metadata.items() if isinstance(v, (str, int, float))},
        **json.loads((path / "training.json").read_text()),
        "seconds": round(time.monotonic() - began, 1),
        "versions": _versions(device),
    }
    atomic_write(path / "results.json", json.dumps(results, indent=2, allow_nan=False))
    write_report(path, config, results)
    folder.drop_checkpoints()
    _say(_summary(results))
    return path


# What is counted, and the least that makes sense; fewer would mean something else to a library further down.
_LEAST = {
    "data": {"n_train": 1, "n_eval": 2},
    "mask": {"batches": 1},
    "training": {
        "n_steps": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "warmup_steps": 0, "max_length": 2,
        "logging_steps": 1, "save_steps": 0,
    },
    "evaluation": {"batch_size": 1, "n_generate": 0, "max_new_tokens": 0},
}  # fmt: skip


def _check(config: dict[str, dict[str, Any]]) -> None:
    """Finds wrong values before anything is loaded."""
    for section, keys in _LEAST.items():
        for key, least in keys.items():
            if config[section][key] < least:
                raise ValueError(f"{section}.{key} must be at least {least}, got {config[section][key]}.")
    if not 0 <= config["mask"]["sparsity"] < 1:
        raise ValueError(f"mask.sparsity must be in [0, 1), such as 0.975, got {config['mask']['sparsity']}.")
    if len(config["optimizer"]["betas"]) != 2:
        raise ValueError(f"optimizer.betas must be two numbers, got {config['optimizer']['betas']}.")


# ---- data and evaluation -----------------------------------------------------------------------------------------------
def _load_pairs(config: dict[str, dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training pairs, held-out pairs); no prompt is in both."""
    settings = config["data"]
    seed = settings["seed"] if settings["seed"] is not None else config["training"]["seed"]
    name, n_train, n_eval = settings["name"], settings["n_train"], settings["n_eval"]
    if name.startswith("reasoning_gym:"):
        task = name.removeprefix("reasoning_gym:")
        style = dict(settings["style"])
        if style.get("example"):
            style["example"] = tuple(style["example"])
        options = {"task_config": settings["options"], "style": data.PromptStyle(**style)}
        return (
            data.preference_pairs(task, n_train, seed, "train", **options),
            data.preference_pairs(task, n_eval, seed, "test", **options),
        )
    rows = list(data.load_preference_dataset(name))
    unique = list({json.dumps(row["prompt"]): row for row in rows}.values())
    if len(unique) < n_eval + 1:
        raise ValueError(
            f"{name!r} has {len(unique)} different prompts, too few to hold out data.n_eval={n_eval} of them."
        )
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [unique[i] for i in order]
    return shuffled[n_eval : n_eval + n_train], shuffled[:n_eval]


def _evaluate(
    model: PreTrainedModel,
    tokenizer: Any,
    pairs: list[dict[str, Any]],
    config: dict[str, dict[str, Any]],
    when: str,
    path: Path | None,
    reference: tuple[Tensor, Tensor] | None,
) -> dict[str, Any]:
    """Held-out preferences and greedy answers; kept in ``path``, where a resumed run finds them."""
    if path is not None and path.is_file():
        return json.loads(path.read_text())
    settings = config["evaluation"]
    with Progress(f"evaluate {when}", len(pairs), unit="pair") as progress:
        result = evaluate.evaluate_preferences(
            model, tokenizer, pairs, config["training"]["beta"], reference, settings["batch_size"],
            progress=lambda done, total: progress.update(completed=done),
        )  # fmt: skip
    result = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in result.items()}
    asked = pairs[: settings["n_generate"]]
    if asked:
        with Progress(f"generate {when}", len(asked), unit="answer") as progress:
            greedy = evaluate.greedy_exact_match(
                model, tokenizer, asked, settings["max_new_tokens"] or None, settings["batch_size"],
                progress=lambda done, total: progress.update(completed=done),
            )  # fmt: skip
        result["greedy"] = {k: v for k, v in greedy.items() if k != "answers"}
        result["answers"] = greedy.get("answers", [])[:5]
    if path is not None:
        atomic_write(path, json.dumps(result))
    return result


def _without_logps(result: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in result.items() if not k.endswith("_logps")}


# ---- training ------------------------------------------------------------------------------------------------------------
def _arguments(config: dict[str, dict[str, Any]], folder: Path, device: torch.device) -> DPOConfig:
    settings, optimizer = config["training"], config["optimizer"]
    return DPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=settings["batch_size"],
        gradient_accumulation_steps=settings["gradient_accumulation_steps"],
        max_steps=settings["n_steps"],
        learning_rate=optimizer["learning_rate"],
        adam_beta1=optimizer["betas"][0],
        adam_beta2=optimizer["betas"][1],
        adam_epsilon=optimizer["eps"],
        weight_decay=optimizer["weight_decay"],
        max_grad_norm=optimizer["max_grad_norm"],
        lr_scheduler_type=settings["lr_scheduler"],
        warmup_steps=settings["warmup_steps"],
        beta=settings["beta"],
        loss_type=list(settings["loss_type"]),
        loss_weights=list(settings["loss_weights"]) or None,
        max_length=settings["max_length"],
        logging_steps=settings["logging_steps"],
        save_strategy="steps" if settings["save_steps"] else "no",
        save_steps=settings["save_steps"] or 1,
        save_total_limit=1,
        seed=settings["seed"],
        gradient_checkpointing=config["model"]["gradient_checkpointing"],
        # The reference is the model before training: its log-probabilities once, instead of a second model in memory.
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=config["evaluation"]["batch_size"],
        bf16=False,
        fp16=False,
        report_to=[],
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
    )


def _make_trainer(
    model: PreTrainedModel, tokenizer: Any, pairs: list[dict[str, Any]], arguments: DPOConfig
) -> DPOTrainer:
    # Its tokenisation bars flash by; the long parts (reference, scoring, training, evaluation) have bars of their own.
    disable_progress_bars()
    trainer = _reference_once(pairs)(
        model=model, args=arguments, train_dataset=data.to_dataset(pairs), processing_class=tokenizer,
        callbacks=[MetricsFile(Path(str(arguments.output_dir)) / "metrics.jsonl")],
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    # With every checkpoint TRL writes a model card into the run folder, which has a report instead.
    trainer.create_model_card = lambda *args, **kwargs: None  # type: ignore[method-assign]
    return trainer


def _reference_once(pairs: list[dict[str, Any]]) -> type[DPOTrainer]:
    """DPOTrainer that measures the reference with :func:`sparseopt.evaluate.sequence_logps`: the same numbers, several
    times faster where prompts begin alike, since what they share is computed once. Only that one step is replaced, and
    TRL's own runs wherever rows were dropped or would be truncated."""

    class ReferenceOnce(DPOTrainer):
        def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
            model: Any = self.model
            tokenizer: Any = self.processing_class
            limit: int | None = cast(DPOConfig, self.args).max_length
            tokens = [evaluate.tokenize_pair(tokenizer, pair) for pair in pairs]
            longest = max(len(prompt) + max(len(chosen), len(rejected)) for prompt, chosen, rejected in tokens)
            if len(dataset) != len(pairs) or longest > (limit or longest):
                return super()._precompute_ref_logps(dataset, name, batch_size)
            with Progress("reference", len(pairs), unit="pair") as progress:
                chosen, rejected = evaluate.sequence_logps(
                    model, tokenizer, pairs, batch_size,
                    progress=lambda done, total: progress.update(completed=done),
                )  # fmt: skip
            with_chosen = dataset.add_column("ref_chosen_logps", chosen.tolist())
            return with_chosen.add_column("ref_rejected_logps", rejected.tolist())

    return ReferenceOnce


def _given_masks(config: dict[str, dict[str, Any]], model: PreTrainedModel) -> so.MaskSet | None:
    """The masks of ``mask.path``, which must cover every parameter; or checks that the patterns leave some."""
    settings = config["mask"]
    if settings["path"] is None:
        if settings["method"] is not None:
            scored_parameters(model, settings["include"], settings["exclude"])
        return None
    masks = resolve_names(model, so.MaskSet.load(settings["path"]))
    missing = [name for name, _ in model.named_parameters() if name not in masks]
    if missing:
        raise ValueError(
            f"the mask {settings['path']!r} lacks {len(missing)} parameters of the model, such as {missing[0]!r}."
        )
    return masks


def _masks(
    config: dict[str, dict[str, Any]],
    trainer: DPOTrainer,
    model: PreTrainedModel,
    folder: Path,
    given: so.MaskSet | None,
) -> so.MaskSet:
    """The masks of this run: what its folder has already, was given, or is found. They cover every parameter."""
    settings, kept = config["mask"], folder / "mask.safetensors"
    if kept.is_file():
        return so.MaskSet.load(kept)
    if given is not None:
        masks = given
    elif settings["method"] is None:
        masks = so.MaskSet.full_like(model)
    else:
        include, exclude = settings["include"] or None, settings["exclude"] or None
        found: dict[str, Any] = {"base_model": config["model"]["name"]}
        if settings["method"] == "gradient":
            # Parameters that are not scored need no memory: one zero, expanded.
            scores = {name: torch.zeros(()).expand(p.shape) for name, p in model.named_parameters()}
            scores.update(gradient_scores(trainer, settings["batches"], include, exclude))
            found["batches"] = settings["batches"]
        else:
            generator = torch.Generator().manual_seed(config["training"]["seed"])
            scores = {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}
        masks = so.find_masks(
            scores, settings["sparsity"], settings["scope"], granularity_of(settings["granularity"]),
            include=include, exclude=exclude, method=settings["method"], metadata=found,
        )  # fmt: skip
    masks.save(kept)
    return masks


def _train(trainer: DPOTrainer, masks: so.MaskSet, config: dict[str, dict[str, Any]], folder: RunFolder) -> None:
    """Trains, checks that nothing else moved, and keeps the outcome: ``training.json``, ``trained_entries.safetensors``."""
    settings = config["optimizer"]
    model: Any = trainer.model
    frozen = frozen_digest(model, masks)
    _say(f"Training {masks.active_parameters:,} of {masks.total_parameters:,} weights; the others stay as they are.")
    attach(trainer, masks, capture_gradients=settings["capture_gradients"], master_weights=settings["master_weights"])
    guard, progress = InterruptGuard(), TrainProgress()
    trainer.add_callback(guard)
    trainer.add_callback(progress)
    try:
        with guard:
            trainer.train(resume_from_checkpoint=str(folder.checkpoint) if folder.checkpoint else None)
    except BaseException as error:
        progress.close(error)
        raise
    state = trainer.state
    if guard.interrupted and state.global_step < state.max_steps:
        _say(f"A checkpoint was saved after step {state.global_step} of {state.max_steps}.")
        raise KeyboardInterrupt
    changed = [name for name, digest in frozen_digest(model, masks).items() if digest != frozen[name]]
    if changed:
        raise RuntimeError(f"entries outside the mask changed in {len(changed)} parameters, first {changed[0]!r}.")
    optimizer = sparse_optimizer(trainer)
    cost = {
        "frozen_entries_bit_identical": True,
        "optimizer_state_bytes": optimizer.state_bytes(),
        "gradient_bytes": optimizer.gradient_bytes(),
        "skipped_steps": optimizer.skipped_steps,
        "steps": state.global_step,
        "train_seconds": round(state.log_history[-1]["train_runtime"], 1),
    }
    atomic_write(folder.path / "training.json", json.dumps(cost, indent=2))
    # Last: where this file is, training is done.
    optimizer.export_delta().save(folder.path / "trained_entries.safetensors")
    if guard.interrupted:  # during the last step
        raise KeyboardInterrupt


def frozen_digest(model: torch.nn.Module, masks: so.MaskSet) -> dict[str, str]:
    """SHA-256 of the bits of each parameter with its active entries zeroed: equal digests, identical frozen entries."""
    result = {}
    for name, param in model.named_parameters():
        value = param.detach().masked_fill(masks[name].to(param.device), 0).cpu().contiguous()
        result[name] = hashlib.sha256(value.view(-1).view(torch.uint8).numpy().data).hexdigest()
    return result


# ---- telling -------------------------------------------------------------------------------------------------------------
def _versions(device: torch.device) -> dict[str, str]:
    import transformers
    import trl

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    return {
        "sparseopt": so.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
        "python": sys.version.split()[0],
        "device": name,
    }


def _summary(results: dict[str, Any]) -> str:
    before, after = results["before"], results["after"]
    text = f"Held-out reward accuracy {before['reward_accuracy']:.3f} -> {after['reward_accuracy']:.3f}"
    text += f", margin {before['margin']:.2f} -> {after['margin']:.2f}"
    if "greedy" in after:
        text += f", greedy exact match {before['greedy']['exact_match']:.2f} -> {after['greedy']['exact_match']:.2f}"
    return f"{text}. Entries outside the mask: bit-identical."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
