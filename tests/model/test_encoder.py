from dataclasses import replace

import pytest
import torch
from transformers import Qwen2Config, Qwen2Model

from tdro_cli.builtin.backbones import Auto
from tdro_cli.data.tokenization import TextTokenizer
from tdro_cli.errors import TdroError
from tdro_cli.model.encoder import (
    EncoderContract,
    TextEncoder,
    add_lora,
    check_lengths,
    compile_blocks,
    draws_at_random,
    pool,
    position_limit,
)
from tdro_cli.model.packing import pad_batch
from tdro_cli.protocols import LoadedBackbone

CAUSAL = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text")


def encoder_and_ids(folder, texts, **options):
    loaded = Auto().load(str(folder))
    options.setdefault("pooling", "last_token" if loaded.causal else "mean")
    encoder = TextEncoder(loaded.model, **options).eval()
    contract = EncoderContract(query_length=64, passage_length=64)
    tokenizer = TextTokenizer(loaded.tokenizer, contract)
    return encoder, tokenizer.passages(texts), tokenizer.pad_id


def test_padding_never_changes_an_embedding(family, tiny, texts):
    encoder, token_lists, pad_id = encoder_and_ids(tiny(family), texts)
    together = encoder(*pad_batch(token_lists, pad_id))
    alone = torch.cat([encoder(*pad_batch([tokens], pad_id)) for tokens in token_lists])
    assert (together - alone).abs().max() < 1e-5
    assert len({tuple(row) for row in alone.mul(1e3).round().tolist()}) == len(texts)  # and texts differ


@pytest.mark.parametrize("pooling", ["last_token", "mean", "cls"])
def test_left_padding_gives_the_embedding_of_right_padding(family, pooling, tiny, texts):
    encoder, token_lists, pad_id = encoder_and_ids(tiny(family), texts, pooling=pooling)
    right_ids, right_mask = pad_batch(token_lists, pad_id)
    reversed_ids, reversed_mask = pad_batch([tokens[::-1] for tokens in token_lists], pad_id)
    left = encoder(reversed_ids.flip(1), reversed_mask.flip(1))
    assert (left - encoder(right_ids, right_mask)).abs().max() < 1e-5


def test_a_family_is_causal_exactly_if_a_later_token_changes_nothing_before_it(family, tiny):
    loaded = Auto().load(str(tiny(family)))
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]])
    with torch.no_grad():
        hidden = loaded.model.eval()(input_ids=ids).last_hidden_state
    assert loaded.causal == torch.allclose(hidden[0, 0], hidden[1, 0], atol=1e-6) == (family in CAUSAL)


