"""`meter-fast predict`: what comes out is what the Python calls say, in order, and nothing is dropped."""

import csv
import io
import json

import pytest
from predict_cases import make_export, make_writer, write_pictures

import meter_fast
from meter_fast.cli import main
from meter_fast.predict.progress import Progress


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("command") / "export")


@pytest.fixture(scope="module")
def predictor(export):
    return meter_fast.load(export)


@pytest.fixture
def paths(tmp_path):
    """Four pictures in a folder, and a file that is none."""
    paths = write_pictures(tmp_path / "pictures", 4)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    return paths


def run(*words: object) -> int:
    return main(["predict", *map(str, words)])


def read(path) -> list[dict]:
    """The rows of a result."""
    if path.suffix == ".csv":
        return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def close(found, expected) -> None:
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_one_picture(export, predictor, paths, capsys):
    assert run(export, "answer", paths[0], "--text", "is it red ?", "--k", 2) == 0
    shown = capsys.readouterr()
    (one, p), (two, q) = predictor.answer(paths[0], "is it red ?", 2)
    assert shown.out == f"{paths[0]}\tis it red ?\t{one} {p:.4f}, {two} {q:.4f}\n"
    assert shown.err.startswith("1 row in ") and "failed" not in shown.err


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_folder(export, predictor, paths, tmp_path, capsys, suffix):
    out = tmp_path / f"out{suffix}"
    assert run(export, "match", tmp_path / "pictures", "--text", "a red circle", "--text", "two", "--out", out) == 0
    rows = read(out)
    assert [(row["image"], row["text"]) for row in rows] == [
        (str(p), t) for p in paths for t in ("a red circle", "two")
    ]
    close([float(row["probability"]) for row in rows], predictor.match([p for p in paths for _ in "ab"],
                                                                       ["a red circle", "two"] * 4))  # fmt: skip
    assert all(row["error"] == "" for row in rows)
    shown = capsys.readouterr()
    assert shown.out == "" and "1 other files of the folder" in shown.err and f"written to {out}" in shown.err


def test_every_task_from_a_table(export, predictor, paths, tmp_path):
    table = tmp_path / "asked.csv"
    table.write_text(
        "id,image,text\n" + "".join(f"{n},pictures/{n % 4}.png,a <mask> circle {n % 3}\n" for n in range(9))
    )
    images, texts = [paths[n % 4] for n in range(9)], [f"a <mask> circle {n % 3}" for n in range(9)]
    for task in ("answer", "match", "fill", "entails"):
        out = tmp_path / f"{task}.jsonl"
        assert run(export, task, table, "--out", out, "--batch", 2) == 0
        rows, said = read(out), getattr(predictor, task)(images, texts)
        assert [row["id"] for row in rows] == [str(n) for n in range(9)]
        for row, expected in zip(rows, said, strict=True):
            assert row["error"] == ""
            if task == "answer":
                assert [row["answer"], row["answers"][0][0]] == [expected[0][0]] * 2
                close([score for _, score in row["answers"]], [score for _, score in expected])
            elif task == "match":
                close(row["probability"], expected)
            elif task == "fill":
                assert row["filled"] == row["text"].replace("<mask>", expected[0][0][0])
                close([p for _, p in row["fills"][0]], [p for _, p in expected[0]])
            else:
                assert row["label"] == max(expected, key=expected.get)
                close(row["neutral"], expected["neutral"])


def test_compare(export, predictor, paths, tmp_path, capsys):
    assert run(export, "compare", paths[0], paths[1], "--text", "both are red") == 0
    expected = predictor.compare(paths[0], paths[1], "both are red")
    assert capsys.readouterr().out == f"{paths[0]}\t{paths[1]}\tboth are red\t{expected:.4f}\n"
    table, out = tmp_path / "pairs.jsonl", tmp_path / "out.csv"
    rows = [{"image_a": f"pictures/{n}.png", "image_b": f"pictures/{3 - n}.png", "text": "both"} for n in range(4)]
    table.write_text("\n".join(map(json.dumps, rows)))
    assert run(export, "compare", table, "--out", out) == 0
    close([float(row["probability"]) for row in read(out)], predictor.compare(paths, paths[::-1], "both"))


