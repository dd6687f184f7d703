"""The loader: the same global batches however they are divided and prepared, from any step on."""

import random
import sys
import threading
import traceback
import weakref
from collections import Counter

import numpy as np
import pytest
import torch
from making import SIDE, backend, caption, global_batches, loader_of, rows_of, write_pairs
from torch.testing import assert_close

from meter_fast.data.images import image_transform, normalise
from meter_fast.data.loader import PretrainLoader, TrainingLoader, run_ahead
from meter_fast.data.order import OrderError, SampleOrder
from meter_fast.data.samples import Prepared
from meter_fast.data.sources import Sources, open_sources
from meter_fast.data.text import TextPipeline

# ------------------------------------------------------------------------------------------ the contract of a batch


@pytest.mark.parametrize("negatives", ["batch", "dataset"])
def test_a_batch_holds_what_it_says(sound, tokenizer, negatives):
    loader = loader_of(sound, tokenizer, global_batch=32, negatives=negatives)
    transform = image_transform("clip", SIDE)
    for (batch,) in loader.steps(0, 4):
        pairs, length = batch.text_ids.shape
        assert pairs == len(batch) == 32
        assert batch.images.shape == (32, 3, SIDE, SIDE)
        assert length == int(batch.text_mask.sum(1).max())
        for name in (
            "text_ids",
            "masked_ids",
            "masked_rows",
            "masked_labels",
            "itm_labels",
            "itm_images",
            "sample_ids",
        ):
            assert getattr(batch, name).dtype == torch.int64, name
        assert batch.text_mask.dtype == torch.bool
        for pair, sample in enumerate(batch.sample_ids.tolist()):
            text = tokenizer.decode(batch.text_ids[pair][batch.text_mask[pair]], skip_special_tokens=True)
            words = caption(sample).split()
            assert text.split()[: len(words)] == words[: len(text.split())]
            pixels = np.random.default_rng(sample // 2).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
            expected = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None], transform, torch.float32)[0]
            assert_close(batch.images[pair], expected, rtol=0, atol=0)
        assert (batch.text_ids.flatten()[batch.masked_rows] == batch.masked_labels).all()
        changed = (batch.text_ids != batch.masked_ids).flatten().nonzero().flatten()
        assert set(changed.tolist()) <= set(batch.masked_rows.tolist())
        assert len(changed) > 0
        assert batch.masked_rows.tolist() == sorted(set(batch.masked_rows.tolist()))
        labels = batch.itm_labels.view(-1, 2)
        assert (labels.sum(1) == 1).all()  # of each two exactly one matches
        matching = batch.itm_labels == 1
        own = torch.arange(32)
        assert (batch.itm_images[matching] == own[matching]).all()
        if negatives == "batch":
            assert batch.false_images is None
            assert (batch.itm_images[~matching] == (own ^ 1)[~matching]).all()
        else:
            assert batch.false_images.shape == (16, 3, SIDE, SIDE)
            assert batch.itm_images[~matching].tolist() == list(range(32, 48))


def test_moving_a_batch_changes_the_type_of_pictures_only(sound, tokenizer):
    ((batch,),) = loader_of(sound, tokenizer, global_batch=8, negatives="dataset").steps(0, 1)
    moved = batch.to("cpu", torch.bfloat16)
    assert moved.images.dtype == moved.false_images.dtype == torch.bfloat16
    assert moved.text_ids.dtype == moved.itm_labels.dtype == torch.int64
    assert moved.text_mask.dtype == torch.bool
    assert batch.to("cpu").images.dtype == torch.float32


def test_a_negative_from_the_batch_never_shows_the_same_picture(sound, tokenizer):
    """Two captions a picture and batches of half the set: without care it would happen all the time."""
    for (batch,) in loader_of(sound, tokenizer, global_batch=64).steps(0, 10):
        pictures = sound.image_ids(batch.sample_ids.numpy())
        wrong = (batch.itm_labels == 0).numpy()
        assert (pictures[batch.itm_images.numpy()][wrong] != pictures[wrong]).all()


