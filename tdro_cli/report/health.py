"""Data health before any training: what in the training files would quietly cost quality.

One pass over each file, or over a sample of its rows. What is kept of a text is its 64-bit hash, so memory grows by 8
bytes a row and 16 bytes a distinct passage.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tdro_cli.data.formats import Example, FirstSeen, passage_text
from tdro_cli.errors import TdroError

if TYPE_CHECKING:
    from tdro_cli.data.tasks import TaskStore
    from tdro_cli.data.tokenization import TextTokenizer
    from tdro_cli.recipe import LoadedRecipe, Recipe, Task
    from tdro_cli.run.progress import Progress

BATCH_ROWS = 1024
LONGEST = 1 << 20  # of a length histogram; longer texts count as this long
UNLIMITED = 1 << 30  # tokens: a length at which nothing is cut
SCRIPT_CHARACTERS = 1000  # of a passage that are looked at for its script
LANGUAGE_QUERIES, LANGUAGE_CHARACTERS = 128, 300  # of each batch, and of each query, that are looked at
SURE = 0.5  # of a language: below it a text counts as unclear
QUICK_ROWS, LEAST_ROWS = 5000, 50  # that a run looks at before it trains: of all tasks, and of each at least
SHOWN = 8  # warnings that a run prints
FACTS_VERSION = 1  # raise it when the same files would give other facts

# shares from which on a finding is worth a warning
UNKNOWN, TRUNCATED_QUERIES, TRUNCATED_PASSAGES, REPEATED, OVERLAP = 0.05, 0.05, 0.25, 0.02, 0.01
FEW_ROWS = 100


def inspect_recipe(loaded: LoadedRecipe, runs: Path, progress: Progress, *, rows: int | None = None) -> dict[str, Any]:
    """The health of every training file of the recipe, as the files are now (before `mine` and `dedup`).

    `rows`: how many of each task are looked at, evenly spaced; all by default. What a sample can't tell (repetitions,
    overlaps) is None then. Raises Problems for files that can't be read. Shares are from 0 to 1; lengths are {"mean",
    "median", "p95", "max"}.
    """
    from tdro_cli.run.plan import data_warnings

    if not loaded.recipe.tasks:
        raise TdroError("the recipe names no training tasks", where=str(loaded.path), remedy="add `tasks:`")
    facts = _facts(loaded, runs, progress, rows)
    found = [*warnings(loaded.recipe, facts["tasks"], facts["overlaps"])]
    facts["mines"] = loaded.recipe.mine is not None
    return {**facts, "warnings": [*found, *_plain_warnings(data_warnings(loaded.recipe, runs / ".cache"))]}


def quick_inspection(
    loaded: LoadedRecipe, runs: Path, progress: Progress, *, model: Path | None = None
) -> dict[str, Any]:
    """The same from `QUICK_ROWS` rows of all tasks together, kept below `runs` and read again while nothing changes.

    `model`: the folder of a backbone that was made from the tasks; by default where the recipe's own would lie.
    """
    from tdro_cli import artifacts

    recipe = loaded.recipe
    rows = max(LEAST_ROWS, QUICK_ROWS // len(recipe.tasks))
    kept = runs / ".cache" / "inspect" / f"{artifacts.digest_of(_facts_key(loaded, runs, rows, model))[:32]}.json"
    try:
        facts = artifacts.read_json(kept)
    except (OSError, ValueError):
        facts = _facts(loaded, runs, progress, rows, model)
        with suppress(OSError):  # runs that can only be read are looked at anew each time
            artifacts.write_json(kept, facts)
    found = warnings(recipe, facts["tasks"], facts["overlaps"])
    return {**facts, "recipe": recipe.name, "mines": recipe.mine is not None, "warnings": found}


def warn_before_training(loaded: LoadedRecipe, runs: Path, progress: Progress, told: set[str]) -> None:
    """Says what `quick_inspection` warns of, without what is in `told`, and adds it there."""
    health = quick_inspection(loaded, runs, progress)
    new = [f"{warning['task']}: {warning['message']}; {warning['remedy']}" for warning in health["warnings"]]
    new = [words for words in new if words not in told]
    for words in new[:SHOWN]:
        progress.warn(words)
    if new[SHOWN:]:
        progress.warn(f"and {len(new) - SHOWN} more about the data: see `tdro inspect`")
    if new and health["sampled"]:
        progress.note(health["sampled"])
    told.update(new)


def save_figure(health: Mapping[str, Any], runs: Path) -> Path:
    """Writes `inspect.png` and `.svg` into the recipe's folder of runs, in place of earlier ones."""
    from tdro_cli.report import figures

    path = runs / health["recipe"] / "inspect"
    path.parent.mkdir(parents=True, exist_ok=True)
    with figures.drawing():
        figures.save(health_figure(health), path)
    return path.with_suffix(".png")


