import gzip
import json

import numpy as np
import pytest

from tdro_cli.errors import RunFailed, TdroError
from tdro_cli.model import embedding, encode
from tdro_cli.model.contract import EncoderContract
from tdro_cli.model.embedding import load_embedder
from tdro_cli.model.encode import encode_file, read_texts
from tdro_cli.run.progress import Silent

PROMPTS = {"query": "Search", "nq": "Find"}


@pytest.fixture
def embedder(tiny):
    return load_embedder(tiny("qwen2"), contract=EncoderContract(passage_length=64, prompts=PROMPTS), device="cpu")


def write(path, lines):
    text = "".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def encoded(file, embedder, folder, *, side="passage", prompt=None, dtype="float32"):
    options = {"side": side, "prompt": prompt, "dtype": dtype, "surroundings": {}, "progress": Silent()}
    made = encode_file(file, embedder, folder, **options)
    return made, np.load(folder / "embeddings.npy", mmap_mode="r"), (folder / "ids.txt").read_text().splitlines()


def test_a_beir_corpus_becomes_an_array_with_ids_title_before_text(embedder, texts, tmp_path):
    rows = [{"_id": f"d{i}", "title": "T" * (i % 2), "text": text} for i, text in enumerate(texts)]
    made, array, ids = encoded(write(tmp_path / "corpus.jsonl.gz", rows), embedder, tmp_path / "out")
    assert isinstance(array, np.memmap) and array.dtype == np.float32
    assert ids == [f"d{i}" for i in range(len(texts))]
    expected = embedder.encode_passages([f"T {t}" if i % 2 else t for i, t in enumerate(texts)])
    assert np.array_equal(array, expected)
    assert (made["texts"], made["dimension"]) == (len(texts), 32)
    assert not list(tmp_path.glob(".*partial"))


def test_queries_get_the_models_prompt_or_the_one_given(embedder, texts, tmp_path):
    file = write(tmp_path / "queries.jsonl", [{"_id": str(i), "text": text} for i, text in enumerate(texts)])
    for name, prompt in (("own", None), ("other", "Find"), ("none", "")):
        _, array, _ = encoded(file, embedder, tmp_path / name, side="query", prompt=prompt)
        assert np.array_equal(array, embedder.encode_queries(texts, prompt))


def test_plain_lines_are_named_by_their_number_and_blank_ones_left_out(embedder, tmp_path):
    file = write(tmp_path / "lines.txt", ["first", "", "  ", "second {", "third"])
    _, array, ids = encoded(file, embedder, tmp_path / "out", dtype="float16")
    assert ids == ["1", "4", "5"]
    assert array.dtype == np.float16
    assert np.abs(array - embedder.encode_passages(["first", "second {", "third"])).max() < 1e-3


def test_training_rows_give_their_queries(tmp_path):
    file = write(tmp_path / "train.jsonl", [{"query_id": 7, "query": "why", "positive_passages": []}])
    assert [(text.id, text.text) for text in read_texts(file, "query")] == [("7", "why")]
    with pytest.raises(TdroError, match="found the keys query_id, query, positive_passages"):
        list(read_texts(file, "passage"))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"_id": "a", "text": "x"}, {"_id": "b"}], "'text' is missing"),
        ([{"_id": "a", "text": "x"}, {"text": "y"}], "the id '_id' is missing"),
        ([{"_id": "a", "text": "x"}, "oops"], "not a JSON object"),
        ([{"_id": "a", "text": "x"}, {"_id": "b\nc", "text": "y"}], "not one line"),
    ],
)
def test_a_bad_line_is_named_before_anything_is_written(lines, message, embedder, tmp_path):
    file = write(tmp_path / "corpus.jsonl", lines)
    with pytest.raises(TdroError, match=message) as fault:
        encoded(file, embedder, tmp_path / "out")
    assert fault.value.where.endswith("corpus.jsonl:2")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_files_that_are_missing_empty_or_no_text_are_told(embedder, tmp_path):
    for name, content, message in (
        ("none.jsonl", None, "no such file"),
        ("empty.jsonl", b"", "the file is empty"),
        ("blank.txt", b"\n \n", "holds no text"),
        ("latin.txt", "żółw\n".encode("iso-8859-2"), "not UTF-8"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 50)[:-9], "cannot be read"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(TdroError, match=message):
            encoded(tmp_path / name, embedder, tmp_path / "out")


def test_a_killed_encoding_goes_on_where_it_was_and_ends_in_the_same_bits(embedder, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding, "CHUNK", 2)
    monkeypatch.setattr(encode, "CHUNK", 2)
    file = write(tmp_path / "lines.txt", texts * 2)
    encoded(file, embedder, tmp_path / "whole")
    whole, seen = embedder._embed, []

    def dies(token_lists):
        seen.append(len(token_lists))
        if len(seen) == 4:
            raise KeyboardInterrupt
        return whole(token_lists)

    monkeypatch.setattr(embedder, "_embed", dies)
    with pytest.raises(KeyboardInterrupt):
        encoded(file, embedder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with open(tmp_path / ".out.partial" / "embeddings.npy", "ab") as file_of_array:
        file_of_array.write(b"half a row")
    encoded(file, embedder, tmp_path / "out")
    assert sum(seen) - 2 == len(texts) * 2  # the chunk that died was computed again, no other
    assert (tmp_path / "out" / "embeddings.npy").read_bytes() == (tmp_path / "whole" / "embeddings.npy").read_bytes()


def test_what_was_begun_for_another_file_is_not_used(embedder, tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    for name in ("digest", "ids.txt", "embeddings.npy"):
        (partial / name).write_text("of another\n")
    _, array, ids = encoded(write(tmp_path / "lines.txt", ["a", "b", "c"]), embedder, tmp_path / "out")
    assert ids == ["1", "2", "3"] and array.shape == (3, 32)


def test_two_processes_do_not_make_the_same_folder(embedder, tmp_path):
    file = write(tmp_path / "lines.txt", ["a"])
    with encode._unfinished(tmp_path / "out", "digest"), pytest.raises(RunFailed, match="another process makes"):
        encoded(file, embedder, tmp_path / "out")


def test_the_command_encodes_and_never_writes_over(tiny, texts, tmp_path, tdro):
    file = write(tmp_path / "lines.txt", texts)
    command = ("encode", str(file), "--model", str(tiny("bert")), "--out", str(tmp_path / "out"), "--side", "passage")
    code, out, err = tdro(*command)
    assert code == 0 and f"wrote {len(texts)} embeddings of size 32" in out, err
    before = (tmp_path / "out" / "embeddings.npy").read_bytes()
    code, _, err = tdro(*command)
    assert code == 2 and "out exists" in err
    assert (tmp_path / "out" / "embeddings.npy").read_bytes() == before
