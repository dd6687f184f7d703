"""Both forms that `benchmarks.latency` times say the same: texts padded to 50 or to the longest, everything computed or
what is read."""

import argparse
import itertools

import numpy as np
import pytest
import torch

from benchmarks import latency
from benchmarks.latency import (
    HEADS,
    PADDED,
    TOLERANCE,
    Case,
    Model,
    Spent,
    ask_fast,
    ask_plain,
    cases,
    check,
    make_form,
    make_requests,
    make_sides,
    measure,
    summed,
)


@pytest.fixture(scope="module")
def models():
    """The model of all heads and the one that writes."""
    return {writes: make_sides("tiny", None, writes, torch.float32, "cpu") for writes in (False, True)}


@pytest.mark.parametrize("task", list(HEADS))
def test_plain_and_fast_say_the_same(models, task):
    sides = models[task == "caption"]
    asked = make_requests(task, 5, 2, 13, sides.plain.config.vision.image_size)
    assert (len(asked.texts), len(set(asked.first))) == (5, 1 if task == "rank" else 3)
    plain, fast = ask_plain(task, sides, asked), ask_fast(task, sides.fast["eager"], asked)
    assert plain.shape[0] == 5 and plain.float().std() > 0
    check(task, sides, plain, fast, TOLERANCE["fp32"])


def test_a_difference_ends_the_run(models):
    asked = make_requests("match", 3, 1, 13, 96)
    plain, fast = ask_plain("match", models[False], asked), ask_fast("match", models[False].fast["eager"], asked)
    with pytest.raises(RuntimeError, match="match: plain and fast differ by"):
        check("match", models[False], plain + 1e-2, fast, TOLERANCE["fp32"])


@pytest.mark.parametrize(("task", "tokens"), itertools.product(("answer", "fill"), (4, 8, 13, 50)))
def test_texts_are_as_long_as_asked(models, task, tokens):
    texts = make_requests(task, 64, 1, tokens, 8).texts
    read = models[False].tokenizer([text.replace("<mask>", models[False].tokenizer.mask_token) for text in texts])
    lengths = np.array([len(ids) for ids in read["input_ids"]])
    spread = min(4, tokens - 4, PADDED - tokens)
    assert (lengths.min(), lengths.max()) == (tokens - spread, tokens + spread)
    assert abs(lengths.mean() - tokens) < 1


def test_variants_share_weights_and_only_some_are_compiled():
    sides = make_sides("tiny", None, False, torch.float32, "cpu", ("eager", "compiled"))
    eager, compiled = (sides.fast[name].model for name in ("eager", "compiled"))
    assert [block._compiled_call_impl is None for block in eager.vision.blocks] == [True] * len(eager.vision.blocks)
    assert all(block._compiled_call_impl is not None for block in compiled.vision.blocks)
    for plain, own in zip(sides.plain.parameters(), compiled.parameters(), strict=True):
        assert plain is not own and torch.equal(plain, own)


def test_every_form_is_timed_as_often_as_asked():
    """Case after case, in processes of their own."""
    todo = [Case("answer", 8, 1, 2), Case("match", 8, 1, 1)]
    found = list(measure(Model("tiny", 96, False, "fp32"), ("eager",), todo, 3))
    assert [case for case, _ in found] == todo
    for _, times in found:
        assert {name: len(some) for name, some in times.items()} == {"plain": 3, "eager": 3}
        assert all(one.wall > 0 and one.cpu > 0 for some in times.values() for one in some)


def test_a_process_that_says_something_else_ends_the_run(monkeypatch):
    monkeypatch.setattr(latency, "keep_freed_memory", lambda: True)  # it would be of the whole test run
    monkeypatch.setattr(latency, "ask_fast", lambda *_: [[("a", 0.1)] * 5])
    work = make_form("eager", Model("tiny", 96, False, "fp32"), [Case("answer", 8, 1, 1)], 1)
    with pytest.raises(RuntimeError, match="answer: plain and fast differ by"):
        work()


def test_percentiles_and_throughput():
    found = summed([Spent(n / 1000, n / 500) for n in range(1, 102)], 4)
    assert found == pytest.approx({"p50": 51, "p95": 96, "p99": 100, "cpu_p50": 102, "requests_per_second": 4 / 0.051})


def test_only_cases_that_differ_are_measured():
    arguments = argparse.Namespace(tokens=[8, 13], texts=[1, 5], batch=[1, 5])
    expected = [(8, 1, 1), (8, 1, 5), (8, 5, 5), (13, 1, 1), (13, 1, 5), (13, 5, 5)]
    assert cases(arguments, "answer") == [Case("answer", *case) for case in expected]
    assert cases(arguments, "rank") == [Case("rank", *case) for case in ((8, 1, 1), (8, 1, 5), (13, 1, 1), (13, 1, 5))]
    assert len(cases(arguments, "caption")) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tokens", "8", "51"], "--tokens 8 51: 4 to 50"),
        (["--batch", "0"], "1 or more"),
        pytest.param(
            ["--variant", "cuda_graphs"],
            "cuda_graphs needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_a_model_is_made(options, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["latency", "--size", "tiny", *options])
    with pytest.raises(SystemExit):
        latency.main()
    assert said in capsys.readouterr().err
