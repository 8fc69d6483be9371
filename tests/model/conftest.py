"""Tiny random models of the families that we support, with tokenizers of the same kinds, written as checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest

TEXTS = [
    "A retriever reads a query and a passage.",
    "Wing flutter at high speed",
    "日本語の短い文",
    "How do I list the open files of a process? Use lsof, then read the table it prints, line by line.",
    "x",
    "Ein Vertrag kommt durch Antrag und Annahme zustande; żółw, naïve, l'été.",
]
DECODERS = ("qwen2", "qwen3", "llama", "mistral", "gemma", "gemma2", "gemma3_text")
ENCODERS = ("bert", "distilbert", "roberta", "xlm-roberta", "modernbert")
FAMILIES = DECODERS + ENCODERS
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


def _trained(pipeline, trainer):
    pipeline.train_from_iterator(TEXTS * 3, trainer)
    return pipeline


def tiny_tokenizer(family: str):
    """A tokenizer of the family's kind: same class, same template around a text, same special tokens."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if family in ("qwen2", "qwen3"):  # no template at all
        special = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
        pipeline = transformers.Qwen2Tokenizer(vocab={}, merges=[], **special).backend_tokenizer
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=list(special.values()), initial_alphabet=alphabet, show_progress=False
        )
        return transformers.Qwen2Tokenizer(tokenizer_object=_trained(pipeline, trainer), **special)
    if family == "llama":  # Llama 3: byte level, BOS from a template, no padding token
        pipeline = Tokenizer(models.BPE())
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        special = ["<|begin_of_text|>", "<|end_of_text|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
        _trained(pipeline, trainer)
        pipeline.post_processor = processors.Sequence(
            [
                processors.ByteLevel(trim_offsets=True),
                processors.TemplateProcessing(
                    single=f"{special[0]} $A", pair=f"{special[0]} $A {special[0]} $B", special_tokens=[(special[0], 0)]
                ),
            ]
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=pipeline, bos_token=special[0], eos_token=special[1]
        )
    if family == "mistral":  # pieces of SentencePiece, BOS asked for in tokenizer_config.json, no padding token
        special = ["<unk>", "<s>", "</s>"]
        pipeline = transformers.LlamaTokenizer().backend_tokenizer
        _trained(pipeline, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
        return transformers.LlamaTokenizer(
            tokenizer_object=pipeline, add_bos_token=True, add_eos_token=False, bos_token="<s>", eos_token="</s>"
        )
    if family.startswith("gemma"):
        special = ["<pad>", "<eos>", "<bos>", "<unk>"]
        pipeline = transformers.GemmaTokenizer().backend_tokenizer
        _trained(pipeline, trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False))
        return transformers.GemmaTokenizer(tokenizer_object=pipeline, add_bos_token=True)
    if family in ("bert", "distilbert", "modernbert"):
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        pipeline = transformers.BertTokenizer().backend_tokenizer
        _trained(pipeline, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False))
        pipeline.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        kind = transformers.PreTrainedTokenizerFast if family == "modernbert" else transformers.BertTokenizer
        names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
        return kind(tokenizer_object=pipeline, **dict(zip(names, special, strict=True)))
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    names = ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    if family == "roberta":
        pipeline = Tokenizer(models.BPE())
        pipeline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        )
    else:
        pipeline = Tokenizer(models.Unigram())
        pipeline.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    _trained(pipeline, trainer)
    pipeline.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=pipeline, cls_token="<s>", sep_token="</s>", **dict(zip(names, special, strict=True))
    )


def tiny_config(family: str, tokenizer):
    from transformers import AutoConfig

    sizes = dict(SIZES, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    if family in DECODERS:
        sizes |= {"num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}
        sizes |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    elif family == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": len(tokenizer)}
        sizes |= {"max_position_embeddings": 256, "pad_token_id": tokenizer.pad_token_id}
    elif "roberta" in family:
        sizes |= {"max_position_embeddings": 258}
    elif family == "modernbert":
        ids = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
        sizes |= {"max_position_embeddings": 256, "local_attention": 8, **ids}
    else:
        sizes |= {"max_position_embeddings": 256}
    if family in ("gemma2", "gemma3_text"):
        sizes |= {"sliding_window": 8}  # shorter than the texts
    return AutoConfig.for_model(family, **sizes)


def write_tiny_model(family: str, folder: Path, *, seed: int = 0) -> Path:
    import torch
    from transformers import AutoModel

    tokenizer = tiny_tokenizer(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(tiny_config(family, tokenizer))
        with torch.no_grad():  # far from the near-linear start, where a wrong position would hardly show
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function from a family's name to the folder of its tiny checkpoint."""
    made: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in made:
            made[family] = write_tiny_model(family, tmp_path_factory.mktemp(family))
        return made[family]

    return folder_of


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return TEXTS


def pytest_generate_tests(metafunc):
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", FAMILIES)
    if "decoder" in metafunc.fixturenames:
        metafunc.parametrize("decoder", DECODERS)