def _facts_key(loaded: LoadedRecipe, runs: Path, rows: int, model: Path | None) -> dict[str, Any]:
    """All that the facts depend on."""
    from tdro_cli.run.plan import open_tasks

    recipe = loaded.recipe
    stores = open_tasks(recipe, {task.name: task.path for task in recipe.tasks}, runs / ".cache")
    try:
        place: Any = tokenizer_place(loaded, runs, model)[0]
    except TdroError as error:
        place = {"reason": error.message}
    lengths = [recipe.encoder.query_length, recipe.encoder.passage_length]
    tasks = {task.name: [stores[task.name].digest, task.prompt, task.symmetric] for task in recipe.tasks}
    return {"version": FACTS_VERSION, "rows": rows, "tokenizer": place, "lengths": lengths, "tasks": tasks}


def _facts(
    loaded: LoadedRecipe, runs: Path, progress: Progress, rows: int | None, model: Path | None = None
) -> dict[str, Any]:
    from tdro_cli.run.plan import open_tasks

    recipe = loaded.recipe
    stores = open_tasks(recipe, {task.name: task.path for task in recipe.tasks}, runs / ".cache")
    tokenizer, source = tokenizer_of(loaded, runs, model)
    chosen = {name: _spread(len(store), rows) for name, store in stores.items()}
    counts = {name: len(store) if chosen[name] is None else len(chosen[name]) for name, store in stores.items()}
    tasks, queries = {}, {}
    with progress.start("look at the data", sum(counts.values()), "rows") as bar:
        for task in recipe.tasks:
            store, health = stores[task.name], TaskHealth(task, tokenizer)
            for batch in batches(store) if chosen[task.name] is None else picked(store, chosen[task.name]):
                health.note(batch)
                bar.advance(len(batch))
            queries[task.name] = np.unique(np.concatenate(health.query_ids))
            tasks[task.name] = health.summary(store, whole=chosen[task.name] is None)
    sampled = [name for name in chosen if chosen[name] is not None]
    return {
        "recipe": recipe.name,
        "tokenizer": source,
        "unit": "characters" if tokenizer is None else "tokens",
        "lengths": {"queries": recipe.encoder.query_length, "passages": recipe.encoder.passage_length},
        "digests": {name: store.digest for name, store in stores.items()},
        "sampled": (sampled and _sampled_words(sampled, counts, stores)) or None,
        "tasks": tasks,
        "overlaps": list(_overlaps({name: ids for name, ids in queries.items() if name not in sampled})),
    }


def _sampled_words(sampled: Sequence[str], counts: Mapping[str, int], stores: Mapping[str, TaskStore]) -> str:
    some, all_rows = sum(counts[name] for name in sampled), sum(len(stores[name]) for name in sampled)
    which = f"{len(sampled)} of {len(stores)} tasks" if len(sampled) < len(stores) else "all tasks"
    return (
        f"Looked at {some:,} of the {all_rows:,} rows of {which}, evenly spaced; repetitions and overlaps show in all "
        "rows only: `tdro inspect` reads them."
    )