def test_rank(export, predictor, paths, tmp_path):
    texts, out = ["a red circle", "two", "blue"], tmp_path / "out.csv"
    assert run(export, "rank", tmp_path / "pictures", *(x for t in texts for x in ("--text", t)), "--out", out) == 0
    ranking, rows = predictor.rank(paths, texts), read(out)
    assert len(rows) == 12
    for n, path in enumerate(paths):
        own = rows[3 * n : 3 * n + 3]
        assert [row["image"] for row in own] == [str(path)] * 3 and [row["text_rank"] for row in own] == ["1", "2", "3"]
        assert [row["text"] for row in own] == [texts[t] for t in ranking.texts[n]]
        close([float(row["score"]) for row in own], ranking.scores[n][ranking.texts[n]].tolist())
    for t, text in enumerate(texts):
        own = sorted((row for row in rows if row["text"] == text), key=lambda row: int(row["image_rank"]))
        assert [row["image"] for row in own] == [str(paths[n]) for n in ranking.images[t]]
    table = tmp_path / "both.csv"
    table.write_text("image,text\npictures/1.png,two\npictures/3.png,blue\n,red\n")
    assert run(export, "rank", table, "--out", out) == 0
    assert [bool(row["error"]) for row in read(out)] == [False] * 4 + [True]
    table = tmp_path / "both.jsonl"
    table.write_text('{"image": ["odd"], "text": "two"}\n{"image": "pictures/1.png", "text": "two"}\n')
    assert run(export, "rank", table, "--out", out) == 0
    assert sorted(bool(row["error"]) for row in read(out)) == [False, True]


def test_captions(paths, tmp_path, tmp_path_factory, capsys):
    export = make_writer(tmp_path_factory.mktemp("captions") / "export")
    assert run(export, "caption", *paths) == 0
    said = meter_fast.load(export).caption(paths)
    assert capsys.readouterr().out == "".join(f"{path}\t{text}\n" for path, text in zip(paths, said))


def test_rows_that_fail_keep_their_place_and_are_counted(export, predictor, paths, tmp_path, capsys):
    (tmp_path / "cut.png").write_bytes(paths[0].read_bytes()[:300])
    (tmp_path / "text.png").write_text("hello")
    table, out = tmp_path / "asked.csv", tmp_path / "out.csv"
    table.write_text(
        'n,image,text\n0,pictures/0.png,red ?\n1,cut.png,red ?\n2,pictures/1.png,"  "\n3,nowhere.png,red ?\n'
        "4,text.png,red ?\n5,,red ?\n6,pictures/2.png,red ?,more\n7,pictures/2.png\n8,pictures/2.png,red ?\n"
    )
    assert run(export, "match", table, "--out", out) == 0
    rows = read(out)
    assert [row["n"] for row in rows] == [str(n) for n in range(9)]
    told = [
        "",
        "truncated",
        "empty text",
        "does not exist",
        "not an image",
        "holds no path",
        "more cells",
        "empty text",
        "",
    ]
    for row, error in zip(rows, told, strict=True):
        assert error in row["error"] and bool(row["error"]) == bool(error) == (row["probability"] == "")
    close([float(rows[n]["probability"]) for n in (0, 8)], predictor.match([paths[0], paths[2]], "red ?"))
    error = capsys.readouterr().err
    assert "9 rows in" in error and "7 of them failed: empty text 2, truncated 1" in error and "and 4 more" in error


def test_lines_that_are_no_json_keep_their_place(export, paths, tmp_path, capsys):
    table, out = tmp_path / "asked.jsonl", tmp_path / "out.jsonl"
    table.write_text(
        '{"image": "pictures/0.png", "text": "red"}\n\n{broken\n[1]\n{"image": "pictures/1.png", "text": 3}\n'
    )
    assert run(export, "match", table, "--out", out) == 0
    rows = read(out)
    assert [row["error"][:11] for row in rows] == ["", "line 3 is n", "line 4 hold", "a text is a"]
    assert rows[1]["line"] == 3 and rows[0]["line"] is None and rows[1]["probability"] is None


def test_all_rows_failed_is_an_error_and_the_file_says_why(export, tmp_path, capsys):
    (tmp_path / "a.png").write_text("hello")
    assert run(export, "match", tmp_path / "a.png", "--text", "red") == 2
    shown = capsys.readouterr()
    assert "error: " in shown.out and "not an image" in shown.err
    assert run(export, "match", tmp_path / "a.png", "--text", "red", "--out", tmp_path / "out.csv") == 2
    assert "not an image" in read(tmp_path / "out.csv")[0]["error"]


