import copy
import time
from itertools import pairwise

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tdro_cli import recipe as recipes
from tdro_cli import registry
from tdro_cli.artifacts import canonical_json
from tdro_cli.errors import TdroError

RECIPE = """\
name: roads
seed: 7
tasks:
  - {name: bridges, path: data/bridges.jsonl, prompt: find the bridge}
  - name: tunnels
    path: data/tunnels.jsonl
backbone: {name: scratch, options: {layers: 2}}
encoder:
  temperature: 0.05
train_ref: {steps: 20, batch: {queries: 8}}
learn_weights:
  steps: 20
  loss_measurement: relative
  weight_updater: {name: exponentiated_gradient, options: {learning_rate: 0.1}}
transfer: {strategy: {name: reweight, options: {max_epochs: 4}}}
finetune: {steps: 20, optimizer: {betas: [0.9, 0.98]}}
eval:
  benchmarks: [{name: folder, options: {path: collections}}]
"""


@pytest.fixture(autouse=True)
def project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("bridges", "tunnels"):
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"query": "q", "pos": ["p"]}\n')
    return tmp_path


def load(text=RECIPE, *overrides, **options):
    with open("recipe.yaml", "w", encoding="utf-8") as file:
        file.write(text)
    return recipes.load("recipe.yaml", overrides, **options)


def faults(text=RECIPE, *overrides, **options):
    """What loading reports: (message, where, remedy) of every fault, in order."""
    with pytest.raises(TdroError) as caught:
        load(text, *overrides, **options)
    return [tuple(problem.values()) for problem in caught.value.problems()]


def one_fault(text=RECIPE, *overrides, **options):
    (fault,) = faults(text, *overrides, **options)
    return fault


def changed(old, new):
    assert RECIPE.count(old) == 1
    return RECIPE.replace(old, new)


# ---- what is right ----


def test_values_of_the_file_stand_and_the_rest_are_defaults():
    recipe = load().recipe
    assert [task.name for task in recipe.tasks] == ["bridges", "tunnels"]
    assert (recipe.seed, recipe.encoder.temperature, recipe.train_ref.batch.queries) == (7, 0.05, 8)
    assert recipe.learn_weights.loss_measurement.name == "relative"
    assert (recipe.encoder.query_length, recipe.encoder.passage_length) == (128, 512)  # the paper's
    assert recipe.mine is None and recipe.dedup is None and recipe.lora is None


def test_the_defaults_are_the_papers():
    recipe = load("tasks: [{name: bridges, path: data/bridges.jsonl}]").recipe
    assert recipe.seed == 42
    assert recipe.encoder.temperature == 0.002
    for section in (recipe.train_ref, recipe.learn_weights, recipe.finetune):
        assert (section.steps, section.batch.queries, section.optimizer.learning_rate) == (1000, 2048, 1e-4)
    assert recipe.train_ref.batch.passages_per_query == 2
    assert recipe.learn_weights.batch.passages_per_query == 8
    assert registry.resolve("weight_updaters", "exponentiated_gradient").learning_rate == 0.02


def test_numbers_may_be_written_with_an_exponent_and_dates_are_text():
    recipe = load(changed("temperature: 0.05", "temperature: 5e-2") + "deepspeed: {since: 2024-01-31}\n").recipe
    assert recipe.encoder.temperature == 0.05
    assert recipe.deepspeed == {"since": "2024-01-31"}


@pytest.mark.parametrize("section", ["mine", "dedup", "lora", "finetune", "transfer"])
def test_a_section_with_nothing_under_it_takes_the_defaults(section):
    text = "\n".join(line for line in RECIPE.splitlines() if not line.startswith(section))
    loaded = getattr(load(f"{text}\n{section}:\n").recipe, section)
    assert loaded == type(loaded)()


def test_null_turns_a_section_off_that_can_be_absent():
    recipe = load(RECIPE + "mine: null\nlora: ~\n").recipe
    assert recipe.mine is None and recipe.lora is None