def test_coins_and_false_pictures_are_fair(sound, tokenizer):
    """Over 64 steps of 32: which of a pair matches, and which picture of the data set is drawn."""
    first, drawn = [], Counter()
    for (batch,) in loader_of(sound, tokenizer, global_batch=32, negatives="dataset").steps(0, 64):
        first += batch.itm_labels.view(-1, 2)[:, 0].tolist()
        drawn.update(image.numpy().tobytes() for image in batch.false_images)
    assert abs(np.mean(first) - 0.5) < 0.06  # 1024 coins: 3.8 standard deviations
    assert len(drawn) == 60
    counts = np.array(list(drawn.values()))
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 59 + 5 * np.sqrt(2 * 59)


def test_masks_differ_between_epochs_and_seeds(sound, tokenizer):
    """A caption is hidden in other places each time it comes round."""
    places = {}
    for (batch,) in loader_of(sound, tokenizer, global_batch=120).steps(0, 3):
        for sample, _, masked, *_ in rows_of([batch]):
            places.setdefault(sample, []).append(tuple(masked))
    assert all(len(several) == 3 for several in places.values())
    assert sum(len(set(several)) for several in places.values()) > 300
    again, _ = global_batches(sound, tokenizer, (0, 1), global_batch=120)
    other, _ = global_batches(sound, tokenizer, (0, 1), global_batch=120, seed=4)
    assert again != other


def test_the_programs_own_random_numbers_are_left_alone(sound, tokenizer):
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    list(loader_of(sound, tokenizer, global_batch=16, negatives="dataset").steps(0, 3))
    assert states == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_no_token_to_predict_gives_empty_rows(sound, tokenizer):
    order = SampleOrder(sound.sizes, 0, 4, image_ids=sound.image_ids)
    text = TextPipeline(tokenizer, max_length=16, probability=0.0)
    ((batch,),) = PretrainLoader(sound, order, text, backend(), micro_batch=4, workers=0).steps(0, 1)
    assert batch.masked_rows.shape == batch.masked_labels.shape == (0,)
    assert batch.masked_rows.dtype == batch.masked_labels.dtype == torch.int64
    assert (batch.masked_ids == batch.text_ids).all()


# ------------------------------------------------------------------------------------------ elasticity and resuming


