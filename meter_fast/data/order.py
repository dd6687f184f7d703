"""Which samples every optimizer step reads: a pure function of (seed, step), whatever the hardware.

Knows numbers of samples and of pictures; knows no files. The stream of samples is endless: epoch after epoch, each in
its own order, nothing repeated or left out where one ends. Any place of the stream is computed on its own, so resuming
costs nothing, and no list of the data set is kept. World size, micro-batch and accumulation only say who takes which
positions of the global batch.
"""

from collections.abc import Callable, Sequence

import numpy as np

MIXING_BLOCK = (
    1 << 16
)  # positions in which sources get their exact shares when mixed by weight; a share is a multiple of 1/65536
_FEISTEL_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_PAIR_FIX = "the positions 2i and 2i+1 of a global batch must show two pictures, as each is the other's false picture"


class OrderError(ValueError):
    """Numbers that do not fit together: which, and which would."""


Key = Sequence[int | np.ndarray]


def mix(key: Key, numbers: np.ndarray) -> np.ndarray:
    """Counter-based random numbers: (key, numbers [n] int64) -> [n] uint64, without state.

    SplitMix64 (Steele, Lea, Flood 2014) begun at a place that is made of the key in the same way; `numbers` are the
    places in its sequence. A part of the key is an integer, or [n] integers, one for each number.
    """
    return _scramble(numbers.astype(np.uint64) * _GOLDEN + _fold(key))


def _fold(key: Key, start: np.ndarray | None = None) -> np.ndarray:
    """A key as one uint64 ([1], or [n] where a part is [n])."""
    folded = np.zeros(1, np.uint64) if start is None else start
    for part in key:
        number = part.astype(np.uint64) if isinstance(part, np.ndarray) else np.array([part & (2**64 - 1)], np.uint64)
        folded = _scramble(folded ^ number)
    return folded


