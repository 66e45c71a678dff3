"""Pruned model folders: what from_pretrained makes of them, what is kept, what is refused."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparseopt as so
from sparseopt.deltas.pruned import write_pruned

EMBEDDING = "model.embed_tokens.weight"


def make(folder, tie=True, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tie, pad_token_id=None, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "tied", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "untied", tie=False)


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def masks_for(folder, density=0.3, without=()):
    masks = so.MaskSet.random(load(folder), density, seed=3)
    bools = {name: mask & (name not in without) for name, mask in masks.items()}
    return so.MaskSet.from_bool(bools)


@pytest.mark.parametrize("shard", ["5GB", "10KB"])
def test_from_pretrained_loads_it(tied, tmp_path, shard):
    masks = masks_for(tied, without=[EMBEDDING])
    about = write_pruned(tied, masks, tmp_path / "out", max_shard_size=shard)
    before, after = load(tied), load(tmp_path / "out")
    assert after.dtype == torch.bfloat16
    zeros = total = 0
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(new, old if name == EMBEDDING else torch.where(masks[name], old, 0))
        zeros, total = zeros + int((new == 0).sum()), total + new.numel()
    assert about["kept"] == [EMBEDDING]
    assert (about["zero_parameters"], about["total_parameters"]) == (zeros, total)
    assert about["zero_share"] == zeros / total
    assert about["zeroed_parameters"] == total - 96 * 32 - masks.active_parameters
    assert (len(about["files"]) > 1) == (shard == "10KB")
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == about
    for file in ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (tied / file).read_bytes()
    assert not list(tmp_path.glob(".*"))
    assert (tmp_path / "out").stat().st_mode & 0o055  # not private, unless the umask says so
    after(torch.tensor([[1, 2, 3]]))


def test_nothing_active_can_be_erased(untied, tmp_path):
    masks = masks_for(untied, without=["lm_head.weight"])
    about = write_pruned(untied, masks, tmp_path / "out", keep_unmasked=False)
    assert about["kept"] == []
    assert not load(tmp_path / "out").lm_head.weight.any()


def test_tensors_without_a_mask_are_kept(untied, tmp_path):
    masks = masks_for(untied)
    chosen = [name for name in masks if name != EMBEDDING]
    about = write_pruned(untied, masks.select(chosen), tmp_path / "out", keep_unmasked=False)
    assert about["kept"] == [EMBEDDING]
    after = load(tmp_path / "out")
    assert torch.equal(after.model.embed_tokens.weight, load(untied).model.embed_tokens.weight)
    assert not after.lm_head.weight[~masks["lm_head.weight"]].any()


@pytest.mark.parametrize("stored", [[EMBEDDING], ["lm_head.weight"], [EMBEDDING, "lm_head.weight"]])
@pytest.mark.parametrize("named", [EMBEDDING, "lm_head.weight"])
def test_tied_tensors_under_any_name(tied, tmp_path, stored, named):
    """Both copies are pruned where files hold two: else from_pretrained would find them different."""
    folder = tmp_path / "model"
    folder.mkdir()
    state = load_file(tied / "model.safetensors")
    embedding = state.pop(EMBEDDING)
    save_file({**state, **{name: embedding.clone() for name in stored}}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_bytes((tied / "config.json").read_bytes())
    mask = torch.rand(96, 32) < 0.5
    write_pruned(folder, so.MaskSet.from_bool({named: mask}), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert sorted(written) == sorted([*state, *stored])
    for name in stored:
        assert torch.equal(written[name], torch.where(mask, embedding, 0))
    assert all(torch.equal(written[name], state[name]) for name in state)


def test_other_dtypes(tied, tmp_path):
    """Eight-bit floats are pruned bit by bit; integers without a mask are copied, with one refused."""
    folder = tmp_path / "model"
    folder.mkdir()
    state = {
        "a": torch.randn(9, 7).to(torch.float8_e4m3fn), "b": torch.arange(5), "c": torch.tensor([-1.0, -2.0, float("nan")]),
    }  # fmt: skip
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    masks = so.MaskSet.from_bool({"a": torch.rand(9, 7) < 0.5, "c": torch.tensor([True, False, False])})
    about = write_pruned(folder, masks, tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["a"].float(), torch.where(masks["a"], state["a"].float(), 0))
    assert torch.equal(written["b"], state["b"])
    assert written["c"].tolist() == [-1, 0, 0]
    assert about["total_parameters"] == 66
    with pytest.raises(ValueError, match="'b' as int64: only floats are pruned"):
        write_pruned(folder, so.MaskSet.from_bool({"b": torch.ones(5, dtype=torch.bool)}), tmp_path / "no")


def test_refused_and_nothing_left_behind(tied, tmp_path):
    masks = masks_for(tied)
    foreign = so.MaskSet.from_bool({**dict(masks.items()), "model.layers.9.w": torch.ones(3, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'model.layers.9.w' fits no tensor of .* hold 20"):
        write_pruned(tied, foreign, tmp_path / "out")
    short = so.MaskSet.from_bool({"model.norm.weight": torch.ones(31, dtype=torch.bool)})
    with pytest.raises(ValueError, match=r"'model.norm.weight' with shape \[32\], its mask has \[31\]"):
        write_pruned(tied, short, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_pruned(tmp_path / "nowhere", masks, tmp_path / "out")
    with pytest.raises(ValueError, match="a size is a number of bytes"):
        write_pruned(tied, masks, tmp_path / "out", max_shard_size="big")
    full = tmp_path / "full"
    full.mkdir()
    (full / "thesis.txt").write_text("mine")
    for target in (full, full / "thesis.txt"):
        with pytest.raises(FileExistsError, match="is no empty folder"):
            write_pruned(tied, masks, target)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    assert (full / "thesis.txt").read_text() == "mine"


def test_a_failure_halfway_leaves_nothing(tied, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    data = (tied / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data)
    masks = masks_for(tied)
    with pytest.raises(FileNotFoundError, match=r"expected a config\.json"):  # found missing after the weights' plan
        write_pruned(folder, masks, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_memory_does_not_grow_with_the_model(tmp_path):
    """256 MB of weights in two tensors: the process gains far less than one of them."""
    folder = tmp_path / "model"
    folder.mkdir()
    from sparseopt._safetensors import write_tensors

    piece = torch.ones(1 << 22)
    specs = {name: ((8, 1 << 22), torch.float32) for name in ("a", "b")}
    write_tensors(folder / "model.safetensors", specs, (piece for _ in range(16)), {"format": "pt"})
    (folder / "config.json").write_text("{}")
    code = (
        "import resource, sys, torch, sparseopt as so\n"
        "from sparseopt.deltas.pruned import write_pruned\n"
        "masks = so.MaskSet({n: torch.full((1 << 22,), 0b1, dtype=torch.uint8) for n in 'ab'},"
        " {n: (8, 1 << 22) for n in 'ab'})\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "about = write_pruned(sys.argv[1], masks, sys.argv[2])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, about['zero_share'])\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    grown, share = result.stdout.split()
    assert float(share) == 0.875
    assert int(grown) * 1024 < 110e6