def _spread(count: int, rows: int | None) -> np.ndarray | None:
    """Evenly spaced row numbers; None for all of them."""
    return None if rows is None or count <= rows else np.linspace(0, count - 1, rows).astype(np.int64)


def batches(store: Iterable[Example]) -> Iterator[list[Example]]:
    rows = iter(store)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield batch


def picked(store: TaskStore, rows: np.ndarray) -> Iterator[list[Example]]:
    for start in range(0, len(rows), BATCH_ROWS):
        yield store.examples(rows[start : start + BATCH_ROWS])


# ---- the recipe's tokenizer ----


def tokenizer_of(
    loaded: LoadedRecipe, runs: Path, model: Path | None = None
) -> tuple[TextTokenizer | None, dict[str, Any]]:
    """The tokenizer of the recipe's backbone if it can be had without a network, and where it is from or why not."""
    from tdro_cli.data.tokenization import TextTokenizer
    from tdro_cli.model.contract import EncoderContract

    recipe = loaded.recipe
    try:
        folder, tokenizer = _load_tokenizer(loaded, runs, model)
        section = recipe.encoder
        contract = EncoderContract(query_length=section.query_length, passage_length=section.passage_length)
        return TextTokenizer(tokenizer, contract), {"source": folder, "reason": None, "vocabulary": len(tokenizer)}
    except TdroError as error:
        return None, {"source": None, "reason": error.message, "vocabulary": None}
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return None, {"source": None, "reason": reason, "vocabulary": None}


def tokenizer_place(loaded: LoadedRecipe, runs: Path, model: Path | None = None) -> tuple[str, Any]:
    """Where the backbone's tokenizer lies on this machine, and the plugin that loads it. Imports nothing heavy.

    Raises TdroError if it is not here, or not made yet.
    """
    from tdro_cli import artifacts, registry
    from tdro_cli.builtin.backbones import Auto
    from tdro_cli.run.plan import is_prepared, make_plans

    recipe = loaded.recipe
    if recipe.backbone is None:
        raise TdroError("the recipe names no backbone")
    plugin = registry.resolve("backbones", recipe.backbone.name, recipe.backbone.options)
    if model is not None:
        return str(model), plugin
    if is_prepared(recipe):
        out = make_plans(loaded, runs, needed=["backbone"])["backbone"].out
        if not artifacts.is_complete(out):
            raise TdroError(f"the backbone {recipe.backbone.name!r} is made from the tasks, and has not been made yet")
        return str(out / "model"), plugin
    if isinstance(plugin, Auto):
        return _local_copy(recipe.backbone.source, plugin.revision), plugin
    if Path(recipe.backbone.source).is_dir():
        return recipe.backbone.source, plugin
    raise TdroError(f"the backbone {recipe.backbone.name!r} may need the network for {recipe.backbone.source}")


def _load_tokenizer(loaded: LoadedRecipe, runs: Path, model: Path | None) -> tuple[str, Any]:
    from tdro_cli.builtin.backbones import Auto, quiet_transformers
    from tdro_cli.run.plan import is_prepared

    folder, plugin = tokenizer_place(loaded, runs, model)
    if not isinstance(plugin, Auto) and not is_prepared(loaded.recipe):
        return folder, plugin.load(folder).tokenizer  # a stranger's plugin may bring a tokenizer of its own
    from transformers import AutoTokenizer

    options = {"trust_remote_code": plugin.trust_remote_code} if isinstance(plugin, Auto) else {}
    with quiet_transformers():
        return folder, AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)


def _local_copy(source: str, revision: str | None) -> str:
    """The folder of a model that is on this machine. Raises TdroError if the hub would have to be asked."""
    if Path(source).expanduser().is_dir():
        return str(Path(source).expanduser())
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return snapshot_download(source, revision=revision, local_files_only=True, allow_patterns=["*token*", "*.json"])
    except (LocalEntryNotFoundError, HFValidationError):
        raise TdroError(f"the model {source} is not on this machine") from None


# ---- one task ----


