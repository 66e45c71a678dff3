"""DeltaLogger in transformers' and TRL's trainers; schedules."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.trainer_callback import CallbackHandler, TrainerCallback

import sparseopt as so
from sparseopt.deltas.base import open_base
from sparseopt.deltas.delta import model_fingerprint
from sparseopt.trainers import DeltaLogger, parse_schedule

KEYS = ["mean_l2_from_init", "mean_frac_big_from_init", "attn_mean_l2", "mlp_mean_l2"]


# ---- schedules ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("value", "steps"),
    [
        ("10,20,30", [10, 20, 30]),
        ("30, 10 ,20,10", [10, 20, 30]),
        ("10:80:10,100:1000:100", [*range(10, 81, 10), *range(100, 1001, 100)]),
        ("1:6:2", [1, 3, 5]),
        ("5:5:1", [5]),
        ("dpo", [10, 20, 30, 40, 100, 150, 200]),
        ("GRPO", [*range(10, 81, 10), *range(100, 1001, 100)]),
        ("dpo,500", [10, 20, 30, 40, 100, 150, 200, 500]),
        ([3, 1, 2], [1, 2, 3]),
        (range(2, 9, 3), [2, 5, 8]),
    ],
)
def test_schedules(value: Any, steps: list[int]) -> None:
    schedule = parse_schedule(value)
    assert list(schedule) == steps
    assert schedule == steps
    assert len(schedule) == len(steps)
    assert [step for step in range(-1, 1200) if step in schedule] == steps
    assert list(parse_schedule(value, 20)) == [step for step in steps if step <= 20]
    assert parse_schedule(schedule) == schedule


def test_every_has_no_end_unless_told() -> None:
    schedule = parse_schedule("every:7,3")
    assert [step for step in range(40) if step in schedule] == [3, 7, 14, 21, 28, 35]
    assert 7_000_000 in schedule
    with pytest.raises(ValueError, match="every:7 has no end"):
        list(schedule)
    assert list(parse_schedule("every:7,3", 21)) == [3, 7, 14, 21]
    assert 28 not in parse_schedule("every:7", 21)


@pytest.mark.parametrize(
    "value", ["", ",", "ten", "10,", "10:20", "1:2:3:4", "every", "every:x", "0", "-5", "0:10:5", "10:20:0", "every:0",
              "20:10:5", [], [0], "1.5", "dpo grpo"],
)  # fmt: skip
def test_bad_schedules_say_what_is_wrong(value: Any) -> None:
    with pytest.raises(ValueError, match="schedule"):
        parse_schedule(value)


def test_schedules_are_whole_numbers() -> None:
    for value in ([1.5], ["3"], [True]):
        with pytest.raises(TypeError, match="whole numbers"):
            parse_schedule(value)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_steps"):
        parse_schedule("10", 0)


# ---- training ----------------------------------------------------------------------------------------------------------
class Watch(TrainerCallback):
    """A tracker: what it was told, and the weights of every step."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []
        self.states: dict[int, dict[str, torch.Tensor]] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kw: Any) -> None:
        self.states[state.global_step] = {name: t.clone() for name, t in model.state_dict().items()}


