"""Questions read picture by picture: groups, batches of them on any division, and pictures that cannot be read."""

import itertools
from collections import Counter

import numpy as np
import pytest
from making import BAD_PICTURES
from test_questions import NAMES, assembler_of, rows_of_pictures, told, write_questions

from meter_fast.data.by_picture import ByPicture
from meter_fast.data.loader import TrainingLoader
from meter_fast.data.order import SampleOrder, micro_slices
from meter_fast.data.question_tables import open_questions
from meter_fast.data.randaugment import RandAugment
from meter_fast.data.samples import BadDataError

EACH = (1, 3, 7, 12)  # questions of the pictures, in turn


@pytest.fixture
def asked(tmp_path):
    """Two tables, of 30 and 10 pictures with 1 to 12 questions; one question of some pictures has no answer."""
    rows = [rows_of_pictures(n + 1, EACH[n % 4])[n] for n in range(40)]
    write_questions(tmp_path / "one.arrow", rows[:30], 4)
    write_questions(tmp_path / "two.arrow", rows[30:])
    return open_questions(["arrow:one", "arrow:two"], tmp_path, answered_only=True)


@pytest.fixture
def spoilt(tmp_path):
    """40 pictures with three questions each. Every fifth picture is bad, in turn by each cause; of three others some
    questions are no text, of the last of these all."""
    rows = rows_of_pictures(40)
    for number, place in enumerate(range(0, 40, 5)):
        rows[place]["image"] = list(BAD_PICTURES.values())[number % 4]
    rows[6]["questions"][1], rows[8]["questions"][0] = "", "\n"
    rows[9]["questions"] = ["", " ", "\t"]
    write_questions(tmp_path / "own.arrow", rows)
    return open_questions(["arrow:own"], tmp_path, answered_only=True)


def batches_of(sources, tokenizer, steps, world=1, micro=6, size=6, at_most=0, **options):
    """Of each step the questions of all processes in their order; and the loaders."""
    groups, loaders = ByPicture(sources, at_most), []
    for rank in range(world):
        order, slices = SampleOrder(groups.sizes, 3, size), micro_slices(size, world, micro, rank, pairs=False)
        reader = assembler_of(sources, tokenizer, groups=groups, **options)
        loaders.append(TrainingLoader(order, reader, slices, 0, 1, max_bad_share=0.9))
    together = []
    for parts in zip(*(loader.steps(*steps) for loader in loaders), strict=True):
        together.append([batch for several in zip(*parts, strict=True) for batch in several])
    return together, loaders


