"""The recipe: one YAML file describes everything that changes the numbers."""

from __future__ import annotations

import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tdro_cli import registry
from tdro_cli.errors import Problems, TdroError, did_you_mean

Place = tuple[str | int, ...]  # a key path: ("tasks", 0, "path")

NAME = r"^\w[\w.+-]*$"  # of files and folders, too
NAME_BYTES = 200  # file systems take 255, and endings are put behind it
SECRET = re.compile(r"(^|_)(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|CREDENTIALS?)(_|$)", re.I)
# No machine gets near them. They tell a slip of the hand from a size, before anything is allocated.
MOST_STEPS, MOST_QUERIES, MOST_TOKENS, MOST_RANK = 10**9, 10**6, 10**6, 10**6

# marks a key that says how or where to run: it changes no result beyond rounding
EXECUTION: dict[str, Any] = {"execution": True}


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    def numbers(self) -> dict[str, Any]:
        """The section as plain values, without the keys that change no result: what a digest covers."""
        values = {}
        for name, field in type(self).model_fields.items():
            if field.json_schema_extra != EXECUTION:
                values[name] = _plain(getattr(self, name))
        return values


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.numbers()
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


class PluginChoice(Section):
    """A plugin by name, with its options. A bare name stands for {name: NAME}."""

    name: str
    """name of an installed plugin: see `tdro plugins`"""
    options: dict[str, Any] = {}
    """the plugin's own options"""


def _plugin(kind: str, default: str | None = None) -> Any:
    """The annotated type of a plugin choice of `kind`; without a name it is `default`."""
    widen = BeforeValidator(lambda value: _choice(value, default))
    return Annotated[PluginChoice, widen, Field(json_schema_extra={"plugin_kind": kind, "plugin_default": default})]


def _choice(value: Any, default: str | None) -> Any:
    """A bare string is a name; a mapping without a name takes the default one."""
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, dict) and default is not None:
        return {"name": default, **value}
    return value


def _short_enough(name: str) -> str:
    if (size := len(name.encode())) > NAME_BYTES:
        raise ValueError(f"the name {name[:20]!r}... has {size} bytes, and a file name has room for {NAME_BYTES}")
    return name


Name = Annotated[str, Field(pattern=NAME, max_length=NAME_BYTES), AfterValidator(_short_enough)]


class Task(Section):
    """One training set."""

    name: Name
    """unique; letters, digits, `_`, and after the first `.`, `+`, `-`"""
    path: str
    """JSONL (plain, .gz, .zst) or Parquet; relative to the working directory"""
    prompt: str = ""
    """the instruction put before each query: `Instruct: {prompt}\\nQuery: {query}`; none when empty"""
    symmetric: bool = False
    """query and passage are the same kind of text: the prompt goes before passages, too"""
    in_batch_negatives: bool = True
    """whether other rows' passages are negatives; false for classification-like tasks"""


class Backbone(Section):
    name: str = "auto"
    """a backbone plugin"""
    source: str | None = None
    """a local folder or a Hugging Face name; `scratch` needs none"""
    options: dict[str, Any] = {}
    """the plugin's own options, for instance `revision` of `auto`"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """of the matrix products: bfloat16 runs under autocast; weights, similarities and losses stay float32"""
    attention: Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention", "varlen"] = "sdpa"
    """sdpa, eager, flash_attention_2 (if installed), or varlen: nothing computed on padding; on GPUs in bfloat16"""
    compile: bool = Field(False, json_schema_extra=EXECUTION)
    """torch.compile each layer: minutes of preparation, then faster steps on a GPU"""
    activation_checkpointing: bool = Field(False, json_schema_extra=EXECUTION)
    """trade time for memory: activations are computed again in the backward pass"""


class Encoder(Section):
    pooling: Literal["last_token", "mean", "cls"] = "last_token"
    """which hidden state is the embedding"""
    normalize: bool = True
    """embeddings of length 1, so that similarity is the cosine"""
    query_length: int = Field(128, ge=4, le=MOST_TOKENS)
    """tokens, prompt and EOS included"""
    passage_length: int = Field(512, ge=4, le=MOST_TOKENS)
    """tokens, title and EOS included"""
    temperature: float = Field(0.002, ge=1e-6)
    """similarities are divided by it; the paper's value"""
    micro_batch_tokens: int = Field(16384, ge=1, json_schema_extra=EXECUTION)
    """tokens, padding included, that go through the model at once; on a CPU never more than 2,048"""
    activation_tokens: int | None = Field(None, ge=1, json_schema_extra=EXECUTION)
    """tokens whose activations are kept at once; a larger batch is trained by gradient caching. Left out: 65,536 on a
    GPU, 12,288 on a CPU"""


class Lora(Section):
    r: int = Field(8, ge=1, le=MOST_RANK)
    """rank"""
    alpha: float = Field(32.0, gt=0)
    """scale: the update is multiplied by alpha / r"""
    dropout: float = Field(0.1, ge=0, lt=1)
    """of the adapter's input"""
    target_modules: list[str] | None = None
    """names of linear layers; the backbone family's own when left out"""


class Batch(Section):
    queries: int = Field(2048, ge=1, le=MOST_QUERIES)
    """queries of a global batch, over all devices"""
    passages_per_query: int = Field(2, ge=1, le=MOST_RANK)
    """one positive and this many less one hard negatives"""
    composition: Literal["homogeneous", "mixed"] = "homogeneous"
    """a global batch from one task, or a task per query"""
    draws: Literal["stratified", "independent"] = "stratified"
    """tasks in shares exact to one batch, or drawn independently"""


