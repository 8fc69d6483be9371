"""The embedded sample: real retrieval tasks, made from the sources of Python and of the packages that tdro installs.

Every row is a pure function of the installed versions: files are read in the order of their names, choices are made by
SHA-256 of what is chosen, and nothing depends on the clock, the hash seed or the place of the installation.
"""

from __future__ import annotations

import ast
import gzip
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tdro_cli.artifacts import (
    MANIFEST,
    digest_file,
    is_complete,
    manifest_of,
    publishing,
    read_json,
    write_json,
    write_text,
)
from tdro_cli.errors import TdroError

PROVENANCE = "provenance.json"
REVISION = 1  # raise it when the same packages would give other rows: an older sample is then not taken for ours
PASSAGE_CHARACTERS = 600  # a tiny encoder reads these in one piece
QUERY_CHARACTERS = 300
HELD_OUT_ONE_IN = 8  # modules
STDLIB = "python"
PACKAGES = (STDLIB, "deepspeed", "matplotlib", "numpy", "peft", "pyarrow", "scipy", "torch", "transformers")
# Tests repeat the wording of what they test, vendored code belongs to others, the compilers of torch are a third of its
# bulk, and the models of transformers are copies of each other. The parts of Python are those that systems leave out.
SKIPPED_FOLDERS = {"test", "tests", "testing", "_vendor", "_inductor", "_dynamo", "models", "pybind11_tests"} | {
    "idlelib", "lib2to3", "tkinter", "turtledemo", "ensurepip", "distutils", "site-packages", "dist-packages"
}  # fmt: skip


@dataclass(frozen=True)
class Definition:
    """A function, method or class of a source file, with what its author wrote about it."""

    package: str
    module: str
    qualname: str
    is_class: bool
    docstring: str
    signature: str  # empty for a class
    code: str  # without decorators and docstring; empty for a class
    errors: tuple[tuple[str, str], ...]  # message, code that raises it with the message taken out

    @property
    def name(self) -> str:
        return f"{self.module}:{self.qualname}"

    @property
    def words(self) -> str:
        """The name as a person would say it: `shutil:copyTree` is "shutil copy tree"."""
        place, words = split_words(self.module.rpartition(".")[2]), split_words(self.qualname)
        return words if words.startswith(place) else f"{place} {words}"


@dataclass(frozen=True)
class Pair:
    """A query and the passage that answers it."""

    query: str
    docid: str
    title: str
    text: str


@dataclass(frozen=True)
class Task:
    prompt: str
    packages: tuple[str, ...]
    rows: int  # at most
    pairs: Callable[[Definition], Iterator[Pair]]


@dataclass(frozen=True)
class Collection:
    prompt: str
    queries: int  # at most
    documents: int  # at most
    asked: tuple[Callable[[Definition], Iterator[Pair]], ...]  # in equal shares


def package_folder(package: str) -> Path:
    """Where the sources of `package` lie; TdroError when it is not installed as source files."""
    if package == STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    spec = importlib.util.find_spec(package)  # finds without importing
    if spec is None or not spec.submodule_search_locations:
        raise TdroError(
            f"the package {package!r} is not installed, so the sample cannot be made from it",
            remedy=f"install tdro with its dependencies: pip install tdro (or: pip install {package})",
        )
    return Path(next(iter(spec.submodule_search_locations)))


def source_files(package: str) -> list[tuple[str, Path]]:
    """(dotted module name, file) of every source file that is read, sorted by name."""
    folder = package_folder(package)
    found = []
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        # _sysconfigdata describes the machine that Python was built on
        if not SKIPPED_FOLDERS.intersection(parts[:-1]) and not parts[-1].startswith("_sysconfigdata"):
            names = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
            found.append((".".join(names if package == STDLIB else (package, *names)), path))
    if not found:
        raise TdroError(f"no sources of {package!r} in {folder}", remedy="use a Python that ships its .py files")
    return sorted(found, key=lambda pair: (pair[0], pair[1].name))


def read_definitions(package: str, module: str, path: Path) -> list[Definition]:
    """The functions, methods and classes of one file that say or raise something, in order.

    Of several with one name, the first that is documented counts.

    Raises SyntaxError (also for bytes that are no text) where this Python cannot read the file.
    """
    try:
        with tokenize.open(path) as file:
            source = file.read()
    except UnicodeDecodeError as error:
        raise SyntaxError(str(error)) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        tree = ast.parse(source)
    lines = source.split("\n")
    found: dict[str, Definition] = {}
    for qualname, node in _named_nodes(tree, ""):
        earlier = found.get(qualname)
        definition = _definition(package, module, qualname, node, lines)
        if definition and (earlier is None or (definition.docstring and not earlier.docstring)):
            found[qualname] = definition
    return list(found.values())


