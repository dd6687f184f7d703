"""What does sharing give when every picture is scored against every caption? Plain form against ours, in one run.

    python -m benchmarks.retrieval [--size base] [--image-size 384] [--pictures 2] [--texts 6] [--dtype fp32]
    python -m benchmarks.retrieval --flops-only

Plain is the published loop: a picture is repeated for all its texts, before the vision encoder, texts are padded to 40
tokens, and every layer computes all its rows. Ours is what `meter-fast evaluate MODEL retrieval` runs. Rounds
alternate. Scores of both must be equal. FLOPs are counted from shapes (`meter_fast/flops.py`), for what is measured and
for a split of 1000 pictures and 5000 captions.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.plain import PLAIN, plain_match_scores, without_savings
from benchmarks.record import append
from meter_fast.flops import count_flops
from meter_fast.models import config as models
from meter_fast.models.meter import Meter
from meter_fast.plan.ranking import flops_per_pair as shared_flops
from meter_fast.score_retrieval import encode_texts, match_scores

PADDED = 40  # tokens, max_text_len of the published retrieval
CAPTION = 13  # tokens of an average caption, specials included
SPLIT = (1000, 5000)  # pictures and captions: the test split of Flickr30k
TOLERANCE = {"fp32": 5e-6, "bf16": 3e-2}  # relative L2


def configuration(size: str, image_size: int | None) -> models.ModelConfig:
    config = {"tiny": models.tiny, "base": models.base}[size]()
    if image_size:
        config = replace(config, vision=replace(config.vision, image_size=image_size))
    return replace(config, mlm_head=False, itm_head=False, rank_head=True)


def captions(config: models.ModelConfig, count: int, spread: int = 0) -> list[list[int]]:
    """Token ids of texts of CAPTION tokens, up to `spread` more or fewer."""
    chance = torch.Generator().manual_seed(0)
    lengths = CAPTION + torch.randint(-spread, spread + 1, (count,), generator=chance)
    return [torch.randint(5, config.text.vocab_size, (int(n),), generator=chance).tolist() for n in lengths]


def images(config: models.ModelConfig, count: int) -> Tensor:
    side = config.vision.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def shared(model: Meter, pixels: Tensor, ids: list[list[int]]) -> Tensor:
    return match_scores(model, model.encode_image(pixels), encode_texts(model, ids))


def flops_per_pair(config: models.ModelConfig, pictures: int, texts: int) -> dict[str, float]:
    """Of the plain form, and of ours where `pictures` and `texts` of CAPTION tokens are scored against each other."""
    with torch.device("meta"):
        plain = Meter(config, load_weights=False, kernels=PLAIN).eval()
        pixels = torch.empty(1, 3, *(config.vision.image_size,) * 2)
    ids = captions(config, 1)
    return {
        "plain": count_flops(lambda: plain_match_scores(plain, pixels, ids, PADDED)),
        "shared": shared_flops(config, pictures, texts, CAPTION),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("tiny", "base"), default="base")
    parser.add_argument("--image-size", type=int, default=384, help="pixels")
    parser.add_argument("--pictures", type=int, default=2)
    parser.add_argument("--texts", type=int, default=6)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--flops-only", action="store_true", help="count, measure nothing")
    arguments = parser.parse_args()
    config = configuration(arguments.size, arguments.image_size)
    case = f"{arguments.size} {config.vision.image_size}px"
    rows = []
    for n, t in (SPLIT,) if arguments.flops_only else ((arguments.pictures, arguments.texts), SPLIT):
        flops = flops_per_pair(config, n, t)
        print(f"{case}, {n:,} pictures x {t:,} captions: {flops['plain'] / 1e9:.1f} GFLOP a pair plain, "
              f"{flops['shared'] / 1e9:.1f} shared, {flops['plain'] / flops['shared']:.2f} x fewer")  # fmt: skip
        rows += [dict(case=f"{case} {n}x{t}", variant=name, metric="flops_per_pair", value=value, unit="FLOP")
                 for name, value in flops.items()]  # fmt: skip
    if not arguments.flops_only:
        rows += measure(arguments, config, f"{case} {arguments.pictures}x{arguments.texts} {arguments.dtype}")
    print(f"rows added to {append('retrieval', rows)}")


def measure(arguments: argparse.Namespace, config: models.ModelConfig, case: str) -> list[dict]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    torch.manual_seed(0)
    plain = without_savings(Meter(config, kernels=PLAIN)).to(device, dtype).eval()
    ours = Meter(config).to(device, dtype).eval()
    ours.load_state_dict(plain.state_dict())
    ids, pixels = captions(config, arguments.texts, spread=2), images(config, arguments.pictures).to(device, dtype)
    sides = {
        "plain": lambda: plain_match_scores(plain, pixels, ids, PADDED).cpu(),
        "shared": lambda: shared(ours, pixels, ids),
    }
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    scores: dict[str, Tensor] = {}
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            scores[name] = side()  # on the host: nothing is left to wait for
            seconds[name].append(time.perf_counter() - start)
    # What all pairs have in common says nothing: with random weights scores differ little.
    distance = (scores["plain"] - scores["shared"]).norm() / scores["plain"].norm()
    if distance > TOLERANCE[arguments.dtype]:
        raise SystemExit(f"scores differ by {distance:.1e} (relative L2): one of the two is wrong")
    pairs = arguments.pictures * arguments.texts
    times = {name: 1e3 * statistics.median(found) / pairs for name, found in seconds.items()}
    print(f"{case}: {times['plain']:.1f} ms a pair plain, {times['shared']:.1f} shared, "
          f"{times['plain'] / times['shared']:.2f} x faster; scores differ by {distance:.1e}")  # fmt: skip
    return [
        dict(case=case, variant=name, metric="time_per_pair", value=value, unit="ms") for name, value in times.items()
    ]


if __name__ == "__main__":
    main()