class WeightBatch(Section):
    queries: int = Field(2048, ge=1, le=MOST_QUERIES)
    """queries of a global batch, over all devices"""
    passages_per_query: int = Field(8, ge=2, le=MOST_RANK)
    """one positive and this many less one hard negatives"""
    draws: Literal["stratified", "independent"] = "stratified"
    """equal counts of every task (the remainder rotates), or the paper's literal draw of probability 1/k"""
    parts: int = Field(1, ge=1, le=MOST_QUERIES)
    """equal parts of the batch, which only `relative_official` measures one by one; the authors' release had 4"""


class Optimizer(Section):
    learning_rate: float = Field(1e-4, gt=0)
    """peak of the schedule"""
    weight_decay: float = Field(0.1, ge=0)
    """decoupled, as in AdamW; biases and norms are left out"""
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field([0.9, 0.999], min_length=2, max_length=2)
    """AdamW's moment decays"""
    eps: float = Field(1e-8, gt=0)
    """AdamW's epsilon"""
    max_grad_norm: float | None = Field(1.0, gt=0)
    """gradients are clipped to this L2 norm; null: never"""


class Schedule(Section):
    name: Literal["cosine", "linear", "constant"] = "cosine"
    """decay after the warm-up"""
    warmup_steps: int | None = Field(None, ge=0, le=MOST_STEPS)
    """linear from 0; a tenth of the steps when left out, the paper's 100 of 1,000"""
    min_ratio: float = Field(0.1, ge=0, le=1)
    """of the peak, at the last step"""


class Checkpoint(Section):
    every_steps: int = Field(100, ge=1, le=MOST_STEPS, json_schema_extra=EXECUTION)
    """how much a killed run loses at most"""
    keep_last: int = Field(1, ge=1, json_schema_extra=EXECUTION)
    """older checkpoints are removed"""


class Training(Section):
    steps: int = Field(1000, ge=1, le=MOST_STEPS)
    """optimizer steps"""
    batch: Batch = Batch()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    cross_device_negatives: bool = True
    """passages on other devices are negatives, too: results don't depend on the number of devices"""
    false_negative_mask: _plugin("false_negative_masks", "known") = PluginChoice(name="known")
    """which candidates are too like the query to be its negatives, beside those known as positives"""
    checkpoint: Checkpoint = Field(Checkpoint(), json_schema_extra=EXECUTION)


class TrainRef(Training):
    hold_out: float = Field(0.2, ge=0, lt=1)
    """share of each task's rows, chosen by content, that the reference never sees"""


class Stop(Section):
    window_steps: int = Field(100, ge=10, le=MOST_STEPS)
    """the last steps that are judged; the first end is after so many"""
    drift_over_noise: float = Field(2.0, gt=0)
    """end under it: squared way of the log weights over the window against that of random steps, which make 1"""


class LearnWeights(Section):
    steps: int = Field(1000, ge=1, le=MOST_STEPS)
    """updates of the task weights"""
    stop: Stop | None = None
    """end before `steps` when nothing but noise moves the weights; null: never"""
    batch: WeightBatch = WeightBatch()
    loss_measurement: _plugin("loss_measurements", "relative") = PluginChoice(name="relative")
    """how much headroom each task has, from its losses"""
    weight_updater: _plugin("weight_updaters", "exponentiated_gradient") = PluginChoice(name="exponentiated_gradient")
    """how measurements change the weights"""
    proxy_weights: Literal["previous", "current"] = "previous"
    """which weights scale the proxy's gradient: before this step's update (one forward pass) or after (two)"""
    absent_tasks: Literal["last", "zero"] = "last"
    """measurement of a task absent from the batch: its last one, or the release's 0"""
    rows: Literal["held_out", "all"] = "held_out"
    """measure on rows that the reference has not seen (`train_ref.hold_out`), or on all"""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    checkpoint: Checkpoint = Field(Checkpoint(), json_schema_extra=EXECUTION)


class Transfer(Section):
    strategy: _plugin("transfer_strategies", "reweight") = PluginChoice(name="reweight")
    """how weights become sampling probabilities"""
    weights: Literal["final", "mean", "ema"] = "final"
    """which of the learned weights: of the last step, their mean over steps, or their moving average"""
    weights_from: str | None = None
    """take weights from this file instead: a weights.json, or the authors' *_weights.json"""


class Finetune(Training):
    rows: Literal["all", "held_in"] = "all"
    """train on all rows, or on those that the reference was trained on (for a comparison with it)"""


class PositiveMargin(Section):
    name: Literal["relative", "absolute", "threshold"] = "relative"
    """a candidate's highest score: a share of the positive's, the positive's less a number, or a number"""
    value: float = 0.95
    """the share, or the number"""

    @model_validator(mode="after")
    def _value_that_fits(self) -> PositiveMargin:
        if self.name != "relative" and "value" not in self.model_fields_set:
            raise ValueError(f"the margin {self.name!r} needs a value, in the unit of the scores")
        if self.name == "relative" and self.value <= 0:
            raise ValueError(f"the share of the positive's score must be > 0, got {self.value:g}")
        return self


class Sampling(Section):
    name: Literal["top", "uniform", "simans"] = "uniform"
    """the first candidates, any of them, or rather those that score like the positive"""
    a: float = Field(1.0, gt=0)
    """simans: how sharply; in one over the score's unit, squared"""
    b: float = 0.0
    """simans: how far above the positive's score the likeliest candidate is"""

    @model_validator(mode="after")
    def _options_of_its_own(self) -> Sampling:
        if self.name != "simans" and (self.a, self.b) != (1.0, 0.0):
            raise ValueError(f"a and b belong to simans, not to {self.name}")
        return self