def test_null_means_no_margin_where_left_out_it_is_the_default():
    assert load(RECIPE + "mine: {positive_margin: null}\n").recipe.mine.positive_margin is None
    assert load(RECIPE, "mine.positive_margin=null").recipe.mine.positive_margin is None
    assert load(RECIPE + "mine: {keep: 3}\n").recipe.mine.positive_margin == recipes.PositiveMargin(value=0.95)


def test_null_stands_for_the_defaults_where_a_section_cannot_be_absent():
    recipe = load(changed("train_ref: {steps: 20, batch: {queries: 8}}", "train_ref: null")).recipe
    assert recipe.train_ref == recipes.TrainRef()
    assert load(changed("batch: {queries: 8}", "batch: null")).recipe.train_ref.batch == recipes.Batch()


def test_every_key_has_its_line():
    loaded = load()
    assert loaded.where("tasks", 1, "path") == "recipe.yaml:6, tasks.1.path"
    assert loaded.where("encoder", "temperature") == "recipe.yaml:9, encoder.temperature"
    assert loaded.where("encoder", "pooling") == "recipe.yaml:8, encoder.pooling"  # absent: the section's line


def test_keys_that_change_no_result_are_left_out_of_the_numbers():
    before = load().recipe
    after = load(RECIPE, "encoder.micro_batch_tokens=9", "finetune.checkpoint.every_steps=3").recipe
    assert before != after
    assert before.encoder.numbers() == after.encoder.numbers()
    assert before.finetune.numbers() == after.finetune.numbers()
    assert before.encoder.numbers() != load(RECIPE, "encoder.pooling=mean").recipe.encoder.numbers()


def test_recipe_is_plain_json_and_reads_back():
    recipe = load().recipe
    assert recipes.Recipe.model_validate(recipe.model_dump(mode="json")) == recipe


# ---- mistakes, all together ----


def test_five_mistakes_are_reported_together_with_line_key_and_remedy():
    text = """\
name: roads
tasks:
  - {name: bridges, path: data/bridge.jsonl}
backbone: {name: scrath}
encoder:
  temprature: 0.05
train_ref: {steps: many}
learn_weights:
  weight_updater: {name: exponentiated_gradient, options: {learnig_rate: 0.1}}
"""
    found = faults(text)
    assert [where for _, where, _ in found] == [
        "recipe.yaml:3, tasks.0.path",
        "recipe.yaml:4, backbone.name",
        "recipe.yaml:6, encoder.temprature",
        "recipe.yaml:7, train_ref.steps",
        "recipe.yaml:9, learn_weights.weight_updater.options.learnig_rate",
    ]
    messages, remedies = [fault[0] for fault in found], [fault[2] for fault in found]
    assert messages[0] == "there is no file data/bridge.jsonl"
    assert "no backbone named 'scrath'" in messages[1] and "did you mean 'scratch'?" in remedies[1]
    assert messages[2] == "unknown key 'temprature'" and "did you mean 'temperature'?" in remedies[2]
    assert messages[3] == "steps can't be 'many'" and "valid integer" in remedies[3]
    assert "has no option 'learnig_rate'" in messages[4] and "did you mean 'learning_rate'?" in remedies[4]