@dataclass
class Lengths:
    """A histogram of lengths, and the share above a limit."""

    counts: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))
    cut: int = 0

    def note(self, lengths: Sequence[int], limit: int | None = None) -> None:
        if not len(lengths):
            return
        length_N = np.minimum(np.asarray(lengths, np.int64), LONGEST)
        new = np.bincount(length_N, minlength=len(self.counts))
        new[: len(self.counts)] += self.counts
        self.counts = new
        self.cut += int((length_N > limit).sum()) if limit is not None else 0

    def summary(self) -> dict[str, float] | None:
        total = int(self.counts.sum())
        if not total:
            return None
        below = np.cumsum(self.counts)
        return {
            "mean": float(self.counts @ np.arange(len(self.counts))) / total,
            "median": int(np.searchsorted(below, total / 2)),
            "p95": int(np.searchsorted(below, 0.95 * total)),
            "max": len(self.counts) - 1,
        }

    @property
    def cut_share(self) -> float | None:
        total = int(self.counts.sum())
        return self.cut / total if total else None


@dataclass
class _Side:
    """Queries, or passages: their lengths, unknown tokens and scripts."""

    characters: Lengths = field(default_factory=Lengths)
    tokens: Lengths = field(default_factory=Lengths)
    text_tokens: int = 0
    unknown: int = 0
    letters: Counter[str] = field(default_factory=Counter)

    def summary(self, knows_tokens: bool, knows_unknown: bool) -> dict[str, Any]:
        return {
            "characters": self.characters.summary(),
            "tokens": self.tokens.summary() if knows_tokens else None,
            "truncated": self.tokens.cut_share if knows_tokens else None,
            "unknown": self.unknown / max(1, self.text_tokens) if knows_unknown else None,
            "scripts": scripts(self.letters),
        }


