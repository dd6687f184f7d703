"""Annotation files read element by element give what reading them whole gives."""

import json

import pytest

from meter_fast.data.prepare import PrepareError, json_stream
from meter_fast.data.prepare.json_stream import elements, lines

ARRAYS = {
    "empty": [],
    "numbers": [1, 23, -4.5e10, 678901234567890],
    "texts": ["", "café", 'quote " and \\ and ] }', "\U0001f600", "\ud83d"],
    "objects": [{"a": [1, [2, {"b": None}]], "c": "x" * 50}, {}, [], True, None],
}


@pytest.fixture(params=[1, 3, 7, 1 << 22])
def window(request, monkeypatch):
    monkeypatch.setattr(json_stream, "WINDOW", request.param)


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("name", ARRAYS)
def test_elements_are_those_of_the_whole_file(name, ascii_only, window, tmp_path):
    array = ARRAYS[name] if ascii_only else [one for one in ARRAYS[name] if one != "\ud83d"]
    path = tmp_path / "annotations.json"
    for key, content, mark in ((None, array, b""), ("wanted", {"info": {"wanted": [0]}, "wanted": array, "z": 1}, b"")):
        text = json.dumps(content, ensure_ascii=ascii_only, indent=1)
        path.write_bytes(mark + text.encode())
        found = list(elements(path, key))
        assert [one for one, _, _ in found] == array
        whole = path.read_bytes()
        assert [json.loads(whole[begin:end]) for _, begin, end in found] == array


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf ["x"]')
    assert list(elements(tmp_path / "a.json")) == [("x", 5, 8)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file ends where [ should"),
        (b"{}", "'{' stands where [ should"),
        (b"[1, 2", "the file ends where , or ] should"),
        (b"[1 2]", "'2' stands where , or ] should, byte 3"),
        (b'[1, {"a": ]', "byte 4"),
        (b'["\xff"]', "utf-8"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_damage_is_an_error_with_its_place(content, message, window, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(PrepareError) as caught:
        list(elements(tmp_path / "a.json"))
    assert message in str(caught.value) and "a.json" in str(caught.value)


def test_lines_are_numbered_and_empty_ones_passed_over(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": "é"}')
    assert list(lines(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (3, {"a": "é"})]
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a"')
    with pytest.raises(PrepareError, match="line 2: no JSON"):
        list(lines(tmp_path / "a.jsonl"))