def test_ten_mistakes_of_ten_kinds_are_reported_together(monkeypatch):
    monkeypatch.delenv("ROADS", raising=False)
    text = """\
sead: 7
seed: 1
tasks:
  - {name: bridges, path: data/bridges.jsonl}
  - {name: bridges, path: data/tunnels.jsonl}
  - {path: "${ROADS}/x.jsonl", name: x}
  - {name: a b, path: data/tunnels.jsonl}
  - {name: z}
encoder: {pooling: last-token}
mine: {rank_window: [9, 2]}
learn_weights: {weight_updater: {options: {learning_rate: fast}}}
transfer: {strategy: top_k}
finetune: [1, 2]
seed: 2
"""
    found = {where.split(", ")[1]: (message, remedy) for message, where, remedy in faults(text)}
    assert set(found) == {
        "sead", "seed", "tasks.1.name", "tasks.2.path", "tasks.3.name", "tasks.4.path", "encoder.pooling", "mine",
        "learn_weights.weight_updater.options.learning_rate", "transfer.strategy.options", "finetune",
    }  # fmt: skip
    assert "did you mean 'seed'?" in found["sead"][1]
    assert found["seed"][0] == "the key 'seed' is given twice"
    assert found["tasks.1.name"][0] == "two tasks are named 'bridges'"
    assert "ROADS is not set" in found["tasks.2.path"][0] and "export ROADS=" in found["tasks.2.path"][1]
    assert found["tasks.4.path"][0] == "the key 'path' is missing"
    assert "did you mean 'last_token'?" in found["encoder.pooling"][1]
    assert "1 <= first <= last" in found["mine"][0]
    assert "needs the option 'k'" in found["transfer.strategy.options"][0]
    assert "its keys: steps, batch" in found["finetune"][1]


def test_a_wrong_type_anywhere_is_named_with_its_key():
    loaded = yaml.safe_load(RECIPE)
    for place in _places(loaded):
        for wrong in (["x"], {"zz": 1}, "zz", -3, 0.5, True, None):
            values = copy.deepcopy(loaded)
            _put(values, place, wrong)
            text = yaml.safe_dump(values, sort_keys=False)
            try:
                canonical_json(load(text).recipe.model_dump(mode="json"))
            except TdroError as error:
                for problem in error.problems():
                    assert problem["message"] and problem["remedy"], (place, wrong)
                    assert problem["where"].startswith("recipe.yaml"), (place, wrong)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "a recipe is a mapping of sections"),
        ("# nothing\n", "a recipe is a mapping of sections"),
        ("[1, 2]", "a recipe is a mapping of sections"),
        ("just words", "a recipe is a mapping of sections"),
        ("{}", "the recipe names no tasks"),
        ("tasks:\n", "tasks can't be None"),
        ("tasks: []", "the recipe names no tasks"),
        ("a: 1\nb: [\n", "not valid YAML"),
        ("a: 1\n\tb: 2\n", "not valid YAML"),
        ("a: 1\n---\nb: 2\n", "not valid YAML"),
        ("a: *nowhere\n", "not valid YAML"),
        ("a: \0\n", "not valid YAML"),
        ('a: "\\ud800"\n', "not valid YAML"),
        ("seed: !!python/object:os.system {}\n", "seed can't be a mapping"),
        ("seed: !!python/name:os.system ''\n", "not valid YAML"),
        ("seed: !!binary aGVsbG8=\n", "not valid YAML"),
        ("seed: .nan\n", "not valid YAML"),
        ("seed: -.inf\n", "not valid YAML"),
        ("seed: 1e999\n", "not valid YAML"),
        ("seed: " + "9" * 5000, "not valid YAML"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
        ("{a: " * 5000, "nested too deeply"),
        ("? [a, b]\n: 1\n", "unknown key"),
        ("1: 2\n", "unknown key '1'"),
        ("null: 2\n", "unknown key 'null'"),
    ],
)
def test_a_file_that_is_no_recipe_is_told_in_words(text, message):
    found = faults(text)
    assert any(message in fault[0] for fault in found)
    assert all(where.startswith("recipe.yaml") and remedy for _, where, remedy in found)


def test_a_syntax_error_names_its_line():
    assert one_fault("name: a\nseed: 1\ntasks: [\n  {name: a\n")[1] == "recipe.yaml:5"
    assert one_fault("name: a\nseed: \x07\n")[1] == "recipe.yaml:2"


def chained(first, link):
    """YAML of 24 values, each made of the one before."""
    letters = "abcdefghijklmnopqrstuvwx"
    lines = [f"{new}: &{new} {link.format(f'*{old}')}" for old, new in pairwise(letters)]
    return "\n".join([f"a: &a {first}", *lines, ""])