def _scramble(x: np.ndarray) -> np.ndarray:
    x = x + _GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(places: np.ndarray, size: int, key: Key) -> np.ndarray:
    """Places [n] int64 in 0..size-1 -> [n] int64, where a random permutation of 0..size-1, named by `key`, puts them.

    A Feistel network over a rectangle just larger than `size`; what falls outside walks on until it is inside (Black
    and Rogaway, "Ciphers with arbitrary finite domains", 2002). Nothing of length `size` is stored.
    """
    width = max(1, int(np.ceil(np.sqrt(size))))
    height = -(-size // width)
    out = np.array(places, np.int64)
    base = np.broadcast_to(_fold(key), out.shape)
    walking = np.ones(out.shape, bool)
    while walking.any():
        left, right = np.divmod(out[walking], height)
        own = base[walking]
        for turn in range(_FEISTEL_ROUNDS):  # a round changes both halves
            left = (left + _draw(own, 2 * turn, right, width)) % width
            right = (right + _draw(own, 2 * turn + 1, left, height)) % height
        out[walking] = left * height + right
        walking = out >= size
    return out


def _draw(base: np.ndarray, turn: int, numbers: np.ndarray, below: int) -> np.ndarray:
    drawn = _scramble(numbers.astype(np.uint64) * _GOLDEN + _fold((turn,), base))
    return (drawn % np.uint64(below)).astype(np.int64)


class SampleOrder:
    """The samples of every optimizer step.

    sources_sizes: samples per source. weights: shares of the sources, or None: all samples are drawn equally often.
    With weights each source runs through epochs of its own. image_ids: [n] int64 samples -> [n] int64 pictures; with
    it, positions 2i and 2i+1 of a batch always show different pictures (parts_pairs says so). epoch_size: samples that
    make an epoch; None with weights.
    Raises OrderError for what cannot work: no samples, odd global batch with image_ids, a share below 1/65536.
    """

    def __init__(
        self,
        sources_sizes: Sequence[int],
        seed: int,
        global_batch: int,
        weights: Sequence[float] | None = None,
        image_ids: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        self.sizes = [int(size) for size in sources_sizes]
        if not self.sizes or min(self.sizes) < 1:
            raise OrderError(f"sources of {self.sizes} samples: each needs at least one")
        if global_batch < 1 or (image_ids is not None and global_batch % 2):
            raise OrderError(f"engine.global_batch={global_batch}: give a positive even number; {_PAIR_FIX}")
        self.seed = int(seed)
        self.global_batch = int(global_batch)
        self._image_ids = image_ids
        self.parts_pairs = image_ids is not None
        self._first = np.cumsum([0, *self.sizes])
        self.epoch_size = None if weights is not None else int(self._first[-1])
        self._quota = None if weights is None else _quotas(weights, self.sizes)

    def batch(self, step: int) -> np.ndarray:
        """Sample ids [G] int64 of optimizer step `step` (0-based).

        Raises OrderError when more than half of the batch would show one picture.
        """
        positions = np.arange(step * self.global_batch, (step + 1) * self.global_batch, dtype=np.int64)
        samples = self._stream(positions)
        if self._image_ids is None:
            return samples
        return part_pairs(samples, self._image_ids(samples), step)

    def _stream(self, positions: np.ndarray) -> np.ndarray:
        """Positions [n] of the endless stream -> samples [n]."""
        if self._quota is None:
            return self._epochs(positions, 0, int(self._first[-1]))
        block, place = np.divmod(positions, MIXING_BLOCK)
        slot = permute(place, MIXING_BLOCK, (self.seed, 1, block))
        ends = np.cumsum(self._quota)
        owner = np.searchsorted(ends, slot, side="right")
        quota = self._quota[owner]
        turn = block * quota + slot - (ends[owner] - quota)  # how many samples of its source come before this one
        samples = np.empty_like(positions)
        for source in np.unique(owner).tolist():
            own = owner == source
            samples[own] = self._epochs(turn[own], source + 1, self.sizes[source]) + self._first[source]
        return samples

    def _epochs(self, turns: np.ndarray, purpose: int, size: int) -> np.ndarray:
        """The turns-th draws of an endless run through 0..size-1, every epoch permuted anew."""
        epoch, place = np.divmod(turns, size)
        return permute(place, size, (self.seed, 0, purpose, epoch))


def _quotas(weights: Sequence[float], sizes: Sequence[int]) -> np.ndarray:
    """Each source's positions in a mixing block [sources] int64: shares by largest remainder."""
    shares = np.asarray(weights, np.float64)
    if shares.shape != (len(sizes),) or not (np.isfinite(shares) & (shares > 0)).all():
        raise OrderError(
            f"data.weights={tuple(weights)}: give one positive number for each of the {len(sizes)} sources"
        )
    exact = shares / shares.sum() * MIXING_BLOCK
    quota = np.floor(exact).astype(np.int64)
    rest = MIXING_BLOCK - int(quota.sum())
    quota[np.argsort(quota - exact, kind="stable")[:rest]] += 1
    if quota.min() < 1:
        raise OrderError(
            f"data.weights={tuple(weights)}: the smallest share is below 1/{MIXING_BLOCK}; leave that source out"
        )
    return quota


def part_pairs(samples: np.ndarray, pictures: np.ndarray, step: int) -> np.ndarray:
    """Swap second halves of pairs so that no pair (2i, 2i+1) shows one picture twice. [G] int64 -> [G] int64.

    A pair of two equal pictures always finds a pair without that picture, unless it fills more than half the batch.
    """
    samples, pictures = samples.copy(), pictures.copy()
    first, second = pictures[0::2], pictures[1::2]
    for pair in np.flatnonzero(first == second).tolist():
        if first[pair] != second[pair]:
            continue  # an earlier swap has parted it
        fits = np.flatnonzero((first != first[pair]) & (second != first[pair]))
        if fits.size == 0:
            raise OrderError(
                f"step {step}: more than half of the {samples.size} samples of the global batch show one picture; "
                f"{_PAIR_FIX}. Add pictures, or set objectives.itm_negatives=dataset"
            )
        other = int(fits[np.searchsorted(fits, pair) % fits.size])  # the next one round the batch
        for values in (samples, pictures):
            values[[2 * pair + 1, 2 * other + 1]] = values[[2 * other + 1, 2 * pair + 1]]
    return samples


def micro_slices(
    global_batch: int, world: int, micro_batch: int, rank: int, accumulation: int | None = None, pairs: bool = True
) -> list[slice]:
    """The positions of the global batch that a rank takes: micro-batch a (0..A-1) takes [(a*W + r)*m, +m).

    accumulation A: given, it is checked; None, it follows. pairs: positions 2i and 2i+1 stay together, so m is even.
    Raises OrderError naming the micro-batches and world sizes that would divide the global batch.
    """
    if micro_batch < 1 or world < 1 or not 0 <= rank < world:
        raise OrderError(
            f"rank {rank} of {world}, engine.micro_batch={micro_batch}: "
            "give positive numbers, and a rank below the world size"
        )
    step = 2 if pairs else 1
    found = global_batch // (world * micro_batch)
    if global_batch % (world * micro_batch) or micro_batch % step or accumulation not in (None, found):
        raise OrderError(_what_divides(global_batch, world, micro_batch, accumulation, step))
    return [slice((a * world + rank) * micro_batch, (a * world + rank + 1) * micro_batch) for a in range(found)]


def _what_divides(global_batch: int, world: int, micro_batch: int, accumulation: int | None, step: int) -> str:
    """The refusal: what was asked, and all that would work."""
    micro = [m for m in range(step, global_batch // world + 1, step) if global_batch % (world * m) == 0]
    worlds = [w for w in range(1, global_batch // micro_batch + 1) if global_batch % (w * micro_batch) == 0]
    text = f"engine.global_batch={global_batch} is not world size {world} x engine.micro_batch={micro_batch}"
    text += f" x {accumulation} accumulated" if accumulation is not None else " x a whole number"
    if micro_batch % step:
        text = f"engine.micro_batch={micro_batch} is odd; {_PAIR_FIX}"
        worlds = []
    text += f". With {world} processes these micro-batches work: {', '.join(map(str, micro)) or 'none'}"
    if worlds:
        text += f"; with micro-batch {micro_batch} these numbers of processes: {', '.join(map(str, worlds))}"
    return (
        text + f". Or choose a global batch that is a multiple of {world * max(step, micro_batch + micro_batch % step)}"
    )