def _named(value: Any) -> Any:
    """A bare name stands for {name: NAME}."""
    return {"name": value} if isinstance(value, str) else value


def _margin(value: Any) -> Any:
    """A bare number is a share of the positive's score, a bare name takes the default."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"value": float(value)} if is_number else _named(value)


class Mine(Section):
    negative_miner: _plugin("negative_miners", "bm25") = PluginChoice(name="bm25")
    """what ranks the task's passages for each query"""
    corpora: dict[str, str] = {}
    """{task: file of passages}, JSONL or Parquet, to choose from besides the task's own"""
    rescorer: _plugin("rescorers") | None = None
    """scores candidates and positives anew, for the margin and the sampling; null: the miner's scores"""
    rank_window: list[int] = Field([2, 100], min_length=2, max_length=2)
    """first and last rank to choose from, counted from 1"""
    keep: int = Field(16, ge=1, le=MOST_RANK)
    """negatives of a query, those it came with included"""
    positive_margin: Annotated[PositiveMargin, BeforeValidator(_margin)] | None = PositiveMargin()
    """drop candidates that score above this; a bare number is a share of the positive's score; null: keep them"""
    sampling: Annotated[Sampling, BeforeValidator(_named)] = Sampling()
    """which of the candidates to take; a bare name has its default options"""
    existing: Literal["keep", "replace"] = "keep"
    """top up the negatives that a row came with, or replace them"""
    pad: bool = False
    """fill up with random passages where too few are found"""

    @model_validator(mode="after")
    def _window_in_order(self) -> Mine:
        first, last = self.rank_window
        if not 1 <= first <= last <= MOST_RANK:
            raise ValueError(
                f"rank_window must be [first, last] with 1 <= first <= last <= {MOST_RANK}, got {self.rank_window}"
            )
        return self


class Dedup(Section):
    against: list[_plugin("benchmarks")] = []
    """benchmarks, or folders in BEIR layout, whose queries must not be trained on; empty: those of `eval`"""
    deduplicator: _plugin("deduplicators", "simhash") = PluginChoice(name="simhash")
    """which texts count as the same"""
    fields: list[Literal["query", "passage"]] = Field(["query"], min_length=1)
    """which training texts are compared: queries with test queries, positive passages with test documents"""
    within: Literal["none", "task", "all"] = "none"
    """also drop training rows that repeat an earlier row of the same task, or of any"""


class HNSW(Section):
    links: int = Field(32, ge=2)
    """neighbours of a document in the graph (M)"""
    build_depth: int = Field(200, ge=1)
    """candidates while building (efConstruction)"""
    search_depth: int = Field(256, ge=1)
    """candidates while searching (efSearch)"""
    checked: int = Field(200, ge=1)
    """queries that are also searched exactly, to state the recall"""


class Search(Section):
    name: Literal["exact", "hnsw"] = "exact"
    """`exact`: every document is scored; `hnsw`: an approximate index in memory, for many queries on one corpus"""
    options: HNSW | None = None
    """of `hnsw`"""

    @model_validator(mode="after")
    def _owned(self) -> Search:
        if self.name == "exact" and self.options is not None:
            raise ValueError("the exact search has no options")
        return self

    def index(self) -> dict[str, int] | None:
        """The options of the approximate index; None for the exact search."""
        return None if self.name == "exact" else (self.options or HNSW()).model_dump()


class HeldOut(Section):
    queries: int = Field(100, ge=1)
    """of each task, at most"""
    documents: int = Field(1000, ge=1)
    """of each task: the passages of those queries' rows, filled up to this many with other passages of the task"""


class Eval(Section):
    benchmarks: list[_plugin("benchmarks")] = []
    """the test collections"""
    held_out: HeldOut | None = None
    """also measure each task on rows that the models have not seen (`train_ref.hold_out`)"""
    depth: int = Field(100, ge=1, le=MOST_RANK)
    """documents retrieved for a query"""
    measures: list[str] = Field(["nDCG@10", "R@100"], min_length=1)
    """names that ir-measures knows"""
    models: list[str] = Field(["train_ref", "finetune"], min_length=1)
    """what to evaluate: `untrained`, `train_ref`, `finetune`, `bm25`, or a folder or hub name"""
    compare_to: str | None = "train_ref"
    """the model of the list that the others are tested against"""
    prompt: str | None = None
    """instruction put before test queries of collections that bring none; null: the model's own"""
    dtype: Literal["float32", "bfloat16"] | None = None
    """of the models' matrix products; null: `backbone.dtype`"""
    embedding_dtype: Literal["float16", "float32"] = "float16"
    """of the corpus embeddings on disk"""
    search: Annotated[Search, BeforeValidator(lambda value: _choice(value, "exact"))] = Search()
    """how the corpus is searched"""

    @model_validator(mode="after")
    def _something(self) -> Eval:
        if not self.benchmarks and self.held_out is None:
            raise ValueError("eval needs benchmarks, or held_out")
        return self