@pytest.mark.parametrize("negatives", ["batch", "dataset"])
@pytest.mark.parametrize("kind", ["sound", "damaged"])
@pytest.mark.scenario(13, "the loader gives the same global batches for every division among processes")
def test_every_division_gives_the_same_global_batches(request, tokenizer, kind, negatives):
    """World sizes, micro-batches and accumulations, over an epoch's end; with bad samples the counts agree too."""
    sources = request.getfixturevalue(kind)
    whole, (plain,) = global_batches(sources, tokenizer, (0, 7), global_batch=24, negatives=negatives)
    assert (plain.skipped.total() > 0) == (kind == "damaged")
    for world, micro in [(1, 12), (1, 2), (2, 12), (2, 2), (3, 4), (4, 6), (6, 4), (12, 2)]:
        divided, loaders = global_batches(
            sources, tokenizer, (0, 7), global_batch=24, negatives=negatives, world=world, micro_batch=micro
        )
        assert divided == whole, (world, micro)
        assert sum((loader.skipped for loader in loaders), Counter()) == plain.skipped
        assert {loader.accumulation for loader in loaders} == {24 // (world * micro)}


def test_micro_batches_may_be_odd_with_negatives_from_the_data_set(sound, tokenizer):
    whole, _ = global_batches(sound, tokenizer, (0, 3), global_batch=12, negatives="dataset")
    for world, micro in [(1, 3), (4, 1), (4, 3), (12, 1)]:
        options = {"global_batch": 12, "negatives": "dataset", "world": world, "micro_batch": micro}
        assert global_batches(sound, tokenizer, (0, 3), **options)[0] == whole
    with pytest.raises(OrderError, match="micro_batch=3 is odd"):
        loader_of(sound, tokenizer, global_batch=12, micro_batch=3)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("prefetch", [1, 3])
@pytest.mark.scenario(15, "0, 1 and 3 threads: the same batches, also with damaged pictures")
def test_threads_change_nothing(damaged, tokenizer, workers, prefetch):
    options = {"global_batch": 24, "micro_batch": 4}
    inline, (alone,) = global_batches(damaged, tokenizer, (0, 6), **options)
    threaded, (loader,) = global_batches(damaged, tokenizer, (0, 6), workers=workers, prefetch=prefetch, **options)
    assert threaded == inline
    assert loader.skipped == alone.skipped
    assert loader.skip_examples == alone.skip_examples
    assert loader.seen == alone.seen == 6 * 24


class Recorded(Sources):
    """Sources that remember what was read."""

    @classmethod
    def over(cls, sources):
        recorded = cls(sources._sources)
        recorded.reads = []
        return recorded

    def read(self, index):
        self.reads.append(index)
        return super().read(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_gives_the_same_and_reads_nothing_before(sound, tokenizer, workers):
    whole, _ = global_batches(sound, tokenizer, (0, 9), global_batch=16)
    recorded = Recorded.over(sound)
    resumed, (loader,) = global_batches(recorded, tokenizer, (6, 9), global_batch=16, workers=workers)
    assert resumed == whole[6:]
    expected = [sample for step in (6, 7, 8) for sample in loader.order.batch(step).tolist()]
    assert sorted(recorded.reads) == sorted(expected)


def test_a_later_start_on_another_division_continues_the_same_stream(sound, tokenizer):
    """2 processes, then 1, then 4: as one run on 1."""
    whole, _ = global_batches(sound, tokenizer, (0, 9), global_batch=16)
    parts = []
    for world, steps in ((2, (0, 3)), (1, (3, 5)), (4, (5, 9))):
        parts += global_batches(sound, tokenizer, steps, global_batch=16, world=world, micro_batch=16 // world)[0]
    assert parts == whole


def test_mixing_by_weight_is_elastic_too(tmp_path, tokenizer):
    write_pairs(tmp_path / "few.arrow", 4)
    write_pairs(tmp_path / "many.arrow", 40, first=100)
    sources = open_sources(["arrow:few", "arrow:many"], tmp_path, weights=[0.5, 0.5])
    whole, _ = global_batches(sources, tokenizer, (0, 5), global_batch=32)
    assert global_batches(sources, tokenizer, (0, 5), global_batch=32, world=4, micro_batch=4)[0] == whole
    few = sum(row[0] < 4 for rows in whole for row in rows)
    assert 55 <= few <= 105  # of 160


@pytest.mark.scenario(17, "fewer pictures than pairs in a batch or processes")
def test_a_set_smaller_than_the_batch_or_the_world_works(tmp_path, tokenizer):
    write_pairs(tmp_path / "own.arrow", 3)
    sources = open_sources(["arrow:own"], tmp_path)
    whole, _ = global_batches(sources, tokenizer, (0, 3), global_batch=16)
    assert [len(rows) for rows in whole] == [16, 16, 16]
    counts = Counter(row[0] for rows in whole for row in rows)
    assert counts == {0: 16, 1: 16, 2: 16}
    assert global_batches(sources, tokenizer, (0, 3), global_batch=16, world=8, micro_batch=2)[0] == whole


def test_a_set_of_one_picture_is_refused_for_negatives_from_the_batch(tmp_path, tokenizer):
    write_pairs(tmp_path / "own.arrow", 1, captions_each=5)
    sources = open_sources(["arrow:own"], tmp_path)
    with pytest.raises(OrderError, match=r"one picture.*itm_negatives=dataset"):
        list(loader_of(sources, tokenizer, global_batch=4).steps(0, 1))
    assert len(list(loader_of(sources, tokenizer, global_batch=4, negatives="dataset").steps(0, 1))) == 1


# ------------------------------------------------------------------------------------------ errors


class BrokenText(TextPipeline):
    """A pipeline with a programming error, not a bad sample."""

    def encode(self, texts):
        return [text.missing_method() for text in texts]


@pytest.mark.parametrize("workers", [0, 2])
def test_programming_errors_are_no_bad_samples(sound, tokenizer, workers):
    """They come up at once in the consumer, with the place they happened at."""
    order = SampleOrder(sound.sizes, 0, 4, image_ids=sound.image_ids)
    loader = PretrainLoader(sound, order, BrokenText(tokenizer), backend(), micro_batch=4, workers=workers)
    with pytest.raises(AttributeError, match="missing_method") as error:
        list(loader.steps(0, 5))
    assert "missing_method()" in "".join(traceback.format_tb(error.value.__traceback__))


def test_an_error_comes_up_in_its_place_in_the_order(sound, tokenizer):
    class Failing(Recorded):
        def read(self, index):
            if index == self.fatal:
                raise OSError("disk failure")
            return super().read(index)

    failing = Failing.over(sound)
    loader = loader_of(failing, tokenizer, global_batch=8, workers=2, prefetch=4)
    failing.fatal = int(loader.order.batch(3)[2])
    done = 0
    with pytest.raises(OSError, match="disk failure"):
        for _ in loader.steps(0, 10):
            done += 1
    assert done == 3


# ------------------------------------------------------------------------------------------ threads


def loader_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_threads_end_when_the_consumer_stops_early_or_reaches_the_end(sound, tokenizer):
    loader = loader_of(sound, tokenizer, global_batch=8, workers=3, prefetch=4)
    steps = loader.steps(0, 10_000)
    next(steps)
    assert loader_threads()
    steps.close()
    assert loader_threads() == []
    assert len(list(loader.steps(0, 3))) == 3
    assert loader_threads() == []
    with pytest.raises(KeyboardInterrupt):
        for _ in loader.steps(0, 10_000):
            raise KeyboardInterrupt
    assert loader_threads() == []


def test_no_more_than_the_asked_steps_are_prepared_ahead(sound, tokenizer):
    """The memory of a run: the step in use, and `prefetch` steps of `accumulation` micro-batches."""
    recorded = Recorded.over(sound)
    loader = loader_of(recorded, tokenizer, global_batch=8, micro_batch=2, workers=2, prefetch=2)
    steps = loader.steps(0, 1000)
    next(steps)
    for _ in range(200):
        threading.Event().wait(0.005)
        if len(recorded.reads) >= 3 * 8:
            break
    threading.Event().wait(0.1)
    assert len(recorded.reads) == 3 * 8
    steps.close()


def test_what_a_step_leaves_is_freed_before_the_next_is_begun(sound):
    """Freed later, it would be freed beside threads that have just begun, and the caller would wait for them."""
    made = []

    class Makes:
        def micro_batch(self, samples, positions):
            assert not any(batch() is not None for batch in made[: len(made) // 2 * 2])
            return Prepared(kept(torch.ones(len(samples))))

    def kept(batch):
        made.append(weakref.ref(batch))
        return batch

    loader = TrainingLoader(SampleOrder(sound.sizes, 0, 8), Makes(), [slice(0, 4), slice(4, 8)], workers=0)
    for batches in loader.steps(0, 5):
        assert len(batches) == 2
        del batches
    assert len(made) == 10


def test_the_caller_need_not_wait_long_for_its_turn():
    """While threads are at work Python's lock goes round faster, and again as before when they have ended."""
    before = sys.getswitchinterval()
    turns = run_ahead(range(9), lambda task: Prepared((task, sys.getswitchinterval())), 2, 3)
    first = next(turns).batch
    inner = list(run_ahead(range(3), lambda task: Prepared(sys.getswitchinterval()), 1, 1))
    seen = [first, *(prepared.batch for prepared in turns)]
    assert [task for task, _ in seen] == list(range(9))
    assert all(turn <= before / 5 for _, turn in seen)
    assert [prepared.batch for prepared in inner] == [seen[0][1]] * 3
    assert sys.getswitchinterval() == before
    turns = run_ahead(range(9), Prepared, 2, 3)
    next(turns)
    turns.close()
    assert sys.getswitchinterval() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": -1}, "data.workers=-1"),
        ({"prefetch": 0}, "data.prefetch=0"),
        ({"negatives": "none"}, "itm_negatives='none': choose one of batch, dataset"),
        ({"max_bad_share": 1.5}, "data.max_bad_share=1.5"),
        ({"world": 3}, "global_batch=8 is not world size 3"),
    ],
)
def test_wrong_options_are_named(sound, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        loader_of(sound, tokenizer, global_batch=8, **options)


def test_negatives_from_the_batch_need_an_order_that_parts_pairs(sound, tokenizer):
    order = SampleOrder(sound.sizes, 0, 8)
    with pytest.raises(OrderError, match=r"image_ids=sources\.image_ids"):
        PretrainLoader(sound, order, TextPipeline(tokenizer), backend(), micro_batch=8)
