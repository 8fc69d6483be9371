from tdro_cli.report.measures import (
    Table,
    benchmark_tables,
    comparison_note,
    comparison_table,
    paper_table,
    render_latex,
    render_markdown,
    search_note,
    tables,
)
from tdro_cli.retrieve.comparison import compare, compare_seeds
from tdro_cli.retrieve.measures import summary


def test_the_table_stars_what_is_sure_and_owns_up_to_one_seed(made_up):
    comparison = compare({"base": made_up(0), "better": made_up(1, gain=0.1)}, baseline="base")
    table = comparison_table(comparison)
    assert table[0][:4] == ["measure", "collection", "base", "better"]
    assert len({len(row) for row in table}) == 1
    assert [row[1] for row in table[1:]] == ["a", "b", "average (all, 2)"]
    assert all(row[4].endswith("*") for row in table[1:])
    assert "seed noise is unknown" in comparison_note(comparison)


def test_the_table_over_seeds_shows_the_spread(made_up):
    comparison = compare_seeds([(made_up(s), made_up(s + 5)) for s in range(3)], baseline="b", model="m")
    table = comparison_table(comparison)
    column = table[0].index("seed spread")
    assert all(float(row[column]) > 0 for row in table[1:])
    assert len({len(row) for row in table}) == 1


def summaries(values):
    return {model: summary(model, by_collection) for model, by_collection in values.items()}


PAPER = {  # two benchmarks of the paper in small: CQADupStack's forums are one set
    f"beir/{name}": {"nDCG@10": 0.0} for name in ("nq", "cqadupstack/tex", "cqadupstack/gis")
} | {f"mkqa/{name}": {"accuracy@10": 0.0, "accuracy@100": 0.0} for name in ("th", "fi", "ja")}


def constant(value):
    """Eight queries a collection, all with nearly the same value."""
    return {
        name: {m: {f"q{i}": value + i / 500 for i in range(8)} for m in measures} for name, measures in PAPER.items()
    }


def test_results_are_laid_out_as_in_the_papers_table_three():
    values = {"Qwen": constant(0.4), "top": constant(0.45), "reweight": constant(0.425)}
    table = paper_table(summaries(values), compare(values, baseline="Qwen"))
    assert table.groups == [("", 1), ("BEIR (2)", 1), ("MKQA (3)", 2)]
    assert table.rows == [
        ["model", "nDCG@10", "accuracy@10", "accuracy@100"],
        ["Qwen", "40.7", "40.7", "40.7"],
        ["top", "45.7* (+5.0)", "45.7* (+5.0)", "45.7* (+5.0)"],
        ["reweight", "43.2* (+2.5)", "43.2* (+2.5)", "43.2* (+2.5)"],
        ["mean gain", "+3.7", "+3.7", "+3.7"],
    ]


def test_a_benchmark_of_one_collection_has_its_gain_too(made_up):
    values = {"b": made_up(0, names=("own",)), "m": made_up(1, gain=0.2, names=("own",))}
    table = paper_table(summaries(values), compare(values, baseline="b"))
    assert table.groups == [("", 1), ("all sets (1)", 1)]
    assert "* (+" in table.rows[2][1]


def test_each_benchmark_and_measure_has_a_table_of_sets():
    found = benchmark_tables(summaries({"a": constant(0.1), "b": constant(0.2)}))
    assert [table.title for table in found] == ["BEIR nDCG@10", "MKQA accuracy@10", "MKQA accuracy@100"]
    assert found[0].rows == [
        ["collection", "a", "b"],
        ["nq", "0.1070", "0.2070"],
        ["cqadupstack (2)", "0.1070", "0.2070"],
        ["average", "0.1070", "0.2070"],
    ]


def test_collections_of_no_benchmark_share_a_table(made_up):
    found = benchmark_tables(summaries({"m": made_up(0, names=("x", "y"))}))
    assert [(table.title, len(table.rows)) for table in found] == [("nDCG@10", 4)]


def test_bm25s_settings_and_what_an_approximate_search_missed_are_said():
    facts = {
        "bm25": {"c": {"search": "bm25", "k1": 0.9, "b": 0.4, "analyzer": "en"}},
        "m": {"c": {"search": "hnsw", "recall": 0.99}, "d": {"search": "hnsw", "recall": 0.973}},
        "exact": {"c": {"search": "exact"}},
    }
    assert search_note(facts) == (
        "bm25: Lucene, k1 0.9, b 0.4, analyzer en. m: approximate search (HNSW), 97.3% of the exact results at worst."
    )


def test_an_evaluation_of_one_model_has_no_tests_in_its_tables():
    found = tables({"measures": summaries({"m": constant(0.3)}), "facts": {}, "comparison": None})
    assert [table.title for table in found][-1] == "Averages, per cent"


def test_markdown_and_latex_of_a_small_table():
    table = Table("small", [["set", "R@100", "P@1"], ["a_b|c", "0.5*", "1"]], [("", 1), ("X & Y (3)", 2)], "* sure")
    assert render_markdown(table) == (
        "**small**\n\n| set | X & Y (3) R@100 | X & Y (3) P@1 |\n|---|---:|---:|\n| a_b\\|c | 0.5* | 1 |\n\n\\* sure\n"
    )
    assert render_latex(table).splitlines() == [
        "% small",
        r"\begin{tabular}{lrr}",
        r"\toprule",
        r" & \multicolumn{2}{c}{X \& Y (3)} \\",
        r"set & R@100 & P@1 \\",
        r"\midrule",
        r"a\_b|c & 0.5* & 1 \\",
        r"\bottomrule",
        r"\end{tabular}",
        "% * sure",
    ]
