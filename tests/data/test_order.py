"""The order of samples: complete and different epochs, exact shares, a pure function of the step, pairs that differ."""

from collections import Counter

import numpy as np
import pytest

from meter_fast.data.order import MIXING_BLOCK, OrderError, SampleOrder, micro_slices, mix, part_pairs, permute


def stream(order, steps):
    return np.concatenate([order.batch(step) for step in range(steps)])


@pytest.mark.parametrize("size", [*range(1, 40), 97, 1000, 1024, 12345])
def test_permutations_are_permutations(size):
    for key in ((0,), (1, 2), (7, 0, 3)):
        assert sorted(permute(np.arange(size), size, key).tolist()) == list(range(size))


@pytest.mark.parametrize("size", [2, 3, 5, 12, 100])
def test_every_place_goes_everywhere_equally_often(size):
    """Chi-square of (place, image) counts over 4000 keys, and of the distance between neighbours' images."""
    keys = 4000
    every_key = np.repeat(np.arange(keys), size)
    images = permute(np.tile(np.arange(size), keys), size, (11, every_key)).reshape(keys, size)
    assert (images[17] == permute(np.arange(size), size, (11, 17))).all()
    places = np.stack([np.bincount(images[:, place], minlength=size) for place in range(size)])
    distances = np.bincount(((images[:, 1:] - images[:, :-1]) % size).ravel(), minlength=size)
    freedom = (size - 1) ** 2
    assert ((places - keys / size) ** 2 / (keys / size)).sum() < freedom + 5 * np.sqrt(2 * freedom)
    if size > 2:
        expected = distances[1:].mean()
        assert ((distances[1:] - expected) ** 2 / expected).sum() < (size - 2) + 5 * np.sqrt(2 * (size - 2))


