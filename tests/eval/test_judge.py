"""Judged dialogue: what a verdict is read as, AlignBench's aggregation, pairs in both orders, and judges that fail."""

import gzip
import http.server
import json
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tele_jax.cli.main import main
from tele_jax.data import templates
from tele_jax.errors import FailedError, UserError
from tele_jax.eval import judge, tables
from tele_jax.eval.judges import HttpJudge, overlap
from tele_jax.eval.model import EvalModel
from tests.inference.test_chat import model, work_directory

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("很好。{'事实正确性': 9, '综合得分': 7}", 7),
        ('```json\n{"清晰度": 8, "综合得分": 6.5}\n```', 6.5),
        ("{“综合得分”：10}", 10),
        ("例如{'综合得分': 1}。我的打分是：\n{'综合得分': '8'}\n谢谢", 8),
        ("{'综合得分': 3} 比 {'清晰度': 9} 重要", 3),
        ("综合得分：8", -1),
        ("{'综合得分': 0}", -1),
        ("{'综合得分': 11}", -1),
        ("{'综合得分': -5}", -1),
        ("{'综合得分': 高}", -1),
        ("{'得分': 8}", -1),
        ("{" * 5000 + "'综合得分'" * 500, -1),
        ("", -1),
        ("{" + "好" * 100_000 + "}", judge.UNREADABLE),  # a judge that repeats itself is read in time
    ],
)
def test_a_score_is_read_from_the_last_dict_that_has_one(text, score):
    assert judge.read_score(text)[1] == score


@pytest.mark.parametrize(
    ("text", "better"),
    [
        ("{'更好': 'A'}", "A"),
        ('{"更好": "B"}', "B"),
        ("{'更好'：“平局”}", "平"),
        ("更好: A", ""),
        ("{'更好': 'C'}", ""),
        ("", ""),
    ],
)
def test_a_preference_is_read_from_a_dict(text, better):
    assert judge.read_preference(text) == better


TEXT = st.text(st.sampled_from("ab 猫狗，。\n"), max_size=20)


@given(TEXT, TEXT)
def test_the_overlap_is_sacrebleus_chrf(answer, reference):
    chrf = pytest.importorskip("sacrebleu").sentence_chrf(answer, [reference])
    assert overlap(answer, reference) == pytest.approx(chrf.score / 100, abs=1e-9)


def rows_of(scores, lengths=(3,), count=1):
    return [
        {"question_id": f"{name}{n}", "category": name, "question": "?", "answer": "a" * length, "score": score}
        for name, score in scores.items()
        for n, length in zip(range(count), lengths * count)
    ]


def test_the_overall_scores_of_the_published_rows_are_theirs():
    names = {short: name for name, short in judge.ALIGNBENCH.items()}
    unlike = {row for row, *_ in tables.ALIGNBENCH.unlike_their_cells()}
    for row, cells in tables.ALIGNBENCH.rows.items():
        scores = dict(zip(tables.ALIGNBENCH.columns, map(float, cells)))
        printed = scores.pop("Overall")
        found = judge.scores_of(rows_of({names[short]: score for short, score in scores.items()}), by_judge=True)
        assert found["kind"] == "alignbench" and found["scores"] == scores
        assert (round(found["overall"] + 1e-9, 2) == printed) == (row not in unlike)
    assert unlike == {"gpt-4-0613"}


def test_unreadable_verdicts_are_counted_and_in_no_mean():
    rows = rows_of({"Safety": 4.0, "Logic": -1}, (2, 4), 2)
    rows[0]["score"] = -1
    found = judge.scores_of(rows, by_judge=True)
    assert found["kind"] == "teleeval" and list(found["categories"]) == ["Logic", "Safety"]
    assert found["scores"] == {"Safety": 4.0} and found["mean"] == 4 and "overall" not in found
    assert found["unreadable"] == 3 and found["categories"]["Logic"]["unreadable"] == 2 and found["length"] == 3
    assert found["interval"] is None and found["categories"]["Safety"]["interval"] is None  # of one score
    assert "Logic -" in " ".join(judge.text_of(found).split())
    assert judge.scores_of(rows, by_judge=False)["kind"] == "reference_overlap"
    assert judge.scores_of(rows_of({"Law": 3}), by_judge=True)["kind"] == "dialogue"


