import json

import numpy as np
import pytest
import torch

from tdro_cli.builtin.backbones import Auto
from tdro_cli.errors import TdroError
from tdro_cli.model.contract import EncoderContract
from tdro_cli.model.embedding import Embedder, load_embedder
from tdro_cli.model.encoder import TextEncoder, add_lora
from tdro_cli.model.export import export_model, merged_state, save_model

PROMPTS = {"nq": "Given a question, retrieve passages", "quora": "Find the same question", "query": "Search"}
DETAILS = {
    "name": "tiny",
    "data": [{"task": "nq", "share": 0.25}],
    "measures": {"nDCG@10": 0.5},
    "recipe": "a: 1\nb: 2",
}


def encoder_of(folder, contract, *, lora=False):
    loaded = Auto().load(str(folder))
    model = loaded.model
    if lora:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(1)
            model = add_lora(loaded, r=4, alpha=16, dropout=0.1)
            for name, parameter in model.named_parameters():
                if "lora_B" in name:  # zero at the start: nothing to merge
                    parameter.normal_(std=0.1)
    encoder = TextEncoder(model, pooling=contract.pooling, normalize=contract.normalize).eval()
    return encoder, loaded.tokenizer


def contract_of(family, **options):
    pooling = "mean" if family in ("bert", "distilbert", "roberta", "xlm-roberta", "modernbert") else "last_token"
    return EncoderContract(
        **{"pooling": pooling, "query_length": 48, "passage_length": 48, "prompts": PROMPTS} | options
    )


def save(folder_of_base, contract, folder, *, lora=False):
    """Saves, and returns what our own embedder says of the live model."""
    encoder, tokenizer = encoder_of(folder_of_base, contract, lora=lora)
    save_model(encoder, tokenizer, contract, folder, details=DETAILS)
    return Embedder(encoder, tokenizer, contract, digest="live", device="cpu")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_saved_model_embeds_as_the_live_one_everywhere(family, lora, tiny, texts, tmp_path):
    contract = contract_of(family)
    live = save(tiny(family), contract, tmp_path / "m", lora=lora)
    queries, passages = live.encode_queries(texts, PROMPTS["nq"]), live.encode_passages(texts)

    ours = load_embedder(tmp_path / "m", device="cpu")
    assert ours.contract == contract
    assert np.abs(ours.encode_queries(texts, PROMPTS["nq"]) - queries).max() < 1e-5
    assert np.abs(ours.encode_passages(texts) - passages).max() < 1e-5

    by_transformers = with_transformers(tmp_path / "m", contract, texts)
    assert np.abs(by_transformers - passages).max() < 1e-5

    if lora:
        assert np.abs(with_peft(tiny(family), tmp_path / "m" / "adapter", contract, texts) - passages).max() < 1e-5
        adapter = load_embedder(tmp_path / "m" / "adapter", device="cpu")
        assert np.abs(adapter.encode_queries(texts, PROMPTS["nq"]) - queries).max() < 1e-5
        untouched = load_embedder(tiny(family), contract=contract, device="cpu").encode_passages(texts)
        assert np.abs(untouched - passages).max() > 1e-3
    else:
        assert not (tmp_path / "m" / "adapter").exists()


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_sentence_transformers_embeds_as_we_do(family, lora, tiny, texts, tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="the extra `compare` is not installed")
    live = save(tiny(family), contract_of(family), tmp_path / "m", lora=lora)
    model = st.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    long = [*texts, "many words of a long text " * 40]  # truncated, EOS kept
    assert np.abs(model.encode_document(long) - live.encode_passages(long)).max() < 1e-5
    assert np.abs(model.encode_query(long) - live.encode_queries(long)).max() < 1e-5
    for task in ("nq", "quora"):
        assert np.abs(model.encode(long, prompt_name=task) - live.encode_queries(long, PROMPTS[task])).max() < 1e-5
    assert model.get_sentence_embedding_dimension() == live.dimension


@pytest.mark.parametrize(("query_length", "passage_length"), [(24, 48), (48, 24)])
def test_sentence_transformers_cuts_each_side_at_its_own_length(query_length, passage_length, tiny, texts, tmp_path):
    st = pytest.importorskip("sentence_transformers", "6.0", reason="the extra `compare` is not installed")
    contract = contract_of("llama", query_length=query_length, passage_length=passage_length)
    live = save(tiny("llama"), contract, tmp_path / "m")
    model = st.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    long = [*texts, "", "🙂 ภาษาไทย نص عربي " * 9, "many words of a long text " * 40]
    assert np.abs(model.encode_document(long) - live.encode_passages(long)).max() < 1e-5
    assert np.abs(model.encode_query(long, prompt="") - live.encode_queries(long, "")).max() < 1e-5
    assert len({len(live.tokenizer.queries([long[-1]])[0]), len(live.tokenizer.passages([long[-1]])[0])}) == 2


