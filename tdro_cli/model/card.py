"""The model card: what a saved model is, what it was trained on, how well it does, where it comes from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from tdro_cli.artifacts import read_json
from tdro_cli.model.contract import EncoderContract
from tdro_cli.model.encoder import TextEncoder
from tdro_cli.recipe import Recipe

LICENCE = (
    "None is given here: it is for whoever publishes this model to choose one, within those of the base model and of "
    "the training data."
)
METHOD = "A retriever trained with tdro: task-level distributionally robust optimization (arXiv 2408.10613)."


def model_card(encoder: TextEncoder, contract: EncoderContract, details: Mapping[str, Any]) -> str:
    """README.md of a saved model, in Markdown.

    `details` are its further sections, a key each: text, a table of {name: value}, or a table of a list of equal dicts.
    `name` is the title, `base_model` goes into the head that hubs read.
    """
    facts = {
        "embedding size": encoder.dimension,
        "pooling": contract.pooling,
        "normalised": "yes" if contract.normalize else "no",
        "query length (tokens)": contract.query_length,
        "passage length (tokens)": contract.passage_length,
        "temperature in training": contract.temperature,
        "template of a prompted text": contract.query_template.replace("\n", "\\n"),
    }
    base = details.get("base_model")
    lines = [
        "---",
        "library_name: sentence-transformers",
        "pipeline_tag: sentence-similarity",
        "tags: [sentence-transformers, feature-extraction, retrieval, tdro]",
        *([f"base_model: {base}"] if base else []),
        "---",
        "",
        f"# {_cell(details.get('name', 'Text embedding model'))}",
        "",
        METHOD if "recipe" in details else "An embedding model, saved by tdro; trained elsewhere.",
        "",
        *_usage(contract),
        *_section("Encoder", facts),
    ]
    if contract.prompts:
        lines += _section("Prompts", dict(contract.prompts))
    for title, value in details.items():
        if title not in ("name", "base_model"):
            lines += _section(title.replace("_", " ").capitalize(), value)
    lines += _section("Licence", LICENCE)
    return "\n".join(lines).rstrip() + "\n"


def _usage(contract: EncoderContract) -> Iterator[str]:
    task = next((name for name in contract.prompts if name not in ("query", "document")), None)
    named = task if task and not contract.query_prompt() else None
    ask = f'model.encode_query(["a query"], prompt_name="{named}")' if named else 'model.encode_query(["a query"])'
    yield from ("```python", "from sentence_transformers import SentenceTransformer", "")
    yield 'model = SentenceTransformer("path/to/this/folder")'
    yield f"query = {ask}"
    yield from ('passage = model.encode_document(["a passage"])', "```", "")


def training_details(
    recipe: Recipe, stage: str, done: Mapping[str, Any], *, manifest: Mapping[str, Any], measures: Mapping[str, Any]
) -> dict[str, Any]:
    """What a card says of a trained model.

    `done` is the content of training.json, `manifest` that of the stage's output (or what it will be), `measures` that
    of measures.json where the model has been evaluated, else empty.
    """
    section = getattr(recipe, stage.replace("-", "_"))
    source = recipe.backbone.source if recipe.backbone else None
    details: dict[str, Any] = {"name": f"{recipe.name}, {stage}", "data": list(_data(done))}
    if source and not _is_place(source):
        details["base_model"] = source
    if measures:
        details["measures"] = list(_measures(measures))
    details["training"] = {
        "steps": done["steps"],
        "queries a step": section.batch.queries,
        "passages a query": section.batch.passages_per_query,
        "peak learning rate": section.optimizer.learning_rate,
        "trained": f"LoRA of rank {recipe.lora.r}" if recipe.lora else "all parameters",
        "tokens seen": done["tokens"],
        "seconds": round(done["seconds"]),
    }
    details["provenance"] = {
        "digest": manifest["digest"],
        **{f"from {name}": digest for name, digest in manifest["inputs"].items()},
        "commit of tdro": manifest.get("commit") or "not a source tree",
        "devices": ", ".join(manifest.get("devices", ())),
        **manifest["versions"],
    }
    details["recipe"] = recipe_text(recipe)
    return details


def _data(done: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for name, seen in done["queries_seen"].items():
        row: dict[str, Any] = {"task": name, "rows": done["rows"][name]}
        for key, title in (("weights", "weight"), ("probabilities", "probability"), ("loss_weights", "loss weight")):
            if name in done.get(key, {}):
                row[title] = done[key][name]
        yield {**row, "queries seen": seen, "epochs": done["epochs"][name]}


def _measures(measures: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for collection, values in measures["results"].items():
        yield {"collection": collection, **values}
    average = {name: value for name, value in measures["average"].items() if isinstance(value, float)}
    if average and len(measures["results"]) > 1:
        yield {"collection": "average", **average}


def recipe_text(recipe: Recipe) -> str:
    """The recipe as YAML with every override in it, defaults and the folders of files left out."""
    import yaml

    values = recipe.model_dump(mode="json", exclude_defaults=True)
    return yaml.safe_dump(_without_places(values), sort_keys=False, allow_unicode=True, width=100)


def _without_places(value: Any) -> Any:
    """Where files lie on the machine of the training is nobody's business, and of no use elsewhere."""
    if isinstance(value, Mapping):
        return {key: _without_places(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_places(item) for item in value]
    return PurePath(value).name if isinstance(value, str) and _is_place(value) else value


def _is_place(source: str) -> bool:
    return source.startswith(("/", "~", "./", "../")) or ("/" in source and Path(source).exists())


def measures_of(run: Path, stage: str, digest: str) -> dict[str, Any]:
    """What the newest evaluation beside a run says of the model that the run published; {} where there is none."""
    found: list[tuple[str, dict[str, Any]]] = []
    for out in run.parent.glob("eval-*/out"):
        try:
            manifest = read_json(out / "manifest.json")
            measures = read_json(out / stage.replace("-", "_") / "measures.json")
        except (OSError, ValueError):
            continue  # not complete, or of other models
        if manifest.get("inputs", {}).get(stage) == digest:
            found.append((manifest.get("published", ""), measures))
    return max(found, key=lambda item: item[0])[1] if found else {}


# ---- Markdown ----


def _section(title: str, value: Any) -> Iterator[str]:
    yield from (f"## {title}", "")
    if isinstance(value, Mapping):
        yield from _table(["", ""], [[name, item] for name, item in value.items()])
    elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
        header = list(dict.fromkeys(key for row in value for key in row))
        yield from _table(header, [[row.get(key, "") for key in header] for row in value])
    elif isinstance(value, str) and "\n" in value:
        yield from ("```yaml", value.strip("\n"), "```")
    else:
        yield _cell(value)
    yield ""


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
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