def test_intervals_hold_the_mean_and_are_the_same_again():
    rng = np.random.default_rng(0)
    rows = [row | {"score": float(rng.integers(1, 11))} for row in rows_of({"数学计算": 0}, count=200)]
    found = judge.scores_of(rows, by_judge=True)
    (low, high), mean = found["categories"]["Math"]["interval"], found["scores"]["Math"]
    error = 1.96 * np.std([row["score"] for row in rows]) / 200**0.5  # of the normal distribution
    assert (low, high) == pytest.approx((mean - error, mean + error), abs=0.05)
    assert judge.scores_of(rows, by_judge=True) == found


# --------------------------------------------------------------------------------------------------------------- pairs


def answers(*texts, **more):
    named = {"category": "Safety", "question": "?"} | more
    return [{"question_id": i, "answer": text} | named for i, text in enumerate(texts)]


def judging(decide):
    """A judge that is shown (answer A, answer B) and replies what `decide` says."""

    def ask(prompts, on_text):
        for i, prompt in reversed([*enumerate(prompts)]):  # replies come in any order
            shown = [part.split("\n")[1] for part in prompt.split("[助手")[1:]]
            on_text(i, decide(*shown))

    return ask


def test_a_pair_is_won_only_where_both_orders_agree(tmp_path):
    ours, theirs = (
        answers("good", "bad", "same", "odd", "mute", "long"),
        answers("bad", "good", "same", "odd", "mute", "x"),
    )

    def decide(a, b):
        if "mute" in (a, b):
            return None
        better = "A" if a in ("good", "long") else "B" if b in ("good", "long") else "平" if a == "same" else "A"
        return f"因为…… {{'更好': '{better}'}}"

    rows = judge.compare(ours, theirs, judging(decide), tmp_path, {})
    assert [row["outcome"] for row in rows] == ["win", "loss", "tie", "disagreement", "unreadable", "win"]
    found = judge.pairs_of(rows)
    assert found["counts"] == {"win": 2, "loss": 1, "tie": 1, "disagreement": 1, "unreadable": 1}
    assert (found["win"]["rate"], found["loss"]["rate"]) == (0.4, 0.2) and found["net"]["rate"] == pytest.approx(0.2)
    assert found["win"]["interval"][0] < 0.4 < found["win"]["interval"][1]
    assert found["length"] == np.mean([len(row["answer"]) for row in ours])
    assert "mean length in characters: 4 against 3" in judge.text_of(found)
    with pytest.raises(UserError, match="does not answer question_id 5"):
        judge.compare(ours, theirs[:5], None, tmp_path, {})
    with pytest.raises(UserError, match="question_id 0, or another question"):
        judge.compare(ours, answers("bad", question="other"), None, tmp_path, {})


def test_a_judge_that_prefers_the_first_answer_gives_no_win(tmp_path):
    rows = judge.compare(answers("a", "b"), answers("c", "d"), judging(lambda a, b: "{'更好': 'A'}"), tmp_path, {})
    assert {row["outcome"] for row in rows} == {"disagreement"}


def test_what_a_judge_reads_is_the_dialogue():
    row = answers(["一", "二"], question=["甲", "乙"], reference=["丙", "丁"])[0]
    text = judge.dialogue_text(row, {"": row["answer"]})
    assert [text.index(part) for part in "甲丙一乙丁二"] == sorted(text.index(part) for part in "甲丙一乙丁二")


# ---------------------------------------------------------------------------------------------------------------- HTTP


@pytest.fixture
def endpoint():
    """(URL, list of the requests, list of the (status, body) that the next ones are answered with; then a verdict)."""
    asked, script = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append((self.path, self.headers.get("Authorization"), body))
            verdict = json.dumps({"choices": [{"message": {"content": "好 {'综合得分': 8}"}}]})
            status, text = script.pop(0) if script else (200, verdict)
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://localhost:9/")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked, script
        server.shutdown()


def replies(judge, count):
    found = {}
    judge([f"p{i}" for i in range(count)], found.__setitem__)
    return found