class Recipe(Section):
    """Everything that changes the numbers of an experiment."""

    name: Name = "tdro"
    """names the folder runs/NAME"""
    seed: int = Field(42, ge=0, lt=2**63)
    """of every random choice"""
    data_seed: int | None = Field(None, ge=0, lt=2**63)
    """of mining alone, so that runs of several seeds share their negatives; the seed when left out"""
    tasks: list[Task] = []
    """the training sets, or the path of a YAML file that lists them; none are needed to evaluate models as they are"""
    backbone: Backbone | None = None
    """the model that all trained models start from"""
    encoder: Encoder = Encoder()
    """how a text becomes an embedding"""
    lora: Lora | None = None
    """train low-rank adapters instead of all parameters"""
    mine: Mine | None = None
    """find hard negatives; absent: those that the files have"""
    dedup: Dedup | None = None
    """remove training rows that repeat test queries"""
    train_ref: TrainRef = TrainRef()
    """the reference model: all tasks in equal shares"""
    learn_weights: LearnWeights = LearnWeights()
    """the task weights, learned by a proxy model beside the reference"""
    transfer: Transfer = Transfer()
    """from task weights to the shares of tasks in `finetune`"""
    finetune: Finetune = Finetune()
    """the retriever"""
    eval: Eval | None = None
    """measures on test collections"""
    deepspeed: dict[str, Any] = {}
    """keys of DeepSpeed's own configuration, merged over the generated one; `zero_stage: 0..3` for short"""
    loggers: list[_plugin("loggers")] = Field([PluginChoice(name="tensorboard")], json_schema_extra=EXECUTION)
    """where each step's numbers also go, beside metrics.jsonl; empty: nowhere"""
    skip_bad_rows: bool = False
    """set bad rows of the training files aside instead of stopping"""


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe with the places its values came from."""

    recipe: Recipe
    path: Path
    text: str
    places: Mapping[Place, str]
    overrides: Sequence[str] = ()

    def where(self, *place: str | int) -> str:
        return _where(self.places, place)


# ---- reading ----


MOST_VALUES = 100_000  # of a recipe; a few lines of aliases can stand for billions


class _Loader(yaml.SafeLoader):
    """YAML as people write it: 1e-4 is a number, a date is text, a key given twice is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9]+(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+)$"
    ),
    list("-+0123456789."),
)


def load(path: str | Path, overrides: Sequence[str] = (), *, strategy: str | None = None) -> LoadedRecipe:
    """The recipe in `path`, with `key.path=value` overrides. Raises Problems with every fault found.

    `strategy` names the transfer strategy in place of the recipe's; the overrides come after it.
    """
    path = Path(path)
    problems: list[TdroError] = []
    places: dict[Place, str] = {}
    text = read_text(path)
    values = _parse(text, str(path), places, problems)
    if not isinstance(values, dict):
        if not problems:
            remedy = "write keys such as `tasks:`; `tdro recipe list` shows examples"
            problems.append(TdroError("a recipe is a mapping of sections", where=str(path), remedy=remedy))
        raise Problems(problems)
    if strategy is not None:
        _choose_strategy(values, places, strategy)
    for override in sorted(overrides, key=lambda text: not text.partition("=")[0].endswith(".name")):
        _override(values, override, path, places, problems)
    listed = _tasks_from_file(values, path, places, problems)
    _expand(values, (), places, problems)
    _fill_sections(values, Recipe)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        recipe = None
        problems += [_explain(d, places) for d in error.errors() if listed or d["loc"] != ("tasks",)]
    problems += [*_plugin_problems(values, places), *_task_problems(values, places), *_late_problems(values, places)]
    if problems:
        raise Problems(sorted(problems, key=_order))
    given = [*([f"transfer.strategy={strategy}"] if strategy is not None else []), *overrides]
    return LoadedRecipe(recipe, path, text, places, given)


def read_text(path: Path) -> str:
    from tdro_cli import artifacts

    try:
        return artifacts.read_text(path)
    except FileNotFoundError:
        remedy = "name a recipe, or write one: `tdro recipe list` shows those that come with tdro"
        raise TdroError(f"there is no recipe {path}", remedy=remedy) from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a zero byte in the path
        reason = getattr(error, "strerror", None) or str(error)
        raise TdroError(f"can't read {path}: {reason}", remedy="a recipe is a YAML file in UTF-8") from None