def test_random_numbers_are_even_in_every_bit_and_differ_by_key():
    numbers = mix((3, 1), np.arange(20_000))
    bits = (numbers[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.02
    assert np.abs(np.corrcoef(bits.T.astype(float)) - np.eye(64)).max() < 0.05
    for other in ((3, 2), (4, 1), (1, 3), (3,), (3, 1, 0)):
        assert len(np.intersect1d(numbers, mix(other, np.arange(20_000)))) == 0


@pytest.mark.parametrize(("sizes", "batch"), [([10], 4), ([7, 5], 4), ([100], 32), ([3], 10), ([1], 1)])
def test_each_epoch_holds_every_sample_once_also_across_steps(sizes, batch):
    size = sum(sizes)
    samples = stream(SampleOrder(sizes, 5, batch), -(-6 * size // batch))
    epochs = [samples[e * size : (e + 1) * size].tolist() for e in range(6)]
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size >= 7:
        assert len({tuple(epoch) for epoch in epochs}) == 6


def test_steps_come_out_the_same_in_any_sequence_and_differ_by_seed():
    order = SampleOrder([1000], 5, 64)
    forward = [order.batch(step).tolist() for step in range(50)]
    for step in (49, 3, 20, 3):
        assert SampleOrder([1000], 5, 64).batch(step).tolist() == forward[step]
    assert SampleOrder([1000], 6, 64).batch(0).tolist() != forward[0]


def test_the_order_stays_what_it_is_between_versions():
    """Runs resume at a step by these numbers: a change here silently repeats and skips samples of every running job."""
    assert SampleOrder([1000], 0, 8).batch(0).tolist() == PINNED[0]
    assert SampleOrder([1000], 1, 8).batch(10**6).tolist() == PINNED[1]
    assert SampleOrder([600, 400], 0, 8, weights=[1, 3]).batch(2).tolist() == PINNED[2]


PINNED = (
    [686, 379, 495, 934, 285, 885, 821, 424],
    [866, 581, 473, 428, 239, 727, 902, 431],
    [180, 659, 613, 644, 732, 780, 664, 981],
)


def test_far_steps_of_large_sets_are_within_bounds():
    samples = SampleOrder([10_000_000], 1, 4096).batch(10**7)
    assert samples.min() >= 0
    assert samples.max() < 10_000_000
    assert len(np.unique(samples)) == 4096  # 2441 epochs and a part: this batch lies inside one


def test_weights_give_exact_shares_and_each_source_its_own_epochs():
    sizes, shares = [50, 1000, 7], [0.5, 0.375, 0.125]
    samples = stream(SampleOrder(sizes, 2, 1024, weights=[4, 3, 1]), 2 * MIXING_BLOCK // 1024)
    owners = np.searchsorted(np.cumsum(sizes), samples, side="right")
    for block in (owners[:MIXING_BLOCK], owners[MIXING_BLOCK:]):
        assert np.bincount(block).tolist() == [round(share * MIXING_BLOCK) for share in shares]
    for batch in owners.reshape(-1, 1024):  # the mixture is the same all the way through
        assert np.abs(np.bincount(batch, minlength=3) / 1024 - shares).max() < 0.08
    for source, size in enumerate(sizes):
        drawn = Counter(samples[owners == source].tolist())
        assert len(drawn) == size
        # both mixing blocks are complete, so every sample came up equally often, but for the epoch under way
        assert max(drawn.values()) - min(drawn.values()) <= 1


def test_weights_that_are_no_fractions_of_a_block_add_up():
    owners = SampleOrder([10, 10, 10], 0, MIXING_BLOCK, weights=[1, 1, 1]).batch(0) // 10
    assert np.bincount(owners).tolist() == [21846, 21845, 21845]


@pytest.mark.parametrize("pictures_per_sample", [1, 5, 40])
def test_pairs_show_two_pictures_and_nothing_is_lost(pictures_per_sample):
    """Five captions a picture in a set smaller than the batch: pairs of equal pictures are common."""
    size, batch = 200, 128

    def picture_of(samples):
        return samples // pictures_per_sample

    plain, parted = SampleOrder([size], 9, batch), SampleOrder([size], 9, batch, image_ids=picture_of)
    swapped = 0
    for step in range(40):
        samples = parted.batch(step)
        pictures = picture_of(samples)
        assert (pictures[0::2] != pictures[1::2]).all()
        assert sorted(samples.tolist()) == sorted(plain.batch(step).tolist())
        swapped += int((samples != plain.batch(step)).sum())
    assert (swapped > 0) == (pictures_per_sample > 1)


def test_only_pairs_that_need_it_are_touched():
    samples, pictures = np.arange(12), np.array([0, 1, 2, 2, 3, 4, 5, 6, 7, 7, 8, 9])
    assert part_pairs(samples, pictures, 0).tolist() == [0, 1, 2, 5, 4, 3, 6, 7, 8, 11, 10, 9]


def test_one_picture_up_to_half_the_batch_works_and_more_is_refused():
    for count in range(2, 9):
        pictures = np.array([0] * count + list(range(1, 17 - count)))
        parted = pictures[part_pairs(np.arange(16), pictures, 0)]
        assert (parted[0::2] != parted[1::2]).all()
    pictures = np.array([0] * 9 + list(range(1, 8)))
    with pytest.raises(
        OrderError, match=r"step 7: more than half of the 16 samples .* one picture.*itm_negatives=dataset"
    ):
        part_pairs(np.arange(16), pictures, 7)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 8, 16, 24, 48, 64])
def test_ranks_and_micro_batches_take_each_position_once(world):
    """Every way to divide 384 positions: the union over ranks and micro-batches is the global batch."""
    for micro in range(2, 384 // world + 1, 2):
        if 384 % (world * micro):
            continue
        taken = [at for rank in range(world) for at in micro_slices(384, world, micro, rank)]
        positions = np.concatenate([np.arange(384)[at] for at in taken])
        assert sorted(positions.tolist()) == list(range(384))
        for rank in range(world):  # as the contract has it: (a * W + r) * m
            starts = [at.start for at in micro_slices(384, world, micro, rank)]
            assert starts == [(a * world + rank) * micro for a in range(384 // (world * micro))]


def test_what_does_not_divide_is_refused_with_what_would():
    with pytest.raises(OrderError) as refusal:
        micro_slices(8, 3, 2, 0)
    assert "global_batch=8 is not world size 3 x engine.micro_batch=2" in str(refusal.value)
    assert "With 3 processes these micro-batches work: none" in str(refusal.value)
    assert "with micro-batch 2 these numbers of processes: 1, 2, 4" in str(refusal.value)
    assert "multiple of 6" in str(refusal.value)
    with pytest.raises(OrderError, match=r"With 8 processes these micro-batches work: 2, 4, 8, 16, 32, 64\W"):
        micro_slices(512, 8, 24, 0)
    with pytest.raises(OrderError, match=r"micro_batch=3 is odd; .*With 2 processes these micro-batches work: 2, 6"):
        micro_slices(12, 2, 3, 0)
    assert len(micro_slices(12, 2, 3, 0, pairs=False)) == 2
    with pytest.raises(OrderError, match=r"world size 2 x engine\.micro_batch=4 x 3 accumulated"):
        micro_slices(16, 2, 4, 0, accumulation=3)
    assert len(micro_slices(16, 2, 4, 0, accumulation=2)) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources_sizes": [], "global_batch": 4}, "each needs at least one"),
        ({"sources_sizes": [4, 0], "global_batch": 4}, "each needs at least one"),
        ({"sources_sizes": [4], "global_batch": 0}, "global_batch=0"),
        ({"sources_sizes": [4], "global_batch": 3, "image_ids": lambda n: n}, "global_batch=3: .*even"),
        ({"sources_sizes": [4, 4], "global_batch": 4, "weights": [1]}, "one positive number for each"),
        ({"sources_sizes": [4, 4], "global_batch": 4, "weights": [1, -1]}, "one positive number for each"),
        ({"sources_sizes": [4, 4], "global_batch": 4, "weights": [1, 1e-9]}, "smallest share is below 1/65536"),
    ],
)
def test_wrong_numbers_are_named(arguments, message):
    with pytest.raises(OrderError, match=message):
        SampleOrder(seed=0, **arguments)


@pytest.mark.parametrize(("rank", "world", "micro"), [(0, 1, 0), (2, 2, 2), (-1, 2, 2), (0, 0, 2)])
def test_wrong_ranks_are_named(rank, world, micro):
    with pytest.raises(OrderError, match=f"rank {rank} of {world}, engine.micro_batch={micro}"):
        micro_slices(8, world, micro, rank)