def _named_nodes(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
    for child in getattr(node, "body", []):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield prefix + child.name, child
            yield from _named_nodes(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from _named_nodes(child, prefix)


def _definition(package: str, module: str, qualname: str, node: Any, lines: list[str]) -> Definition | None:
    docstring = ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        return Definition(package, module, qualname, True, docstring, "", "", ()) if docstring else None
    body = node.body[1:] if docstring else node.body
    first = body[0].lineno - 1 if body else node.end_lineno
    raises = any(" raise " in line for line in lines[first : node.end_lineno])
    if not docstring and not raises:
        return None
    head_end = node.body[0].lineno - 1
    signature = _dedent(lines[node.lineno - 1 : head_end])
    if head_end < node.lineno:  # `def f(): ...` on one line has no body worth a passage
        return Definition(package, module, qualname, False, docstring, signature, "", ())
    code = _dedent(lines[node.lineno - 1 : head_end] + lines[first : node.end_lineno])
    errors = tuple(_errors(node, signature, lines, first)) if raises else ()
    return Definition(package, module, qualname, False, docstring, signature, cap(code), errors)


def _dedent(lines: list[str]) -> str:
    return textwrap.dedent("\n".join(line.rstrip() for line in lines)).strip("\n")


def _errors(node: ast.FunctionDef, signature: str, lines: list[str], first: int) -> Iterator[tuple[str, str]]:
    """The messages that a function raises, each with the function as it reads when that message is taken out."""
    for child in ast.walk(node):
        if not isinstance(child, ast.Raise):
            continue
        raised = child.exc
        if not isinstance(raised, ast.Call) or not raised.args or not isinstance(raised.func, ast.Name):
            continue
        message = join_space(_message(raised.args[0]))
        if len(re.findall(r"[A-Za-z]{3,}", message)) < 4:
            continue
        start, end = child.lineno - 1, child.end_lineno or child.lineno
        taken_out = lines[start][: len(lines[start]) - len(lines[start].lstrip())] + f"raise {raised.func.id}(...)"
        body = _dedent([*lines[first:start], taken_out, *lines[end : node.end_lineno]]).split("\n")
        code = _around(cap(signature, 200), body, start - first)
        yield cap(f"{raised.func.id}: {message}", QUERY_CHARACTERS), code


def _around(signature: str, body: list[str], wanted: int) -> str:
    """A function within the size of a passage, with line `wanted` of its body in it."""
    body = [f"    {line}" if line else line for line in body]
    begin, size = wanted, len(signature) + len(body[wanted]) + 9
    while begin and size + len(body[begin - 1]) + 1 <= PASSAGE_CHARACTERS:
        begin -= 1
        size += len(body[begin]) + 1
    return cap("\n".join([signature, *(["    ..."] if begin else []), *body[begin:]]))


def _message(node: ast.AST) -> str:
    """The text of a message expression, with names where values would stand."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(_message(value) for value in values)
        case ast.FormattedValue(value=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name
        case ast.FormattedValue():
            return "..."
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _message(left) + _message(right)
        case ast.BinOp(left=left, op=ast.Mod()):
            return _message(left)
        case ast.Call(func=ast.Attribute(value=left, attr="format")):
            return _message(left)
    return ""


def cap(text: str, characters: int = PASSAGE_CHARACTERS) -> str:
    """`text` cut before the word that would pass `characters`."""
    if len(text) <= characters:
        return text
    cut = max(text.rfind(space, 0, characters + 1) for space in " \n")
    return text[: cut if cut > characters // 2 else characters].rstrip()


def join_space(text: str) -> str:
    return " ".join(text.split())


def split_words(name: str) -> str:
    """`BaseEventLoop._run_once` as "base event loop run once"."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[\W_]+", " ", name)
    return join_space(spaced).lower()


def plain(text: str) -> str:
    """Docstring mark-up as running text: roles, backquotes and line breaks go, words stay."""
    text = re.sub(r":[a-zA-Z][\w:+-]*:`~?\.?([^`<]*?)\s*(?:<[^>]*>)?`", r"\1", text)
    text = re.sub(r"\[`?([^\]`]+)`?\](?:\([^)]*\)|\[[^\]]*\])?_?", r"\1", text)
    return join_space(re.sub(r"`+_*|[-=~]{4,}", "", text))


SECTION = re.compile(
    r"^(?:(?P<underlined>\w[\w ]*)\n[-=~]{3,} *$|(?P<google>[A-Z][\w ]*):{1,2} *$"
    r"|(?P<field>:\w+[ \w]*:(?!`)|\.\. \w+::|>>> ))",
    re.MULTILINE,
)
PARAMETER_SECTIONS = {"parameters", "other parameters", "args", "arguments", "keyword args", "keyword arguments"}


def sections(docstring: str) -> list[tuple[str, str]]:
    """(lower-case heading, body) in order, in NumPy's, Google's or Sphinx's manner; what comes first has no heading."""
    marks = list(SECTION.finditer(docstring))
    ends = [mark.start() for mark in marks] + [len(docstring)]
    found = [("", docstring[: ends[0]])]
    for mark, end in zip(marks, ends[1:], strict=True):
        heading = (mark["underlined"] or mark["google"] or mark["field"]).strip().lower()
        start = mark.start() if mark["field"] else mark.end()
        found.append((heading, docstring[start:end].strip("\n")))
    return found


def summary(docstring: str) -> str:
    """The first paragraph in one line, or its first sentence when it is long; empty when it says next to nothing."""
    text = plain(sections(docstring)[0][1].strip().split("\n\n")[0])
    if len(text) > 200:
        text = re.split(r"(?<=[a-z)\]])\.\s", text)[0]
    words = re.findall(r"[A-Za-z]{2,}", text)
    readable = len(words) >= 4 and text[:1].isalpha() and "->" not in text and not re.match(r"[\w.]+\(", text)
    return cap(text, QUERY_CHARACTERS) if readable else ""


def description(docstring: str) -> str:
    """The paragraphs between the summary and the first section; empty when shorter than 80 characters."""
    text = sections(docstring)[0][1].strip().partition("\n\n")[2]
    text = plain(text)
    return cap(text) if len(text) >= 80 else ""


def parameters(docstring: str) -> list[tuple[str, str]]:
    """(name, type and description) of every parameter that is described."""
    found: list[tuple[str, str]] = []
    for heading, body in sections(docstring):
        if heading in PARAMETER_SECTIONS:
            for entry in re.split(r"\n(?=\S)", textwrap.dedent(body)):
                found.extend(_parameter(entry))
    return found


def _parameter(entry: str) -> Iterator[tuple[str, str]]:
    # NumPy's `name : type` over an indented text, or Google's `name (type): text`
    match = re.match(r"[*`]*(\w+)[*`]*(?: ?\(([^\n]*?)\))?( ?):[ \n]?(.*)", entry, re.DOTALL)
    if match:
        name, kind, space, text = match.groups()
        if space and not kind:
            kind, _, text = text.partition("\n")
        text = plain(f"{kind}. {text}" if kind else text)
        if len(re.findall(r"[A-Za-z]{2,}", text)) >= 6:
            yield name, cap(text)


def example_code(docstring: str) -> str:
    """The statements of the first doctest, without prompts, output and imports."""
    statements = []
    for line in docstring.split("\n"):
        match = re.match(r"\s*(?:>>>|\.\.\.) ?(.*)", line)
        if match and not re.match(r"(?:import|from) |\s*(?:#|$)", match[1]):
            statements.append(match[1].rstrip())
    text = cap("\n".join(statements), QUERY_CHARACTERS)
    return text if len(text) >= 25 else ""


VERBS = set(
    re.findall(
        r"\w+",
        """
        add append apply build call cast change check clear close collect compute concatenate construct convert copy
        count create decode decompose define delete describe determine disable display download draw enable encode
        estimate evaluate execute export extract fill filter find fit format generate get give handle import
        initialize insert iterate join list load log make map merge move multiply normalize open parse perform plot
        prepare print process produce provide put quantize raise read receive reduce register release remove render
        replace reset resize restore retrieve return rotate run sample save scale search select send serialize set
        show shuffle sort split start stop store sum test transform transpose unregister update validate verify wait
        wrap write yield
        """,
    )
)


def question(text: str) -> str:
    """A summary as what a person would ask: "Compute the norm." is "How do I compute the norm?"; empty if it is neither
    an instruction nor a thing."""
    first, _, rest = text.rstrip(".:;, ").partition(" ")
    word = first.lower()
    forms = (word, word.removesuffix("s"), word.removesuffix("es"))
    if base := next((form for form in forms if form in VERBS), ""):
        return f"How do I {base} {rest}?"
    return f"What is {word} {rest}?" if word in ("a", "an", "the") else ""


def summary_to_code(definition: Definition) -> Iterator[Pair]:
    text = summary(definition.docstring)
    if text and len(definition.code) - len(definition.signature) >= 40:
        yield Pair(text, definition.name, definition.words, definition.code)


def summary_to_description(definition: Definition) -> Iterator[Pair]:
    text, answer = summary(definition.docstring), description(definition.docstring)
    if text and answer:
        yield Pair(text, f"{definition.name}#description", "", answer)


def parameter_to_signature(definition: Definition) -> Iterator[Pair]:
    if len(definition.signature) >= 30:
        described = [pair for pair in parameters(definition.docstring) if pair[0] in definition.signature]
        for name, text in _chosen(described, 2, definition.name):
            query = cap(f"{name}: {text}", QUERY_CHARACTERS)
            yield Pair(query, f"{definition.name}#signature", definition.words, cap(definition.signature))


def parameter_question(definition: Definition) -> Iterator[Pair]:
    words = split_words(definition.qualname)
    for name, text in _chosen(parameters(definition.docstring), 2, definition.name):
        query = f"What does the argument {name} of {words} do?"
        yield Pair(query, f"{definition.name}#parameter-{name}", definition.words, cap(f"{name}: {text}"))


def summary_question(definition: Definition) -> Iterator[Pair]:
    for pair in summary_to_description(definition):
        if asked := question(pair.query):
            yield Pair(asked, pair.docid, pair.title, pair.text)


def error_to_function(definition: Definition) -> Iterator[Pair]:
    for number, (message, code) in enumerate(definition.errors[:2], 1):
        yield Pair(message, f"{definition.name}#raise-{number}", definition.words, code)


def class_name_to_docstring(definition: Definition) -> Iterator[Pair]:
    text = plain(definition.docstring)
    if definition.is_class and len(text) >= 80:
        words = split_words(definition.qualname)
        yield Pair(f"{words} class of {definition.package}", f"{definition.name}#docstring", "", cap(text))


def example_to_docstring(definition: Definition) -> Iterator[Pair]:
    asked, text = example_code(definition.docstring), summary(definition.docstring)
    if asked and text:
        answer = cap(f"{text} {description(definition.docstring)}".strip())
        yield Pair(asked, f"{definition.name}#about", definition.words, answer)


SCIENCE = ("matplotlib", "numpy", "scipy")
TASKS = {
    "torch_code": Task(
        "Given a one-line description of a deep learning function, retrieve the PyTorch code that implements it",
        ("torch",),
        5000,
        summary_to_code,
    ),
    "parameter_signature": Task(
        "Given the description of a parameter, retrieve the signature of the function that takes it",
        (*SCIENCE, "transformers", "torch", "peft", "pyarrow"),
        3500,
        parameter_to_signature,
    ),
    "stdlib_code": Task(
        "Given a one-line description, retrieve the function of the Python standard library that does it",
        (STDLIB,),
        2500,
        summary_to_code,
    ),
    "science_description": Task(
        "Given the summary of a function or class, retrieve the longer explanation from its documentation",
        SCIENCE,
        2000,
        summary_to_description,
    ),
    "error_function": Task(
        "Given an error message, retrieve the function that raises it",
        PACKAGES,
        1500,
        error_to_function,
    ),
    "class_docstring": Task(
        "Given the name of a class, retrieve its documentation",
        PACKAGES,
        1200,
        class_name_to_docstring,
    ),
    "parameter_question": Task(
        "Given a question about an argument of a function, retrieve the documentation of the argument",
        PACKAGES,
        800,
        parameter_question,
    ),
    "example_docstring": Task(
        "Given an example of its use, retrieve the documentation of the function",
        (STDLIB, "numpy", "scipy", "torch"),
        400,
        example_to_docstring,
    ),
}
COLLECTIONS = {
    "code_search": Collection(
        "Given a one-line description, retrieve the function that implements it", 500, 2500, (summary_to_code,)
    ),
    "api_questions": Collection(
        "Given a question about a library, retrieve the documentation that answers it",
        500,
        2500,
        (summary_question, parameter_question),
    ),
}
TASK_PROMPTS = {name: task.prompt for name, task in TASKS.items()}
COLLECTION_PROMPTS = {name: collection.prompt for name, collection in COLLECTIONS.items()}


def held_out(module: str) -> bool:
    """Whether `module` is kept for the test collections: one in eight, by the digest of its name."""
    return _lot(module) % HELD_OUT_ONE_IN == 0


def _lot(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])