def test_last_token_mean_and_cls_of_hidden_states_made_by_hand():
    hidden = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 6.0], [9.0, 9.0], [9.0, 9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert pool(hidden, mask, "last_token").tolist() == [[3, 4], [5, 6]]
    assert pool(hidden, mask, "mean").tolist() == [[2, 3], [5, 6]]
    assert pool(hidden, mask, "cls").tolist() == [[1, 2], [5, 6]]


def test_embeddings_are_of_length_one_where_asked_and_float32_in_bfloat16(tiny, texts):
    encoder, token_lists, pad_id = encoder_and_ids(tiny("qwen2"), texts)
    exact = encoder(*pad_batch(token_lists, pad_id))
    assert torch.allclose(exact.norm(dim=1), torch.ones(len(texts)), atol=1e-6)
    bare, _, _ = encoder_and_ids(tiny("qwen2"), texts, normalize=False)
    raw = bare(*pad_batch(token_lists, pad_id))
    assert (raw.norm(dim=1) - 1).abs().min() > 1e-3
    assert torch.allclose(torch.nn.functional.normalize(raw, dim=1), exact, atol=1e-6)
    half, _, _ = encoder_and_ids(tiny("qwen2"), texts, autocast="bfloat16")
    rough = half(*pad_batch(token_lists, pad_id))
    assert rough.dtype == torch.float32
    assert 0 < (rough - exact).abs().max() < 0.2
    assert torch.allclose(rough.norm(dim=1), torch.ones(len(texts)), atol=1e-6)  # normalised after bfloat16


def test_mask_or_none_gives_the_same_gradient_in_a_causal_model(decoder, tiny, texts):
    encoder, token_lists, pad_id = encoder_and_ids(tiny(decoder), texts)
    assert encoder._needs_mask == (decoder == "gemma2")  # the one that sdpa can't serve
    gradients = []
    for needs_mask in (False, True):
        encoder._needs_mask = needs_mask
        encoder.zero_grad()
        encoder(*pad_batch(token_lists, pad_id))[:, :7].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[1].norm()


def test_eager_attention_agrees_with_sdpa(family, tiny, texts):
    encoder, token_lists, pad_id = encoder_and_ids(tiny(family), texts)
    eager = TextEncoder(Auto().load(str(tiny(family)), attention="eager").model, pooling=encoder.pooling).eval()
    batch = pad_batch(token_lists, pad_id)
    assert (encoder(*batch) - eager(*batch)).abs().max() < 1e-5


def test_lora_reaches_every_layer_that_it_names_and_every_adapter_gets_a_gradient(family, tiny, texts):
    loaded = Auto().load(str(tiny(family)))
    encoder = TextEncoder(add_lora(loaded, r=2, dropout=0.0), pooling="mean")
    tokenizer = TextTokenizer(loaded.tokenizer, EncoderContract())
    encoder(*pad_batch(tokenizer.passages(texts), tokenizer.pad_id))[:, 0].sum().backward()
    trained = {name: p.grad for name, p in encoder.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert [name for name, gradient in trained.items() if gradient is None] == []
    per_layer = {"modernbert": 4, "distilbert": 6, "bert": 6, "roberta": 6, "xlm-roberta": 6}.get(family, 7)
    assert len(trained) >= 2 * per_layer * 2  # A and B, two layers


def test_an_unknown_lora_target_is_told_with_the_models_own(tiny):
    with pytest.raises(TdroError, match=r"q_prj(.|\n)*own are q_proj, k_proj"):
        add_lora(Auto().load(str(tiny("qwen2"))), targets=["q_prj"])


@pytest.mark.parametrize(("family_name", "positions"), [("bert", 256), ("roberta", 256), ("qwen2", 256)])
def test_a_contract_longer_than_the_models_positions_is_refused(family_name, positions, tiny):
    model = Auto().load(str(tiny(family_name))).model
    assert position_limit(model) == positions
    check_lengths(model, EncoderContract(passage_length=positions))
    with pytest.raises(TdroError, match="at most 256"):
        check_lengths(model, EncoderContract(passage_length=positions + 1))


def test_a_contract_survives_json_and_refuses_nonsense():
    contract = EncoderContract(pooling="mean", prompts={"nq": "Find {it}"}, temperature=0.02)
    assert EncoderContract.from_json(contract.to_json()) == contract
    assert contract.head("Find {it}") == "Instruct: Find {it}\nQuery: "
    assert contract.head("") == ""
    for wrong in ({"pooling": "max"}, {"query_template": "{query} {prompt}"}, {"query_length": 1}, {"ending": "x"}):
        with pytest.raises(ValueError):
            EncoderContract(**wrong)


def test_the_models_own_query_prompt_is_the_one_named_query_or_the_only_one():
    assert EncoderContract(prompts={"a": "p", "b": "p"}).query_prompt() == "p"
    assert EncoderContract(prompts={"a": "p", "b": "q"}).query_prompt() == ""
    assert EncoderContract(prompts={"a": "p", "query": "q"}).query_prompt() == "q"


@pytest.mark.slow  # the compiler takes a minute
def test_compiled_layers_give_the_same_embeddings_and_gradients(tiny, texts):
    results = []
    for compiled in (False, True):
        encoder, token_lists, pad_id = encoder_and_ids(tiny("qwen2"), texts)
        if compiled:
            compile_blocks(encoder.backbone)
        embedding_ND = encoder(*pad_batch(token_lists, pad_id))
        embedding_ND[:, :7].sum().backward()
        results.append((embedding_ND.detach(), torch.cat([p.grad.flatten() for p in encoder.parameters()])))
    (plain, gradient), (fast, fast_gradient) = results
    assert (plain - fast).abs().max() < 1e-5
    assert (gradient - fast_gradient).norm() < 1e-4 * gradient.norm()
    assert "layers.0.mlp.up_proj.weight" in encoder.backbone.state_dict()


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, False), ({"attention_dropout": 0.1}, True), ({"router_jitter_noise": 0.01}, True)],
)
def test_what_draws_at_random_is_told_from_the_configuration(options, expected):
    config = Qwen2Config(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, **options)
    assert draws_at_random(Qwen2Model(config)) is expected


def test_what_draws_at_random_is_told_from_the_modules():
    model = Qwen2Model(Qwen2Config(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2))
    loaded = LoadedBackbone(model, None, ("q_proj",), True)
    assert draws_at_random(add_lora(loaded, r=2, dropout=0.1))
    assert not draws_at_random(add_lora(replace(loaded, model=Qwen2Model(model.config)), r=2, dropout=0.0))