@pytest.mark.parametrize("pooling", ["last_token", "mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_sentence_transformers_reads_the_contract(pooling, normalize, tiny, texts, tmp_path):
    st = pytest.importorskip("sentence_transformers", reason="the extra `compare` is not installed")
    contract = contract_of("llama", pooling=pooling, normalize=normalize)
    live = save(tiny("llama"), contract, tmp_path / "m")
    model = st.SentenceTransformer(str(tmp_path / "m"), device="cpu")
    theirs = model.encode_document(texts)
    assert np.abs(theirs - live.encode_passages(texts)).max() < 1e-5 * np.abs(theirs).max()


def with_transformers(folder, contract, texts):
    from transformers import AutoModel, AutoTokenizer

    return pooled(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), contract, texts)


def with_peft(base, adapter, contract, texts):
    from peft import PeftModel
    from transformers import AutoModel, AutoTokenizer

    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter)
    return pooled(model, AutoTokenizer.from_pretrained(adapter), contract, texts)


def pooled(model, tokenizer, contract, texts):
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    mask = batch["attention_mask"]
    if contract.pooling == "last_token":
        vectors = torch.stack([row[m.nonzero().max()] for row, m in zip(hidden, mask, strict=True)])
    else:
        vectors = torch.stack([row[m.bool()].mean(0) for row, m in zip(hidden, mask, strict=True)])
    return torch.nn.functional.normalize(vectors, dim=1).numpy()


def test_merging_equals_pefts_own_and_leaves_the_training_model_alone(tiny):
    encoder, _ = encoder_of(tiny("qwen2"), contract_of("qwen2"), lora=True)
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    ours = merged_state(encoder.backbone, encoder.backbone.state_dict())
    after = encoder.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    theirs = encoder.backbone.merge_and_unload().state_dict()
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6


def test_an_adapter_that_is_not_plain_lora_is_refused(tiny):
    from peft import LoraConfig, get_peft_model

    loaded = Auto().load(str(tiny("qwen2")))
    model = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(TdroError, match="more than plain LoRA"):
        merged_state(model, model.state_dict())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_same_weights_give_the_same_bytes(lora, tiny, tmp_path):
    for name in ("a", "b"):
        save(tiny("llama"), contract_of("llama"), tmp_path / name, lora=lora)
    first, second = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*") if p.is_file()}
        for n in ("a", "b")
    )
    assert first == second
    assert not [path for path in first if path.suffix in (".bin", ".pt", ".pkl", ".pth")]
    digests = [load_embedder(tmp_path / name, device="cpu").digest for name in ("a", "b")]
    assert digests[0] == digests[1]


def test_nothing_saved_depends_on_hashing_or_asks_for_another_template(tiny, tmp_path):
    save(tiny("mistral"), contract_of("mistral"), tmp_path / "m", lora=True)
    adapter = json.loads((tmp_path / "m" / "adapter" / "adapter_config.json").read_text())
    assert adapter["target_modules"] == sorted(adapter["target_modules"])  # a set in peft
    config = json.loads((tmp_path / "m" / "tokenizer_config.json").read_text())
    assert not {"add_bos_token", "add_eos_token"} & config.keys()


def test_weights_given_apart_are_the_ones_saved(tiny, texts, tmp_path):
    encoder, tokenizer = encoder_of(tiny("qwen2"), contract_of("qwen2"), lora=True)
    gathered = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    expected = Embedder(encoder, tokenizer, contract_of("qwen2"), digest="", device="cpu").encode_passages(texts)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.zero_()  # as in ZeRO-3, where the module holds nothing
    save_model(encoder, tokenizer, contract_of("qwen2"), tmp_path / "m", details={}, state_dict=gathered)
    for folder in ("m", "m/adapter"):
        assert np.abs(load_embedder(tmp_path / folder, device="cpu").encode_passages(texts) - expected).max() < 1e-5


def test_a_saved_model_is_never_written_over(tiny, tmp_path):
    save(tiny("bert"), contract_of("bert"), tmp_path / "m")
    with pytest.raises(TdroError, match="model already"):
        save(tiny("bert"), contract_of("bert"), tmp_path / "m")


def test_contract_prompts_and_card_are_written(tiny, tmp_path):
    save(tiny("qwen2"), contract_of("qwen2"), tmp_path / "m")
    contract = json.loads((tmp_path / "m" / "tdro_encoder.json").read_text())
    assert (contract["pooling"], contract["query_length"], contract["prompts"]) == ("last_token", 48, PROMPTS)
    prompts = json.loads((tmp_path / "m" / "config_sentence_transformers.json").read_text())["prompts"]
    assert prompts == {
        "nq": "Instruct: Given a question, retrieve passages\nQuery: ",
        "quora": "Instruct: Find the same question\nQuery: ",
        "query": "Instruct: Search\nQuery: ",
        "document": "",
    }
    card = (tmp_path / "m" / "README.md").read_text()
    for expected in (
        "# tiny",
        "| nq | 0.25 |",
        "| nDCG@10 | 0.5 |",
        "```yaml\na: 1\nb: 2\n```",
        "library_name: sentence-tr",
    ):
        assert expected in card
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "m").glob("*.[jm][sd]*"))


