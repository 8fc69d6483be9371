"""`attention: varlen` gives what sdpa gives on padded batches; here by its loop, on a GPU by torch's kernel."""

import json
import shutil

import pytest
import torch

from tdro_cli.builtin.backbones import Auto
from tdro_cli.data.tokenization import TextTokenizer
from tdro_cli.errors import TdroError
from tdro_cli.model import varlen
from tdro_cli.model.contract import EncoderContract
from tdro_cli.model.encoder import TextEncoder, add_lora, pool, pool_unpadded
from tdro_cli.model.packing import encode_token_lists, pad_batch


def encoders(folder, texts, pooling="mean", **options):
    """The same model with sdpa and with varlen, and the texts' tokens."""
    pair = [
        TextEncoder(Auto().load(str(folder), attention=attention).model, pooling=pooling, **options).eval()
        for attention in ("sdpa", "varlen")
    ]
    tokenizer = TextTokenizer(Auto().load(str(folder)).tokenizer, EncoderContract(query_length=64, passage_length=64))
    return *pair, tokenizer.passages(texts), tokenizer.pad_id


def gradient(encoder, batch):
    encoder.zero_grad()
    encoder(*batch)[:, :7].sum().backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


@pytest.mark.parametrize("pooling", ["last_token", "mean", "cls"])
def test_varlen_gives_the_embeddings_and_gradients_of_sdpa(family, pooling, tiny, texts):
    if family == "gemma2":
        pytest.skip("it caps its attention scores: see the next test")
    padded, unpadded, token_lists, pad_id = encoders(tiny(family), texts, pooling)
    assert unpadded.unpadded and not padded.unpadded
    batch = pad_batch(token_lists, pad_id)
    assert (padded(*batch) - unpadded(*batch)).abs().max() < 1e-5
    expected, found = gradient(padded, batch), gradient(unpadded, batch)
    assert (found - expected).norm() < 1e-5 * expected.norm()


WINDOWS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
    "qwen3": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None},
}


@pytest.mark.parametrize("windowed", WINDOWS)
def test_a_sliding_window_is_that_of_eager_attention_on_a_text_alone(windowed, tiny, texts, tmp_path):
    narrow = tmp_path / "narrow"
    shutil.copytree(tiny(windowed), narrow)
    config = json.loads((narrow / "config.json").read_text())
    (narrow / "config.json").write_text(json.dumps(config | WINDOWS[windowed]))
    padded, unpadded, _, pad_id = encoders(narrow, texts)
    token_lists = [[5 + (i * length) % 97 for i in range(length)] for length in (3, 8, 9, 30)]
    eager = TextEncoder(Auto().load(str(narrow), attention="eager").model, pooling="mean").eval()
    alone = torch.cat([eager(*pad_batch([tokens], pad_id)) for tokens in token_lists])
    batch = pad_batch(token_lists, pad_id)
    for encoder in (padded, unpadded):
        assert (encoder(*batch) - alone).abs().max() < 1e-5
    wide, *_ = encoders(tiny(windowed), texts)
    assert (wide(*batch) - alone).abs().max() > 1e-3  # the window matters


def test_a_model_that_caps_attention_scores_is_refused(tiny, texts):
    _, unpadded, token_lists, pad_id = encoders(tiny("gemma2"), texts)
    with pytest.raises(TdroError, match=r"caps attention scores(.|\n)*sdpa"):
        unpadded(*pad_batch(token_lists, pad_id))


def test_attention_dropout_is_refused_in_training_only(tiny, texts):
    _, unpadded, token_lists, pad_id = encoders(tiny("bert"), texts)
    unpadded(*pad_batch(token_lists, pad_id))
    with pytest.raises(TdroError, match="drops 10%"):
        unpadded.train()(*pad_batch(token_lists, pad_id))


