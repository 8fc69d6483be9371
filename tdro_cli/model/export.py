"""Saved models that sentence-transformers, transformers, peft and this package all read alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tdro_cli.artifacts import digest_of, manifest_of, publishing, read_json, write_json, write_text
from tdro_cli.builtin.backbones import quiet_transformers
from tdro_cli.data.tokenization import TextTokenizer, ending_in_template
from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.model.card import measures_of, model_card, training_details
from tdro_cli.model.contract import CONTRACT_FILE, EncoderContract
from tdro_cli.model.embedding import POOLING_KEYS, load_embedder, model_folder
from tdro_cli.model.encoder import TextEncoder
from tdro_cli.run.plan import Plan

ADAPTER_FOLDER = "adapter"
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


# ---- tdro export ----


def export_model(
    source: str | Path,
    folder: Path,
    *,
    dtype: str = "float32",
    query_prompt: str | None = None,
    revision: str | None = None,
    surroundings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the model of a run, a folder or a hub name into the new `folder`, LoRA merged in: what it is made of.

    `dtype`: of the saved weights. `query_prompt`: the default prompt of queries, a task's name or the prompt itself.
    The card is written anew, with the measures of the newest evaluation of the run. `surroundings` go to the manifest.
    Raises TdroError if `folder` exists.
    """
    _require_new(folder)
    embedder = load_embedder(source, device="cpu", revision=revision)
    contract = embedder.contract
    if query_prompt is not None:
        prompt = contract.prompts.get(query_prompt, query_prompt)
        contract = replace(contract, prompts={**contract.prompts, "query": prompt})
    run = _run_of(model_folder(source))
    numbers = {"stage": "export", "model": embedder.digest, "dtype": dtype, "prompts": dict(contract.prompts)}
    made_of = {
        "schema": 1,
        "stage": "export",
        "digest": digest_of(numbers),
        "numbers": numbers,
        "inputs": {run.stage: run.digest} if run else {},
        **(surroundings or {}),
    }
    embedder.encoder.backbone.to(getattr(torch, dtype))
    with publishing(folder, lambda: made_of) as aside:
        details = _details(run) if run else {"name": Path(source).name}
        save_model(embedder.encoder, embedder.tokenizer.tokenizer, contract, aside, details=details)
    return made_of


def _require_new(folder: Path) -> None:
    if folder.is_symlink() or folder.exists():
        raise TdroError(f"{folder} exists", remedy="name a new folder: nothing is written over")


def _run_of(model: str | Path) -> Plan | None:
    """The plan of the run that published this model; None for a model from elsewhere."""
    out = Path(model).resolve().parent
    if not (out / "training.json").is_file() or not (out.parent / "plan.json").is_file():
        return None
    return replace(Plan.read(out.parent / "plan.json"), folder=str(out.parent))


def _details(run: Plan) -> dict[str, Any]:
    return training_details(
        run.settings(),
        run.stage,
        read_json(run.out / "training.json"),
        manifest=manifest_of(run.out),
        measures=measures_of(Path(run.folder), run.stage, run.digest),
    )


def merged_state(backbone: Any, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the bare model with W + scaling · B A in the place of each adapted W. arXiv 2106.09685, section 4.

    `state` has the names of `backbone.state_dict()`, `backbone` is wrapped by peft. Nothing is changed in place.
    Raises TdroError for an adapter that is not plain LoRA on linear layers.
    """
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
    # releases before 6 know one length only and refuse these keys: written where the two sides differ, as theirs are
    apart = contract.query_length != contract.passage_length
    lengths = {"query_length": contract.query_length, "document_length": contract.passage_length} if apart else {}
    write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": contract.passage_length, "do_lower_case": False, **lengths},
    )
    prompts = {name: contract.head(prompt) for name, prompt in contract.prompts.items()}
    prompts |= {"query": contract.head(contract.query_prompt()), "document": contract.head(contract.passage_prompt())}
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