def _parse(text: str, file: str, places: dict[Place, str], problems: list[TdroError], under: Place = ()) -> Any:
    """The plain value of a YAML text; `places` learns file:line of every key."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return {} if under and _is_section(under) else None
            return _value(loader, node, under, file, places, problems, 0)
        finally:
            loader.dispose()
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        number = mark.line if mark else text.count("\n", 0, getattr(error, "position", 0))
        words = getattr(error, "problem", None) or str(error).splitlines()[0]
        if isinstance(error, RecursionError):
            words = "nested too deeply"
        where = f"{file}:{number + 1}"
        problems.append(TdroError(f"not valid YAML: {words}", where=where, remedy="mend the syntax there"))
        return None


def _value(loader, node, place: Place, file: str, places, problems, depth: int) -> Any:
    places[place] = f"{file}:{node.start_mark.line + 1}"
    if depth > 50:
        raise yaml.MarkedYAMLError(problem="nested too deeply", problem_mark=node.start_mark)
    if len(places) + len(problems) > MOST_VALUES:
        words = f"more than {MOST_VALUES:,} values, counting what aliases repeat"
        raise yaml.MarkedYAMLError(problem=words, problem_mark=node.start_mark)
    if isinstance(node, yaml.MappingNode):
        values = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else str(key_node.tag)
            key = key.encode(errors="backslashreplace").decode()
            if key in values:
                where = f"{file}:{key_node.start_mark.line + 1}, {dotted((*place, key))}"
                problems.append(TdroError(f"the key {key!r} is given twice", where=where, remedy="remove one of them"))
            values[key] = _value(loader, value_node, (*place, key), file, places, problems, depth + 1)
            places[(*place, key)] = f"{file}:{key_node.start_mark.line + 1}"
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, n, (*place, i), file, places, problems, depth + 1) for i, n in enumerate(node.value)]
    if node.value == "" and node.style is None and _is_section(place):
        return {}  # `mine:` with nothing after it asks for the defaults; `mine: null` for no mining
    try:
        value = loader.construct_object(node, deep=True)
        if isinstance(value, str):
            value.encode()  # refuses half a surrogate pair, which nothing after this could write
    except ValueError as error:
        raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from error
    if isinstance(value, int) and value.bit_length() > 64:
        raise yaml.MarkedYAMLError(problem="a number of more than 64 bits", problem_mark=node.start_mark)
    if not isinstance(value, str | int | float | bool | None) or value in (math.inf, -math.inf) or value != value:
        words = f"{node.value[:40]!r} is no text, finite number, true, false or null"
        raise yaml.MarkedYAMLError(problem=words, problem_mark=node.start_mark)
    return value


def _is_section(place: Place) -> bool:
    """Whether a key path names a section, which may be left empty."""
    _, section = list(_fields((*place, "")))[-1]
    return (
        isinstance(section, type)
        and issubclass(section, Section)
        and not (place and place[-1] in ("tasks", "benchmarks", "against"))
    )


def _fill_sections(values: dict, section: type[Section]) -> None:
    """`train_ref: null` stands for the defaults where a section can't be absent."""
    for key, field in section.model_fields.items():
        inner = _inner(field.annotation)
        if isinstance(inner, type) and issubclass(inner, Section) and key in values:
            may_be_absent = type(None) in typing.get_args(field.annotation)
            if values[key] is None and isinstance(field.default, Section) and not may_be_absent:
                values[key] = {}
            if isinstance(values[key], dict):
                _fill_sections(values[key], inner)


def _choose_strategy(values: dict, places: dict[Place, str], name: str) -> None:
    transfer = values.setdefault("transfer", {})
    if isinstance(transfer, dict):
        chosen = transfer.get("strategy")
        if name != (chosen.get("name") if isinstance(chosen, dict) else chosen):
            transfer["strategy"] = {"name": name}  # another strategy's options would not fit
            places[("transfer", "strategy")] = places[("transfer", "strategy", "name")] = "--strategy"


def _override(values: dict, override: str, path: Path, places: dict[Place, str], problems: list[TdroError]) -> None:
    """Puts the value of `key.path=value` into the values; a key path names list items by number or by their name."""
    key, equals, text = override.partition("=")
    origin = f"--set {override}"
    parts: list[str | int] = [int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in key.split(".")]
    if not equals or "" in parts:
        problems.append(TdroError(f"--set {override!r} is not key.path=value", remedy="for instance --set seed=7"))
        return
    if parts[0] == "tasks" and len(parts) > 1:
        _tasks_from_file(values, path, places, problems)
    target: Any = values
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(target, list):
            part = _item(target, part, origin, problems)
            if part is None:
                return
        elif isinstance(target, dict):
            part = str(part)
        else:
            outer = dotted(parts[:depth])
            problems.append(TdroError(f"{outer} is {target!r}, not a section", where=origin, remedy=f"set {outer}"))
            return
        parts[depth] = part
        if last:
            break
        if isinstance(target, dict):
            if isinstance(target.get(part), str) and parts[depth + 1] in ("options", "name"):
                target[part] = {"name": target[part]}  # a bare plugin name gets options
            if target.get(part) is None:
                target[part] = {}
                places[tuple(parts[: depth + 1])] = origin
        target = target[part]
    below: dict[Place, str] = {}
    before = len(problems)
    value = _parse(text, origin, below, problems, tuple(parts))
    if len(problems) > before:
        return
    if part == "name" and isinstance(target, dict) and target.get("name") != value:
        target.pop("options", None)  # another plugin's options would not fit
    target[part] = value
    places.update(dict.fromkeys([*below, tuple(parts)], origin))


def _item(target: list, part: str | int, origin: str, problems: list[TdroError]) -> int | None:
    """The number of a list's item, given that or the item's name; None if there is none, which is a problem."""
    names = [item.get("name") if isinstance(item, dict) else item for item in target]
    if isinstance(part, int) and part < len(target):
        return part
    if part in names:
        return names.index(part)
    valid = did_you_mean(str(part), {str(name) for name in names})
    problems.append(TdroError(f"the list has no item {part!r}", where=origin, remedy=f"{valid}, or a number from 0"))
    return None


