"""Retrieval by either head: published scores, the plain loop, what is shared, going on, several processes, refusals."""

import copy
import json
from collections import Counter

import pytest
import torch
from golden_cases import GOLDEN, TOLERANCE, relative
from safetensors.torch import load_file

from meter_fast.cli import main
from meter_fast.data.images import image_transform, open_backend
from meter_fast.data.sources import open_sources
from meter_fast.data.text import TextPipeline
from meter_fast.models.config import KernelsConfig
from meter_fast.models.meter import Meter, Need
from meter_fast.recall import recalls
from meter_fast.retrieval import evaluate_retrieval, score_retrieval
from meter_fast.score_retrieval import encode_texts, match_scores


def owned(owner: torch.Tensor, pictures: int) -> torch.Tensor:
    """[T] -> [N,T] bool."""
    return torch.arange(pictures)[:, None] == owner


@pytest.mark.parametrize("text", ["padded", "packed"])
def test_published_scores(case, text):
    """The published loop ranks by `rank_output`, which starts as row 1 of the ITM head; row 0 is none of its."""
    tasks = load_file(GOLDEN / case.name / "state_tasks.safetensors")
    model = Meter(case.model.config, load_weights=False, kernels=KernelsConfig(text=text)).eval()
    model.load_state_dict(case.model.state_dict())
    with torch.no_grad():
        model.itm_head.weight.copy_(
            torch.cat([torch.zeros_like(tasks["rank_output.weight"]), tasks["rank_output.weight"]])
        )
        model.itm_head.bias.copy_(torch.cat([torch.zeros(1), tasks["rank_output.bias"]]))
        rows = [ids[mask].tolist() for ids, mask in zip(case.inputs["text_ids"], case.inputs["text_masks"].bool())]
        image = model.encode_image(case.inputs["image"])
        for batch in (1, 2, 256):
            scores = match_scores(model, image, encode_texts(model, rows, batch), batch)
            assert relative(scores, case.outputs["recall/scores"]) < TOLERANCE


def plain_loop(model: Meter, tokenizer, pixels: torch.Tensor, captions: list[str]) -> torch.Tensor:
    """Every pair by itself, through the whole model."""
    scores = torch.empty(len(pixels), len(captions))
    for i, picture in enumerate(pixels):
        for t, caption in enumerate(captions):
            ids = torch.tensor([tokenizer(caption)["input_ids"]])
            mask = torch.ones_like(ids, dtype=torch.bool)
            fused = model.fuse(model.encode_text(ids, mask), model.encode_image(picture[None]), mask, need=Need.CLS)
            chances = model.itm_head(fused.cls).softmax(-1)[0]
            scores[i, t] = (chances[1] / chances[0]).log()
    return scores


@torch.inference_mode()
def test_scores_are_those_of_one_pass_for_each_pair(scenes, scene_model, scene_tokenizer):
    sources = open_sources(["coco"], scenes, "test")
    backend = open_backend("torchvision", image_transform("clip", 64), "cpu", torch.float32)
    found = score_retrieval(scene_model, TextPipeline(scene_tokenizer, 50), sources, backend, 5)
    pictures = sources.image_ids(torch.arange(len(sources)).numpy())
    chosen = sorted(set(pictures.tolist()))
    chosen = [chosen[i] for i in (0, 10, 20, 29, 39)]
    samples = [[n for n in range(len(sources)) if pictures[n] == picture] for picture in chosen]
    captions = [sources.read(n).text for group in samples for n in group]
    pixels = torch.cat([backend.decode([sources.read(group[0]).image]) for group in samples])
    plain = plain_loop(scene_model, scene_tokenizer, pixels, captions)
    assert found.scores.dtype == torch.float32 and found.scores.shape == (5, len(set(captions)))
    assert relative(found.scores[:, found.which], plain) < 1e-4  # the plain one goes through probabilities
    assert found.owner.tolist() == [i for i, group in enumerate(samples) for _ in group]
    result = found.result()
    assert result["retrieval"] == recalls(plain, owned(found.owner, 5))
    assert (result["pictures"], result["captions"]) == (5, len(captions))


def test_unreadable_pictures_go_with_their_captions(scenes, scene_model, scene_tokenizer):
    sources = open_sources(["coco"], scenes, "test")
    backend = open_backend("torchvision", image_transform("clip", 64), "cpu", torch.float32)

    class Damaged:
        """The sources, with one picture cut short."""

        def __init__(self, bad: int):
            self.bad, self.image_ids = bad, sources.image_ids

        def __len__(self):
            return len(sources)

        def read(self, index: int):
            sample = sources.read(index)
            if sources.image_ids(torch.tensor([index]).numpy())[0] != self.bad:
                return sample
            return type(sample)(sample.image[:100], sample.text, sample.name)

    skipped, text = Counter(), TextPipeline(scene_tokenizer, 50)
    whole = score_retrieval(scene_model, text, sources, backend, 5)  # pictures 0, 10, 20, 29, 39
    found = score_retrieval(scene_model, text, Damaged(10), backend, 5, skipped=skipped)
    assert sum(skipped.values()) == 1 and len(found.scores) == len(whole.scores) - 1 == 4
    kept = whole.owner != 1
    assert len(found.owner) == int(kept.sum()) and found.owner.max() == 3
    others = torch.tensor([0, 2, 3, 4])
    assert relative(found.scores[:, found.which], whole.scores[others][:, whole.which[kept]]) < 1e-5


def test_command(run_dir, scenes, tmp_path, capsys):
    out = tmp_path / "scores.json"
    argv = ["evaluate", str(run_dir), "retrieval", "data.val_split=test", "--pictures", "6", "--json", str(out)]
    assert main(argv) == 0
    said, scores = capsys.readouterr().out, json.loads(out.read_text())
    assert scores["pictures"] == 6 and scores["split"] == "test" and set(scores["retrieval"]) == set(scores["chance"])
    assert scores["chance"]["ir_r1"] == pytest.approx(1 / 6)
    assert "IR@1" in said and "pictures 6/6" in said and "different" in said
    named = evaluate_retrieval(run_dir, ["data.val_sources=arrow:coco_caption_karpathy_val"], 4)
    assert named["split"] == "arrow:coco_caption_karpathy_val" and named["pictures"] == 4


@pytest.mark.parametrize(
    ("more", "said"),
    [(["retrieval", "--pictures", "1"], "give 2 or more"), (["retrieval", "--pairs", "5"], "--pairs goes with"),
     (["pretrain", "--pictures", "5"], "--pictures goes with"), (["retrieval", "data.val_sources=f30k"], "f30k")],
)  # fmt: skip
def test_refusals(run_dir, capsys, more, said):
    assert main(["evaluate", str(run_dir), *more]) == 2
    assert said in capsys.readouterr().err


def test_a_model_without_a_trained_itm_head_is_refused(run_dir, scenes, scene_model, scene_tokenizer):
    headless = copy.deepcopy(scene_model)
    headless.itm_head = None
    backend = open_backend("torchvision", image_transform("clip", 64), "cpu", torch.float32)
    with pytest.raises(ValueError, match="both of which this model lacks"):
        score_retrieval(headless, TextPipeline(scene_tokenizer, 50), open_sources(["coco"], scenes, "test"), backend)
    config = json.loads((run_dir / "config.json").read_text())
    config["objectives"]["names"] = ["mlm"]
    (run_dir / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="only itm trains"):
        evaluate_retrieval(run_dir)