class StopAt(TrainerCallback):
    """Ctrl-C after a step, with its checkpoint saved or not."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def make_trainer(
    folder: Path, model: Any, *callbacks: TrainerCallback, masks: so.MaskSet | None = None, **changes: Any
) -> Trainer:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 64, (32, 12), generator=generator).tolist()
    arguments = TrainingArguments(
        output_dir=str(folder / "run"), **{
            "per_device_train_batch_size": 4, "max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [],
            "use_cpu": True, "seed": 0, "save_strategy": "steps", "save_steps": 3, "disable_tqdm": True, **changes,
        },
    )  # fmt: skip
    data = Dataset.from_dict({"input_ids": ids, "labels": ids})
    trainer = Trainer(model=model, args=arguments, train_dataset=data, callbacks=list(callbacks))
    if masks is not None:
        so.attach(trainer, masks)
    return trainer


def some_masks(model: Any) -> so.MaskSet:
    masks = so.MaskSet.random(model, 0.1, seed=3)
    return so.MaskSet.from_bool({n: masks[n] if "proj" in n else torch.zeros_like(masks[n]) for n in masks.names})


def check_chain(log: Path, states: dict[int, dict[str, torch.Tensor]], steps: list[int]) -> None:
    base, found = open_base(log), so.DeltaLog(log)
    assert found.chain() == steps
    state = {name: base.tensor(name).clone() for name in base.names}
    state.update({alias: state[name] for alias, name in base.tied.items()})
    for step in steps:
        found.load(step).apply_(state)
        assert model_fingerprint(state) == model_fingerprint(states[step]), step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_logs_scheduled_steps_and_the_last(tiny_folder: Path, tmp_path: Path, dtype: torch.dtype, sparse: bool) -> None:
    model, watch = load(tiny_folder, dtype), Watch()
    masks = some_masks(model) if sparse else None
    logger = DeltaLogger(tmp_path / "log", "2,every:3", final=True)
    make_trainer(tmp_path, model, logger, watch, masks=masks).train()
    check_chain(tmp_path / "log", watch.states, [2, 3, 6, 8])
    assert not (tmp_path / "log" / "base.safetensors").exists()  # the model's folder is still there
    assert open_base(tmp_path / "log").name == str(tiny_folder)
    delta = so.DeltaLog(tmp_path / "log").load(8)
    if masks is not None:
        assert 0 < delta.changed_parameters <= masks.active_parameters
        assert all("proj" in name for name in delta.names)


def test_statistics_reach_trackers_that_come_before_and_the_history(tiny_folder: Path, tmp_path: Path) -> None:
    tracker, logger = Watch(), DeltaLogger(tmp_path / "log", [2, 5])
    trainer = make_trainer(tmp_path, load(tiny_folder), logger)
    trainer.callback_handler.callbacks.insert(0, tracker)  # as report_to does
    order = [c for c in trainer.callback_handler.callbacks if c is not logger]
    trainer.train()
    assert [c for c in trainer.callback_handler.callbacks if c is not logger] == order
    log = so.DeltaLog(tmp_path / "log")
    for entries in (tracker.logs, trainer.state.log_history):
        told = {e["subnet/step"]: e for e in entries if "subnet/step" in e}
        assert list(told) == [2, 5]  # each once, and none is lost
        for step, entry in told.items():
            assert entry["step"] >= step
            for key in KEYS:
                assert entry[f"subnet/{key}"] == log.stats(step)[key] > 0
    assert len([e for e in trainer.state.log_history if "subnet/step" in e]) == 2


def test_tensorboard_gets_the_statistics(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real report_to machinery: a tracker class registered there."""
    from transformers.integrations import integration_utils

    seen: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kw: Any) -> None:
            seen.append(dict(logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "tensorboard", Tracker)
    trainer = make_trainer(
        tmp_path, load(tiny_folder), DeltaLogger(tmp_path / "log", "2"), report_to=["tensorboard"]
    )  # fmt: skip
    trainer.train()
    assert sum(f"subnet/{KEYS[0]}" in logs for logs in seen) == 1


@pytest.mark.parametrize("sparse", [False, True])
def test_resumed_from_a_checkpoint_it_ends_as_if_never_stopped(tiny_folder: Path, tmp_path: Path, sparse: bool) -> None:
    schedule = [1, 3, 4, 5, 7]
    whole, model = Watch(), load(tiny_folder)
    masks = some_masks(model) if sparse else None
    make_trainer(tmp_path / "a", model, DeltaLogger(tmp_path / "log-a", schedule), whole, masks=masks).train()
    check_chain(tmp_path / "log-a", whole.states, schedule)

    folder, log = tmp_path / "b", tmp_path / "log-b"
    with pytest.raises(KeyboardInterrupt), DeltaLogger(log, schedule) as logger:
        make_trainer(folder, load(tiny_folder), logger, StopAt(5), masks=masks).train()
    assert so.DeltaLog(log).steps() == [1, 3, 4, 5]
    resumed = Watch()
    logger = DeltaLogger(log, schedule)
    make_trainer(folder, load(tiny_folder), logger, resumed, masks=masks).train(resume_from_checkpoint=True)
    assert min(resumed.states) == 4  # from checkpoint-3
    check_chain(log, whole.states, schedule)
    for step in schedule:
        assert so.DeltaLog(log).load(step) == so.DeltaLog(tmp_path / "log-a").load(step)


def test_a_log_of_an_earlier_run_is_kept_unless_told(tiny_folder: Path, tmp_path: Path) -> None:
    for restart in (False, True):
        make_trainer(tmp_path, load(tiny_folder), DeltaLogger(tmp_path / "log", [1, 2], restart=restart)).train()
        shutil.rmtree(tmp_path / "run")
    with pytest.raises(ValueError, match="steps up to 2 already"):
        make_trainer(tmp_path, load(tiny_folder), DeltaLogger(tmp_path / "log", [1])).train()
    assert so.DeltaLog(tmp_path / "log").steps() == [1, 2]


def test_two_names_with_one_slug_do_not_share_a_log(tiny_folder: Path, tmp_path: Path) -> None:
    make_trainer(tmp_path, load(tiny_folder), DeltaLogger(tmp_path / "log", [1], name="org/some-model")).train()
    other = load(tiny_folder)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    with pytest.raises(ValueError, match=r"'org/some-model' \(.*'org/some_model' \("):
        make_trainer(tmp_path / "2", other, DeltaLogger(tmp_path / "log", [1], name="org/some_model")).train()


def test_errors_come_before_training_or_with_the_next_record(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch, model = Watch(), load(tiny_folder)
    model.config._name_or_path = ""
    with pytest.raises(ValueError, match="save_base=False"):
        make_trainer(tmp_path, model, DeltaLogger(tmp_path / "no", [1], save_base=False), watch).train()
    assert not watch.states

    def full_disk(self: so.Delta, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(so.Delta, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_trainer(tmp_path, load(tiny_folder), DeltaLogger(tmp_path / "log", [1, 3]), watch).train()
    assert max(watch.states) == 2
    with pytest.raises(OSError, match="No space left"):  # that of the last record, at the end
        make_trainer(tmp_path, load(tiny_folder), DeltaLogger(tmp_path / "log", [8])).train()


def test_other_processes_write_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, load(tiny_folder), DeltaLogger(tmp_path / "log", "every:1"))
    trainer.state.is_world_process_zero = False
    monkey = CallbackHandler.on_train_begin

    def begin(self: Any, args: Any, state: Any, control: Any, **kw: Any) -> Any:
        state.is_world_process_zero = False
        return monkey(self, args, state, control, **kw)

    trainer.callback_handler.on_train_begin = begin.__get__(trainer.callback_handler)  # type: ignore[method-assign]
    trainer.train()
    assert not (tmp_path / "log").exists()


def test_in_a_dpo_trainer(tiny_folder: Path, pairs_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in pairs_file.read_text().splitlines()]
    model, watch = load(tiny_folder), Watch()
    arguments = DPOConfig(
        output_dir=str(tmp_path / "run"), per_device_train_batch_size=2, max_steps=4, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, seed=0, save_strategy="no", disable_tqdm=True, max_length=32,
    )  # fmt: skip
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(tiny_folder),
        callbacks=[DeltaLogger(tmp_path / "log", "1:4:2", name=str(tiny_folder)), watch],
    )  # fmt: skip
    so.attach(trainer, some_masks(model))
    trainer.train()
    check_chain(tmp_path / "log", watch.states, [1, 3])
    entries = [e for e in trainer.state.log_history if "subnet/step" in e]
    assert [e["subnet/step"] for e in entries] == [1, 3]
    assert all("rewards/accuracies" in e or "train_runtime" in e for e in entries)


class Disk(TrainerCallback):
    """What of the log is on the disk when a checkpoint is complete."""

    def __init__(self, log: Path) -> None:
        self.log, self.found = log, {}

    def on_save(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        self.found[state.global_step] = sorted(int(path.stem[11:]) for path in self.log.glob("delta_step_*"))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_no_checkpoint_is_ahead_of_the_log(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    write, disk = so.DeltaLog._write, Disk(tmp_path / "log")

    def slowly(*arguments: Any) -> None:
        time.sleep(0.3)
        write(*arguments)

    monkeypatch.setattr(so.DeltaLog, "_write", slowly)
    logger = DeltaLogger(tmp_path / "log", "1,2,3,4,6")
    changes = {"max_steps": 6, "save_strategy": strategy, "save_steps": 4, "per_device_train_batch_size": 8}
    make_trainer(tmp_path, load(tiny_folder), logger, disk, **changes).train()
    assert set(disk.found) >= ({4, 6} if strategy == "steps" else {6})
    for step, logged in disk.found.items():
        assert logged == [s for s in (1, 2, 3, 4, 6) if s <= step]
