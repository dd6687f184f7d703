"""Bad samples in the loader: replaced alike on every division, counted by cause, shown; too many stop the run."""

from collections import Counter

import pytest
from making import BAD_PICTURES, SIDE, caption, loader_of, pair_members, picture, sources_of, write_tar

from meter_fast.data.samples import BadDataError
from meter_fast.data.sources import open_sources


def test_bad_samples_are_replaced_counted_and_shown(damaged, tokenizer):
    """One epoch: every bad sample is met once as itself; its replacement is good, and never its partner's picture."""
    loader = loader_of(damaged, tokenizer, global_batch=120)
    ((batch,),) = loader.steps(0, 1)
    wanted, got = loader.order.batch(0), batch.sample_ids.numpy()
    bad_rows = set(range(0, 60, 5))
    bad = {sample for sample in range(120) if sample // 2 in bad_rows} | {15, 16, 18}
    assert not bad & set(got.tolist())
    assert [int(w) for w, g in zip(wanted, got, strict=True) if w != g] == [w for w in wanted.tolist() if w in bad]
    pictures = damaged.image_ids(got)
    assert (pictures[0::2] != pictures[1::2]).all()
    assert set(loader.skipped) == {*BAD_PICTURES, "empty caption"}
    for cause in BAD_PICTURES:
        assert loader.skipped[cause] >= 6  # three pictures with two captions each, and what replacements met
    assert loader.skipped["empty caption"] >= 3
    for cause, names in loader.skip_examples.items():
        assert 1 <= len(names) <= 5
        assert all(name.startswith("own.arrow row ") for name in names), cause
    assert loader.seen == 120


def test_a_replacement_never_shows_the_partners_picture(tmp_path, tokenizer):
    """Three sound pictures among seven: a replacement would hit the partner's picture one time in three."""
    images = [picture(n) for n in range(3)] + list(BAD_PICTURES.values())
    sources = sources_of(tmp_path, images, [[caption(n)] for n in range(7)])
    both = 0
    for step, (batch,) in enumerate(loader_of(sources, tokenizer, global_batch=14).steps(0, 30)):
        got = batch.sample_ids.view(-1, 2)
        assert (got < 3).all()
        assert (got[:, 0] != got[:, 1]).all(), step
        both += int((loader_of(sources, tokenizer, global_batch=14).order.batch(step).reshape(-1, 2) > 2).all(1).sum())
    assert both > 20  # pairs of which both were bad


def test_only_the_picture_at_fault_is_lost_when_a_batch_cannot_be_decoded(tmp_path, tokenizer):
    images = [picture(n) for n in range(16)]
    images[5] = BAD_PICTURES["undecodable"]
    sources = sources_of(tmp_path, images, [[caption(n)] for n in range(16)])
    loader = loader_of(sources, tokenizer, global_batch=16)
    for _ in range(2):  # the second time it is known
        ((batch,),) = loader.steps(0, 1)
        different = loader.order.batch(0) != batch.sample_ids.numpy()
        assert different.sum() == 1
        assert loader.order.batch(0)[different].tolist() == [5]
    assert loader.skipped == {"undecodable": 2}


def test_pictures_over_the_pixel_cap_are_skipped_unread(tmp_path, tokenizer):
    images = [picture(n) for n in range(8)] + [picture(8, side=64)]
    sources = sources_of(tmp_path, images, [[caption(n)] for n in range(9)])
    loader = loader_of(sources, tokenizer, global_batch=18, max_image_pixels=SIDE * SIDE)
    ((batch,),) = loader.steps(0, 1)
    assert 8 not in batch.sample_ids.tolist()
    assert loader.skipped["too many pixels"] >= 2


@pytest.mark.scenario(26, "the same replacement every time")
def test_the_same_bad_picture_is_replaced_differently_for_each_caption_but_always_alike(damaged, tokenizer):
    """The replacement is a function of (seed, sample): the same in every epoch, if the partner does not show it."""
    replaced = {}
    loader = loader_of(damaged, tokenizer, global_batch=120)
    for step, (batch,) in enumerate(loader.steps(0, 4)):
        for wanted, got in zip(loader.order.batch(step).tolist(), batch.sample_ids.tolist(), strict=True):
            if wanted != got:
                replaced.setdefault(wanted, []).append(got)
    assert all(len(several) == 4 for several in replaced.values())
    usual = [Counter(several).most_common(1)[0] for several in replaced.values()]
    assert all(count >= 3 for _, count in usual)
    assert len({sample for sample, _ in usual}) > 15


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.scenario(25, "stops naming causes, counts and the first names")
def test_nothing_but_garbage_stops_with_causes_counts_and_names(tmp_path, tokenizer, workers):
    images = [BAD_PICTURES["not an image"]] * 300 + [b""] * 100
    sources = sources_of(tmp_path, images, [[caption(n)] for n in range(400)])
    loader = loader_of(sources, tokenizer, global_batch=8, workers=workers)
    with pytest.raises(BadDataError) as stop:
        list(loader.steps(0, 1))
    message = str(stop.value)
    assert message.startswith("100 samples in a row could not be used. not an image: ")
    assert "zero bytes: " in message
    assert "own.arrow row " in message


def test_too_large_a_share_stops_after_the_first_samples(damaged, tokenizer):
    loader = loader_of(damaged, tokenizer, global_batch=20, max_bad_share=0.1)
    done = 0
    with pytest.raises(BadDataError, match=r"more than data\.max_bad_share=0\.1\. .*: \d+, first own\.arrow row"):
        for _ in loader.steps(0, 100):
            done += 1
    assert loader.seen + loader.skipped.total() >= 200
    assert done * 20 < 200  # it stopped as soon as the share means something
    lenient = loader_of(damaged, tokenizer, global_batch=20, max_bad_share=0.5)
    assert len(list(lenient.steps(0, 30))) == 30


def test_a_damaged_shard_costs_its_own_samples_only(tmp_path, tokenizer):
    """One shard is cut in the middle of a picture, and then cut once more after it was indexed."""
    for number in range(3):
        members = [member for pair in range(4) for member in pair_members(4 * number + pair)]
        write_tar(tmp_path / f"{number}.tar", members)
    shard = tmp_path / "1.tar"
    shard.write_bytes(shard.read_bytes()[: 15 * 512])
    sources = open_sources(["shards:*.tar"], tmp_path)
    assert len(sources) == 10
    shard.write_bytes(shard.read_bytes()[: 6 * 512 + 600])
    loader = loader_of(sources, tokenizer, global_batch=10)
    ((batch,),) = loader.steps(0, 1)
    assert (loader.order.batch(0) != batch.sample_ids.numpy()).sum() == 1
    assert set(loader.skipped) == {"truncated"}
    assert loader.skip_examples["truncated"][0].startswith("1.tar byte 3584")