@pytest.mark.parametrize("at_most", [0, 1, 3, 5, 100])
def test_each_question_is_in_one_group(asked, at_most: int) -> None:
    groups = ByPicture(asked, at_most)
    members = [groups.samples(group) for group in range(len(groups))]
    assert [one for group in members for one in group] == list(range(len(asked)))
    pictures = asked.image_ids(np.arange(len(asked)))
    per_picture: dict[int, list[int]] = {}
    for group in members:
        assert len(set(pictures[group].tolist())) == 1
        per_picture.setdefault(int(pictures[group[0]]), []).append(len(group))
    assert len(per_picture) == 40 and groups.largest == max(map(len, members))
    for sizes in per_picture.values():
        assert max(sizes) - min(sizes) <= 1
        assert len(sizes) == (-(-sum(sizes) // at_most) if at_most else 1)
    ends = np.cumsum([0, *groups.sizes]).tolist()
    assert ends[-1] == len(groups)
    for (first, last), samples in zip(itertools.pairwise(ends), (0, asked.sizes[0]), strict=True):
        assert members[first][0] == samples and last > first
    with pytest.raises(ValueError, match=r"data.questions_per_picture=-1: 0 \(all\) or more"):
        ByPicture(asked, -1)


@pytest.mark.parametrize("at_most", [0, 5])
def test_a_step_reads_whole_pictures_and_a_pass_each_question_once(asked, tokenizer, at_most: int) -> None:
    groups = ByPicture(asked, at_most)
    steps = -(-len(groups) // 6)
    made, (loader,) = batches_of(asked, tokenizer, (0, steps), at_most=at_most)
    chosen = [loader.order.batch(step).tolist() for step in range(steps)]
    for [batch], numbers in zip(made, chosen, strict=True):
        assert batch.sample_ids.tolist() == [one for group in numbers for one in groups.samples(group)]
        pictures = asked.image_ids(batch.sample_ids.numpy()).tolist()
        assert len(batch.images) == len(set(pictures)) <= 6  # each is decoded, and then encoded, once
    first_pass = [one for [batch] in made for one in batch.sample_ids.tolist()][: len(asked)]
    last = sum(len(groups.samples(group)) for group in itertools.islice(itertools.chain(*chosen), len(groups)))
    assert last == len(asked) and sorted(first_pass) == list(range(len(asked)))


@pytest.mark.parametrize("kind", ["asked", "spoilt"])
@pytest.mark.parametrize("augment", [False, True])
def test_every_division_reads_the_same(request, tokenizer, kind: str, augment: bool) -> None:
    """Same questions, targets, pixels and replacements in the same order, over an epoch's end and when resumed; a
    picture of a step is augmented in one way, in another step in another."""
    sources = request.getfixturevalue(kind)
    options = {"augment": RandAugment("randaugment_published", 3, 6)} if augment else {}
    made, (plain,) = batches_of(sources, tokenizer, (0, 9), **options)
    whole = [told(batches) for batches in made]
    for world, micro in [(1, 2), (2, 3), (3, 1)]:
        divided, loaders = batches_of(sources, tokenizer, (0, 9), world, micro, **options)
        assert [told(batches) for batches in divided] == whole, (world, micro)
        assert sum((loader.skipped for loader in loaders), Counter()) == plain.skipped
    resumed, _ = batches_of(sources, tokenizer, (7, 9), **options)
    assert [told(batches) for batches in resumed] == whole[7:]
    seen: dict[int, set[bytes]] = {}
    for rows in whole:
        of_step: dict[int, bytes] = {}
        for row in rows:
            picture = int(sources.image_ids(np.array([row[0]]))[0])
            assert of_step.setdefault(picture, row[4]) == row[4]
            seen.setdefault(picture, set()).add(row[4])
    assert (max(map(len, seen.values())) > 1) == augment


def test_bad_pictures_are_replaced_by_pictures_and_counted_by_question(spoilt, tokenizer) -> None:
    groups = ByPicture(spoilt)
    made, (loader,) = batches_of(spoilt, tokenizer, (0, 1), micro=40, size=40)
    [batch] = made[0]
    names = Counter(name.split(" (")[0] for names in loader.skip_examples.values() for name in names)
    assert max(names.values()) == 1
    bad = {*range(0, 40, 5), 9}
    kept = spoilt.image_ids(batch.sample_ids.numpy())
    assert not bad & set(kept.tolist())
    usable = [[one for one in groups.samples(g) if spoilt.read(one).text.strip()] for g in range(40)]
    order, place, taken = loader.order.batch(0).tolist(), 0, []
    for group in order:  # in the place of each group its own questions, or those of another picture
        found = int(kept[place])
        assert found == group or group in bad
        taken.append(found)
        assert batch.sample_ids[place : place + len(usable[found])].tolist() == usable[found]
        place += len(usable[found])
    assert place == len(batch) and loader.seen == len(batch)
    assert loader.skipped.total() >= sum(len(groups.samples(g)) for g in bad) + 2
    assert set(loader.skipped) <= {"truncated", "not an image", "zero bytes", "undecodable", "empty caption"}


def test_a_table_of_bad_pictures_stops_the_run(tmp_path, tokenizer) -> None:
    write_questions(tmp_path / "own.arrow", [{**row, "image": b""} for row in rows_of_pictures(4)])
    sources = open_questions(["arrow:own"], tmp_path)
    reader = assembler_of(sources, tokenizer, groups=ByPicture(sources))
    with pytest.raises(BadDataError, match=r"\d+ samples in a row could not be used"):
        reader.micro_batch(np.arange(3), np.arange(3))


def test_targets_are_those_of_each_question(asked, tokenizer) -> None:
    groups = ByPicture(asked)
    batch = assembler_of(asked, tokenizer, groups=groups).micro_batch(np.array([3, 0]), np.arange(2)).batch
    single = assembler_of(asked, tokenizer).micro_batch(np.array(groups.samples(3) + groups.samples(0)), np.arange(12))
    assert told([batch]) == told([single.batch]) and batch.targets.shape[1] == len(NAMES)
    assert len(batch.images) == 2
