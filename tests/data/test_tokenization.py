import runpy
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tdro_cli.data.tokenization import TextTokenizer, ending_in_template, special_ids
from tdro_cli.model.contract import EncoderContract

tiny_tokenizer = cache(runpy.run_path(str(Path(__file__).parents[1] / "model" / "conftest.py"))["tiny_tokenizer"])
# family: tokens before a text, tokens after it, whether we put the last one there
TEMPLATES = {
    "qwen2": ([], ["<|im_end|>"], True),
    "llama": (["<|begin_of_text|>"], ["<|end_of_text|>"], True),
    "mistral": (["<s>"], ["</s>"], True),
    "gemma": (["<bos>"], ["<eos>"], True),
    "bert": (["[CLS]"], ["[SEP]"], False),
    "roberta": (["<s>"], ["</s>"], False),
    "xlm-roberta": (["<s>"], ["</s>"], False),
}
every_template = pytest.mark.parametrize("family", TEMPLATES)
LONG = "one two three " * 200


@every_template
def test_special_tokens_surround_a_text_and_survive_truncation(family):
    tokenizer = tiny_tokenizer(family)
    ours = TextTokenizer(tokenizer, EncoderContract(query_length=9, passage_length=12))
    before, after, appended = TEMPLATES[family]
    assert tokenizer.convert_ids_to_tokens(ours.prefix_ids) == before
    assert tokenizer.convert_ids_to_tokens(ours.suffix_ids) == after
    assert bool(ours.appended_ids) == appended
    for ids, limit in ((ours.queries([LONG])[0], 9), (ours.passages([LONG])[0], 12)):
        assert len(ids) == limit
        tokens = tokenizer.convert_ids_to_tokens(ids)
        assert tokens[: len(before)] == before
        assert tokens[-1:] == after
        assert tokens.count(after[0]) == 1


@every_template
@settings(max_examples=30, deadline=None)
@given(text=st.text(max_size=40), limit=st.integers(4, 30))
def test_any_text_is_within_the_limit_and_ends_once(family, text, limit):
    ours = TextTokenizer(tiny_tokenizer(family), EncoderContract(passage_length=limit))
    (ids,) = ours.passages([text])
    assert len(ids) <= limit
    assert ids[-1] == ours.suffix_ids[-1]
    assert ids[: len(ours.prefix_ids)] == ours.prefix_ids


@every_template
def test_a_template_that_ends_with_eos_is_not_given_another(family):
    ours = TextTokenizer(tiny_tokenizer(family), EncoderContract(passage_length=16))
    again = TextTokenizer(ending_in_template(ours), ours.contract)
    assert again.appended_ids == []
    assert (again.prefix_ids, again.suffix_ids) == (ours.prefix_ids, ours.suffix_ids)
    texts = ["a", "", LONG, "日本語 żółw\n\nline"]
    assert again.passages(texts) == ours.passages(texts)
    plain = ending_in_template(ours)
    assert [plain(text, truncation=True)["input_ids"] for text in texts] == ours.passages(texts)
    assert plain.pad_token_id == ours.pad_id


@every_template
def test_the_original_tokenizer_is_left_as_it_was(family):
    tokenizer = tiny_tokenizer(family)
    before = tokenizer.backend_tokenizer.to_str()
    ending_in_template(TextTokenizer(tokenizer, EncoderContract()))
    assert tokenizer.backend_tokenizer.to_str() == before


def test_truncation_and_padding_written_into_a_tokenizer_file_are_not_followed():
    tokenizer = tiny_tokenizer("bert")
    fresh = tokenizer.__class__(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str()),
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
    )
    fresh.backend_tokenizer.enable_truncation(8)
    fresh.backend_tokenizer.enable_padding(length=128)
    ours = TextTokenizer(fresh, EncoderContract(passage_length=40))
    assert [len(ids) for ids in ours.passages([LONG, "x"])] == [40, 3]


def test_a_query_carries_its_prompt_in_e5_style_and_a_plain_one_none():
    tokenizer = tiny_tokenizer("qwen2")
    ours = TextTokenizer(tokenizer, EncoderContract(query_length=64))
    (prompted,), (plain,) = ours.queries(["who?"], "Find {answers}"), ours.queries(["who?"])
    assert tokenizer.decode(prompted) == "Instruct: Find {answers}\nQuery: who?<|im_end|>"
    assert tokenizer.decode(plain) == "who?<|im_end|>"
    assert ours.passages(["who?"], "Find {answers}") == [prompted]


def test_a_prompt_that_leaves_no_room_for_the_text_is_refused():
    ours = TextTokenizer(tiny_tokenizer("qwen2"), EncoderContract(query_length=40))
    fits = "a"
    while len(ours._plain([ours.contract.head(fits)])[0]) < 38:
        fits += "b"
    assert len(ours.queries(["zz zz zz"], fits)[0]) == 40  # 38 of the prompt, 1 of the text, EOS
    with pytest.raises(ValueError, match="leaves none for the text"):
        ours.queries(["zz"], fits + "bcdef")


def test_eos_pads_where_there_is_no_padding_token():
    llama = tiny_tokenizer("llama")
    assert llama.pad_token_id is None
    assert TextTokenizer(llama, EncoderContract()).pad_id == llama.eos_token_id


def test_ending_tokenizer_leaves_the_template_alone_and_no_text_is_empty():
    ours = TextTokenizer(tiny_tokenizer("qwen2"), EncoderContract(ending="tokenizer"))
    assert ours.suffix_ids == []
    assert ours.passages([""]) == [[ours.pad_id]]


def test_an_ending_other_than_eos_is_kept():
    tokenizer = ending_in_template(TextTokenizer(tiny_tokenizer("qwen2"), EncoderContract()))
    tokenizer.eos_token = "<|endoftext|>"  # as a model whose template ends with another special token
    ours = TextTokenizer(tokenizer, EncoderContract())
    assert tokenizer.convert_ids_to_tokens(ours.suffix_ids) == ["<|im_end|>"]


def test_special_ids_of_a_template_are_found_around_the_text():
    assert special_ids(tiny_tokenizer("bert")) == ([2], [3])
    assert special_ids(tiny_tokenizer("qwen2")) == ([], [])
