"""Reconstruction: state dicts and folders that are bit-equal to the model that was trained."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open

import sparseopt as so
from sparseopt.deltas._model_folder import parse_size
from sparseopt.deltas.base import write_base
from sparseopt.deltas.delta import model_fingerprint
from sparseopt.deltas.reconstruct import reconstruct, write_checkpoint

STEPS = [3, 6, 9]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A tiny Llama in fp32 with tied embeddings, a tokenizer's file and a generation config."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base") / "tiny"
    model = LlamaForCausalLM(config)
    model.generation_config.temperature = 0.5
    model.generation_config.do_sample = True
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "training_args.bin").write_bytes(b"not ours")
    return folder


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options)


def train(folder, model, name=None, save_base="auto"):
    """Random updates logged as `Delta`s -> state dicts by step. The model trains in its own dtype."""
    generator = torch.Generator().manual_seed(5)
    base = write_base(folder, model, save_base, name=name)
    parent, states = None, {}
    for step in STEPS:
        entries, shapes = {}, {}
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                where = (torch.rand(parameter.numel(), generator=generator) < 0.2).nonzero().view(-1)
                update = (0.01 * torch.randn(where.numel(), generator=generator)).to(parameter.dtype)
                parameter.view(-1)[where] += update
                entries[key], shapes[key] = (where, parameter.detach().view(-1)[where].clone()), parameter.shape
        delta = so.Delta.from_dict(entries, shapes, step=step, parent_step=parent, base_fingerprint=base.fingerprint)
        delta.save(folder / f"delta_step_{step}.safetensors")
        states[step], parent = {key: tensor.clone() for key, tensor in model.state_dict().items()}, step
    return states


@pytest.fixture(scope="module")
def trained(base_folder, tmp_path_factory):
    """(log folder, states): bf16 training from the fp32 folder, which is the base: nothing is saved beside it."""
    log = tmp_path_factory.mktemp("log")
    states = train(log, load(base_folder, dtype=torch.bfloat16), name=str(base_folder))
    assert not (log / "base.safetensors").exists()
    return log, states


def equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


@pytest.mark.parametrize("step", STEPS)
def test_state_dict(trained, base_folder, step):
    log, states = trained
    fresh = load(base_folder, dtype=torch.bfloat16)
    for base in (None, str(base_folder), base_folder, fresh, fresh.state_dict()):
        found = reconstruct(base, log, step)
        equal(found, states[step])
        assert found["lm_head.weight"] is found["model.embed_tokens.weight"]
    assert model_fingerprint(fresh) == model_fingerprint(load(base_folder, dtype=torch.bfloat16))  # left alone
    fresh.load_state_dict(found)
    assert model_fingerprint(fresh) == model_fingerprint(states[step])
    equal(so.reconstruct(None, so.DeltaLog(log), step), states[step])


@pytest.mark.parametrize("size", ["5GB", "20KB", 1])
def test_folder_loads_bit_equal(trained, base_folder, tmp_path, size):
    log, states = trained
    about = write_checkpoint(log, 6, tmp_path / "out", max_shard_size=size)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]  # nothing temporary is left
    model = load(tmp_path / "out", dtype="auto")
    assert model.dtype == model.config.dtype == torch.bfloat16
    equal(model.state_dict(), states[6])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.generation_config.temperature == 0.5
    stored = list((tmp_path / "out").glob("*.safetensors"))
    assert sorted(p.name for p in stored) == about["files"]
    assert {"5GB": 1, "20KB": 3, 1: len(list(model.named_parameters()))}[size] == len(stored)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists() == (size != "5GB")
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == (base_folder / name).read_text()
    assert not (tmp_path / "out" / "training_args.bin").exists()
    assert about["bytes"] == sum(2 * p.numel() for p in model.parameters())
    assert json.loads((tmp_path / "out" / "reconstruction.json").read_text()) == about
    with safe_open(stored[0], framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_filled_in_order_up_to_the_limit(trained, tmp_path):
    log, _ = trained
    write_checkpoint(log, 9, tmp_path / "out", max_shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    sizes = {}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as stored:
            sizes[file] = sizes.get(file, 0) + 2 * stored.get_tensor(name).numel()
    assert max(sizes.values()) <= 20_000
    assert sum(sizes.values()) == index["metadata"]["total_size"]


def test_a_saved_base_and_a_module(tmp_path, base_folder):
    """A model from nowhere: its config comes from the module that is given."""
    model = load(base_folder, dtype=torch.float32)
    model.config._name_or_path = ""
    fresh = load(base_folder, dtype=torch.float32)
    states = train(tmp_path / "log", model, save_base=True)
    equal(reconstruct(None, tmp_path / "log", 9), states[9])
    with pytest.raises(FileNotFoundError, match=r"does not say which model it began at.*name a model"):
        write_checkpoint(tmp_path / "log", 9, tmp_path / "out")
    write_checkpoint(tmp_path / "log", 9, tmp_path / "out", fresh)
    again = load(tmp_path / "out", dtype="auto")
    assert again.dtype == torch.float32
    assert again.generation_config.temperature == 0.5
    equal(again.state_dict(), states[9])
    shutil.rmtree(tmp_path / "out")
    write_checkpoint(tmp_path / "log", 9, tmp_path / "out", str(base_folder))
    equal(load(tmp_path / "out", dtype="auto").state_dict(), states[9])


def test_an_earlier_reconstruction_is_replaced_anything_else_refused(trained, tmp_path):
    log, states = trained
    out = tmp_path / "out"
    out.mkdir()
    write_checkpoint(log, 3, out, max_shard_size="20KB")
    write_checkpoint(log, 9, out)
    assert [p.name for p in out.glob("*.safetensors*")] == ["model.safetensors"]
    equal(load(out, dtype="auto").state_dict(), states[9])
    (out / "reconstruction.json").unlink()
    with pytest.raises(FileExistsError, match=r"'.*out' is not empty and no earlier reconstruction"):
        write_checkpoint(log, 3, out)
    with pytest.raises(FileExistsError, match="is a file"):
        write_checkpoint(log, 3, out / "config.json")
    equal(load(out, dtype="auto").state_dict(), states[9])


def test_nothing_is_left_of_a_failure(trained, tmp_path):
    log, _ = trained
    broken = tmp_path / "log"
    shutil.copytree(log, broken)
    path = broken / "delta_step_6.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(so.FormatError, match="delta_step_6"):
        write_checkpoint(broken, 9, tmp_path / "out")
    with pytest.raises(so.FormatError, match="delta_step_6"):
        reconstruct(None, broken, 6)
    path.unlink()
    with pytest.raises(ValueError, match="gap: step 9 follows step 6"):
        write_checkpoint(broken, 9, tmp_path / "out")
    for step in (1, 10):
        with pytest.raises(ValueError, match=f"no step {step}; it has steps 3, 6, 9"):
            write_checkpoint(log, step, tmp_path / "out")
    with pytest.raises(ValueError, match="a size is"):
        write_checkpoint(log, 3, tmp_path / "out", max_shard_size="5 elephants")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log"]


def test_another_model_is_refused(trained, base_folder, tmp_path):
    log, _ = trained
    other = load(base_folder, dtype=torch.bfloat16)
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    for call in (lambda: reconstruct(other, log, 3), lambda: write_checkpoint(log, 3, tmp_path / "out", other)):
        with pytest.raises(ValueError, match="is another model"):
            call()


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "1.5 MiB", 7, "7", "2kb")] == [5 * 10**9, 1572864, 7, 7, 2000]
    for bad in ("", "0", "GB", "-3", "5XB"):
        with pytest.raises(ValueError, match="a size is"):
            parse_size(bad)
