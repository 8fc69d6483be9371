import numpy as np
import pytest

from tdro_cli.errors import TdroError
from tdro_cli.retrieve.comparison import compare, compare_groups, compare_seeds, mean_summary
from tdro_cli.retrieve.measures import summary


def test_comparison_holds_the_tests_of_the_differences(made_up):
    from scipy import stats

    base, better = made_up(0), made_up(1, gain=0.05)
    out = compare({"base": base, "better": better}, baseline="base")
    assert [row["collection"] for row in out["rows"]] == ["a", "b"]
    assert out["seed_noise"] == "unknown"
    p_values = []
    for row in out["rows"]:
        a = np.array(list(better[row["collection"]]["nDCG@10"].values()))
        b = np.array(list(base[row["collection"]]["nDCG@10"].values()))
        assert row["difference"] == pytest.approx(a.mean() - b.mean())
        assert row["model_value"] - row["baseline_value"] == pytest.approx(row["difference"])
        assert row["interval"][0] < row["difference"] < row["interval"][1]
        p_values.append(stats.ttest_rel(a, b).pvalue)
        assert row["p_t_test"] == pytest.approx(p_values[-1])
    low, high = sorted(p_values)
    assert sorted(row["p_holm"] for row in out["rows"]) == pytest.approx([min(1, 2 * low), max(2 * low, high)])
    (average,) = out["averages"]
    assert average["benchmark"] == "all" and average["collections"] == 2
    assert average["difference"] == pytest.approx(sum(row["difference"] for row in out["rows"]) / 2)


def test_a_model_against_itself_differs_in_nothing(made_up):
    out = compare({"m": made_up(0), "same": made_up(0)}, baseline="m")
    for row in out["rows"]:
        assert (row["difference"], row["p_t_test"], row["p_randomisation"], row["p_holm"]) == (0, 1, 1, 1)
        assert row["interval"] == [0, 0]
    assert out["averages"][0]["p_randomisation"] == 1


def test_queries_are_paired_by_id_not_by_order():
    base = {"c": {"R@100": {"1": 0.0, "2": 1.0}}}
    other = {"c": {"R@100": {"2": 1.0, "1": 0.0}}}
    assert compare({"b": base, "m": other}, baseline="b")["rows"][0]["interval"] == [0, 0]


def test_runs_over_other_queries_are_refused():
    base, other = {"c": {"R@100": {"1": 0.0}}}, {"c": {"R@100": {"2": 0.0}}}
    with pytest.raises(TdroError, match="not over the same queries"):
        compare({"b": base, "m": other}, baseline="b")


def test_one_benchmark_has_one_average(made_up):
    names = ("beir/nq", "beir/fiqa")
    out = compare({"b": made_up(0, names=names), "m": made_up(1, names=names)}, baseline="b")
    assert [row["benchmark"] for row in out["averages"]] == ["beir"]
    mixed = ("beir/nq", "beir/fiqa", "own")
    out = compare({"b": made_up(0, names=mixed), "m": made_up(1, names=mixed)}, baseline="b")
    assert [row["benchmark"] for row in out["averages"]] == ["beir", "all"]


def test_seeds_take_back_what_queries_alone_would_call_significant():
    # three seeds whose gains are +0.10, -0.08 and +0.04 on every query: each sure over queries, none over seeds
    rng = np.random.default_rng(0)
    pairs = []
    for gain in (0.10, -0.08, 0.04):
        noise = rng.normal(0, 0.01, 80)
        base = {"c": {"nDCG@10": {str(i): 0.4 for i in range(80)}}}
        pairs.append((base, {"c": {"nDCG@10": {str(i): 0.4 + gain + float(e) for i, e in enumerate(noise)}}}))
    (row,) = compare_seeds(pairs, baseline="b", model="m")["rows"]
    assert row["p_queries"] < 1e-6
    assert row["p_seeds"] > 0.5
    assert row["differences"] == pytest.approx([0.10, -0.08, 0.04], abs=0.005)
    assert row["seed_spread"] == pytest.approx(np.std([0.10, -0.08, 0.04], ddof=1), abs=0.005)
    assert row["interval"][0] < 0 < row["interval"][1]


def test_averages_over_seeds_pair_seeds_and_collections(made_up):
    from scipy import stats

    pairs = [(made_up(s), made_up(s + 10, gain=0.05)) for s in range(4)]
    out = compare_seeds(pairs, baseline="b", model="m")
    (average,) = out["averages"]
    cells = np.array([[row["differences"][s] for row in out["rows"]] for s in range(4)])
    assert average["p_seeds"] == pytest.approx(stats.ttest_1samp(cells.mean(1), 0).pvalue)
    assert average["p_cells"] == pytest.approx(stats.ttest_1samp(cells.ravel(), 0).pvalue)
    assert average["model_value"] - average["baseline_value"] == pytest.approx(average["difference"])
    assert average["interval"][0] < average["difference"] < average["interval"][1]


def test_one_seed_is_too_few_for_seed_noise(made_up):
    with pytest.raises(ValueError, match="2 seeds"):
        compare_seeds([(made_up(0), made_up(1))], baseline="b", model="m")


def test_groups_of_one_run_are_compared_over_queries_and_larger_ones_over_seeds(made_up):
    one = compare_groups({"b": [made_up(0)], "m": [made_up(1)], "n": [made_up(2)]}, baseline="b")
    assert one["seed_noise"] == "unknown" and one["models"] == ["m", "n"]
    groups = {"b": [made_up(s) for s in range(3)], "m": [made_up(s + 5) for s in range(3)]}
    several = compare_groups({**groups, "n": [made_up(s + 9) for s in range(3)]}, baseline="b")
    assert several["seed_noise"] == "measured" and several["seeds"] == 3 and several["models"] == ["m", "n"]
    alone = compare_groups(groups, baseline="b")
    assert [row for row in several["rows"] if row["model"] == "m"] == alone["rows"]
    assert {row["model"] for row in several["averages"]} == {"m", "n"}


def test_what_no_seed_changes_stands_for_every_seed(made_up):
    trained = [made_up(s) for s in range(3)]
    found = compare_groups({"bm25": [made_up(7)], "trained": trained}, baseline="bm25")
    assert found == compare_seeds([(made_up(7), run) for run in trained], baseline="bm25", model="trained")


def test_groups_with_other_numbers_of_seeds_are_refused(made_up):
    with pytest.raises(TdroError, match=r"not the same number of seeds for each \(b: 2, m: 3\)"):
        compare_groups({"b": [made_up(0)] * 2, "m": [made_up(1)] * 3}, baseline="b")


def test_the_summary_over_seeds_is_the_mean_of_every_value():
    found = mean_summary("m", [summary("m", {"x/a": {"R@1": {"q": value}}}) for value in (0.2, 0.6)])
    assert found["results"]["x/a"]["R@1"] == found["average"]["R@1"] == found["benchmarks"]["x"]["R@1"]
    assert found["average"]["R@1"] == pytest.approx(0.4)