def test_cut_texts_are_told(export, paths, capsys):
    assert run(export, "match", paths[0], "--text", "red " * 40) == 0
    assert "1 text not read to the end" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{tmp}/nowhere", "match", "{pic}", "--text", "a"], "nowhere does not exist: give an export folder"),
        (["{tmp}", "match", "{pic}", "--text", "a"], "has no model: neither model.safetensors"),
        (["{pic}", "match", "{pic}", "--text", "a"], "0.png was not opened"),
        (["{model}", "caption", "{pic}"], "writes no captions (it has no decoder"),
        (["{model}", "match", "{tmp}/nowhere.png", "--text", "a"], "nowhere.png does not exist"),
        (["{model}", "match", "{tmp}/empty", "--text", "a"], "empty holds no pictures (0 other files)"),
        (["{model}", "match", "{pic}"], 'match needs a text: --text "..."'),
        (["{model}", "match", "{pic}", "--text", ""], "a text is '': empty text"),
        (["{model}", "answer", "{pic}", "--text", "a", "--k", "9"], "k=9: give 1 to 6, the answers"),
        (["{model}", "answer", "{pic}", "--text", "a", "--k", "0"], "--k 0: give 1 or more"),
        (["{model}", "match", "{pic}", "--text", "a", "--k", "3"], "--k 3 has no meaning for match"),
        (["{model}", "compare", "{pic}", "--text", "a"], "compare takes two pictures, or a table with"),
        (["{model}", "compare", "{table}"], "table.csv has no column image_a: it has image, question (its first line"),
        (["{model}", "match", "{table}"], "table.csv has no column text: it has image, question"),
        (["{model}", "match", "{tmp}/rows.jsonl"], "rows.jsonl has no column text: it has image"),
        (["{model}", "match", "{tmp}/none.csv"], "none.csv has no rows"),
        (["{model}", "match", "{tmp}/latin.csv"], "latin.csv is not UTF-8"),
        (["{model}", "match", "{tmp}/own.csv"], "own.csv has a column probability, which is the name of a result"),
        (["{model}", "match", "{tmp}/own.csv", "--text", "a"], "own.csv has a column text, and --text was given"),
        (["{model}", "match", "{table}", "{pic}", "--text", "a"], "2 inputs, with a table among them"),
        (["{model}", "match", "{tmp}/table.tsv"], "table.tsv is neither a picture nor a table"),
        (["{model}", "caption", "{pic}", "--text", "a"], "caption reads no text"),
        (
            ["{model}", "match", "{pic}", "--text", "a", "--out", "{tmp}/x.txt"],
            "x.txt: give a name that ends with .csv",
        ),
        (["{model}", "match", "{pic}", "--text", "a", "--out", "{tmp}/no/x.csv"], "the folder"),
        (["{model}", "match", "{table}", "--out", "{table}"], "is a folder or the input itself"),
        (["{model}", "match", "{pic}", "--text", "a", "--device", "gpu"], "device='gpu' is no device"),
        (["{unnamed}", "answer", "{pic}", "--text", "a"], "does not say what its 6 answers are called: give answers="),
    ],
)
def test_wrong_calls_end_with_a_line_and_code_2(export, paths, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    files = {
        "table.csv": "image,question\npictures/0.png,a\n",
        "rows.jsonl": '{"image": "pictures/0.png"}\n',
        "none.csv": "image,text\n",
        "own.csv": "image,text,probability\npictures/0.png,a,1\n",
        "table.tsv": "image\ttext\n",
    }
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "latin.csv").write_bytes("image,text\npictures/0.png,caf\xe9\n".encode("latin-1"))
    places = {"model": export, "tmp": tmp_path, "pic": paths[0], "table": tmp_path / "table.csv"}
    if "{unnamed}" in words:
        places["unnamed"] = make_export(tmp_path / "unnamed", answers=False)
    before = sorted(tmp_path.iterdir())
    assert run(*(word.format(**places) for word in words)) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_nothing_is_written_when_it_is_interrupted(export, paths, tmp_path, monkeypatch):
    def stop(self, done, failed):
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "__call__", stop)
    with pytest.raises(KeyboardInterrupt):
        run(export, "match", *paths, "--text", "a", "--out", tmp_path / "out.csv")
    assert not list(tmp_path.glob("*out*"))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_and_elsewhere():
    now = [0.0]
    terminal, plain = Terminal(), io.StringIO()
    shown = [Progress(200, stream, clock=lambda: now[0]) for stream in (terminal, plain)]
    for done in (50, 100, 150, 200):
        now[0] += 5
        for one in shown:
            one(done, done // 100)
    for one in shown:
        one.close()
    assert terminal.getvalue().count("\r") == 5 and "\n" not in terminal.getvalue()
    assert plain.getvalue().splitlines() == [
        "[############------------] 100/200 rows  10 rows/s  ETA 10 s  failed 1",
        "[########################] 200/200 rows  10 rows/s  ETA 0 s  failed 2",
    ]
