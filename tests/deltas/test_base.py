"""The base of a delta log: written only where needed, read in pieces, and never another model."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparseopt as so
from sparseopt.deltas import base as module
from sparseopt.deltas.base import describe_model, open_base, read_header, write_base
from sparseopt.deltas.delta import model_fingerprint

FILES = ["base.json", "base.safetensors"]


class Tied(nn.Module):
    """Tied weights, a buffer, a scalar, an empty tensor, and a tensor that is not contiguous."""

    def __init__(self, seed=0, dtype=torch.bfloat16):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(11, 6)
        self.layer = nn.Linear(6, 5)
        self.norm = nn.BatchNorm1d(5)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.nothing = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(torch.randn(4, 7).t())
        self.head = nn.Linear(6, 11, bias=False)
        self.to(dtype)
        self.head.weight = self.embed.weight


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def check(base, model):
    state = model.state_dict()
    assert base.fingerprint == model_fingerprint(model)
    assert [*base.names, *base.tied] == sorted(state, key=[*base.names, *base.tied].index)
    for name, tensor in state.items():
        assert torch.equal(base.tensor(name), tensor), name
        assert base.tensor(name).dtype == tensor.dtype
        n = tensor.numel()
        assert torch.equal(base.piece(name, n // 3, n - n // 4), tensor.reshape(-1)[n // 3 : n - n // 4])


@pytest.mark.parametrize("chunk", [3, 1 << 22])
def test_a_saved_base_gives_every_tensor(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("sparseopt.deltas._source.CHUNK", chunk)
    model = Tied()
    written = write_base(tmp_path / "log", model)
    assert contents(tmp_path / "log") == FILES
    for base in (written, open_base(tmp_path / "log"), open_base(tmp_path / "log", model)):
        check(base, model)
        assert base.tied == {"head.weight": "embed.weight"}
        assert base.shapes["scale"] == ()
        assert base.buffers == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    check(open_base(tmp_path / "log", model.state_dict()), model)
    # The safetensors library reads it too.
    assert torch.equal(load_file(tmp_path / "log" / "base.safetensors")["turned"], model.turned)


def test_base_json_is_as_documented(tmp_path):
    write_base(tmp_path, Tied(), name="some/model", revision="abc")
    content = json.loads((tmp_path / "base.json").read_text())
    assert (content["format"], content["version"], content["saved"]) == ("sparseopt.delta_log", 1, True)
    assert (content["name"], content["revision"]) == ("some/model", "abc")
    assert content["parameters"]["layer.weight"] == {"shape": [5, 6], "dtype": "bfloat16"}
    assert list(content["parameters"])[:4] == ["scale", "nothing", "turned", "embed.weight"]
    assert content["tied"] == {"head.weight": "embed.weight"}
    assert content["fingerprint"] == model_fingerprint(Tied())


def folder_of(path, model, shards=1, dtype=torch.float32):
    """A model folder as from_pretrained takes it."""
    path.mkdir()
    state = {
        name: (t.detach().to(dtype) if t.is_floating_point() else t).contiguous()
        for name, t in model.state_dict().items()
        if name != "embed.weight"
    }
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return
    names, where = list(state), {}
    for i in range(shards):
        part = names[i::shards]
        save_file({name: state[name] for name in part}, path / f"model-{i}.safetensors")
        where.update(dict.fromkeys(part, f"model-{i}.safetensors"))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


@pytest.mark.parametrize("shards", [1, 3])
def test_nothing_is_saved_where_the_folder_gives_the_same_bits(tmp_path, shards):
    model = Tied(dtype=torch.float32)
    folder_of(tmp_path / "model", model, shards)  # the tied tensor under its other name only
    model.to(torch.bfloat16)
    model.head.weight = model.embed.weight
    write_base(tmp_path / "log", model, name=str(tmp_path / "model"))
    assert contents(tmp_path / "log") == ["base.json"]
    check(open_base(tmp_path / "log"), model)
    write_base(tmp_path / "log2", model, save_base=True, name=str(tmp_path / "model"))
    assert contents(tmp_path / "log2") == FILES


def test_a_difference_of_one_bit_is_saved_or_refused(tmp_path):
    model = Tied(dtype=torch.float32)
    folder_of(tmp_path / "model", model)
    with torch.no_grad():
        model.layer.bias[2] = -0.0
    folder_of(tmp_path / "same", model)
    with torch.no_grad():
        model.layer.bias[2] = 0.0
    for name in ("model", "same"):
        write_base(tmp_path / f"log-{name}", model, name=str(tmp_path / name))
        assert contents(tmp_path / f"log-{name}") == FILES
        with pytest.raises(ValueError, match=r"save_base=False.*'layer.bias' differs"):
            write_base(tmp_path / "no", model, save_base=False, name=str(tmp_path / name))
    with pytest.raises(ValueError, match="no name or folder"):
        write_base(tmp_path / "no", model, save_base=False)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("change", [lambda s: s.pop("scale"), lambda s: s.update(scale=torch.zeros(2))])
def test_a_folder_with_other_tensors_is_not_the_base(tmp_path, change):
    model = Tied(dtype=torch.float32)
    state = {name: t.detach().contiguous() for name, t in model.state_dict().items() if name != "head.weight"}
    change(state)
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="'scale'"):
        write_base(tmp_path / "log", model, save_base=False, name=str(tmp_path / "model"))
    write_base(tmp_path / "log", model, name=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="'scale'"):
        open_base(tmp_path / "log", tmp_path / "model")


def test_another_base_is_an_error_that_names_both(tmp_path):
    one, two = Tied(0), Tied(1)
    write_base(tmp_path, one, name="org/one")
    with pytest.raises(ValueError, match=r"'org/one' \(fingerprint .*'org/two' \(fingerprint "):
        write_base(tmp_path, two, name="org/two")
    with pytest.raises(ValueError, match=f"{model_fingerprint(one)[:12]}.*{model_fingerprint(two)[:12]}"):
        open_base(tmp_path, two)
    assert read_header(tmp_path).name == "org/one"
    write_base(tmp_path, Tied(0), name="org/one")  # the same again is fine
    untied = Tied(0)
    untied.head.weight = nn.Parameter(untied.head.weight.detach() + 1)
    with pytest.raises(ValueError, match="another model"):
        open_base(tmp_path, untied)


def test_what_changed_after_writing_is_noticed(tmp_path):
    model = Tied(dtype=torch.float32)
    folder_of(tmp_path / "model", model)
    write_base(tmp_path / "log", model, name=str(tmp_path / "model"))
    state = load_file(tmp_path / "model" / "model.safetensors")
    state["layer.bias"][0] += 1
    save_file(state, tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="is another model"):
        open_base(tmp_path / "log")
    (tmp_path / "model" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        open_base(tmp_path / "log")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        open_base(tmp_path / "log", tmp_path / "nowhere")


def hub_cache(root, name, model, commit="1234567890abcdef1234567890abcdef12345678"):
    repo = root / f"models--{name.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots").mkdir()
    folder_of(repo / "snapshots" / commit, model, shards=2)
    return commit


def test_a_hub_name_is_read_from_the_local_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model = Tied(dtype=torch.float32)
    commit = hub_cache(tmp_path / "hub", "org/model", model)
    for number, revision in enumerate((None, commit)):
        log = tmp_path / f"log{number}"
        write_base(log, model, save_base=False, name="org/model", revision=revision)
        base = open_base(log)
        check(base, model)
        assert (base.name, base.revision) == ("org/model", revision)
    with pytest.raises(ValueError, match="'org/other' is not in the local Hugging Face cache"):
        write_base(tmp_path / "no", model, save_base=False, name="org/other")


def test_the_name_comes_from_the_config_with_the_commit_it_was_loaded_from():
    model = Tied()
    model.config = type("Config", (), {"_name_or_path": "org/model", "_commit_hash": "abc"})()
    header = describe_model(model, fingerprint=False)
    assert (header.name, header.revision) == ("org/model", "abc")
    header = describe_model(model, name="org/given", fingerprint=False)
    assert (header.name, header.revision) == ("org/given", None)


def test_one_tensor_at_a_time_is_read(tmp_path, monkeypatch):
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(8)))
    write_base(tmp_path, model)
    read = []
    original = module.TensorFile.read
    monkeypatch.setattr(
        module.TensorFile, "read", lambda *a: (read.append(out := original(*a)), out)[1]
    )  # fmt: skip
    base = open_base(tmp_path)
    assert sum(t.numel() for t in read) == sum(p.numel() for p in model.parameters())
    read.clear()
    base.piece("3.weight", 100, 150)
    assert [t.numel() for t in read] == [50]


DAMAGE = [
    (lambda text: text[:50], "no JSON"),
    (lambda text: "[]", "does not describe a delta log"),
    (lambda text: text.replace("delta_log", "else"), "does not describe a delta log"),
    (lambda text: text.replace('"version": 1', '"version": 2'), "version 2"),
    (lambda text: text.replace('"tied"', '"bound"'), "damaged"),
    (lambda text: text.replace("bfloat16", "bfloat17"), "damaged"),
    (lambda text: text.replace('"bfloat16"', '"Tensor"'), "damaged"),
    (lambda text: text.replace('"saved": true', '"saved": 1'), "damaged"),
    (lambda text: text.replace('"head.weight": "embed.weight"', '"head.weight": "gone"'), "damaged"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGE)
def test_a_damaged_description_is_a_format_error(tmp_path, change, message):
    write_base(tmp_path, Tied())
    path = tmp_path / "base.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(so.FormatError, match=message):
        open_base(tmp_path)


def test_damaged_or_missing_tensors(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no delta log"):
        open_base(tmp_path)
    write_base(tmp_path, Tied())
    path = tmp_path / "base.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="another model"):
        open_base(tmp_path)
    path.write_bytes(whole[:-10])
    with pytest.raises(so.FormatError, match="truncated"):
        open_base(tmp_path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"base\.safetensors"):
        open_base(tmp_path)
    write_base(tmp_path, Tied())  # the same model brings it back
    check(open_base(tmp_path), Tied())


def test_errors_name_the_argument(tmp_path):
    with pytest.raises(ValueError, match="save_base must be"):
        write_base(tmp_path, Tied(), save_base="yes")
    base = write_base(tmp_path, Tied())
    with pytest.raises(KeyError, match="'gone'"):
        base.tensor("gone")
    with pytest.raises(ValueError, match=r"3\.\.99 of 'layer.bias'"):
        base.piece("layer.bias", 3, 99)
    state = {"x": torch.zeros(2, dtype=torch.complex64)}
    with pytest.raises(ValueError, match="complex64"):
        write_base(tmp_path / "complex", state)
    assert not (tmp_path / "complex" / "base.json").exists()
