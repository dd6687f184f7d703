"""Fine-tuning on captions: from a pre-trained encoder-decoder to captions of held-out pictures."""

import json
from pathlib import Path

import pytest
import torch
from ranks import RankServer
from small_run import settings

import meter_fast
from meter_fast.cli import main
from meter_fast.config import ConfigError
from meter_fast.data.spans import read_sentinels
from meter_fast.data.tokenizer import load_tokenizer
from meter_fast.recipes import resolve
from meter_fast.training.pairs import OF_INIT, fit_vocabulary, tokenizer_of_init
from meter_fast.training.tasks import PRETRAINING, task_of

HELD_OUT = "data.val_sources=arrow:coco_caption_karpathy_test"


@pytest.fixture(scope="module")
def pretrained(ranks: RankServer, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory of two steps of pre-training on spans and matching, as the base recipe has them."""
    run = tmp_path_factory.mktemp("pretrained") / "run"
    chosen = settings(data, "run.max_steps=2", "engine.dtype=fp32", "objectives.names=span_denoising,itm")
    ranks.train(1, run, ["fusion=encoder_decoder", *chosen]).check()
    return run


@pytest.mark.slow
def test_from_a_pre_trained_model_to_captions(ranks: RankServer, data: Path, pretrained: Path, tmp_path: Path, capsys):
    """The decoder and its vocabulary come from the export, with the sentinels of spans; ITM's head is left out."""
    run = tmp_path / "run"
    chosen = settings(data, f"run.init={pretrained / 'export'}", "data.tokenizer=init", HELD_OUT, "optim.lr=0",
                      "engine.dtype=fp32", "run.max_steps=2", "run.eval_every=2")  # fmt: skip
    argv = ["caption", "size=tiny", f"run.dir={run}", "run.max_epochs=0", *chosen]
    ended = ranks.run(2, run / "logs", "workers:train", argv=argv).check()
    for part in ("not in the model, left out: itm_head", "held out at step 2: caption loss",
                 f"meter-fast evaluate {run} caption"):  # fmt: skip
        assert part in ended.logs[0], (part, ended.logs[0])
    model, before = meter_fast.load_model(run), meter_fast.load_model(pretrained)
    assert model.itm_head is None and len(read_sentinels(load_tokenizer(run / "tokenizer"))) > 1
    for name, value in model.state_dict().items():  # the learning rate is 0
        assert torch.equal(value, before.state_dict()[name]), name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    said = next(row["evaluation"]["caption"] for row in rows if "evaluation" in row)
    assert main(["evaluate", str(run), "pretrain", "--json", str(tmp_path / "pairs.json")]) == 0
    found = json.loads((tmp_path / "pairs.json").read_text())["caption"]
    assert found["count"] == said["count"] and found["loss"] == pytest.approx(said["loss"], rel=1e-5)
    assert main(["evaluate", str(run), "caption"]) == 0
    assert "split arrow:coco_caption_karpathy_test (coco_caption_karpathy_test.arrow), 8 p" in capsys.readouterr().out
    written = json.loads((run / "captions-coco_caption_karpathy_test.json").read_text())
    assert [row["image_id"] for row in written] == list(range(8))  # the tables' names are 0.jpg, 1.jpg, ...


def test_a_model_to_start_from_must_be_named() -> None:
    config = resolve(["caption", "size=tiny"])
    assert config.data.tokenizer == OF_INIT
    with pytest.raises(ConfigError, match=r"data.tokenizer=init: run.init=\(empty\) has no tokenizer with it"):
        tokenizer_of_init(config.run.init)


def test_the_base_recipe_takes_the_vocabulary_of_a_base_model(tmp_path: Path) -> None:
    """That of roberta-base and the sentinels of span denoising, which are more than captioning needs by itself."""

    class Tokenizer:
        pad_token_id = 1

        def __len__(self) -> int:
            return 50265 + 3

    config = fit_vocabulary(resolve(["caption"]), Tokenizer())
    assert config.model.text.vocab_size == 50268
    with pytest.raises(ConfigError, match=r"50268 tokens, model.text.vocab_size=50265"):
        fit_vocabulary(resolve(["caption", "model.text.weights=roberta-base"]), Tokenizer())


def test_what_is_said_next() -> None:
    assert task_of(("caption",)).next_command == "meter-fast evaluate {run} caption"
    assert task_of(("span_denoising", "itm", "caption")) is PRETRAINING
