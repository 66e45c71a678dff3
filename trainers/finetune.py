"""``sparse_finetune``: fine-tune any transformers model with masks that change while it trains.

    load -> hold out -> prune -> train and exchange -> save

The output folder is a model folder, and has beside it ``masks.safetensors`` (the final masks), ``mask_history.json`` (every
change), ``finetune.png`` (the picture of the run), ``results.json`` and ``metrics.jsonl``; ``checkpoint-N/`` until it is done.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from sparseopt.optim.dynamic.criteria import Criterion
from sparseopt.optim.dynamic.policy import SparsitySchedule
from sparseopt.trainers.finetune_run import FinetuneRun
from sparseopt.trainers.finetune_settings import FinetuneSettings

__all__ = ["sparse_finetune"]


def sparse_finetune(
    model_name: Any,
    dataset: Any,
    sparsity_ratio: float = 0.5,
    sparsity_type: str = "unstructured",
    mask_update_interval: int = 100,
    mask_update_fraction: float = 0.3,
    use_rigl: bool = True,
    use_topk_attention: bool = False,
    topk_ratio: float = 0.1,
    learning_rate: float = 5e-5,
    batch_size: int = 8,
    num_epochs: int = 3,
    warmup_steps: int = 100,
    gradient_accumulation_steps: int = 4,
    fp16: bool = True,
    gradient_checkpointing: bool = True,
    output_dir: str | os.PathLike[str] = "./sparse_model",
    *,
    policy: str | None = None,
    target: str = "weights",
    dropped: str = "keep",
    distribution: str = "uniform",
    exclude: str | Sequence[str] = (),
    sparsity_schedule: SparsitySchedule | str | None = None,
    criterion: Criterion | str = None,
    task: str = "causal-lm",
    tokenizer: Any = None,
    dataset_split: str = "train",
    eval_dataset: Any = None,
    eval_fraction: float = 0.05,
    eval_steps: int | None = None,
    text_column: str = "text",
    label_column: str = "label",
    max_length: int = 512,
    max_steps: int | None = None,
    weight_decay: float = 0.01,
    dropout: float | None = None,
    lr_scheduler_type: str = "linear",
    max_grad_norm: float = 1.0,
    seed: int = 42,
    logging_steps: int = 10,
    save_steps: int = 200,
    report_to: str | Sequence[str] = (),
    resume: bool = False,
    device: str = "auto",
) -> PreTrainedModel:
    """Fine-tunes a model whose linear layers are sparse, with masks that look for better connections all the while.

    Element masks save optimizer state, not multiplications: a step is about as long as a dense one. ``results.json`` says what
    was measured.

    Args:
        model_name: ``smollm2``, a folder, a Hub name, or a transformers model.
        dataset: a file or folder of texts, a table (.jsonl, .json, .parquet, .csv), a Hub name, or a ``datasets.Dataset`` or
            ``DatasetDict``. Rows hold a text (``text_column``), ``messages``, ``prompt`` and ``completion``, or ``input_ids``.
        sparsity_ratio: share of inactive entries, [0, 1), of the linear layers (not of embeddings and output head).
        sparsity_type: ``"unstructured"``, ``"2:4"``, ``"4:8"``, or any N:M along the input dimension.
        mask_update_interval: optimizer steps between two updates of the masks.
        mask_update_fraction: share of the active entries exchanged at first; it decays with a cosine until 75% of training.
        use_rigl: drop the smallest, grow where gradients are largest; False: the first masks stay (under a
            ``sparsity_schedule``: only their number changes). ``policy`` overrides it.
        use_topk_attention: mask all but ``topk_ratio`` of the attention heads. Off, unlike in the description that this function
            follows: keeping 10% of the heads destroys most models.
        topk_ratio: share of heads to keep.
        learning_rate: its peak.
        batch_size: samples of a micro-batch.
        num_epochs: passes over the data.
        warmup_steps: optimizer steps until the peak.
        gradient_accumulation_steps: micro-batches of an optimizer step.
        fp16: mixed precision: bf16 on GPUs that have it, off elsewhere; the log says which.
        gradient_checkpointing: recompute activations in backward.
        output_dir: where the model goes, with the run's files.
        policy: ``"rigl"``, ``"set"`` (random growth), ``"gradual"`` (sparsity rises to the ratio) or ``"static"``.
        target: ``"weights"``: inactive weights are 0, all other parameters train densely. ``"updates"``: the model stays whole,
            and only active entries train.
        dropped: under ``"updates"``, what leaves keeps its value (``"keep"``) or returns to the old one (``"rewind"``).
        distribution: of the sparsity over layers: ``"uniform"``, ``"erk"`` or ``"global"``.
        exclude: patterns of parameter names that stay dense.
        sparsity_schedule: ``(step, total_steps) -> sparsity`` in place of the ratio, a function or its name
            (``module:function``, ``file.py:function``), or ``"linear:0.1:0.9"``.
        criterion: which entries leave, in place of |w|: a subclass of ``torch.nn.utils.prune.BasePruningMethod``, a function
            ``score(name, weight, gradient)`` (the lowest leave), or the name of one.
        task: ``"causal-lm"`` or ``"sequence-classification"``.
        tokenizer: a tokenizer or its name; default: the model's.
        dataset_split: of a Hub dataset or DatasetDict.
        eval_dataset: what to evaluate on, as ``dataset``; its first 128 samples.
        eval_fraction: else this share of the data is held out, at most 128 samples.
        eval_steps: optimizer steps between evaluations; default: a tenth of the run.
        text_column: of tables; ``"a,b"`` for pairs of texts in classification.
        label_column: of tables for classification: names or numbers.
        max_length: tokens of a sample; text is cut to blocks of it.
        max_steps: optimizer steps, in place of ``num_epochs``.
        weight_decay: of weight matrices, active entries only.
        dropout: of all dropout that the model has; None: as it comes.
        lr_scheduler_type: a scheduler of transformers: linear, cosine, constant_with_warmup, ...
        max_grad_norm: gradients are clipped to it, over trained entries; 0: not.
        seed: of everything random.
        logging_steps: steps between two log entries.
        save_steps: steps between two checkpoints; 0: only when interrupted.
        report_to: wandb, trackio, tensorboard.
        resume: continue the interrupted run in ``output_dir``, to the same weights.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        The trained model, in evaluation mode.

    Raises:
        ValueError: settings that make no sense, an input dimension that M does not divide, a schedule that returns NaN, a
            criterion of a wrong shape or count, quantised weights under ``target="weights"``, ...
        FileNotFoundError: no such model, data, or run to resume.
        TypeError: an argument of another type.
        KeyboardInterrupt: stopped; a checkpoint was saved, ``resume=True`` continues.
    """
    return FinetuneRun(FinetuneSettings(**locals())).execute()