BOMBS = {
    "of lists": chained("[x, x]", "[{0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}, {0}]"),
    "of mappings": chained("{{k: 1}}", "{{k: {0}, l: {0}}}"),
    "of one key twice": chained("{{k: 1}}", "{{k: {0}, k: {0}}}"),
    "of itself": "a: &a [*a, *a]\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_aliases_cannot_blow_up(bomb):
    began = time.monotonic()
    found = faults(BOMBS[bomb])
    assert "aliases" in found[-1][0] or "nested too deeply" in found[-1][0]
    assert time.monotonic() - began < 20  # without a limit: hours, or the memory of the machine


def test_a_harmless_alias_is_read():
    text = changed("train_ref: {steps: 20, batch: {queries: 8}}", "train_ref: {steps: 20, batch: &b {queries: 8}}")
    assert load(text + "    depth: 10\n".replace("    ", "  ")).recipe.train_ref.batch.queries == 8
    text = text.replace("finetune: {steps: 20,", "finetune: {steps: 20, batch: *b,")
    assert load(text).recipe.finetune.batch.queries == 8


def test_a_file_that_is_not_utf8_or_not_there_or_a_folder_is_told(project):
    (project / "latin.yaml").write_bytes("name: café\n".encode("latin-1"))
    for path, words in (("latin.yaml", "can't read"), ("data", "can't read"), ("absent.yaml", "there is no recipe")):
        with pytest.raises(TdroError, match=words) as caught:
            recipes.load(path)
        assert caught.value.remedy


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    assert load("\ufeff" + RECIPE).recipe.name == "roads"


@pytest.mark.parametrize("name", ["..", ".", ".cache", "a/b", "a b", "", "-x", "x\n"])
def test_a_name_that_is_no_folder_is_refused(name):
    assert one_fault(changed("name: roads", f"name: {yaml.safe_dump(name, default_style=chr(34))}"))[1].endswith("name")


def test_text_that_yaml_takes_for_something_else_should_be_quoted():
    _, where, remedy = one_fault(changed("name: roads", "name: no"))
    assert "quotes" in remedy and where == "recipe.yaml:1, name"


def test_a_file_beside_the_recipe_but_not_in_the_working_directory_is_pointed_to(project):
    (project / "deep").mkdir()
    (project / "deep" / "x.jsonl").write_text("{}")
    (project / "deep" / "recipe.yaml").write_text("tasks: [{name: x, path: x.jsonl}]")
    with pytest.raises(TdroError) as caught:
        recipes.load("deep/recipe.yaml")
    assert "deep/x.jsonl" in caught.value.problems()[0]["remedy"]


def test_a_backbone_that_is_not_made_from_the_tasks_needs_a_source():
    message, where, remedy = one_fault(changed("backbone: {name: scratch, options: {layers: 2}}", "backbone:"))
    assert (message, where) == ("the backbone 'auto' needs a source", "recipe.yaml:7, backbone.source")
    assert "Hugging Face" in remedy


def test_a_model_to_compare_to_that_is_not_evaluated_is_told_before_anything_runs():
    message, where, remedy = one_fault(RECIPE + "  compare_to: train-ref\n")
    assert where == "recipe.yaml:19, eval.compare_to"
    assert message == "compare_to names 'train-ref', which is not evaluated" and "did you mean 'train_ref'?" in remedy


def test_who_evaluates_without_the_reference_must_say_what_to_compare_to():
    assert one_fault(RECIPE + "  models: [finetune]\n")[1] == "recipe.yaml:17, eval.compare_to"
    assert load(RECIPE + "  models: [finetune]\n  compare_to: null\n").recipe.eval.compare_to is None


def test_a_weights_file_that_is_missing_is_told_with_the_rest():
    assert one_fault(RECIPE, "transfer.weights_from=nowhere.json")[:2] == (
        "there is no file nowhere.json",
        "--set transfer.weights_from=nowhere.json, transfer.weights_from",
    )


# ---- --set and --strategy ----


@pytest.mark.parametrize(
    "override, value",
    [
        ("seed=11", lambda r: r.seed == 11),
        ("encoder.temperature=1e-4", lambda r: r.encoder.temperature == 1e-4),
        ("encoder={pooling: mean}", lambda r: r.encoder == recipes.Encoder(pooling="mean")),
        ("tasks.tunnels.prompt='find: the tunnel'", lambda r: r.tasks[1].prompt == "find: the tunnel"),
        ("tasks.0.prompt=p=q", lambda r: r.tasks[0].prompt == "p=q"),
        ("tasks.1.symmetric=true", lambda r: r.tasks[1].symmetric),
        ("finetune.optimizer.betas.0=0.8", lambda r: r.finetune.optimizer.betas == [0.8, 0.98]),
        ("learn_weights.loss_measurement=excess", lambda r: r.learn_weights.loss_measurement.name == "excess"),
        (
            "learn_weights.loss_measurement.options.floor=0.5",
            lambda r: r.learn_weights.loss_measurement.model_dump() == {"name": "relative", "options": {"floor": 0.5}},
        ),
        ("learn_weights.weight_updater.name=doremi", lambda r: r.learn_weights.weight_updater.options == {}),
        ("mine.keep=3", lambda r: r.mine.keep == 3),
        ("mine=", lambda r: r.mine == recipes.Mine()),
        ("eval=null", lambda r: r.eval is None),
        ("deepspeed.zero_stage=2", lambda r: r.deepspeed == {"zero_stage": 2}),
        ("tasks=[{name: only, path: data/bridges.jsonl}]", lambda r: len(r.tasks) == 1),
    ],
)
def test_set_overrides_a_key(override, value):
    assert value(load(RECIPE, override).recipe)


@pytest.mark.parametrize(
    "override, message, remedy",
    [
        ("seed", "is not key.path=value", "--set seed=7"),
        ("=1", "is not key.path=value", ""),
        ("a..b=1", "is not key.path=value", ""),
        (".=1", "is not key.path=value", ""),
        ("seed=[", "not valid YAML", ""),
        ("seed=.nan", "not valid YAML", ""),
        ("sead=1", "unknown key 'sead'", "did you mean 'seed'?"),
        ("encoder.poling=mean", "unknown key 'poling'", "did you mean 'pooling'?"),
        ("transfr.strategy.name=uniform", "unknown key 'transfr'", "did you mean 'transfer'?"),
        ("tasks.tunels.prompt=x", "no item 'tunels'", "did you mean 'tunnels'?"),
        ("tasks.2.prompt=x", "no item 2", "bridges, tunnels"),
        ("tasks.-1.prompt=x", "no item '-1'", ""),
        ("tasks.\u00b2.prompt=x", "no item '\u00b2'", ""),
        ("finetune.optimizer.betas.7=0.1", "no item 7", ""),
        ("seed.deep.deeper=1", "seed is 7, not a section", "set seed"),
        ("seed=", "seed can't be None", "integer"),
        ("tasks.tunnels.prompt=find: the tunnel", "prompt can't be a mapping", "string"),
        ("encoder.temperature=warm", "temperature can't be 'warm'", "number"),
        ("transfer.strategy.options.percent=70", "'reweight' has no option 'percent'", ""),
    ],
)
def test_a_bad_set_is_told(override, message, remedy):
    found = faults(RECIPE, override)
    assert len(found) == 1
    assert message in found[0][0]
    assert remedy in (found[0][2] or "")
    assert f"--set {override}" in (found[0][1] or found[0][0]) or "--set" in found[0][0]


def test_options_fit_the_strategy_that_is_named():
    recipe = load(RECIPE, "transfer.strategy.options.percent=50", strategy="top_percent").recipe
    assert recipe.transfer.strategy.model_dump() == {"name": "top_percent", "options": {"percent": 50}}
    assert load(RECIPE, strategy="reweight").recipe.transfer.strategy.options == {"max_epochs": 4}  # the recipe's own
    message, where, remedy = one_fault(RECIPE, strategy="top_persent")
    assert "top_persent" in message and where.startswith("--strategy") and "did you mean 'top_percent'?" in remedy


def test_set_of_a_name_comes_before_its_options_in_whatever_order():
    options = "transfer.strategy.options.percent=50"
    recipe = load(RECIPE, options, "transfer.strategy.name=top_percent").recipe
    assert recipe.transfer.strategy.model_dump() == {"name": "top_percent", "options": {"percent": 50}}


# ---- ${VARIABLES} and task lists ----


def test_variables_and_their_defaults_are_put_in(monkeypatch):
    monkeypatch.setenv("ROADS", "data")
    monkeypatch.delenv("ELSEWHERE", raising=False)
    text = changed("path: data/bridges.jsonl", 'path: "${ROADS}/bridges.jsonl"').replace(
        "path: data/tunnels.jsonl", "path: ${ELSEWHERE:-data}/tunnels${ELSEWHERE:-}.jsonl"
    )
    assert [task.path for task in load(text).recipe.tasks] == ["data/bridges.jsonl", "data/tunnels.jsonl"]


def test_a_variable_that_is_not_set_is_one_fault_even_where_another_has_a_default(monkeypatch):
    monkeypatch.delenv("ROADS", raising=False)
    message, where, _ = one_fault(changed("path: data/tunnels.jsonl", 'path: "${ROADS:-x}${ROADS}"'))
    assert message == "the environment variable ROADS is not set" and where == "recipe.yaml:6, tasks.1.path"


def test_what_only_looks_like_a_variable_is_a_path():
    assert one_fault(changed("path: data/tunnels.jsonl", 'path: "${A B}/x"'))[0] == "there is no file ${A B}/x"


def listed_in(name):
    return RECIPE[: RECIPE.index("tasks:")] + f"tasks: {name}\n" + RECIPE[RECIPE.index("backbone:") :]


def test_tasks_may_stand_in_a_file_of_their_own(project, monkeypatch):
    monkeypatch.setenv("LISTS", "lists")
    (project / "lists").mkdir()
    (project / "lists" / "roads.yaml").write_text("# roads\n- {name: a, path: data/bridges.jsonl}\n- {name: b}\n")
    message, where, _ = one_fault(listed_in("${LISTS}/roads.yaml"))
    assert (message, where) == ("the key 'path' is missing", "lists/roads.yaml:3, tasks.1.path")
    (project / "lists" / "roads.yaml").write_text("tasks:\n- {name: a, path: data/bridges.jsonl}\n")
    assert load(listed_in("lists/roads.yaml"), "tasks.a.prompt=p").recipe.tasks[0].prompt == "p"
    assert load(RECIPE, "tasks=lists/roads.yaml").recipe.tasks[0].name == "a"


def test_a_task_list_is_found_from_the_recipes_folder_too(project):
    (project / "deep").mkdir()
    (project / "deep" / "list.yaml").write_text("- {name: a, path: data/bridges.jsonl}\n")
    (project / "deep" / "recipe.yaml").write_text("tasks: list.yaml\n")
    assert recipes.load("deep/recipe.yaml").recipe.tasks[0].name == "a"


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "there is no task list list.yaml"),
        ("", "holds no list of tasks"),
        ("words", "holds no list of tasks"),
        ("{a: 1}", "holds no list of tasks"),
        ("- {name: [}", "not valid YAML"),
        (b"\xff\xfe\xfa", "can't read list.yaml"),
    ],
)
def test_a_task_list_that_is_none_is_one_fault(project, content, message):
    if content is not None:
        (project / "list.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    found = faults(listed_in("list.yaml"))
    assert len(found) == 1 and message in found[0][0] and found[0][2]


@pytest.mark.parametrize("name", ["data", '"a\\0b"', "x" * 5000, "${UNSET_ANYWHERE}/x.yaml"])
def test_a_strange_name_of_a_task_list_is_one_fault(name):
    assert len(faults(listed_in(name))) == 1


# ---- whatever the file holds ----


def _places(value, place=()):
    yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*place, key))


