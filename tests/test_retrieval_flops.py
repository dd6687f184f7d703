"""How much work sharing saves in retrieval, counted from shapes; that the count sees inside our operators."""

import pytest
import torch
from golden_cases import TOLERANCE, relative
from meter_fast.kernels.cross_attention import absorbed
from torch.utils.flop_counter import FlopCounterMode, bmm_flop

from benchmarks.plain import PLAIN, plain_match_scores
from benchmarks.retrieval import PADDED, SPLIT, captions, configuration, flops_per_pair, images, shared
from meter_fast.flops import count_flops
from meter_fast.models.meter import Meter


def test_a_third_of_the_plain_form_at_most() -> None:
    """Base size at 384 px, captions of 13 tokens."""
    config = configuration("base", 384)
    flops = flops_per_pair(config, *SPLIT)
    vision = 11 * (24 * 577 * 768**2 + 4 * 577**2 * 768) + 2 * 576 * 768**2
    assert flops["plain"] == pytest.approx(vision + 84.5e9, rel=0.01)  # text encoder and fusion
    assert flops["plain"] / flops["shared"] > 3.5


@pytest.mark.parametrize("direction", ["text_reads_image", "image_reads_text"])
def test_operators_of_our_own_are_counted(direction: str) -> None:
    pairs, texts, tokens, heads, width = 2, 3, 10, 2, 8
    lengths = torch.full((pairs,), texts, dtype=torch.int32)
    image, matrix, bias = torch.randn(pairs, tokens, width), torch.randn(width, width), torch.randn(width)
    if direction == "text_reads_image":
        weights = (torch.randn(2 * width, width), torch.randn(2 * width))
        inputs = (torch.randn(pairs, texts, width), image, *weights, lengths, None, heads, 0.0)
    else:
        key_value = torch.randn(pairs, texts, 2 * width)
        inputs = (key_value, image, matrix, bias, matrix, lengths, None, heads, 0.0)
    operator = getattr(absorbed, f"_{direction}")
    with FlopCounterMode(display=False) as inside:
        operator._init_fn(*inputs)
    assert count_flops(lambda: operator(*inputs)) == inside.get_total_flops() > 0

    out, *kept = operator(*inputs)
    given = (inputs[0], image, *inputs[2:-4])  # all but lengths, seed, heads and dropout
    backward = getattr(absorbed, f"_{direction}_backward")
    if direction == "text_reads_image":
        given = (*given, None, out, *kept, 0.0)
    else:
        given = (*given, None, *kept, 0.0)
    gradient = torch.randn_like(out)
    in_place = {torch.ops.aten.baddbmm_: lambda _, a, b, **__: bmm_flop(a, b)}  # which the counter passes over
    with FlopCounterMode(display=False, custom_mapping=in_place) as inside:
        backward._init_fn(gradient, *given)
    assert count_flops(lambda: backward(gradient, *given)) == inside.get_total_flops() > 0


def test_both_forms_give_the_same_scores() -> None:
    config = configuration("tiny", None)
    torch.manual_seed(0)
    plain, ours = Meter(config, kernels=PLAIN).eval(), Meter(config).eval()
    ours.load_state_dict(plain.state_dict())
    pixels, ids = images(config, 2), captions(config, 4, spread=3)
    assert relative(shared(ours, pixels, ids), plain_match_scores(plain, pixels, ids, PADDED)) < TOLERANCE