def test_left_padding_and_an_order_of_texts_change_nothing(tiny, texts):
    _, unpadded, token_lists, pad_id = encoders(tiny("llama"), texts)
    ids, mask = pad_batch(token_lists, pad_id)
    reversed_ids, reversed_mask = pad_batch([tokens[::-1] for tokens in token_lists], pad_id)
    expected = unpadded(ids, mask)
    assert (unpadded(reversed_ids.flip(1), reversed_mask.flip(1)) - expected).abs().max() < 1e-5
    assert (unpadded(ids.flip(0), mask.flip(0)).flip(0) - expected).abs().max() < 1e-5


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_checkpointed_activations_and_lora_give_the_same_gradient(tiny, texts):
    gradients = []
    for attention in ("sdpa", "varlen"):
        loaded = Auto().load(str(tiny("qwen2")), attention=attention)
        if attention == "varlen":
            loaded.model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(0)
        encoder = TextEncoder(add_lora(loaded, r=2, dropout=0.0)).train()
        tokenizer = TextTokenizer(loaded.tokenizer, EncoderContract())
        gradients.append(gradient(encoder, pad_batch(tokenizer.passages(texts), tokenizer.pad_id)))
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_unpadded_batches_are_cut_by_real_tokens_and_count_no_padding(tiny, texts):
    padded, unpadded, token_lists, pad_id = encoders(tiny("qwen2"), texts)
    seen = []
    unpadded.register_forward_pre_hook(lambda module, args: seen.append(int(args[1].sum())))
    packed = encode_token_lists(unpadded, token_lists, pad_id=pad_id, budget=80, device="cpu")
    assert packed.padded_tokens == 0 and max(seen) <= 80 and sum(seen) == packed.tokens
    expected = encode_token_lists(padded, token_lists, pad_id=pad_id, budget=80, device="cpu")
    assert (packed.embedding_ND - expected.embedding_ND).abs().max() < 1e-5


def test_pooling_end_to_end_is_pooling_side_by_side():
    hidden_NTD, mask_NT = torch.randn(3, 4, 2), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    starts = torch.tensor([0, 4, 5, 7])
    for pooling in ("last_token", "mean", "cls"):
        assert torch.allclose(pool_unpadded(hidden_NTD[mask_NT], starts, pooling), pool(hidden_NTD, mask_NT, pooling))


def test_an_older_kernel_is_given_keys_of_every_head(monkeypatch):
    """That of torch 2.11 does not know grouped heads, that of 2.10 no windows; the kernels themselves need a GPU."""

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
        assert query.shape == key.shape == value.shape
        return varlen._loop(query, key, value, cu_seq_q, max_q, scale, window_size)

    query, key, value = torch.randn(9, 4, 8), torch.randn(9, 2, 8), torch.randn(9, 2, 8)
    told = (torch.tensor([0, 5, 9], dtype=torch.int32), 5, 0.3, (-1, 0))
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    found, expected = (run(query, key, value, *told) for run in (varlen._flash, varlen._loop))
    assert (found - expected).abs().max() < 1e-6
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", lambda query, key, value, is_causal=False: None)
    with pytest.raises(TdroError, match="needs a newer torch"):
        varlen._flash(query, key, value, *told)


@pytest.mark.gpu
def test_torchs_kernel_gives_the_embeddings_of_sdpa(family, tiny, texts):
    """`python -m pytest -m gpu tests/model/test_varlen.py`: bfloat16 embeddings and gradients agree within rounding."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU here")
    if family == "gemma2":
        pytest.skip("it caps its attention scores")
    padded, unpadded, token_lists, pad_id = encoders(tiny(family), texts, autocast="bfloat16")
    ids, mask = pad_batch(token_lists, pad_id)
    padded.cuda(), unpadded.cuda()
    assert (padded(ids.cuda(), mask.cuda()) - unpadded(ids, mask)).abs().max() < 0.05
    expected, found = gradient(padded, (ids.cuda(), mask.cuda())), gradient(unpadded, (ids, mask))
    assert (found - expected).norm() < 0.1 * expected.norm()
