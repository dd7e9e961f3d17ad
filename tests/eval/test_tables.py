"""The published tables: their averages from their cells, and results of ours in their layouts."""

import json

import numpy as np
import pytest

from tele_jax.cli.main import main
from tele_jax.errors import UserError
from tele_jax.eval import tables
from tele_jax.eval.results import read_results
from tele_jax.eval.tables import TABLES, find_domains

# Rows whose printed average is not that of their printed cells; 1.783 and 1.782 are a rounding apart, the other is not.
UNLIKE = {("Llama-65B", "weighted", "1.782", "1.783"), ("gpt-4-0613", "Overall", "6.83", "6.50")}


def test_printed_averages_follow_from_the_printed_cells():
    unlike = {row for table in TABLES for row in table.unlike_their_cells()}
    assert unlike == UNLIKE
    assert sum(len(table.rows) * len(table.averages) for table in TABLES) == 56


def test_the_figures_of_tele_flm_are_those_of_the_report():
    cells = {column: float(x) for column, x in zip(tables.ENGLISH_BPB.columns, tables.ENGLISH_BPB.rows["Tele-FLM 52B"])}
    assert round(tables.ENGLISH_BPB.average("L-Prop", cells), 4) == 0.5502
    assert round(tables.ENGLISH_BPB.average("F-Prop", cells), 4) == 0.5156
    cells = {column: float(x) for column, x in zip(tables.CHINESE_BPB.columns, tables.CHINESE_BPB.rows["Tele-FLM 52B"])}
    assert round(tables.CHINESE_BPB.average("weighted", cells), 4) == 0.6459


def test_alignbench_is_the_mean_of_two_means():
    for row, (overall, math, logic, *language) in tables.ALIGNBENCH.rows.items():
        expected = ((float(math) + float(logic)) / 2 + np.mean([float(x) for x in language])) / 2
        cells = dict(zip(tables.ALIGNBENCH.columns, map(float, (overall, math, logic, *language))))
        assert tables.ALIGNBENCH.average("Overall", cells) == pytest.approx(expected)
        assert (abs(expected - float(overall)) <= 0.005) == (row != "gpt-4-0613")


@pytest.mark.parametrize(
    ("family", "names", "found"),
    [
        ("en", ["WebText", "Github"], {"WebText": "WebText", "Github": "Github"}),
        ("en", ["WebText", "QA"], {}),
        ("en", ["WebText", "Book"], {}),  # of which language, nothing says
        ("en", ["WebText", "Github", "QA"], {"Github": "Github"}),
        ("zh", ["zh.WebText", "WebText", "Github"], {"WebText": "zh.WebText"}),
        ("tokens", ["Code", "English"], {"Code": "Code", "English": "English"}),
        ("zh", ["Code", "English"], {}),
    ],
)
def test_a_name_of_two_tables_counts_for_the_one_that_is_meant(family, names, found):
    assert find_domains(family, names) == found


def harness(model="runs/x", **tasks):
    results = {task: {"alias": task, **figures} for task, (_, figures) in tasks.items()}
    return {"results": results, "n-shot": {t: shots for t, (shots, _) in tasks.items()}, "config": {"model": model}}


def bits_per_byte(domains, model="runs/x"):
    figures = {
        name: {"loss": 2 * x, "bits_per_byte": x, "tokens_per_byte": x / 4, "positions": []}
        for name, x in domains.items()
    }
    return {"kind": "bits_per_byte", "models": {model: {"domains": figures}}}


def table(tmp_path, capsys, *results, code=0):
    paths = []
    for i, content in enumerate(results):
        paths.append(tmp_path / f"{i}" / "results.json")
        paths[-1].parent.mkdir(exist_ok=True)
        paths[-1].write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["eval", "table", *map(str, paths), "--json", str(tmp_path / "f.json")]) == code
    printed = capsys.readouterr()
    return (printed.out, json.loads((tmp_path / "f.json").read_text())["tables"]) if code == 0 else printed.err


def row(printed, model):
    return next(line.split() for line in printed.splitlines() if line.startswith(model))


def test_bits_per_byte_stand_in_the_published_layout(tmp_path, capsys):
    names = ["WebText", "Github", "Wikipedia", "Book", "ArXiv", "StackExchange"]
    printed, figures = table(tmp_path, capsys, bits_per_byte(dict(zip(names, np.arange(1, 7) / 10))))
    loss, bits = figures
    assert [loss["title"], bits["title"]] == ["English, loss in nats per token", "English, bits per byte"]
    expected = np.average(np.arange(1, 7) / 10, weights=[82, 4.5, 4.5, 4.5, 2.5, 2.0])
    assert bits["results"]["runs/x"]["L-Prop"] == pytest.approx(expected)
    assert bits["published"]["Tele-FLM 52B"]["F-Prop"] == 0.516
    assert "Tele-FLM 52B" in printed and f"{expected:.3f}" in row(printed.partition("bits per byte")[2], "runs/x")