# ---- tdro export ----


def with_sentence_transformers(folder):
    st = pytest.importorskip("sentence_transformers", reason="the extra `compare` is not installed")
    return st.SentenceTransformer(str(folder), device="cpu")


def test_an_exported_adapter_is_a_whole_model_that_embeds_as_before(tiny, texts, tmp_path):
    contract = contract_of("qwen2")
    live = save(tiny("qwen2"), contract, tmp_path / "m", lora=True)
    passages = live.encode_passages(texts)
    for number, source in enumerate((tmp_path / "m", tmp_path / "m" / "adapter")):
        out = tmp_path / f"out{number}"
        export_model(source, out)
        assert not (out / "adapter").exists() and not list(out.glob("adapter*"))
        assert np.abs(load_embedder(out, device="cpu").encode_passages(texts) - passages).max() < 1e-5
        assert np.abs(with_transformers(out, contract, texts) - passages).max() < 1e-5
        assert np.abs(with_sentence_transformers(out).encode_document(texts) - passages).max() < 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_an_export_may_be_of_half_size_and_differs_by_rounding_only(dtype, tiny, texts, tmp_path):
    live = save(tiny("qwen2"), contract_of("qwen2"), tmp_path / "m")
    export_model(tmp_path / "m", tmp_path / "out", dtype=dtype)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 0.6 * (tmp_path / "m" / "model.safetensors").stat().st_size
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    difference = np.abs(
        load_embedder(tmp_path / "out", device="cpu").encode_passages(texts) - live.encode_passages(texts)
    )
    assert 0 < difference.max() < 0.1


def test_the_default_prompt_of_queries_is_chosen_by_task_or_text(tiny, texts, tmp_path):
    contract = contract_of("bert", prompts={"nq": PROMPTS["nq"], "quora": PROMPTS["quora"]})
    live = save(tiny("bert"), contract, tmp_path / "m")
    for name, given, prompt in (("by_task", "quora", PROMPTS["quora"]), ("by_text", "Look up", "Look up")):
        export_model(tmp_path / "m", tmp_path / name, query_prompt=given)
        expected = live.encode_queries(texts, prompt)
        assert np.abs(load_embedder(tmp_path / name, device="cpu").encode_queries(texts) - expected).max() < 1e-5
        model = with_sentence_transformers(tmp_path / name)
        assert np.abs(model.encode_query(texts) - expected).max() < 1e-5
        assert np.abs(model.encode(texts, prompt_name="nq") - live.encode_queries(texts, PROMPTS["nq"])).max() < 1e-5
        assert np.abs(model.encode_document(texts) - live.encode_passages(texts)).max() < 1e-5


def test_the_card_of_a_model_from_elsewhere_claims_no_training_of_ours(tiny, tmp_path):
    export_model(tiny("bert"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trained elsewhere" in card and "distributionally" not in card


def test_an_export_never_writes_over_anything(tiny, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "mine.txt").write_text("mine")
    with pytest.raises(TdroError, match="there exists"):
        export_model(tiny("bert"), tmp_path / "there")
    assert [path.name for path in (tmp_path / "there").iterdir()] == ["mine.txt"]
    with pytest.raises(TdroError):
        export_model(tmp_path / "no-such-model", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_runs_link_is_exported_with_a_card_of_data_measures_recipe_and_provenance(experiment, tdro, tmp_path):
    out = experiment.run("transfer.strategy=uniform", "finetune.steps=2", "lora={r: 2}")
    run = experiment.runs / "tiny" / "finetune"
    digest = json.loads((out / "manifest.json").read_text())["digest"]
    evaluated = run.parent / "eval-1" / "out"
    (evaluated / "finetune").mkdir(parents=True)
    (evaluated / "manifest.json").write_text(json.dumps({"inputs": {"finetune": digest}, "published": "2026"}))
    measures = {"results": {"a": {"nDCG@10": 0.25}, "b": {"nDCG@10": 0.75}}, "average": {"nDCG@10": 0.5}}
    (evaluated / "finetune" / "measures.json").write_text(json.dumps(measures))
    code, said, _ = tdro("export", str(run), str(tmp_path / "m"), "--query-prompt", "shell", "--json")
    assert code == 0
    assert json.loads(said)["inputs"] == {"finetune": digest}
    card = (tmp_path / "m" / "README.md").read_text()
    assert "| shell | 90 | 0.25 |" in card
    assert "| a | 0.25 |" in card and "| average | 0.5 |" in card
    assert "steps: 2" in card and "r: 2" in card  # overrides are part of the recipe that was run
    assert digest in card and "path: shell.jsonl.gz" in card and str(experiment.recipe.parent) not in card
    assert "license:" not in card and "None is given here" in card
    assert "## Measures" not in (out / "model" / "README.md").read_text()
    code, _, err = tdro("export", str(run), str(tmp_path / "m"))
    assert code == 2 and "exists" in err
    code, _, err = tdro("export", str(run.parent / "transfer"), str(tmp_path / "n"))
    assert code == 2 and "this run has no model" in err
