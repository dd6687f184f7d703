"""The loader of held-out pairs: each sample once on any number of ranks, bad ones left out."""

from collections import Counter

import numpy as np
import pytest
from making import BAD_PICTURES, backend, caption, picture, rows_of, sources_of, table_of, write_pairs, write_table

from meter_fast.data.loader import EvaluationLoader, evaluation_shares
from meter_fast.data.order import OrderError
from meter_fast.data.samples import BadDataError
from meter_fast.data.sources import open_sources
from meter_fast.data.text import TextPipeline


def evaluation(sources, tokenizer, **options):
    text = TextPipeline(tokenizer, max_length=16)
    return EvaluationLoader(sources, text, backend(), **({"batch_size": 8, "max_bad_share": 0.9} | options))


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [14, 25, 60])
def test_evaluation_shows_each_sample_once_on_any_number_of_ranks(tmp_path, tokenizer, world, size):
    write_pairs(tmp_path / "own.arrow", size)
    sources = open_sources(["arrow:own"], tmp_path)
    whole = rows_of(evaluation(sources, tokenizer))
    loaders = [evaluation(sources, tokenizer, rank=rank, world=world) for rank in range(world)]
    rows = [rows_of(loader) for loader in loaders]
    assert sorted(row[0] for several in rows for row in several) == list(range(size))
    assert [row for several in rows for row in several] == whole
    assert len({len(list(loader)) for loader in loaders}) == 1
    assert all(0 < len(batch) <= 8 for loader in loaders for batch in loader)
    labels = [row[5] for row in whole]
    assert sum(labels) == size - size // 2  # balanced; an odd one out matches
    assert rows_of(evaluation(sources, tokenizer)) == whole


def test_evaluation_of_a_part_is_a_fair_draw(sound, tokenizer):
    parts = [evaluation(sound, tokenizer, limit=30, seed=seed) for seed in range(2)]
    drawn = [sorted(row[0] for row in rows_of(part)) for part in parts]
    assert all(len(set(samples)) == 30 for samples in drawn)
    assert drawn[0] != drawn[1]
    assert max(drawn[0]) > 60
    assert len(rows_of(evaluation(sound, tokenizer, limit=1000))) == 120


def test_evaluation_leaves_bad_samples_out_and_counts_them(damaged, tokenizer):
    loader = evaluation(damaged, tokenizer, workers=2)
    for _ in range(2):
        batches = list(loader)
        seen = [row[0] for row in rows_of(batches)]
        bad = {sample for sample in range(120) if sample // 2 in range(0, 60, 5)} | {15, 16, 18}
        assert sorted(seen) == sorted(set(range(120)) - bad)
        assert loader.skipped == {cause: 6 for cause in BAD_PICTURES} | {"empty caption": 3}
        for batch in batches:
            pictures = damaged.image_ids(batch.sample_ids.numpy())
            wrong = (batch.itm_labels == 0).numpy()
            assert (pictures[batch.itm_images.numpy()][wrong] != pictures[wrong]).all()
            assert (batch.itm_images.numpy()[~wrong] == np.flatnonzero(~wrong)).all()


def test_evaluation_of_nothing_good_stops(tmp_path, tokenizer):
    sources = sources_of(tmp_path, [b""] * 8, [[caption(n)] for n in range(8)])
    with pytest.raises(BadDataError, match=r"no sample of an evaluation batch.*zero bytes: 8, first own\.arrow row"):
        list(evaluation(sources, tokenizer))


def test_evaluation_shares_are_complete_disjoint_even_and_never_empty():
    for count in range(2, 90):
        for world in (1, 2, 3, 5, 8):
            for batch_size in (1, 2, 3, 4, 6, 7, 16):
                if -(-count // 2) < world:
                    with pytest.raises(OrderError, match=f"evaluation of {count} samples on {world} ranks"):
                        evaluation_shares(count, batch_size, 0, world)
                    continue
                shares = [evaluation_shares(count, batch_size, rank, world) for rank in range(world)]
                assert len({len(batches) for batches in shares}) == 1
                every = [batch for batches in shares for batch in batches]
                assert all(0 < len(batch) <= max(4, batch_size) for batch in every)
                assert all(batch[0] % 2 == 0 for batch in every)
                assert np.concatenate(every).tolist() == list(range(count))


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_dealt_batches_are_those_of_one_process(damaged, tokenizer, world):
    """Each once, some processes with fewer or none, and one without a usable sample is passed over."""
    whole = evaluation(damaged, tokenizer, batch_size=4, max_bad_share=1.0)
    parts = [whole.dealt(rank, world) for rank in range(world)]
    rows = [rows_of(part) for part in parts]
    alone = {row[0]: row for row in rows_of(evaluation(damaged, tokenizer, batch_size=4, max_bad_share=1.0))}
    found = [row for several in rows for row in several]
    assert {row[0]: row for row in found} == alone and len(found) == len(alone)
    assert sum((part.skipped for part in parts), Counter()) == {cause: 6 for cause in BAD_PICTURES} | {
        "empty caption": 3
    }
    assert sum(map(len, parts)) == len(whole) and max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_dealt_batch_without_a_usable_sample_is_passed_over(tmp_path, tokenizer):
    images = [b"no picture"] * 8 + [picture(number) for number in range(8)]
    write_table(tmp_path / "own.arrow", table_of(images, [[caption(number)] for number in range(16)]))
    sources = open_sources(["arrow:own"], tmp_path)
    whole = evaluation(sources, tokenizer, batch_size=4, max_bad_share=1.0)
    whole.samples = np.arange(16)
    with pytest.raises(BadDataError, match="no sample of an evaluation batch"):
        list(whole)
    seen = [sorted(row[0] for row in rows_of(whole.dealt(rank, 2))) for rank in range(2)]
    assert seen == [[8, 9, 10, 11], [12, 13, 14, 15]]