def _tasks_from_file(values: dict, recipe: Path, places: dict[Place, str], problems: list[TdroError]) -> bool:
    """`tasks: FILE` stands for the list in FILE, a path from the working directory or from the recipe's folder.

    False if it could not be read, which is a problem.
    """
    tasks = values.get("tasks")
    if not isinstance(tasks, str):
        return True
    where, before = _where(places, ("tasks",)), len(problems)
    name = _expand(tasks, ("tasks",), places, problems)
    values["tasks"] = None
    if len(problems) > before:
        return False
    file = next((f for f in (name, str(recipe.parent / name)) if os.path.isfile(f)), None)
    if file is None:
        remedy = f"paths are relative to the working directory, {os.getcwd()}, or to the recipe's folder"
        problems.append(TdroError(f"there is no task list {name}", where=where, remedy=remedy))
        return False
    try:
        listed = _parse(read_text(Path(file)), file, places, problems, ("tasks",))
    except TdroError as error:
        problems.append(TdroError(error.message, where=where, remedy="a task list is a YAML file in UTF-8"))
        return False
    values["tasks"] = listed.get("tasks") if isinstance(listed, dict) else listed
    if not isinstance(values["tasks"], list) and len(problems) == before:
        remedy = "write a list of `- {name: ..., path: ...}`"
        problems.append(TdroError(f"{file} holds no list of tasks", where=where, remedy=remedy))
    return len(problems) == before


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _variable_fault(name: str, default: str | None) -> tuple[str, str] | None:
    """What is wrong with ${NAME} or ${NAME:-default} in a recipe, and the remedy."""
    if SECRET.search(name):
        words = f"the environment variable {name} is named like a secret, and a recipe's values are written to files"
        return words, "leave it out: libraries read tokens from the environment; or name the variable otherwise"
    if name not in os.environ:
        words = f"the environment variable {name} is not set"
        return (words, f"set it, for instance `export {name}=/a/folder`") if default is None else None
    try:
        os.environ[name].encode()
    except UnicodeEncodeError:
        return f"the environment variable {name} is not text in UTF-8", "set it to text in UTF-8"
    return None


def _expand(value: Any, place: Place, places: Mapping[Place, str], problems: list[TdroError]) -> Any:
    """Replaces ${NAME} and ${NAME:-default} in every string, in place."""
    if isinstance(value, dict):
        for key in value:
            value[key] = _expand(value[key], (*place, key), places, problems)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            value[index] = _expand(item, (*place, index), places, problems)
    elif isinstance(value, str):
        for match in _VARIABLE.finditer(value):
            if fault := _variable_fault(match[1], match[2]):
                problems.append(TdroError(fault[0], where=_where(places, place), remedy=fault[1]))
        # one that is not set stays as it is, so that no other check takes the rest for a path
        return _VARIABLE.sub(lambda match: os.environ.get(match[1], match[0] if match[2] is None else match[2]), value)
    return value


# ---- checking ----


def _fields(place: Place) -> Iterator[tuple[str | int, Any]]:
    """The models along a key path: (key, the section that should hold it)."""
    section: Any = Recipe
    for key in place:
        yield key, section
        if isinstance(section, type) and issubclass(section, Section) and key in section.model_fields:
            section = _inner(section.model_fields[key].annotation)
        elif not isinstance(key, int):
            section = None


def _inner(annotation: Any) -> Any:
    """The section inside X | None, list[X] or Annotated[X]."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation
    for argument in typing.get_args(annotation):
        inner = _inner(argument)
        if isinstance(inner, type) and issubclass(inner, Section):
            return inner
    return None


def _explain(detail: Mapping[str, Any], places: Mapping[Place, str]) -> TdroError:
    """A pydantic error in our words."""
    place, kind, given = tuple(detail["loc"]), detail["type"], detail.get("input")
    where = _where(places, place)
    key = place[-1] if place else "recipe"
    section = list(_fields(place))[-1][1] if place else Recipe
    valid = list(section.model_fields) if isinstance(section, type) and issubclass(section, Section) else []
    if kind == "extra_forbidden":
        return TdroError(f"unknown key {key!r}", where=where, remedy=did_you_mean(str(key), valid))
    if kind == "missing":
        return TdroError(f"the key {key!r} is missing", where=where, remedy=f"add `{key}:` there")
    if kind == "value_error":
        return TdroError(detail["msg"].removeprefix("Value error, "), where=where, remedy="change one of them")
    inner = list(_fields((*place, "")))[-1][1]
    if kind == "model_type" and isinstance(inner, type) and issubclass(inner, Section):
        keys = ", ".join(inner.model_fields)
        return TdroError(f"{key} can't be {_shown(given)}", where=where, remedy=f"it is a section; its keys: {keys}")
    if kind == "string_type" and isinstance(given, bool | int | float):
        remedy = "put it in quotes, if it is meant as text"
        return TdroError(f"{key} can't be {_shown(given)}: it should be text", where=where, remedy=remedy)
    message = re.sub("^(Input|String|List|Dictionary) ", "", detail["msg"])
    if kind == "literal_error" and isinstance(given, str):
        expected = [choice for choice in re.findall(r"'([^']*)'", detail["ctx"]["expected"])]
        return TdroError(f"{key} can't be {given!r}", where=where, remedy=did_you_mean(given, expected))
    return TdroError(f"{key} can't be {_shown(given)}", where=where, remedy=f"the value {message}")


def _shown(value: Any) -> str:
    return "a mapping" if isinstance(value, dict) else "a list" if isinstance(value, list) else repr(value)[:80]


def _choices(values: Mapping) -> Iterator[tuple[str, Place, Any]]:
    """Every plugin choice that a recipe's raw values hold: (kind, place, choice)."""
    if isinstance(values.get("backbone"), dict):
        backbone = {key: values["backbone"][key] for key in ("name", "options") if key in values["backbone"]}
        yield "backbones", ("backbone",), _choice(backbone, "auto")
    yield from _choices_of(Recipe, (), values)
    for name, field in Recipe.model_fields.items():
        section, raw = _inner(field.annotation), values.get(name)
        if isinstance(raw, dict) and isinstance(section, type) and issubclass(section, Section):
            yield from _choices_of(section, (name,), raw)