def _chosen(values: list[Any], count: int, salt: str) -> list[Any]:
    """`count` of `values`, drawn by digest."""
    return sorted(values, key=lambda value: (_lot(f"{salt}\n{value}"), str(value)))[:count]


def task_pairs(name: str, definitions: Iterable[Definition]) -> list[Pair]:
    """The rows of one task, in drawn order: no query twice, every docid one text, no held-out module."""
    task = TASKS[name]
    seen: set[str] = set()
    found = []
    for definition in definitions:
        if definition.package in task.packages and not held_out(definition.module):
            for pair in task.pairs(definition):
                if pair.query not in seen and pair.query != f"{pair.title} {pair.text}".strip():
                    seen.add(pair.query)
                    found.append(pair)
    return sorted(found, key=lambda pair: (_lot(f"{name}\n{pair.docid}\n{pair.query}"), pair.query))[: task.rows]


def collection_pairs(name: str, definitions: Iterable[Definition]) -> tuple[list[Pair], dict[str, dict[str, Pair]]]:
    """The documents of one test collection and {query: {docid: pair}}, from held-out modules alone.

    A query that several documents answer (one summary, several functions) has them all.
    """
    collection = COLLECTIONS[name]
    definitions = [definition for definition in definitions if held_out(definition.module)]
    documents: dict[str, Pair] = {}
    answers: dict[str, dict[str, Pair]] = {}
    for asked in collection.asked:
        pairs = [pair for definition in definitions for pair in asked(definition)]
        pairs.sort(key=lambda pair: (_lot(f"{name}\n{pair.docid}"), pair.docid))
        # of documents with one text, one: neither could be preferred to the other
        distinct = {f"{pair.title}\n{pair.text}": pair for pair in reversed(pairs)}
        queries: dict[str, dict[str, Pair]] = {}
        for pair in list(reversed(distinct.values()))[: collection.documents // len(collection.asked)]:
            documents[pair.docid] = pair
            queries.setdefault(pair.query, {})[pair.docid] = pair
        answers.update(list(queries.items())[: collection.queries // len(collection.asked)])
    return list(documents.values()), answers


def write_sample(folder: Path, *, progress: Any = None) -> dict[str, Any]:
    """Writes tasks/NAME.jsonl.gz, collections/NAME/ (BEIR layout) and provenance.json into `folder`, all or nothing.

    Returns {"tasks": {name: rows}, "collections": {name: {"documents", "queries"}}, "files": [relative path]}. A folder
    that already holds the sample of the installed versions is left as it is. Raises TdroError for a folder that holds
    anything else, and for a package without sources. `progress` is a tdro_cli.run.progress.Progress.
    """
    folder = Path(folder).resolve()
    made_from = _made_from()
    if folder.exists() and not folder.is_dir():
        raise TdroError(f"{folder} is a file", remedy="name a folder that is empty or does not exist")
    if folder.is_dir() and any(folder.iterdir()):
        _check_is_this_sample(folder, made_from)
    else:
        if folder == Path.cwd():  # it is replaced as a whole: the caller would stand in a folder that is gone
            remedy = "name a folder inside it: tdro sample sample"
            raise TdroError("the sample cannot replace the current folder", remedy=remedy)
        manifest = {"schema": 1, "kind": "sample", "made_from": made_from}
        with publishing(folder, lambda: manifest) as aside:
            definitions, unreadable = _read_packages(progress)
            _write_files(aside, definitions, {"schema": 1, "made_from": made_from, "unreadable_files": unreadable})
    return _summary_of(folder)


def _made_from() -> dict[str, Any]:
    versions = {package: _version(package) for package in PACKAGES}
    return {"sample_revision": REVISION, "packages": versions}


def _version(package: str) -> str:
    package_folder(package)  # the error for a missing package
    return platform.python_version() if package == STDLIB else importlib.metadata.version(package)


def _licence(package: str) -> str:
    """The licence as the package's metadata name it."""
    if package == STDLIB:
        return "PSF-2.0"
    metadata: Any = importlib.metadata.metadata(package)
    named = metadata.get("License-Expression") or metadata.get("License") or ""
    if named and len(named) < 100:  # some put the whole text there
        return named
    classifiers = [name for name in metadata.get_all("Classifier") or [] if name.startswith("License ::")]
    return (
        ", ".join(name.rpartition(":: ")[2] for name in classifiers) or named.strip().partition("\n")[0] or "not stated"
    )


def _check_is_this_sample(folder: Path, made_from: dict[str, Any]) -> None:
    remedy = f"remove {folder}, or name a folder that is empty or does not exist"
    manifest = manifest_of(folder) if is_complete(folder) else {}
    if manifest.get("kind") != "sample":
        raise TdroError(f"{folder} is not empty and holds no sample", remedy=remedy)
    if manifest["made_from"] != made_from:
        raise TdroError(
            f"{folder} holds a sample made from other versions",
            where=_differences(manifest["made_from"], made_from),
            remedy=remedy,
        )
    damaged = [
        name
        for name, digest in manifest["files"].items()
        if not (folder / name).is_file() or digest_file(folder / name) != digest
    ]
    if damaged:
        raise TdroError(f"files of the sample in {folder} are missing or changed: {', '.join(damaged)}", remedy=remedy)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    flat = [{"sample_revision": made["sample_revision"], **made["packages"]} for made in (there, here)]
    names = [name for name in sorted({*flat[0], *flat[1]}) if flat[0].get(name) != flat[1].get(name)]
    return ", ".join(f"{name} {flat[0].get(name)} there, {flat[1].get(name)} here" for name in names)


def _read_packages(progress: Any) -> tuple[list[Definition], list[str]]:
    files = [(package, *source) for package in PACKAGES for source in source_files(package)]
    definitions, unreadable = [], []
    with progress.start("reading sources", len(files), "files") if progress else nullcontext() as bar:
        for package, module, path in files:
            try:
                definitions.extend(read_definitions(package, module, path))
            except SyntaxError:
                unreadable.append(module)
            if bar:
                bar.advance()
    return definitions, unreadable


def _write_files(folder: Path, definitions: list[Definition], facts: dict[str, Any]) -> None:
    tasks = {name: task_pairs(name, definitions) for name in TASKS}
    collections = {name: collection_pairs(name, definitions) for name in COLLECTIONS}
    for name, pairs in tasks.items():
        _write_rows(folder / "tasks" / f"{name}.jsonl.gz", map(_task_row, pairs))
    for name, (documents, answers) in collections.items():
        _write_collection(folder / "collections" / name, documents, answers)
    trained = {pair.query for pairs in tasks.values() for pair in pairs}
    provenance = {
        **facts,
        "licences": {package: _licence(package) for package in PACKAGES},
        "definitions": {package: sum(d.package == package for d in definitions) for package in PACKAGES},
        "tasks": {
            name: {"rows": len(pairs), "prompt": TASKS[name].prompt, "packages": TASKS[name].packages}
            for name, pairs in tasks.items()
        },
        "collections": {
            name: {
                "documents": len(documents),
                "queries": len(answers),
                "judgements": sum(map(len, answers.values())),
                "queries_that_are_training_queries": len(trained.intersection(answers)),
                "prompt": COLLECTIONS[name].prompt,
            }
            for name, (documents, answers) in collections.items()
        },
        "held_out_modules": sorted({d.module for d in definitions if held_out(d.module)}),
    }
    write_json(folder / PROVENANCE, provenance)


def _query_id(query: str) -> str:
    return hashlib.sha256(query.encode()).hexdigest()[:16]


def _task_row(pair: Pair) -> dict[str, Any]:
    positive = {"docid": pair.docid, "title": pair.title, "text": pair.text}
    return {
        "query_id": _query_id(pair.query),
        "query": pair.query,
        "positive_passages": [positive],
        "negative_passages": [],
    }


def _write_collection(folder: Path, documents: list[Pair], answers: dict[str, dict[str, Pair]]) -> None:
    _write_rows(
        folder / "corpus.jsonl.gz", ({"_id": pair.docid, "title": pair.title, "text": pair.text} for pair in documents)
    )
    _write_rows(folder / "queries.jsonl.gz", ({"_id": _query_id(query), "text": query} for query in answers))
    judged = [f"{_query_id(query)}\t{docid}\t1\n" for query, found in answers.items() for docid in found]
    write_text(folder / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore\n" + "".join(judged))


def _write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode(), 6, mtime=0))


def _summary_of(folder: Path) -> dict[str, Any]:
    facts = read_json(folder / PROVENANCE)
    return {
        "tasks": {name: task["rows"] for name, task in facts["tasks"].items()},
        "collections": {
            name: {key: found[key] for key in ("documents", "queries")} for name, found in facts["collections"].items()
        },
        "files": sorted([*manifest_of(folder)["files"], MANIFEST]),
    }