def test_an_endpoint_is_asked_again_where_it_is_busy(endpoint, monkeypatch):
    url, asked, script = endpoint
    monkeypatch.setenv("SOME_KEY", "secret\n")
    script += [(429, ""), (503, "busy"), (500, "")]
    found = replies(HttpJudge(url, "m", "SOME_KEY", parallel=1, pause=0), 3)
    assert found == dict.fromkeys(range(3), "好 {'综合得分': 8}") and len(asked) == 6
    path, key, body = asked[0]
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "m"
    assert body["messages"] == [{"role": "user", "content": "p0"}] and body["temperature"] == 0


@pytest.mark.parametrize(
    ("status", "text", "error", "message"),
    [
        (401, "", UserError, r"refuses the request: status 401 \(Unauthorized\)$"),
        (302, "", UserError, "refuses the request: status 302"),
        (503, "", FailedError, "does not answer after 2 tries: status 503"),
        (200, "<html>", FailedError, "no chat completion with .*: '<html>'"),
        (200, '{"choices": []}', FailedError, "no chat completion"),
        (200, '{"choices": [{"message": {"content": null}}]}', FailedError, "no chat completion"),
        (200, "[" * 100_000, FailedError, "no chat completion"),
    ],
)
def test_an_endpoint_that_fails_is_one_line(endpoint, status, text, error, message):
    url, _, script = endpoint
    script += [(status, text)] * 2
    with pytest.raises(error, match=message) as caught:
        replies(HttpJudge(url, "m", parallel=1, pause=0, retries=1), 1)
    assert "\n" not in str(caught.value) and "Bearer" not in str(caught.value)


def test_no_endpoint_and_no_key_are_one_line(monkeypatch):
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(FailedError, match=r"does not answer after 1 try: .*refused"):
        replies(HttpJudge("http://127.0.0.1:9", "m", pause=0, retries=0), 2)
    with pytest.raises(UserError, match="--judge-key NO_KEY: there is no such environment variable"):
        HttpJudge("http://127.0.0.1:9", "m", "NO_KEY")
    with pytest.raises(UserError, match="must begin with http:// or https://"):
        HttpJudge("file:///etc/passwd", "m")
    addresses = ("http://[::1/v1", "http:///v1", "http://ho st", "http://host:x/v1", "http://例/v1", "http://a:99999")
    for url in addresses:
        with pytest.raises(UserError, match="is no URL of ASCII characters"):
            HttpJudge(url, "m")
    with pytest.raises(UserError, match="user name or password is not taken") as caught:
        HttpJudge("http://me:secret@host/v1", "m")
    assert "secret" not in str(caught.value)
    for key in ("sécret", "se cret", "se\ncret"):
        monkeypatch.setenv("SOME_KEY", key)
        with pytest.raises(UserError, match="--judge-key SOME_KEY: its value has") as caught:
            HttpJudge("http://[::1]:9/v1", "m", "SOME_KEY")
        assert "cret" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------ the verb

QUESTIONS = [
    {"question_id": 1, "category": "数学计算", "subcategory": "初等数学", "question": "1+1=?", "reference": "2"},
    {"question_id": 2, "category": "角色扮演", "question": ["Who?", "Why?"], "reference": ["The cat", "mat"]},
    {"question_id": "x", "category": "角色扮演", "question": "The", "reference": "The cat sat on the mat. "},
]