def _choices_of(section: type[Section], place: Place, values: Mapping) -> Iterator[tuple[str, Place, Any]]:
    for key, field in section.model_fields.items():
        kind, default = _plugin_kind(field)
        if kind and isinstance(values.get(key), list):
            for index, item in enumerate(values[key]):
                yield kind, (*place, key, index), _choice(item, default)
        elif kind and values.get(key) is not None:
            yield kind, (*place, key), _choice(values[key], default)


def _plugin_kind(field: Any) -> tuple[str | None, str | None]:
    """The kind and the default name of a field that `_plugin` typed."""
    annotations = [field, *typing.get_args(field.annotation), *(field.metadata or [])]
    for item in annotations:
        for candidate in [item, *getattr(item, "__metadata__", ())]:
            extra = getattr(candidate, "json_schema_extra", None)
            if isinstance(extra, dict) and "plugin_kind" in extra:
                return extra["plugin_kind"], extra["plugin_default"]
    return None, None


def _plugin_problems(values: Mapping, places: Mapping[Place, str]) -> list[TdroError]:
    problems: list[TdroError] = []
    for kind, place, choice in _choices(values):
        if not isinstance(choice, dict) or not isinstance(choice.get("name"), str):
            continue  # the structure is wrong, and has been reported
        options = choice.get("options", {})
        if isinstance(options, dict):
            try:
                registry.resolve(kind, choice["name"], options, where=dotted(place))
            except TdroError as error:
                faults = error.errors if isinstance(error, Problems) else [error]
                problems += [_placed(fault, place, places) for fault in faults]
    return problems


def _placed(error: TdroError, place: Place, places: Mapping[Place, str]) -> TdroError:
    """A registry's error, whose `where` is a dotted place, with the line put before it."""
    given, here = error.where or "", dotted(place)
    if not f"{given}.".startswith(f"{here}."):  # a plugin's own words for the place
        where = f"{_where(places, place)}{f': {given}' if given else ''}"
        return TdroError(error.message, where=where, remedy=error.remedy)
    rest = filter(None, given.removeprefix(here).split("."))
    return TdroError(error.message, where=_where(places, (*place, *rest)), remedy=error.remedy)


def _task_problems(values: Mapping, places: Mapping[Place, str]) -> list[TdroError]:
    problems, seen = [], set()
    tasks = values.get("tasks")
    if not tasks and isinstance(values.get("tasks", []), list) and not values.get("eval"):
        remedy = "add `tasks:`, or `eval:` with models as they are"
        problems.append(TdroError("the recipe names no tasks", where=_where(places, ("tasks",)), remedy=remedy))
    for index, task in enumerate(tasks if isinstance(tasks, list) else []):
        if not isinstance(task, dict):
            continue
        name, path = task.get("name"), task.get("path")
        if isinstance(name, str):
            if name in seen:
                where = _where(places, ("tasks", index, "name"))
                problems.append(TdroError(f"two tasks are named {name!r}", where=where, remedy="rename one of them"))
            seen.add(name)
        if isinstance(path, str) and not os.path.isfile(path) and not _VARIABLE.search(path):
            problems.append(_missing_file(path, _where(places, ("tasks", index, "path"))))
    return problems


def _held_out_problems(sections: Mapping[str, Mapping], places: Mapping[Place, str]) -> list[TdroError]:
    """Rows that a model was trained on measure nothing."""
    problems, rows = [], sections.get("finetune", {}).get("rows", "all")
    if rows == "all" and "finetune" in sections["eval"].get("models", ["finetune"]):
        where, remedy = _where(places, ("finetune", "rows")), "set finetune.rows to held_in, or leave eval.held_out out"
        problems.append(
            TdroError("finetune trains on the rows that eval.held_out measures", where=where, remedy=remedy)
        )
    if sections.get("train_ref", {}).get("hold_out") == 0:
        where, remedy = _where(places, ("train_ref", "hold_out")), "set it to 0.2, for instance"
        problems.append(TdroError("eval.held_out has no rows: none are held out", where=where, remedy=remedy))
    return problems


def _late_problems(values: Mapping, places: Mapping[Place, str]) -> list[TdroError]:
    """What a stage would otherwise miss hours later: a source, a file, a model."""
    problems = []
    sections = {key: value for key, value in values.items() if isinstance(value, dict)}
    backbone = sections.get("backbone")
    if backbone is not None and backbone.get("source") is None and _needs_source(backbone.get("name", "auto")):
        where = _where(places, ("backbone", "source"))
        remedy = "add `source:` with a model folder or a Hugging Face name; the backbone `scratch` needs none"
        message = f"the backbone {backbone.get('name', 'auto')!r} needs a source"
        problems.append(TdroError(message, where=where, remedy=remedy))
    path = sections.get("transfer", {}).get("weights_from")
    if isinstance(path, str) and not os.path.isfile(path) and not _VARIABLE.search(path):
        problems.append(_missing_file(path, _where(places, ("transfer", "weights_from"))))
    if sections.get("eval", {}).get("held_out") is not None:
        problems += _held_out_problems(sections, places)
    corpora = sections.get("mine", {}).get("corpora")
    for task, file in corpora.items() if isinstance(corpora, dict) else ():
        where = _where(places, ("mine", "corpora", task))
        names = [task.get("name") for task in values.get("tasks") or [] if isinstance(task, dict)]
        if task not in names:
            remedy = did_you_mean(str(task), map(str, names))
            problems.append(TdroError(f"corpora names {task!r}, which is no task", where=where, remedy=remedy))
        if isinstance(file, str) and not os.path.isfile(file) and not _VARIABLE.search(file):
            problems.append(_missing_file(file, where))
    problems += _deepspeed_problems(sections.get("deepspeed", {}), places)
    evaluated = sections.get("eval", {})
    rival, models = (evaluated.get(key, Eval.model_fields[key].default) for key in ("compare_to", "models"))
    if "eval" in sections and isinstance(rival, str) and isinstance(models, list) and rival not in models:
        where, remedy = _where(places, ("eval", "compare_to")), f"{did_you_mean(rival, map(str, models))}; null: none"
        problems.append(TdroError(f"compare_to names {rival!r}, which is not evaluated", where=where, remedy=remedy))
    return problems