def _put(values, place, new):
    for key in place[:-1]:
        values = values[key]
    if place:
        values[place[-1]] = new


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
PLACES = list(_places(yaml.safe_load(RECIPE)))[1:]
quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@quick
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), PLAIN, st.text(max_size=6)), min_size=1, max_size=4))
def test_any_change_of_values_and_keys_loads_or_is_told(changes):
    values = yaml.safe_load(RECIPE)
    for place, new, key in changes:
        try:
            _put(values, place, new)
            _put(values, (*place[:-1], key), new)
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change has taken the place away
    _loads_or_tells(yaml.safe_dump(values, allow_unicode=True, sort_keys=False))


@quick
@given(
    cut=st.tuples(st.integers(0, len(RECIPE)), st.integers(0, 9)),
    put=st.text("[]{}:,&*!|>'\"%@`#?- \t\n0aé", max_size=5),
)
def test_any_change_of_the_text_loads_or_is_told(cut, put):
    _loads_or_tells(RECIPE[: cut[0]] + put + RECIPE[sum(cut) :])


@quick
@given(override=st.text("abcdefgst._0123=[]{}:'- ", max_size=20), key=st.sampled_from(PLACES))
def test_any_override_loads_or_is_told(override, key):
    for text in (override, ".".join(map(str, key)) + override):
        _loads_or_tells(RECIPE, text)