def test_tasks_of_several_files_join_and_say_what_differs(tmp_path, capsys):
    first = harness(
        arc_challenge=(0, {"acc,none": 0.3, "acc_norm,none": 0.4, "acc_norm_stderr,none": 0.01}),
        hellaswag=(10, {"acc,none": 0.5, "acc_norm,none": 0.6}),
        mmlu=(5, {"acc,none": 0.25}),
        truthfulqa_mc2=(0, {"acc,none": 0.45}),
        winogrande=(5, {"acc,none": 0.7}),
    )
    second = harness(
        gsm8k=(5, {"exact_match,strict-match": 0.1, "exact_match,flexible-extract": 0.2}),
        humaneval=(0, {"pass@5,create_test": 0.15, "pass@1,create_test": 0.05}),
        bbh=(3, {"exact_match,get-answer": 0.35}),
    )
    printed, figures = table(tmp_path, capsys, first, second)
    cells = [40, 60, 25, 45, 70, 10, 15, 35]
    found = figures[0]["results"]["runs/x"]
    assert [found[c] for c in tables.ENGLISH_TASKS.parts] == pytest.approx(cells)
    assert found["Avg"] == pytest.approx(np.mean(cells))
    assert "runs/x: arc_challenge with 0 examples, the published ARC with 25" in printed
    assert figures[1]["title"] == "TeleChat chat models, percent" and "60.00" in printed
    assert figures[1]["results"]["runs/x"]["HumanEval"] == pytest.approx(5)
    assert "gsm8k with 5 examples, the published GSM8K with 4" in printed


def test_tasks_that_ask_as_telechat_did_stand_in_its_table(tmp_path, capsys):
    both = harness(ceval=(5, {"acc,none": 0.25}), telechat_ceval=(5, {"exact_match,none": 0.75}))
    _, (chinese, telechat) = table(tmp_path, capsys, both)
    assert chinese["results"]["runs/x"] == {"C-Eval": 25.0} and telechat["results"]["runs/x"] == {"C-Eval": 75.0}


def test_a_column_takes_its_own_metric_alone(tmp_path, capsys):
    printed, figures = table(
        tmp_path, capsys, harness(humaneval=(0, {"pass@1,none": 0.25}), mmlu=(5, {"acc,none": 0.5}))
    )
    english, telechat = (shown["results"]["runs/x"] for shown in figures)
    assert "HumanEval" not in english and telechat["HumanEval"] == 25
    assert "runs/x: no HumanEval, which is pass@5 here, from humaneval pass@1" in printed
    assert "which is pass@1 here" not in printed


def test_an_average_without_all_its_columns_is_left_out(tmp_path, capsys):
    printed, figures = table(tmp_path, capsys, bits_per_byte({"Github": 0.25, "ArXiv": 0.5}))
    assert "runs/x: no L-Prop or F-Prop without WebText, Wikipedia, Book, StackExchange" in printed
    assert figures[0]["results"]["runs/x"] == {"Github": 0.5, "ArXiv": 1.0}
    assert row(printed, "runs/x") == ["runs/x", "-", "0.500", "-", "-", "1.000", "-", "-", "-"]


def test_perplexity_by_length_is_that_of_the_documents_cut_there(tmp_path, capsys):
    results = bits_per_byte({"law": 1.0})
    cuts = [(0, 2048, (3, 2.0)), (2048, 4096, (2, 1.8)), (4096, 6144, None), (6144, None, None)]
    results["models"]["runs/x"]["domains"]["law"]["positions"] = [
        {"from": a, "to": b, "cut": cut and dict(zip(("documents", "loss"), cut))} for a, b, cut in cuts
    ]
    printed, (figures,) = table(tmp_path, capsys, results)
    assert figures["results"]["runs/x, law"] == pytest.approx({"2k": np.exp(2.0), "4k": np.exp(1.8)})
    assert figures["published"]["TeleChat-7B, NTK and attention"]["96k"] == 7.97
    assert "96k" in printed


def test_categories_of_dialogues_have_their_tables(tmp_path, capsys):
    scores = dict(zip(tables.ALIGNBENCH.parts, (3.79, 5.15, 7.69, 7.86, 8.45, 8.17, 7.88, 7.85)))
    ours = {"kind": "alignbench", "model": "ours", "scores": scores}
    teleeval = {"kind": "teleeval", "model": "ours", "scores": {"Safety": 8.5}}
    printed, figures = table(tmp_path, capsys, ours, teleeval)
    assert f"{figures[0]['results']['ours']['Overall']:.2f}" == "6.23"
    assert "the cells of gpt-4-0613 give Overall = 6.50, not 6.83" in printed
    assert figures[1]["published"] == {} and figures[1]["results"]["ours"] == {"Safety": 8.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"loss": 1}, "holds no results of tele eval bpb, harness, dialogue or code"),
        ({"kind": "reference_overlap", "scores": {"Math": 5.0}}, "of the kind 'reference_overlap', which no published"),
        (harness(mmlu=(5, {"acc,none": np.nan})), "mmlu acc is not a finite number"),
        ({"kind": "bits_per_byte", "models": {"a": {}}}, "is not as tele eval writes results"),
        ({"kind": "alignbench", "scores": {}}, "is not as tele eval writes results"),
        ({"kind": "bits_per_byte", "models": []}, "is not as tele eval writes results"),
        ([1], "not a table"),
        (
            bits_per_byte({"law": 1.0}),
            "none of these results has a domain, task or category that a published table has",
        ),
        ({"kind": "bits_per_byte", "models": {"a": {"domains": {"Github": 1}}}}, "is not as tele eval writes results"),
    ],
)
def test_files_without_results_are_named(content, message, tmp_path, capsys):
    assert message in table(tmp_path, capsys, content, code=2)


def test_results_that_contradict_each_other_are_refused(tmp_path, capsys):
    two = (harness(mmlu=(5, {"acc,none": 0.25})), harness(mmlu=(5, {"acc,none": 0.5})))
    assert "runs/x: two of the results have mmlu acc, and differ" in table(tmp_path, capsys, *two, code=2)
    with pytest.raises(UserError, match="nowhere"):
        read_results(tmp_path / "nowhere")