NOT_DEEPSPEEDS = {  # keys of DeepSpeed that would make the batch, or the learning rate, other than the recipe says
    "train_batch_size": "batch.queries is the batch",
    "train_micro_batch_size_per_gpu": "encoder.micro_batch_tokens cuts the batch, by tokens",
    "gradient_accumulation_steps": "encoder.activation_tokens bounds memory; a batch is one step whatever its size",
    "scheduler": "schedule sets the learning rate",
}


# of DeepSpeed's documented keys those that a recipe may have use for: it ignores one that it does not know
DEEPSPEEDS = (
    "activation_checkpointing", "aio", "amp", "autotuning", "bf16", "checkpoint", "comms_logger",
    "communication_data_type", "compression_training", "csv_monitor", "data_efficiency", "data_types", "dump_state",
    "elasticity", "flops_profiler", "fp16", "gradient_predivide_factor", "memory_breakdown", "optimizer",
    "prescale_gradients", "sparse_gradients", "steps_per_print", "tensorboard", "torch_autocast",
    "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer",
    "zero_optimization", "zero_stage",
)  # fmt: skip
LIKE = 0.8  # how near a key must be to one of these to be a misspelling of it


def _deepspeed_problems(section: Mapping, places: Mapping[Place, str]) -> list[TdroError]:
    problems = [
        TdroError(f"{key} is not DeepSpeed's to set here", where=_where(places, ("deepspeed", key)), remedy=instead)
        for key, instead in NOT_DEEPSPEEDS.items()
        if key in section
    ]
    for key in section.keys() - {*DEEPSPEEDS, *NOT_DEEPSPEEDS}:
        if near := difflib.get_close_matches(str(key).lower(), DEEPSPEEDS, 1, LIKE):
            told, remedy = f"DeepSpeed has no key {key!r}", f"did you mean {near[0]!r}?"
            problems.append(TdroError(told, where=_where(places, ("deepspeed", key)), remedy=remedy))
    stage = section.get("zero_stage", 0)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        where = _where(places, ("deepspeed", "zero_stage"))
        problems.append(TdroError(f"zero_stage can't be {_shown(stage)}", where=where, remedy="valid: 0, 1, 2, 3"))
    return problems


def _needs_source(backbone: Any) -> bool:
    try:
        return isinstance(backbone, str) and not hasattr(registry.find("backbones", backbone).load(), "prepare")
    except TdroError:
        return False  # no such plugin, which is told elsewhere


def _missing_file(path: str, where: str) -> TdroError:
    beside = Path(where.rsplit(":", 1)[0]).parent / path
    remedy = (
        f"it lies beside the recipe: run from {beside.parent}, or write the path {beside}"
        if os.path.isfile(beside)
        else f"paths are relative to the working directory, {os.getcwd()}"
    )
    return TdroError(f"there is no file {path}", where=where, remedy=remedy)


def dotted(place: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in place)


def _where(places: Mapping[Place, str], place: Sequence[str | int]) -> str:
    """'FILE:LINE, key.path' of a place, or of the nearest section above it."""
    place = tuple(place)
    for length in range(len(place), -1, -1):
        if place[:length] in places:
            return f"{places[place[:length]]}, {dotted(place)}" if place else places[()]
    return dotted(place)


def _order(error: TdroError) -> tuple[str, int]:
    file, _, line = (error.where or "").split(",")[0].rpartition(":")
    return file, int(line) if line.isdigit() else 0


# ---- the recipes that come with tdro ----


def _shipped_folder() -> Path:
    """Beside the package in a source tree, inside it when installed from a wheel."""
    package = Path(__file__).parent
    inside = package / "_recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def shipped() -> dict[str, str]:
    """Names of the shipped recipes, with the first line of each."""
    folder = _shipped_folder()
    names = {}
    for path in sorted(folder.rglob("*.yaml")):
        name = str(path.relative_to(folder).with_suffix(""))
        if not name.startswith("tasks/"):
            names[name] = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
    return names


def copy_shipped(name: str, to: Path) -> None:
    """Writes a recipe that stands alone: the task list that it names is put in its place.

    Raises TdroError for an unknown name, or if `to` exists.
    """
    if name not in shipped():
        raise TdroError(f"no recipe {name!r} comes with tdro", remedy=did_you_mean(name, shipped()))
    if to.exists():
        raise TdroError(f"{to} exists", remedy="name another file")
    from tdro_cli.artifacts import write_text

    recipe = _shipped_folder() / f"{name}.yaml"

    def task_list(match: re.Match) -> str:
        return "tasks:\n" + (recipe.parent / match[1]).read_text(encoding="utf-8")

    text = recipe.read_text(encoding="utf-8")
    write_text(to, re.sub(r"^tasks: (\S+\.yaml).*\n", task_list, text, flags=re.MULTILINE))