@pytest.fixture
def work(tmp_path):
    (tmp_path / "questions.jsonl").write_text("\n".join(json.dumps(q, ensure_ascii=False) for q in QUESTIONS))
    return work_directory(tmp_path / "W", *model(max_seq_len=256))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_eval_dialogue_answers_scores_and_goes_on_after_a_kill(work, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    flags = ["--questions", str(tmp_path / "questions.jsonl"), "--out", str(out), "--max-new-tokens", "8"]
    command = ["eval", "dialogue", str(work), "--judge", "reference", *flags]
    asked = []

    def continue_texts(self, prompts, *, on_text, **how):
        asked.append(len(prompts))
        if len(asked) == 2:
            raise KeyboardInterrupt
        for i, prompt in enumerate(prompts):
            on_text(i, f" The cat, {len(prompt)} ")

    monkeypatch.setattr(EvalModel, "continue_texts", continue_texts)
    assert main(command) == 130 and asked == [3, 1]
    first = lines(out / "answers.jsonl")
    assert sorted(map(str, (row["question_id"] for row in first))) == ["1", "x"]
    with (out / "answers.jsonl").open("a") as file:
        file.write('{"question_id": 2, "ans')
    assert main(command) == 0 and asked == [3, 1, 1, 1]
    found = {row["question_id"]: row for row in lines(out / "answers.jsonl")}
    assert len(found) == 3 and len(found[2]["answer"]) == 2 and first[0] == found[first[0]["question_id"]]
    assert found[1].keys() >= {*QUESTIONS[0], "model_id", "answer_id", "answer"}
    judged = {row["question_id"]: row for row in lines(out / "judgements.jsonl")}
    for row in judged.values():
        pairs = zip(judge.turns(row["answer"]), judge.turns(row["reference"]), strict=True)
        assert row["score"] == pytest.approx(1 + 9 * np.mean([overlap(a, r) for a, r in pairs]))
    results = json.loads((out / "results.json").read_text())
    assert results["kind"] == "reference_overlap" and results["questions"] == 3
    assert "AlignBench" not in (shown := capsys.readouterr().out) and "overlap with the reference" in shown
    assert main(command) == 0 and asked == [3, 1, 1, 1]
    assert main(["eval", "table", str(out)]) == 2
    capsys.readouterr()
    assert main([*command[:-1], "9"]) == 2
    assert "answers.jsonl: was made with another max_new_tokens" in capsys.readouterr().err
    (tmp_path / "questions.jsonl").write_text(json.dumps(QUESTIONS[0]))
    assert main(command) == 2
    assert "answers.jsonl: was made with another questions" in capsys.readouterr().err


def test_answers_of_a_file_are_judged_by_an_endpoint_and_compared(endpoint, tmp_path, capsys):
    url, asked, script = endpoint
    path, out = tmp_path / "answers.jsonl", tmp_path / "out"
    path.write_text("\n".join(json.dumps(q | {"answer": q["reference"], "model_id": "M"}) for q in QUESTIONS))
    command = [
        "eval",
        "dialogue",
        str(path),
        "--judge",
        url,
        "--judge-model",
        "m",
        "--out",
        str(out),
        "--parallel",
        "1",
    ]
    script += [(200, json.dumps({"choices": [{"message": {"content": "好"}}]})), (400, "")]
    assert main(command) == 2
    assert "refuses the request" in capsys.readouterr().err
    kept = lines(out / "judgements.jsonl")
    assert [row["score"] for row in kept] in ([-1], [-1, 8])  # a reply that was on its way may have come
    before = len(asked)
    assert main(command) == 0 and len(asked) - before == 3 - len(kept)
    results = json.loads((out / "results.json").read_text())
    assert results["kind"] == "alignbench" and results["model"] == "M" and results["unreadable"] == 1
    assert sorted(row["score"] for row in lines(out / "judgements.jsonl")) == [-1, 8, 8]
    assert main([*command[:6], "other", *command[7:]]) == 2
    assert "judgements.jsonl: was made with another judge_model" in capsys.readouterr().err
    (tmp_path / "other" / "results.json").parent.mkdir()
    (tmp_path / "other" / "results.json").write_text('{"kind": "bits_per_byte"}')
    assert main([*command[:8], str(tmp_path / "other")]) == 2
    assert "results.json: holds results of something else; choose another --out" in capsys.readouterr().err
    assert main([*command, "--against", str(path)]) == 1  # no reply has a preference
    assert "no verdict of the judge can be read" in capsys.readouterr().err
    reference = [
        "eval",
        "dialogue",
        str(path),
        "--judge",
        "reference",
        "--out",
        str(tmp_path / "r"),
        "--against",
        str(path),
    ]
    assert main(reference) == 0
    assert "tie 3" in capsys.readouterr().out


def test_a_checkpoint_judges(work, tmp_path, monkeypatch, capsys):
    path, out = tmp_path / "answers.jsonl", tmp_path / "out"
    path.write_text("\n".join(json.dumps(q | {"answer": q["reference"]}) for q in QUESTIONS))
    command = ["eval", "dialogue", str(path), "--judge", str(work), "--out", str(out), "--judge-tokens", "4"]
    assert main(command) == 1  # its positions are too few for any prompt
    assert "no verdict of the judge can be read" in capsys.readouterr().err
    assert {row["judgment"] for row in lines(out / "judgements.jsonl")} == {None}
    larger = work_directory(tmp_path / "L", *model(max_seq_len=2048))
    command[4:7] = [str(larger), "--out", str(tmp_path / "second")]
    seen = []

    def verdicts(self, prompts, *, on_text, **how):
        seen.extend(self.vocabulary.decode(ids) for ids in prompts)
        for i in range(len(prompts)):
            on_text(i, f"{{'综合得分': {i + 1}}}")

    monkeypatch.setattr(EvalModel, "continue_texts", verdicts)
    assert main(command) == 0
    assert [row["score"] for row in lines(tmp_path / "second" / "judgements.jsonl")] == [1, 2, 3]
    assert "综合得分" in seen[0] and "1+1=?" in seen[0]


def test_what_is_wrong_is_one_line(work, tmp_path, monkeypatch, capsys):
    file = tmp_path / "questions.jsonl"

    def error(*flags, ckpt=work):
        command = ["eval", "dialogue", str(ckpt), "--out", str(tmp_path / "o"), "--judge", "reference", *flags]
        assert main(command) == 2
        return capsys.readouterr().err

    assert error() == "tele: --questions: is needed with a checkpoint\n"
    assert "--judge-model: is needed" in error("--judge", "http://localhost:9")
    assert "question_id 1: a prompt of" in error("--questions", str(file), "--max-new-tokens", "255")

    def refuse(self, prompts, **how):
        raise AssertionError("nothing is to be answered")

    monkeypatch.setattr(EvalModel, "continue_texts", refuse)
    file.write_text("\n".join(json.dumps(q | {"reference": None}) for q in QUESTIONS))
    assert "question_id 1: needs a reference for each turn" in error("--questions", str(file))
    for change, message in (
        ({"question": " "}, "question_id 1: its question is empty"),
        ({"question": 3}, "line 1: needs a field 'question', str or list"),
        ({"question": []}, "question_id 1: needs turns"),
        ({"question": ["a", 3]}, "must be texts, or lists of texts"),
    ):
        file.write_text(json.dumps(QUESTIONS[0] | change))
        assert message in error("--questions", str(file))
    file.write_text(json.dumps(QUESTIONS[0] | {"answer": ["a", "b"]}))
    assert "as many answers as questions" in error(ckpt=file)
    file.write_text(json.dumps(QUESTIONS[0] | {"answer": "a", "reference": None}))
    assert "needs a reference for each turn" in error(ckpt=file)
    assert "holds answers with their questions; leave the flag out" in error("--questions", str(file), ckpt=file)


def test_answers_are_read_from_gzip_and_damaged_records_are_named(tmp_path, capsys):
    path, out = tmp_path / "answers.jsonl.gz", tmp_path / "out"
    path.write_bytes(gzip.compress(json.dumps(QUESTIONS[0] | {"answer": "3"}).encode()))
    command = ["eval", "dialogue", str(path), "--judge", "reference", "--out", str(out)]
    assert main(command) == 0
    for line in ("5", '{"a": 1}', json.dumps(QUESTIONS[0] | {"answer": "3", "score": True})):
        (out / "judgements.jsonl").write_text(line + "\n")
        assert main(command) == 1
        assert "judgements.jsonl, line 1: damaged, needs a field" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sampling", "expected"), [({"repetition_penalty": 1.5}, 1.5), ({"top_k": 5}, None), ({}, 1.02)]
)
def test_answers_have_the_repetition_penalty_of_the_release_or_else_of_the_template(sampling, expected):
    found = templates.greedy_options(templates.TEMPLATES["telechat_52b"], {"sampling": sampling})
    assert found == ({} if expected is None else {"repetition_penalty": expected})