def _loads_or_tells(text, *overrides):
    try:
        canonical_json(load(text, *overrides).recipe.model_dump(mode="json")).encode()
    except TdroError as error:
        assert error.problems() and all(problem["message"] for problem in error.problems())
        str(error).encode()


def test_rows_that_a_model_is_trained_on_are_not_measured_as_held_out():
    message, where, remedy = one_fault(RECIPE + "  held_out: {queries: 10}\n")
    assert message == "finetune trains on the rows that eval.held_out measures"
    assert where.endswith("finetune.rows") and "held_in" in remedy
    fair = changed("finetune: {steps: 20,", "finetune: {rows: held_in, steps: 20,") + "  held_out: {}\n"
    assert load(fair).recipe.eval.held_out.queries == 100
    none = fair.replace("train_ref: {steps: 20,", "train_ref: {hold_out: 0, steps: 20,")
    assert one_fault(none)[0] == "eval.held_out has no rows: none are held out"


def test_an_evaluation_needs_something_to_measure_on():
    assert "benchmarks, or held_out" in one_fault(RECIPE[: RECIPE.index("eval:")] + "eval: {}\n")[0]


@pytest.mark.parametrize(
    "key, meant", [("zero_optimisation", "zero_optimization"), ("Bf16", "bf16"), ("fp_16", "fp16")]
)
def test_a_misspelt_key_of_deepspeed_is_told(key, meant):
    message, where, remedy = one_fault(RECIPE + f"deepspeed: {{{key}: {{enabled: true}}}}\n")
    assert message == f"DeepSpeed has no key {key!r}" and remedy == f"did you mean {meant!r}?"
    assert where.endswith(f"deepspeed.{key}")


@pytest.mark.parametrize("key", ["bf16", "amp", "comms_logger", "a_key_of_a_later_version"])
def test_other_keys_are_deepspeeds_to_judge(key):
    assert load(RECIPE + f"deepspeed: {{{key}: {{}}}}\n").recipe.deepspeed == {key: {}}


def test_keys_of_deepspeed_that_would_change_the_batch_are_refused_with_what_to_set_instead():
    wrong = "deepspeed: {zero_stage: 4, gradient_accumulation_steps: 4, scheduler: {type: x}}\n"
    told = {where.rpartition(".")[2]: remedy for _, where, remedy in faults(RECIPE + wrong)}
    assert "activation_tokens" in told["gradient_accumulation_steps"] and "schedule" in told["scheduler"]
    assert told["zero_stage"] == "valid: 0, 1, 2, 3"


def test_an_attention_that_is_not_known_is_told_before_anything_is_loaded():
    message, _, remedy = one_fault(changed("backbone: {", "backbone: {attention: sdpaa, "))
    assert "attention can't be 'sdpaa'" in message and "did you mean 'sdpa'" in remedy
