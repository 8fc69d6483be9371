import subprocess
import sys

import numpy as np
import pytest

from tdro_cli.builtin.negative_miners import BM25, Dense, Hybrid, fused
from tdro_cli.errors import TdroError
from tdro_cli.protocols import NegativeMiner, Ranking, Text
from tdro_cli.registry import resolve
from tdro_cli.retrieve.mining import opened

CORPUS = [
    Text("d1", "The heart pumps blood through the body."),
    Text("d2", "A guitar has six strings and a wooden body."),
    Text("d3", "Interest rates were raised by the central bank."),
    Text("d4", "Blood pressure is measured in the arm."),
]
QUERIES = [
    Text("q1", "How does blood flow through the body?"),
    Text("q2", "central bank interest rates"),
    Text("q3", "?"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of our own, made as a recipe makes it: from the tasks' text, then saved."""
    from tdro_cli.builtin.backbones import Scratch
    from tdro_cli.model.contract import EncoderContract
    from tdro_cli.model.encoder import TextEncoder
    from tdro_cli.model.export import save_model

    folder = tmp_path_factory.mktemp("model")
    scratch = Scratch()
    scratch.prepare([text.text for text in CORPUS] * 20, folder / "backbone", seed=1)
    loaded = scratch.load(str(folder / "backbone"), dtype="float32", attention="sdpa")
    contract = EncoderContract(
        pooling="mean", normalize=True, query_length=32, passage_length=32, temperature=0.05, prompts={}
    )
    encoder = TextEncoder(loaded.model, pooling="mean", normalize=True, autocast="float32")
    save_model(encoder, loaded.tokenizer, contract, folder / "model", details={})
    return str(folder / "model")


def test_all_are_negative_miners():
    assert all(
        isinstance(miner, NegativeMiner) for miner in (BM25(), Dense("x"), Hybrid([{"name": "a"}, {"name": "b"}]))
    )


def test_bm25_ranks_one_ranking_a_query_in_order():
    rankings = list(BM25().mine(QUERIES, iter(CORPUS), depth=2))
    assert [(r.query_id, list(r.docids)) for r in rankings] == [("q1", ["d1", "d4"]), ("q2", ["d3"]), ("q3", [])]


LANGUAGES = {
    "fa": [("پایتخت ایران کجاست؟", "تهران پایتخت ایران است"), ("بلندترین کوه کدام است؟", "دماوند کوه بلندی است")],
    "zh": [("北京大学在哪里", "北京大学位于海淀区"), ("上海的天气如何", "今天上海下雨")],
    "ja": [("東京タワーの高さは？", "東京タワーは333メートルです"), ("大阪城はどこですか", "大阪城は大阪市にある")],
    "en": [
        ("Who is running the bank?", "The bank is run by its owners."),
        ("What is a heart?", "The heart is a pump."),
    ],
    "standard": [("Ziwa kubwa ni lipi?", "Ziwa Viktoria ni kubwa"), ("Mlima mrefu?", "Mlima Kilimanjaro ni mrefu")],
    "multilingual": [("北京在哪里", "北京是中国的首都"), ("Where is the tower?", "The tower is in Paris.")],
}


def test_bm25_serves_tasks_in_several_and_unknown_languages_with_one_java_process():
    with BM25().session() as session:
        pid = session.process.pid
        for analyzer, pairs in LANGUAGES.items():
            queries = [Text(f"q{i}", query) for i, (query, _) in enumerate(pairs)]
            corpus = [Text(f"d{i}", passage) for i, (_, passage) in enumerate(pairs)]
            rankings = list(session.mine(queries, corpus, depth=2))
            assert [ranking.docids[0] for ranking in rankings] == ["d0", "d1"]
            assert session.facts == {"analyzer": analyzer}
        assert session.process.pid == pid


@pytest.mark.parametrize(
    "options, words",
    [
        ({"k1": -1.0}, "k1 must be"),
        ({"b": 1.5}, "b in 0..1"),
        ({"threads": 0}, "threads must be"),
        ({"language": "klingon language"}, "language code"),
        ({"k": 1}, "no option 'k'"),
    ],
)
def test_bm25_refuses_what_it_cannot_do(options, words):
    with pytest.raises(TdroError, match=words):
        resolve("negative_miners", "bm25", options)


def test_dense_reads_as_many_tokens_as_it_is_told(model, tmp_path):
    begins_alike = [Text("d1", CORPUS[0].text), Text("d2", CORPUS[0].text + " Blood pressure is measured in the arm.")]
    short = Dense(model, query_length=8, passage_length=6, cache=str(tmp_path))
    (one, *_) = short.mine(QUERIES, begins_alike, depth=2)
    assert one.scores[0] == one.scores[1]
    (one, *_) = Dense(model, cache=str(tmp_path)).mine(QUERIES, begins_alike, depth=2)  # not from the same embeddings
    assert one.scores[0] != one.scores[1]
    with pytest.raises(TdroError, match="positions"), Dense(model, passage_length=10**6).session():
        pass


def test_dense_ranks_every_passage_by_inner_product(model):
    from tdro_cli.model.embedding import load_embedder

    embedder = load_embedder(model)
    query_QD = embedder.encode_queries([query.text for query in QUERIES], "")
    passage_ND = embedder.encode_passages([text.text for text in CORPUS])
    score_QN = query_QD @ passage_ND.T
    rankings = list(Dense(model).mine(QUERIES, iter(CORPUS), depth=3))
    assert [r.query_id for r in rankings] == ["q1", "q2", "q3"]
    for ranking, score_N in zip(rankings, score_QN, strict=True):
        best = np.argsort(-score_N)[:3]
        assert list(ranking.docids) == [CORPUS[i].id for i in best]
        assert ranking.scores == pytest.approx(score_N[best].tolist(), abs=1e-5)


def test_dense_encodes_nothing_twice_and_other_prompts_anew(model, tmp_path):
    encoded = []
    with opened(Dense(model), tmp_path) as session:
        for depth, prompt in ((4, "find it"), (2, "find it"), (4, "find that")):
            list(session.mine(QUERIES, CORPUS, depth=depth, prompt=prompt))
            encoded.append((session.facts["queries_encoded"], session.facts["passages_encoded"]))
    assert encoded == [(3, 4), (0, 0), (3, 0)]
    with opened(Dense(model), tmp_path) as session:
        list(session.mine(QUERIES, CORPUS, depth=1, prompt="find it"))
        assert (session.facts["queries_encoded"], session.facts["passages_encoded"]) == (0, 0)


def test_dense_uses_the_prompt_of_the_task_unless_told_otherwise(model):
    def scores(prompts):
        with opened(Dense(model, prompts=prompts), None) as session:
            return [r.scores for r in session.mine(QUERIES[:1], CORPUS, depth=4, prompt="find the answer")]

    assert scores("auto") == scores("task") != scores("model")


def test_dense_without_queries_or_passages_finds_nothing(model):
    assert list(Dense(model).mine([], CORPUS, depth=3)) == []
    assert [list(r.docids) for r in Dense(model).mine(QUERIES[:1], [], depth=3)] == [[]]


def test_dense_names_a_model_that_is_not_there(tmp_path):
    with pytest.raises(TdroError):
        list(Dense(str(tmp_path / "nothing")).mine(QUERIES, CORPUS, depth=1))


def test_fusion_adds_reciprocal_ranks():
    rankings = [Ranking("q", ["a", "b", "c"], [3, 2, 1]), Ranking("q", ["c", "a"], [0.9, 0.1])]
    ranking = fused(rankings, k=60, depth=2)
    assert ranking.docids == ["a", "c"]
    assert ranking.scores == pytest.approx([1 / 61 + 1 / 62, 1 / 63 + 1 / 61])


def test_hybrid_fuses_the_rankings_of_its_miners(model):
    miners = [{"name": "bm25", "options": {"language": "en"}}, {"name": "dense", "options": {"source": model}}]
    rankings = list(Hybrid(miners).mine(QUERIES, iter(CORPUS), depth=4))
    parts = [
        list(BM25(language="en").mine(QUERIES, CORPUS, depth=4)),
        list(Dense(model).mine(QUERIES, CORPUS, depth=4)),
    ]
    assert rankings == [fused(both, k=60, depth=4) for both in zip(*parts, strict=True)]


def test_hybrid_needs_two_miners_with_names():
    with pytest.raises(ValueError, match="at least two"):
        Hybrid([{"name": "bm25"}])
    with pytest.raises(ValueError, match="at least two"):
        Hybrid([{"name": "bm25"}, {}])


def test_module_imports_nothing_heavy():
    code = (
        "import sys, tdro_cli.builtin.negative_miners\n"
        "print([m for m in ('torch', 'numpy', 'transformers', 'pyarrow', 'jnius') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
