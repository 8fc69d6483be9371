import json
import shutil
import subprocess
import sys

import pytest
import torch

from tdro_cli.builtin.backbones import Auto, Scratch
from tdro_cli.errors import TdroError
from tdro_cli.protocols import Backbone, PreparedBackbone
from tdro_cli.registry import resolve

TEXTS = [f"Sentence {i} says that {i} times {i} is {i * i}. 日本語も少し。" for i in range(300)]
SMALL = {"hidden_size": 32, "layers": 2, "heads": 4, "vocab_size": 400, "max_positions": 128}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scratch")
    Scratch(**SMALL).prepare(iter(TEXTS), folder, seed=3)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_both_backbones_are_found_by_name_and_keep_the_protocols():
    assert isinstance(resolve("backbones", "auto", {"revision": "abc"}), Backbone)
    assert isinstance(resolve("backbones", "scratch", {"layers": 1}), PreparedBackbone)
    with pytest.raises(TdroError, match="even number"):
        resolve("backbones", "scratch", {"hidden_size": 36, "heads": 4})


def test_scratch_is_the_same_bytes_for_the_same_texts_and_seed_and_leaves_the_random_state(scratch, tmp_path):
    before = torch.random.get_rng_state()
    Scratch(**SMALL).prepare(TEXTS, tmp_path / "again", seed=3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert files_of(tmp_path / "again") == files_of(scratch)
    Scratch(**SMALL).prepare(TEXTS, tmp_path / "other", seed=4)
    other = files_of(tmp_path / "other")
    assert other["tokenizer.json"] == files_of(scratch)["tokenizer.json"]
    assert other["model.safetensors"] != files_of(scratch)["model.safetensors"]


def test_scratch_is_a_causal_model_that_knows_every_character(scratch):
    loaded = Scratch(**SMALL).load(str(scratch))
    assert loaded.causal
    assert len(loaded.tokenizer) <= 400
    assert loaded.model.config.vocab_size == len(loaded.tokenizer)
    assert (loaded.tokenizer.eos_token, loaded.tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")
    text = "Sentence ≠ 日本 👍 żółw\n\tx"
    assert loaded.tokenizer.decode(loaded.tokenizer(text)["input_ids"]) == text
    assert 0.015 < loaded.model.layers[0].mlp.up_proj.weight.std() < 0.025


def test_weights_are_float32_whatever_the_checkpoint_and_the_computing_precision(scratch, tmp_path):
    from transformers import AutoModel

    shutil.copytree(scratch, tmp_path / "half")
    AutoModel.from_pretrained(scratch).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    model = Auto().load(str(tmp_path / "half"), dtype="bfloat16").model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("source", ["no-such-owner/no-such-model", "/no/such/folder", "./nothing", "two words"])
def test_a_missing_model_is_told_with_what_to_do(source, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TdroError) as caught:
        Auto().load(source)
    assert source in caught.value.message
    assert caught.value.remedy


def test_a_link_that_leads_nowhere_is_no_name_of_a_hub_model(tmp_path):
    (tmp_path / "model").symlink_to(tmp_path / "gone")
    with pytest.raises(TdroError, match="leads to no folder"):
        resolve("backbones", "auto", {}).load(tmp_path / "model", dtype="float32", attention=None)


def test_a_folder_without_a_model_and_an_unknown_precision_are_told(scratch, tmp_path):
    with pytest.raises(TdroError, match=r"config\.json is missing"):
        Auto().load(str(tmp_path))
    with pytest.raises(TdroError, match="no scratch model"):
        Scratch().load(str(tmp_path))
    with pytest.raises(TdroError, match="float16"):
        Auto().load(str(scratch), dtype="float16")
    with pytest.raises(TdroError, match="attention"):
        Auto().load(str(scratch), attention="no_such_attention")


def test_a_tokenizer_with_more_tokens_than_the_model_has_embeddings_is_refused(scratch, tmp_path):
    from transformers import AutoTokenizer

    shutil.copytree(scratch, tmp_path / "more")
    tokenizer = AutoTokenizer.from_pretrained(scratch)
    tokenizer.add_tokens(["<one-more>"])
    tokenizer.save_pretrained(tmp_path / "more")
    with pytest.raises(TdroError, match=r"token ids up to (\d+), but the model has embeddings for \1"):
        Auto().load(str(tmp_path / "more"))


def test_a_checkpoint_that_lacks_a_layer_is_refused_not_filled_with_random_weights(scratch, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(scratch, tmp_path / "part")
    weights = load_file(scratch / "model.safetensors")
    del weights["layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "part" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TdroError, match=r"lack 1 tensors(.|\n)*layers\.1\.mlp\.up_proj\.weight"):
        Auto().load(str(tmp_path / "part"))


def _pickled(folder):
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _of_another_shape(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["layers.1.mlp.up_proj.weight"] = weights["layers.1.mlp.up_proj.weight"][:5].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_short(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_pickled, r"a pickle \(pytorch_model\.bin\)"),
        (lambda folder: (folder / "model.safetensors").unlink(), "the model has no weights"),
        (_of_another_shape, r"layers\.1\.mlp\.up_proj\.weight is \[5, 32\], the model needs \[128, 32\]"),
        (_cut_short, "can't be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "can't be loaded"),
        (_without_tokenizer, "the tokenizer can't be loaded"),
    ],
)
def test_a_folder_that_holds_no_sound_model_is_refused_in_one_sentence(damage, words, scratch, tmp_path):
    shutil.copytree(scratch, tmp_path / "damaged")
    damage(tmp_path / "damaged")
    with pytest.raises(TdroError, match=words) as caught:
        Auto().load(str(tmp_path / "damaged"))
    assert str(tmp_path / "damaged") in caught.value.where and caught.value.remedy


def test_an_encoder_decoder_is_refused(scratch, tmp_path):
    shutil.copytree(scratch, tmp_path / "t5")
    (tmp_path / "t5" / "config.json").write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(TdroError, match="encoder-decoder"):
        Auto().load(str(tmp_path / "t5"))


def test_python_code_that_comes_with_a_model_is_not_run_unless_asked(scratch, tmp_path):
    folder = tmp_path / "remote"
    shutil.copytree(scratch, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(TdroError):
        Auto().load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_importing_the_backbones_imports_nothing_heavy():
    code = "import sys, tdro_cli.builtin.backbones; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
