import json
import sys
from pathlib import Path

import pytest

from tdro_cli import recipe, registry
from tdro_cli.errors import Problems, TdroError

PLUGIN = '''
from __future__ import annotations
from dataclasses import dataclass, field
from typing import Literal, TYPE_CHECKING
if TYPE_CHECKING:
    from nowhere import Unknown

@dataclass(frozen=True)
class Full:
    """What it does.

    And why."""

    at_least: float
    how: Literal["short", "long"] = "long"
    names: tuple[str, ...] = ()
    most: int | None = None
    deep: bool = False

    def __post_init__(self):
        if self.at_least < 0:
            raise ValueError(f"at_least must be >= 0, got {self.at_least}")
        if self.most == 13:
            raise KeyError("unlucky")

class Plain:
    def __init__(self, size=3, *, hint: Unknown = None):
        self.size, self.hint = size, hint

def made(scale: float = 2.0):
    return ("made", scale)

nothing = 5
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Installs distributions the way pip leaves them: a module and a dist-info folder on the path."""
    counter = iter(range(100))

    def make(distribution: str, kind: str = "loss_measurements", /, code: str = PLUGIN, **names: str) -> str:
        number = next(counter)
        site, module = tmp_path / f"site{number}", f"stranger{number}_{abs(hash(tmp_path)) % 10**8}"
        info = site / f"{distribution.replace('-', '_')}-1.2.dist-info"
        info.mkdir(parents=True)
        (site / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        entries = "".join(f"{name} = {module}:{value}\n" for name, value in names.items())
        (info / "entry_points.txt").write_text(f"[tdro.{kind}]\n{entries}")
        monkeypatch.syspath_prepend(str(site))
        registry.installed.cache_clear()
        return module

    yield make
    registry.installed.cache_clear()


def fault(kind, name, options=None, **place):
    with pytest.raises(TdroError) as caught:
        registry.resolve(kind, name, options, **place)
    return caught.value


def test_a_strangers_plugin_is_found_beside_ours(install):
    install("stranger", full="Full")
    assert {"full", "relative"} <= set(registry.installed("loss_measurements"))
    plugin = registry.find("loss_measurements", "full")
    assert (plugin.distribution, plugin.version) == ("stranger", "1.2")
    made = registry.resolve("loss_measurements", "full", {"at_least": 1, "names": ["a"], "how": "short"})
    assert (made.at_least, made.names, made.how, made.most) == (1.0, ("a",), "short", None)


def test_every_kind_is_known_and_has_plugins_of_ours():
    for kind in registry.KINDS:
        plugins = [p for candidates in registry.installed(kind).values() for p in candidates]
        assert any(plugin.distribution == "tdro" for plugin in plugins)
        assert all(callable(plugin.load()) for plugin in plugins if plugin.distribution == "tdro")
    with pytest.raises(ValueError, match="did you mean 'backbones'"):
        registry.installed("backbone")


@pytest.mark.parametrize(
    "kind, name",
    [
        ("loss_measurements", "loss measurement"),
        ("transfer_strategies", "transfer strategy"),
        ("backbones", "backbone"),
    ],
)
def test_a_kind_has_a_singular(kind, name):
    assert registry.singular(kind) == name


def test_an_unknown_name_lists_what_is_installed_and_the_nearest(install):
    install("stranger", full="Full")
    error = fault("loss_measurements", "ratoi", where="learn_weights.loss_measurement")
    assert error.message == "no loss measurement named 'ratoi'"
    assert error.where == "learn_weights.loss_measurement.name"
    assert "full (stranger 1.2)" in error.remedy and "relative" in error.remedy and "(tdro " in error.remedy
    assert "did you mean 'full'?" in fault("loss_measurements", "ful").remedy


def test_a_name_that_two_distributions_install_is_an_error_naming_both(install):
    install("stranger", full="Full")
    install("rival", full="Full")
    error = fault("loss_measurements", "full", {"at_least": 1})
    assert "rival 1.2" in error.message and "stranger 1.2" in error.message and "uninstall" in error.remedy
    assert [row["fault"] for row in registry.listing() if row["name"] == "full"] == [error.message] * 2


def test_a_stranger_cannot_take_a_name_of_ours_in_silence(install):
    install("stranger", relative="Full")
    assert "tdro" in fault("loss_measurements", "relative").message


@pytest.mark.parametrize(
    "code, words",
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("def f(:", "SyntaxError"),
        ("raise RuntimeError('no device')", "RuntimeError: no device"),
        ("x = 1", "AttributeError"),
    ],
)
def test_a_broken_module_is_told_with_its_distribution_and_hurts_no_other(install, code, words):
    install("stranger", code=code, broken="Full")
    error = fault("loss_measurements", "broken")
    assert words in error.message and "stranger 1.2" in error.message and "stranger" in error.remedy
    rows = {row["name"]: row for row in registry.listing() if row["kind"] == "loss_measurements"}
    assert words in rows["broken"]["fault"] and "fault" not in rows["relative"]
    assert registry.resolve("loss_measurements", "relative") is not None


def test_an_entry_point_that_is_no_class_is_told(install):
    install("stranger", number="nothing")
    assert "not a class" in fault("loss_measurements", "number").message
    assert any("not a class" in row.get("fault", "") for row in registry.listing())


@pytest.mark.parametrize(
    "options, words, remedy",
    [
        ({}, "needs the option 'at_least'", "add it"),
        ({"at_least": 1, "at_leest": 2}, "has no option 'at_leest'", "did you mean 'at_least'?"),
        ({"at_least": "1"}, "option 'at_least' can't be '1'", "float"),
        ({"at_least": None}, "option 'at_least' can't be None", "float"),
        ({"at_least": True}, "option 'at_least' can't be True", "float"),
        ({"at_least": float("nan")}, "option 'at_least' can't be nan", "float"),
        ({"at_least": 1, "how": "shrt"}, "'short' or 'long'", "Literal['short', 'long']"),
        ({"at_least": 1, "names": "a"}, "option 'names'", "tuple[str, ...]"),
        ({"at_least": 1, "most": 1.5}, "option 'most'", "int | None"),
        ({"at_least": 1, "deep": 1}, "option 'deep'", "bool"),
        ({"at_least": {1: object()}}, "not a plain value", "float"),
        ({"at_least": -1}, "at_least must be >= 0, got -1", "change"),
        ({"at_least": 1, "most": 13}, "KeyError: 'unlucky'", "stranger"),
    ],
)
def test_options_are_checked(install, options, words, remedy):
    # hints of this module can be read: nothing in it is only for type checkers
    install("stranger", code=PLUGIN.replace(": Unknown", ""), full="Full")
    error = fault("loss_measurements", "full", options, where="here")
    assert words in error.message and remedy in error.remedy
    assert error.where.startswith("here.options")


def test_several_wrong_options_come_together(install):
    install("stranger", full="Full")
    error = fault("loss_measurements", "full", {"a": 1, "how": "b", "deep": "c"}, where="here")
    assert isinstance(error, Problems)
    assert [e.where for e in error.errors] == [
        "here.options.a",
        "here.options",
        "here.options.how",
        "here.options.deep",
    ]


def test_a_class_without_dataclass_and_a_function_are_plugins_too(install):
    install("stranger", plain="Plain", made="made")
    assert registry.resolve("loss_measurements", "plain", {"size": 4, "hint": [1]}).hint == [1]
    assert registry.resolve("loss_measurements", "made", {"scale": 3}) == ("made", 3.0)
    assert list(registry.options_of(registry.find("loss_measurements", "plain").load())) == ["size", "hint"]


def test_the_listing_is_plain_and_tells_options_and_words(install):
    install("stranger", full="Full")
    (row,) = [row for row in registry.listing() if row["name"] == "full"]
    assert row["words"] == "What it does."
    assert row["options"]["at_least"] == "required" and row["options"]["how"] == "'long'"
    json.dumps(registry.listing(), allow_nan=False)


def test_one_distribution_seen_twice_is_no_clash(install, monkeypatch, tmp_path):
    module = install("stranger", full="Full")
    copy = tmp_path / "copy" / "stranger-1.2.dist-info"
    copy.mkdir(parents=True)
    (copy / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.2\n")
    (copy / "entry_points.txt").write_text(f"[tdro.loss_measurements]\nfull = {module}:Full\n")
    monkeypatch.syspath_prepend(str(copy.parent))
    registry.installed.cache_clear()
    assert registry.resolve("loss_measurements", "full", {"at_least": 0})


def test_a_recipe_names_a_strangers_plugin_and_its_faults(install, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    install("stranger", full="Full")
    Path("a.jsonl").write_text("{}")
    text = "tasks: [{name: a, path: a.jsonl}]\nlearn_weights:\n  loss_measurement: {name: full, options: %s}\n"
    Path("r.yaml").write_text(text % "{at_least: 2}")
    assert recipe.load("r.yaml").recipe.learn_weights.loss_measurement.name == "full"
    for options, place in (("{at_leest: 2, at_least: 1}", ".at_leest"), ("{at_least: -2}", "")):
        Path("r.yaml").write_text(text % options)
        with pytest.raises(TdroError) as caught:
            recipe.load("r.yaml")
        (problem,) = caught.value.problems()
        assert problem["where"] == f"r.yaml:3, learn_weights.loss_measurement.options{place}"


def test_finding_plugins_imports_none_of_them(install):
    module = install("stranger", full="Full")
    registry.find("loss_measurements", "full")
    assert module not in sys.modules
