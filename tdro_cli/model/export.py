"""Saved models that sentence-transformers, transformers, peft and this package all read alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tdro_cli.artifacts import read_json, write_json, write_text
from tdro_cli.builtin.backbones import quiet_transformers
from tdro_cli.data.tokenization import TextTokenizer, ending_in_template
from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.model.encoder import CONTRACT_FILE, EncoderContract, TextEncoder

ADAPTER_FOLDER = "adapter"
POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "last_token": "pooling_mode_lasttoken",
}
PROBES = ("", "a", "How many tokens? 日本語, żółw!\nA new line.", "retrieval " * 2000)


def save_model(
    encoder: TextEncoder,
    tokenizer: Any,
    contract: EncoderContract,
    folder: Path,
    *,
    details: Mapping[str, Any],
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes the model into `folder`: the same files, byte for byte, for the same weights, contract and details.

    In the root the whole model, LoRA merged in (the encoder itself is not changed), with its tokenizer; with LoRA the
    adapter in `adapter/`. `details` go into the model card, a section a key: text, a table of {name: value}, or a table
    of a list of equal dicts. `state_dict`: the weights of `encoder.backbone` by name where the module does not hold
    them itself (ZeRO-3). Weights keep their dtype; safetensors only.
    Raises TdroError if `folder` has a model already, RunFailed if the saved tokenizer gives other ids than ours.
    """
    folder = Path(folder)
    if (folder / CONTRACT_FILE).exists():
        raise TdroError("there is a model already", where=str(folder), remedy="save into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    backbone = encoder.backbone
    state = dict(state_dict) if state_dict is not None else backbone.state_dict()
    text_tokenizer = TextTokenizer(tokenizer, contract)
    exported_tokenizer = ending_in_template(text_tokenizer)
    base = backbone
    if hasattr(backbone, "peft_config"):
        base = backbone.get_base_model()
        _save_adapter(backbone, state, contract, exported_tokenizer, folder / ADAPTER_FOLDER)
        state = merged_state(backbone, state)
    state = {name: value.detach().to("cpu").contiguous() for name, value in state.items()}
    with quiet_transformers():
        base.save_pretrained(folder, state_dict=state, max_shard_size="5GB")
    exported_tokenizer.save_pretrained(folder)
    _check_saved_tokenizer(text_tokenizer, folder)
    _write_sentence_transformers(encoder, contract, folder)
    write_text(folder / "README.md", model_card(encoder, contract, details))
    write_json(folder / CONTRACT_FILE, {"schema": 1, **contract.to_json(), "dimension": encoder.dimension})


def merged_state(backbone: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the bare model with W + scaling · B A in the place of each adapted W. arXiv 2106.09685, section 4.

    `state` has the names of `backbone.state_dict()`, `backbone` is wrapped by peft. Nothing is changed in place.
    Raises TdroError for an adapter that is not plain LoRA on linear layers.
    """
    from torch import nn

    (adapter,) = backbone.active_adapters
    layers = dict(backbone.named_modules())
    merged: dict[str, Tensor] = {}
    used = set()
    for name, weight in state.items():
        if ".lora_" in name:
            continue
        path, _, kind = name.partition(".base_layer.")
        if kind == "weight":
            down, up = f"{path}.lora_A.{adapter}.weight", f"{path}.lora_B.{adapter}.weight"
            layer = layers[path]
            if not isinstance(layer.get_base_layer(), nn.Linear) or down not in state or up not in state:
                raise TdroError(f"{path} has an adapter that can't be merged", remedy="use LoRA on linear layers")
            used |= {down, up}
            delta = (state[up].float() @ state[down].float()) * layer.scaling[adapter]
            weight = (weight.float() + delta.to(weight.device)).to(weight.dtype)
        merged[name.replace(".base_layer.", ".").removeprefix("base_model.model.")] = weight
    unused = sorted(name for name in state if ".lora_" in name and name not in used)
    if unused or any("modules_to_save" in name for name in merged):
        raise TdroError("the adapter has more than plain LoRA", where=unused[0] if unused else None, remedy="use LoRA")
    return merged


def _save_adapter(
    backbone: Any, state: Mapping[str, Tensor], contract: EncoderContract, tokenizer: Any, folder: Path
) -> None:
    backbone.save_pretrained(folder, state_dict=dict(state), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
    # its sets are written in an order that changes from run to run
    config = folder / "adapter_config.json"
    settings = read_json(config)
    for key, value in settings.items():
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            settings[key] = sorted(value)
    write_json(config, settings)
    tokenizer.save_pretrained(folder)
    write_json(folder / CONTRACT_FILE, {"schema": 1, **contract.to_json()})


def _check_saved_tokenizer(text_tokenizer: TextTokenizer, folder: Path) -> None:
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(folder)
    for text, ours in zip(PROBES, text_tokenizer.passages(PROBES), strict=True):
        theirs = saved(text, truncation=True)["input_ids"]
        if theirs != ours and (theirs or text):  # an empty text without special tokens: nothing there, padding here
            raise RunFailed(
                f"the saved tokenizer turns {text[:40]!r} into {theirs[:8]}..{theirs[-3:]} ({len(theirs)} tokens), "
                f"ours into {ours[:8]}..{ours[-3:]} ({len(ours)} tokens)",
                where=str(folder),
                remedy="this tokenizer can't be exported; report it with the model's name",
            )


def _write_sentence_transformers(encoder: TextEncoder, contract: EncoderContract, folder: Path) -> None:
    modules = ["Transformer", "Pooling"] + ["Normalize"] * contract.normalize
    paths = ["", "1_Pooling", "2_Normalize"]
    # the names that every release of sentence-transformers since 2 knows
    write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{module}"}
            for i, module in enumerate(modules)
        ],
    )
    pooling = {key: mode == contract.pooling for mode, key in POOLING_KEYS.items()}
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": encoder.dimension, **pooling, "include_prompt": True},
    )
    if contract.normalize:
        write_json(folder / "2_Normalize" / "config.json", {})
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": contract.passage_length, "do_lower_case": False}
    )
    prompts = {name: contract.head(prompt) for name, prompt in contract.prompts.items()}
    prompts |= {"query": contract.head(contract.query_prompt()), "document": contract.head(contract.passage_prompt())}
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def model_card(encoder: TextEncoder, contract: EncoderContract, details: Mapping[str, Any]) -> str:
    """README.md of a saved model, in Markdown."""
    facts = {
        "embedding size": encoder.dimension,
        "pooling": contract.pooling,
        "normalised": "yes" if contract.normalize else "no",
        "query length (tokens)": contract.query_length,
        "passage length (tokens)": contract.passage_length,
        "temperature in training": contract.temperature,
        "template of a prompted text": contract.query_template.replace("\n", "\\n"),
    }
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags: [sentence-transformers, feature-extraction, retrieval, tdro]",
        "---",
        "",
        f"# {_cell(details.get('name', 'Text embedding model'))}",
        "",
        "A retriever trained with task-level distributionally robust optimization (arXiv 2408.10613).",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("path/to/this/folder")',
        'query = model.encode_query(["a query"])',
        'passage = model.encode_document(["a passage"])',
        "```",
        "",
        *_section("Encoder", facts),
    ]
    if contract.prompts:
        lines += _section("Prompts", dict(contract.prompts))
    for title, value in details.items():
        if title != "name":
            lines += _section(title.replace("_", " ").capitalize(), value)
    return "\n".join(lines).rstrip() + "\n"


def _section(title: str, value: Any) -> Iterator[str]:
    yield from (f"## {title}", "")
    if isinstance(value, Mapping):
        yield from text_table(["", ""], [[name, item] for name, item in value.items()])
    elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
        header = list(dict.fromkeys(key for row in value for key in row))
        yield from text_table(header, [[row.get(key, "") for key in header] for row in value])
    elif isinstance(value, str) and "\n" in value:
        yield from ("```", value.strip("\n"), "```")
    else:
        yield _cell(value)
    yield ""


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + " --- |" * len(header)
    for row in rows:
        yield "| " + " | ".join(map(_cell, row)) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_cell(item)}" for name, item in value.items())
    return str(value).replace("|", "\\|").replace("\n", " ")