class TaskHealth:
    """What one pass over a task's rows tells. Without a tokenizer, nothing about tokens."""

    def __init__(self, task: Task, tokenizer: TextTokenizer | None):
        self.task, self.tokenizer = task, tokenizer
        self.queries, self.passages = _Side(), _Side()
        self.query_ids: list[np.ndarray] = []
        self.texts, self.positives = FirstSeen(), FirstSeen()
        self.rows = self.without_negatives = self.shared_positives = self.query_is_positive = 0
        self.same_text = self.same_tokens = 0
        self.negatives = Lengths()
        self.languages: Counter[str] = Counter()
        self.prompt_fault: str | None = None
        if tokenizer is not None:
            contract, inner = tokenizer.contract, tokenizer.tokenizer
            self.query_limit, self.passage_limit = contract.query_length, contract.passage_length
            whole = replace(contract, query_length=UNLIMITED, passage_length=UNLIMITED)
            self.whole = type(tokenizer)(inner, whole)
            self.special = len(tokenizer.prefix_ids) + len(tokenizer.suffix_ids)
            self.unknown_id = inner.unk_token_id if inner.unk_token_id not in self._around() else None
            try:
                tokenizer.queries(["a"], task.prompt)
            except ValueError as error:
                self.prompt_fault = str(error)

    def _around(self) -> set[int]:
        """Ids that stand in every text, and so can't count as unknown (GPT-2's one special token is all of them)."""
        return {*self.tokenizer.prefix_ids, *self.tokenizer.suffix_ids}

    def note(self, batch: Sequence[Example]) -> None:
        from tdro_cli.data.collation import text_id

        self.rows += len(batch)
        self.negatives.note([len(example.negatives) for example in batch])
        self.without_negatives += sum(not example.negatives for example in batch)
        query_ids = np.array([text_id(_loosely(example.query)) for example in batch], np.int64)
        self.query_ids.append(query_ids)
        words = [
            ([passage_text(p) for p in example.positives], [passage_text(p) for p in example.negatives])
            for example in batch
        ]
        flat = [text for positives, negatives in words for text in (*positives, *negatives)]
        self.texts.note([text_id(text) for text in flat], np.zeros(len(flat), np.int64))
        firsts = [text_id(positives[0]) for positives, _ in words]
        self.shared_positives += int((~self.positives.note(firsts, np.zeros(len(firsts), np.int64))[0]).sum())
        for example, (positives, negatives) in zip(batch, words, strict=True):
            self.same_text += not set(positives).isdisjoint(negatives)
            self.query_is_positive += example.query.strip() in positives
        self.queries.characters.note([len(example.query) for example in batch])
        self.passages.characters.note([len(text) for text in flat])
        self.queries.letters.update("".join(example.query for example in batch))
        step = max(1, len(batch) // LANGUAGE_QUERIES)
        self.languages.update(language_of(example.query) for example in batch[::step])
        self.passages.letters.update("".join(positives[0][:SCRIPT_CHARACTERS] for positives, _ in words))
        if self.tokenizer is not None:
            self._note_tokens([example.query for example in batch], words)

    def _note_tokens(self, queries: list[str], words: list[tuple[list[str], list[str]]]) -> None:
        prompt = self.task.prompt
        plain = self.whole.queries(queries)
        prompted = self.whole.queries(queries, prompt) if prompt else plain
        self._count_unknown(self.queries, plain)
        self.queries.tokens.note([len(tokens) for tokens in prompted], self.query_limit)
        distinct = list(dict.fromkeys(text for positives, negatives in words for text in (*positives, *negatives)))
        encoded = dict(zip(distinct, self.whole.passages(distinct), strict=True))
        occurring = [encoded[text] for positives, negatives in words for text in (*positives, *negatives)]
        self._count_unknown(self.passages, occurring)
        lengths = [len(tokens) for tokens in occurring]
        # the prompt of a symmetric task goes before its passages, too
        head = len(self.whole.passages([""], prompt)[0]) - self.special if self.task.symmetric and prompt else 0
        self.passages.tokens.note([length + head for length in lengths], self.passage_limit)
        room = self.passage_limit - self.special - head
        for positives, negatives in words:
            mine = {self._body(encoded[text], room) for text in positives}
            self.same_tokens += any(self._body(encoded[text], room) in mine for text in negatives)

    def _body(self, tokens: list[int], room: int) -> tuple[int, ...]:
        """What the model sees of a passage, without the special tokens around it."""
        start = len(self.tokenizer.prefix_ids)
        return tuple(tokens[start : min(start + room, len(tokens) - len(self.tokenizer.suffix_ids))])

    def _count_unknown(self, side: _Side, token_lists: Sequence[Sequence[int]]) -> None:
        side.text_tokens += sum(len(tokens) - self.special for tokens in token_lists)
        if self.unknown_id is not None:
            side.unknown += sum(tokens.count(self.unknown_id) for tokens in token_lists)

    def summary(self, store: TaskStore, *, whole: bool) -> dict[str, Any]:
        """`whole`: whether all rows were noted. A sample does not tell what is repeated."""
        knows, distinct = self.tokenizer is not None, len(np.unique(np.concatenate(self.query_ids)))
        knows_unknown = knows and self.unknown_id is not None
        docids, rows = store.facts["distinct_passages"], self.rows
        return {
            "rows": len(store),
            "rows_looked_at": rows,
            "languages": {name: n / self.languages.total() for name, n in self.languages.most_common()},
            "queries": self.queries.summary(knows, knows_unknown),
            "passages": self.passages.summary(knows, knows_unknown),
            "distinct_passages": len(self.texts) if whole else None,
            "repeated_passages": max(0, docids - len(self.texts)) / docids if whole else None,
            "repeated_queries": (rows - distinct) / rows if whole else None,
            "shared_positives": self.shared_positives / rows if whole else None,
            "query_is_positive": self.query_is_positive / rows,
            "negatives_per_row": self.negatives.summary(),
            "without_negatives": self.without_negatives / rows,
            "negative_equals_positive_text": self.same_text / rows,
            "negative_equals_positive_tokens": self.same_tokens / rows if knows else None,
            "prompt_fault": self.prompt_fault,
        }


def _loosely(text: str) -> str:
    """Equal for texts that differ in case and white space only."""
    return " ".join(text.casefold().split())


def _overlaps(queries: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """Pairs of tasks with equal queries, the most first; `share` is of the smaller one's distinct queries."""
    names = list(queries)
    found: list[dict[str, Any]] = []
    for i, a in enumerate(names):
        for b in names[i + 1 :]:
            equal = len(np.intersect1d(queries[a], queries[b], assume_unique=True))
            if equal:
                found.append(
                    {"tasks": [a, b], "queries": equal, "share": equal / min(map(len, (queries[a], queries[b])))}
                )
    yield from sorted(found, key=lambda pair: -pair["queries"])


# ---- scripts ----


def scripts(characters: Mapping[str, int]) -> dict[str, float]:
    """Shares of the letters by Unicode script, the largest first; what is no letter is left out."""
    counts: Counter[str] = Counter()
    for character, count in characters.items():
        script = script_of(character)
        if script:
            counts[script] += count
    total = counts.total()
    return {script: count / total for script, count in counts.most_common()}


@lru_cache(maxsize=1 << 16)
def script_of(character: str) -> str | None:
    """'Latin', 'Han', 'Hiragana' ...: the first word of a letter's Unicode name; None for what is no letter."""
    if not character.isalpha():
        return None
    name = unicodedata.name(character, "OTHER")
    if name.startswith(("CJK", "IDEOGRAPHIC")):
        return "Han"
    first = name.split()[0]
    if first in ("HALFWIDTH", "FULLWIDTH", "MODIFIER", "MATHEMATICAL"):
        return next((word.title() for word in name.split() if word in ("KATAKANA", "HANGUL", "LATIN")), "Other")
    return first.split("-")[0].title()


# ---- languages ----


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_pickled_model(MODEL_FILE)  # of the installed package


def language_of(text: str) -> str:
    """The ISO 639-1 code of a text's language, out of 97; `unclear` for none above an even chance.

    Marco Lui and Timothy Baldwin's langid model (ACL 2012). A text of a few words is often unclear or wrong: meaningful
    are the shares over many.
    """
    model = _identifier()
    count_F = model.instance2fv(text[:LANGUAGE_CHARACTERS])
    seen = np.flatnonzero(count_F)  # a text has few of the 7,480 features: 100 times faster than the whole product
    log_L = count_F[seen].astype(np.float64) @ model.nb_ptc[seen] + model.nb_pc
    best = int(np.argmax(log_L))
    sure = len(seen) and 1 / np.exp(log_L - log_L[best]).sum() >= SURE
    return model.nb_classes[best] if sure else "unclear"


# ---- warnings ----


def warnings(recipe: Recipe, tasks: Mapping[str, Any], overlaps: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What should be mended before training: {"task", "message", "remedy"}."""
    found = [
        {"task": name, "message": message, "remedy": remedy}
        for name, facts in tasks.items()
        for message, remedy in _task_warnings(recipe, facts)
    ]
    dedups = recipe.dedup is not None and recipe.dedup.within == "all"
    for pair in overlaps:
        if pair["share"] >= OVERLAP and not dedups:
            a, b = pair["tasks"]
            message = f"{pair['queries']:,} queries are in {b}, too ({_percent(pair['share'])} of the smaller task)"
            found.append({"task": a, "message": message, "remedy": "add `dedup: {within: all}`, or drop one of them"})
    return found


def _task_warnings(recipe: Recipe, facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    queries, passages = facts["queries"], facts["passages"]
    if facts["prompt_fault"]:
        yield facts["prompt_fault"], "shorten the task's prompt, or raise encoder.query_length"
    if facts["rows"] < FEW_ROWS:
        held = round(recipe.train_ref.hold_out * facts["rows"])
        measured = f", of which about {held} are held out to measure on" if held else ""
        remedy = "add rows, or join it with a task like it: its weight will be noisy"
        yield f"only {facts['rows']} rows{measured}", remedy
    for side, share in (("query", queries["unknown"]), ("passage", passages["unknown"])):
        if share is not None and share >= UNKNOWN:
            side_scripts = queries if side == "query" else passages
            main = next(iter(side_scripts["scripts"]), "this")
            yield (
                f"{_percent(share)} of the {side} tokens are unknown to the tokenizer",
                f"choose a backbone whose vocabulary covers {main} script, or leave the task out",
            )
    for key, side, limit in (("query", queries, TRUNCATED_QUERIES), ("passage", passages, TRUNCATED_PASSAGES)):
        if side["truncated"] is not None and side["truncated"] >= limit:
            length = getattr(recipe.encoder, f"{key}_length")
            yield (
                f"{_percent(side['truncated'])} of the {key} texts are cut at {length} tokens",
                f"encoder.{key}_length: {side['tokens']['p95']} would keep 95 % whole",
            )
    if facts["without_negatives"] and recipe.mine is None:
        rows = (
            "no row has" if facts["without_negatives"] == 1 else f"{_percent(facts['without_negatives'])} of rows lack"
        )
        yield f"{rows} a hard negative, and learn-weights measures on rows that have one", "add a `mine:` section"
    text, tokens = facts["negative_equals_positive_text"], facts["negative_equals_positive_tokens"]
    if text:
        yield f"{_percent(text)} of rows have a negative whose text is a positive's", "take these negatives out"
    if tokens is not None and tokens - text >= 0.001:
        yield (
            f"{_percent(tokens)} of rows have a negative that the tokenizer turns into the same tokens as a positive",
            "no model can tell them apart: choose a backbone that knows the script, or raise encoder.passage_length",
        )
    if (facts["repeated_queries"] or 0) >= REPEATED and not (recipe.dedup and recipe.dedup.within != "none"):
        yield (
            f"{_percent(facts['repeated_queries'])} of rows repeat an earlier query (case and white space aside)",
            "join them into one row with several positives, or add `dedup: {within: task}`",
        )
    if (facts["repeated_passages"] or 0) >= REPEATED:
        yield (
            f"{_percent(facts['repeated_passages'])} of passages repeat the text of another docid",
            "give equal passages one docid: mining takes the copies for negatives",
        )
    if facts["query_is_positive"] >= REPEATED:
        yield (
            f"{_percent(facts['query_is_positive'])} of rows have the query as its own positive",
            "take these rows out",
        )


def _plain_warnings(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        task, _, message = line.removeprefix("task ").partition(": ")
        yield {"task": task, "message": message, "remedy": "mend the file"}


def _percent(share: float | None) -> str:
    if share is None:
        return "-"
    return f"{share:.0%}".replace("%", " %") if share >= 0.1 or not share else f"{100 * share:.2g} %"


# ---- on a terminal ----


def print_health(health: Mapping[str, Any]) -> None:
    from tdro_cli.report.tables import terminal, text_table

    console, source = terminal(), health["tokenizer"]
    knows = source["reason"] is None
    unit = "tokens" if knows else "characters"

    def lengths(side: Mapping[str, Any]) -> str:
        told = side[unit]
        return f"{told['mean']:.0f} / {told['p95']}"

    rows = []
    for name, task in health["tasks"].items():
        queries, passages = task["queries"], task["passages"]
        rows.append([name, f"{task['rows']:,}", lengths(queries), lengths(passages)])
        if knows:
            rows[-1] += [_percent(queries["truncated"]), _percent(passages["truncated"])]
            rows[-1] += [_percent(queries["unknown"]), _percent(passages["unknown"])]
        rows[-1] += [
            f"{task['negatives_per_row']['mean']:.1f}",
            _percent(task["without_negatives"]),
            _percent(task["negative_equals_positive_text"]),
            *([_percent(task["negative_equals_positive_tokens"])] if knows else []),
            _percent(task["repeated_queries"]),
            _percent(task["repeated_passages"]),
        ]
    token_columns = ["q. cut", "p. cut", "q. unk.", "p. unk."] if knows else []
    columns = ["task", "rows", "query", "passage", *token_columns, "neg.", "without", "= text"]
    columns += [*(["= tokens"] if knows else []), "q. rep.", "p. rep."]
    console.print(text_table(f"Training data of {health['recipe']}", columns, rows))
    console.print(
        f"  query, passage: {unit}, mean / 95 % are shorter; cut: at the recipe's lengths; unk.: unknown tokens"
    )
    console.print("  neg.: negatives a row; without: rows without any; =: rows with a negative equal to a positive")
    console.print("  rep.: queries that repeat an earlier one, passages that repeat the text of another docid")
    told = f"tokenizer: {source['source']}, {source['vocabulary']:,} tokens" if knows else "no lengths in tokens: "
    console.print(f"  {told}{source['reason'] or ''}\n", soft_wrap=True)
    rows = [
        [name, _mix(task["languages"]), _mix(task["queries"]["scripts"]), _mix(task["passages"]["scripts"])]
        for name, task in health["tasks"].items()
    ]
    columns = ["task", "languages of queries", "scripts of queries", "scripts of passages"]
    table = text_table("Languages, and scripts by letters", columns, rows)
    for column in table.columns:
        column.justify, column.overflow = "left", "fold"
    console.print(table)
    if health["overlaps"]:
        rows = [[" and ".join(p["tasks"]), f"{p['queries']:,}", _percent(p["share"])] for p in health["overlaps"][:20]]
        console.print(text_table("Equal queries in two tasks", ["tasks", "queries", "of the smaller"], rows))
    if health["sampled"]:
        console.print(f"  {health['sampled']}")
    if "figure" in health:
        console.print(f"  figure: {health['figure']}", soft_wrap=True)
    for warning in health["warnings"]:
        console.print(f"warning: {warning['task']}: {warning['message']}", style="yellow", soft_wrap=True)
        console.print(f"  {warning['remedy']}", soft_wrap=True)
    if not health["warnings"]:
        console.print("  nothing to warn of")


def _mix(shares: Mapping[str, float]) -> str:
    shown = [f"{script} {_percent(share)}" for script, share in list(shares.items())[:3] if share >= 0.01]
    more = len(shares) - len(shown)
    return ", ".join(shown) + (f", {more} more" if more else "") if shown else "-"


# ---- the figure ----


def health_figure(health: Mapping[str, Any]) -> Any:
    """Lengths, languages and faults of every task beside each other; made inside `figures.drawing()`."""
    from tdro_cli.report import figures

    return figures.data_health(list(health_parts(health).values()), list(health["tasks"]))


def health_parts(health: Mapping[str, Any]) -> dict[str, Callable[[Any], None]]:
    """The parts of the figure: each draws into the axes that it is given."""
    from tdro_cli.report import figures

    tasks, unit = health["tasks"], health["unit"]
    lengths = {
        name: {side: [task[side][unit]["median"], task[side][unit]["p95"]] for side in ("queries", "passages")}
        for name, task in tasks.items()
    }
    limits = health["lengths"] if unit == "tokens" else {}
    shares = {words: [_value(task, path) for task in tasks.values()] for words, path in FAULTS.items()}
    found = {words: by_task for words, by_task in shares.items() if any(by_task)}
    if health["mines"]:
        found.pop("no negatives", None)
    parts = {
        "lengths": partial(figures.lengths, lengths, unit, limits),
        "languages": partial(figures.languages, {name: task["languages"] for name, task in tasks.items()}),
    }
    return {**parts, **({"faults": partial(figures.faults, found)} if found else {})}


FAULTS = {  # what the figure's third part shows: words, and where the share stands
    "query tokens unknown": ("queries", "unknown"),
    "passage tokens unknown": ("passages", "unknown"),
    "queries cut": ("queries", "truncated"),
    "passages cut": ("passages", "truncated"),
    "negative = positive": ("negative_equals_positive_tokens",),
    "queries repeated": ("repeated_queries",),
    "no negatives": ("without_negatives",),
}


def _value(task: Any, path: Sequence[str]) -> float | None:
    for key in path:
        task = task[key]
    return task
