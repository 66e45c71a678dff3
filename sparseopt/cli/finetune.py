"""``sparseopt finetune``: dynamic sparse fine-tuning; :mod:`sparseopt.trainers.finetune` does the work."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparseopt.cli._command import SEVERAL, DebugFlag, JsonFlag, example, print_json

EXAMPLE = example(
    "sparseopt finetune --model_name smollm2 --dataset docs/ --sparsity_ratio 0.5 --output_dir sparse_model",
    "sparseopt finetune --model_name smollm2 --dataset rows.jsonl --sparsity_type 2:4 --learning_rate 2e-4 --max_steps 600",
    "sparseopt finetune --model_name smollm2 --dataset docs/ --sparsity_schedule linear:0.1:0.9 --criterion mine.py:score",
    "sparseopt finetune --model_name distilbert-base-uncased --dataset imdb --task sequence-classification \\",
    "    --target updates --sparsity_ratio 0.98 --dropped rewind",
    "sparseopt finetune --model_name smollm2 --dataset docs/ --output_dir sparse_model --resume",
)


def finetune(
    model_name: Annotated[str, typer.Option("--model_name", help="smollm2, a model folder or a Hub name.")],
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            help="A file or folder of texts, a table (.jsonl, .json, .parquet, .csv), or a Hub dataset; with a text, "
            "messages, or prompt and completion.",
        ),
    ],
    sparsity_ratio: Annotated[
        float, typer.Option("--sparsity_ratio", help="Share of inactive entries of the linear layers, [0, 1).")
    ] = 0.5,
    sparsity_type: Annotated[
        str, typer.Option("--sparsity_type", help="unstructured, 2:4, 4:8, or any N:M along the input dimension.")
    ] = "unstructured",
    mask_update_interval: Annotated[
        int, typer.Option("--mask_update_interval", help="Optimizer steps between two mask updates.")
    ] = 100,
    mask_update_fraction: Annotated[
        float,
        typer.Option(
            "--mask_update_fraction",
            help="Share of the active entries exchanged at first; decays until 75% of training.",
        ),
    ] = 0.3,
    use_rigl: Annotated[
        bool,
        typer.Option(
            "--use_rigl/--no_use_rigl",
            help="Drop the smallest weights, grow where gradients are largest; without, masks stay.",
        ),
    ] = True,
    use_topk_attention: Annotated[
        bool,
        typer.Option(
            "--use_topk_attention/--no_use_topk_attention",
            help="Mask all but --topk_ratio of the attention heads; off, because keeping 10% of the heads destroys most models.",
        ),
    ] = False,
    topk_ratio: Annotated[float, typer.Option("--topk_ratio", help="Share of attention heads to keep.")] = 0.1,
    learning_rate: Annotated[float, typer.Option("--learning_rate", help="Peak learning rate.")] = 5e-5,
    batch_size: Annotated[int, typer.Option("--batch_size", help="Samples of a micro-batch.")] = 8,
    num_epochs: Annotated[int, typer.Option("--num_epochs", help="Passes over the data.")] = 3,
    warmup_steps: Annotated[int, typer.Option("--warmup_steps", help="Steps until the peak learning rate.")] = 100,
    gradient_accumulation_steps: Annotated[
        int, typer.Option("--gradient_accumulation_steps", help="Micro-batches of an optimizer step.")
    ] = 4,
    fp16: Annotated[
        bool, typer.Option("--fp16/--no_fp16", help="Mixed precision: bf16 on GPUs that have it, off elsewhere.")
    ] = True,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option("--gradient_checkpointing/--no_gradient_checkpointing", help="Recompute activations in backward."),
    ] = True,
    policy: Annotated[
        str | None, typer.Option("--policy", help="rigl, set (random growth), gradual or static; overrides --use_rigl.")
    ] = None,
    target: Annotated[
        str,
        typer.Option(
            "--target",
            help="weights: inactive weights are 0, the rest trains densely; updates: the model stays whole, only active "
            "entries train.",
        ),
    ] = "weights",
    dropped: Annotated[
        str, typer.Option("--dropped", help="Under updates, what leaves: keep its value, or rewind to the old one.")
    ] = "keep",
    distribution: Annotated[
        str, typer.Option("--distribution", help="Of the sparsity over layers: uniform, erk or global.")
    ] = "uniform",
    exclude: Annotated[
        list[str] | None,
        typer.Option("--exclude", metavar=f"PATTERN{SEVERAL}", help="Parameter names that stay dense."),
    ] = None,
    sparsity_schedule: Annotated[
        str | None,
        typer.Option(
            "--sparsity_schedule",
            help="In place of the ratio: linear:0.1:0.9, module:function or file.py:function of (step, total_steps).",
        ),
    ] = None,
    criterion: Annotated[
        str | None,
        typer.Option(
            "--criterion",
            help="What leaves, in place of |w|: module:name or file.py:name of a score(name, weight, gradient) or a "
            "BasePruningMethod.",
        ),
    ] = None,
    task: Annotated[str, typer.Option("--task", help="causal-lm or sequence-classification.")] = "causal-lm",
    tokenizer: Annotated[str | None, typer.Option("--tokenizer", help="Folder or name; default: the model's.")] = None,
    dataset_split: Annotated[str, typer.Option("--dataset_split", help="Of a Hub dataset.")] = "train",
    eval_dataset: Annotated[
        str | None, typer.Option("--eval_dataset", help="What to evaluate on (its first 128 samples).")
    ] = None,
    eval_fraction: Annotated[
        float, typer.Option("--eval_fraction", help="Else this share is held out, at most 128 samples.")
    ] = 0.05,
    eval_steps: Annotated[
        int | None, typer.Option("--eval_steps", help="Steps between evaluations; default: a tenth of the run.")
    ] = None,
    text_column: Annotated[
        str, typer.Option("--text_column", help="Column with the text; a,b for pairs in classification.")
    ] = "text",
    label_column: Annotated[str, typer.Option("--label_column", help="Column with the class.")] = "label",
    max_length: Annotated[int, typer.Option("--max_length", help="Tokens of a sample.")] = 512,
    max_steps: Annotated[
        int | None, typer.Option("--max_steps", help="Optimizer steps, in place of --num_epochs.")
    ] = None,
    weight_decay: Annotated[float, typer.Option("--weight_decay", help="Of active entries of matrices.")] = 0.01,
    dropout: Annotated[
        float | None, typer.Option("--dropout", help="Of all dropout that the model has; default: as it comes.")
    ] = None,
    lr_scheduler_type: Annotated[
        str, typer.Option("--lr_scheduler_type", help="linear, cosine, constant_with_warmup, ...")
    ] = "linear",
    max_grad_norm: Annotated[
        float, typer.Option("--max_grad_norm", help="Clip gradients of trained entries; 0: not.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of everything random.")] = 42,
    logging_steps: Annotated[int, typer.Option("--logging_steps", help="Steps between two log entries.")] = 10,
    save_steps: Annotated[
        int, typer.Option("--save_steps", help="Steps between two checkpoints; 0: only when interrupted.")
    ] = 200,
    report_to: Annotated[
        list[str] | None,
        typer.Option("--report_to", metavar=f"NAME{SEVERAL}", help="wandb, trackio, tensorboard or none."),
    ] = None,
    output_dir: Annotated[
        str, typer.Option("--output_dir", metavar="FOLDER", help="The model folder, with the run's files.")
    ] = "./sparse_model",
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in the folder, to the same weights.")
    ] = False,
    device: Annotated[
        str, typer.Option("--device", help="auto (CUDA where there is one), cpu, cuda or cuda:N.")
    ] = "auto",
    json: JsonFlag = False,
    debug: DebugFlag = False,
) -> None:
    """Dynamic sparse fine-tuning: train a model whose masks change on the way (RigL, SET, gradual pruning; N:M patterns).

    Writes a model folder, with the final masks, the history of their changes and a picture of the run beside the model. Zeros
    are multiplied like other numbers: this saves optimizer state, not time in forward and backward. After Ctrl-C or a kill
    --resume goes on, to the same weights.
    """
    arguments: dict[str, Any] = {name: value for name, value in locals().items() if name not in ("json", "debug")}
    for name in ("exclude", "report_to"):
        arguments[name] = [part for text in arguments[name] or [] for part in text.split(",")]

    from pathlib import Path

    from sparseopt.trainers.finetune import sparse_finetune

    sparse_finetune(**arguments)
    folder = Path(output_dir)
    if json:
        import json as parser

        print_json({"output_dir": str(folder), **parser.loads((folder / "results.json").read_text())})
    else:
        print(f"Model: {folder} (masks.safetensors, mask_history.json, finetune.png, results.json)")
