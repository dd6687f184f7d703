"""The command `meter-fast`: fast help, errors of one line, and each command carried out on small files."""

import argparse
import json
import os
import subprocess
import sys

import pyarrow as pa
import pytest
import torch
from golden_cases import GOLDEN
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import meter_fast
from meter_fast.cli import main, parser

HEAVY = ("torch", "transformers", "timm", "deepspeed", "numpy", "matplotlib", "nvidia.dali")


def options(command: argparse.ArgumentParser, name: str = "") -> dict[str, list[str]]:
    """Every command with its arguments."""
    found, own = {}, []
    for action in command._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, sub in action.choices.items():
                found.update(options(sub, f"{name} {word}".strip()))
        elif action.dest != "help":
            own.append(action.option_strings[0] if action.option_strings else action.dest)
    return {name: own, **found}


def test_commands_and_options_are_these():
    assert options(parser()) == {
        "": ["--version", "--traceback"],
        "data": [],
        "data scenes": ["out", "--train", "--val", "--test", "--seed"],
        "data prepare": ["set", "raw", "out", "--splits", "--max-missing", "--workers"],
        "data import": [
            *("kind", "source", "out", "--name", "--images", "--answers", "--min-count", "--max-bad-share", "--workers")
        ],
        "data check": ["root", "--names", "--decode", "--max-bad-share", "--json", "--workers"],
        "train": ["recipe", "settings", "--max-restarts", "--processes", "--hostfile"],
        "replay": ["model", "step"],
        "evaluate": [
            *(
                "model",
                "task",
                "settings",
                "--pairs",
                "--pictures",
                "--scores",
                "--dtype",
                "--beams",
                "--captions",
                "--submission",
                "--annotations",
                "--json",
            ),
        ],
        "report": ["model", "settings", "--split", "--pictures"],
        "predict": [
            *("model", "task", "input", "--text", "--out", "--k", "--batch", "--device", "--dtype", "--tokenizer"),
            *("--transform", "--answers"),
        ],
        "plan": ["recipe", "settings", "--out", "--json"],
        "convert": ["source", "out", "--tokenizer", "--image-size", "--text-heads", "--fusion-heads"],
        "doctor": ["settings", "--hostfile", "--data-root", "--port", "--seconds", "--only", "--json"],
    }


def test_help_and_import_load_no_heavy_library():
    code = (
        "import sys, meter_fast.cli\n"
        "try:\n    meter_fast.cli.main(['--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "COMMAND" in done.stdout


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0 and capsys.readouterr().out.strip() == f"meter-fast {meter_fast.__version__}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "{tmp}/nowhere"], "nowhere is not a folder"),
        (["report", "{tmp}"], "has no config.json"),
        (["evaluate", "{tmp}/nowhere", "pretrain"], "nowhere does not exist"),
        (["evaluate", "{tmp}", "pretrain"], "has no model"),
        (["evaluate", "{tmp}/text.ckpt", "pretrain"], "text.ckpt"),
        (["convert", "{tmp}/nowhere.ckpt", "{tmp}/out"], "nowhere.ckpt does not exist"),
        (["convert", "{tmp}/text.ckpt", "{tmp}/out"], "text.ckpt"),
        (["convert", "{tmp}/text.ckpt", "{tmp}"], "exists already"),
        (["data", "scenes", "{tmp}/scenes", "--train", "3"], "at least 20"),
        (["data", "scenes", "{tmp}/text.ckpt", "--train", "20"], "text.ckpt"),
    ],
)
def test_wrong_input_ends_with_one_line_and_code_2(tmp_path, capsys, arguments, message):
    (tmp_path / "text.ckpt").write_text("this is no checkpoint")
    assert main([word.format(tmp=tmp_path) for word in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_traceback_is_shown_on_request(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        main(["--traceback", "report", str(tmp_path / "nowhere")])


def test_an_unknown_setting_is_an_error_with_a_suggestion(run_dir, capsys):
    assert main(["report", str(run_dir), "data.rot=x"]) == 2
    assert "data.root" in capsys.readouterr().err


def test_data_scenes_writes_the_same_files_for_the_same_seed(tmp_path, capsys):
    small = ["--train", "20", "--val", "20", "--test", "20"]
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert main(["data", "scenes", str(tmp_path / name), *small, "--seed", seed]) == 0
    table = "coco_caption_karpathy_test.arrow"
    a, b, c = ((tmp_path / name / table).read_bytes() for name in "abc")
    assert a == b != c
    assert f"{table:<40}       20 rows" in capsys.readouterr().out
    assert pa.ipc.open_file(str(tmp_path / "a" / table)).read_all().num_rows == 20


def test_report_prints_the_scores_and_where_the_page_is(run_dir, capsys):
    assert main(["report", str(run_dir), "--pictures", "30"]) == 0
    printed = capsys.readouterr().out
    report = json.loads((run_dir / "report.json").read_text())
    for name in ("ITM", "colour", "shape", "count", "relation", "unseen, colour"):
        assert any(line.startswith(name) for line in printed.splitlines())
    assert f"{100 * report['scores']['mlm']['count']['chance']:.1f} %" in printed
    assert printed.splitlines()[-1] == f"open {run_dir / 'report.html'}"


def test_evaluate_prints_and_writes_scores(run_dir, tmp_path, capsys):
    arguments = ["evaluate", str(run_dir), "pretrain", "--pairs", "20", "--json", str(tmp_path / "scores.json")]
    assert main(arguments) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    printed = capsys.readouterr().out
    assert f"mlm  loss {scores['mlm']['loss']:.4f}" in printed and "20 pairs, skipped none" in printed
    assert scores["itm"]["count"] == 20


def test_train_in_one_process_then_report(tmp_path, scenes):
    settings = ["run.max_steps=3", "run.log_every=1", "run.eval_every=3", "run.picture_every=2", "data.val_pairs=20"]
    settings += ["engine.global_batch=8", "engine.micro_batch=4", f"data.root={scenes}", f"run.dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "meter_fast.cli", "train", "pretrain", "size=tiny", *settings]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "RANK": "7",
    }  # it is alone all the same
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert sum(line.startswith("step") for line in lines) == 3
    assert any(line.startswith("held out at step 3") for line in lines)
    assert any(f"meter-fast report {tmp_path / 'run'}" in line for line in lines)
    assert main(["report", str(tmp_path / "run"), "--pictures", "4"]) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (report["world_size"], report["zero_stage"], report["dtype"], report["steps"]) == (1, 2, "bf16", 3)
    assert report["versions"]["torch"] == torch.__version__
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"images": 0}).Reload()
    assert [image.step for image in events.Images("held_out/picture")] == [2]


def test_train_says_what_is_wrong_before_anything_else(capsys):
    assert main(["train", "pretrain", "size=tiny", "optim.lrr=1"]) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert main(["train", "pretrian"]) == 2
    assert "pretrain" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- load and convert


@pytest.fixture
def published(tmp_path):
    """A checkpoint as the published code writes it, of the golden CLIP + RoBERTa model, and its tensors."""
    folder = GOLDEN / "clip_roberta"
    state = load_file(folder / "state.safetensors")
    config = json.loads((folder / "config.json").read_text())["config"]
    plain = {name: value for name, value in config.items() if isinstance(value, (str, int, float, bool, type(None)))}
    path = tmp_path / "published.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": {"config": plain}}, path)
    return path, state


HEADS = ["--text-heads", "4", "--fusion-heads", "4"]


def test_a_published_checkpoint_comes_back_key_for_key_and_bit_for_bit(published, tmp_path, capsys):
    path, state = published
    assert main(["convert", str(path), str(tmp_path / "export"), *HEADS]) == 0
    assert f"{len(state)} tensors" in capsys.readouterr().out or (tmp_path / "export" / "model.safetensors").exists()
    assert main(["convert", str(tmp_path / "export"), str(tmp_path / "back.ckpt")]) == 0
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    assert set(back["state_dict"]) == set(state)
    for name, value in state.items():
        assert torch.equal(back["state_dict"][name], value), name
    assert back["hyper_parameters"]["config"]["num_heads"] == 4
    assert "roberta" in back["hyper_parameters"]["config"]["tokenizer"]


def test_convert_refuses_options_without_meaning(run_dir, tmp_path, capsys):
    assert main(["convert", str(run_dir), str(tmp_path / "x.ckpt"), "--image-size", "96"]) == 2
    assert "--image-size has no meaning" in capsys.readouterr().err


def test_convert_can_change_the_resolution_and_add_a_tokenizer(published, tmp_path, scenes):
    path, _ = published
    out = tmp_path / "larger"
    options = ["--image-size", "96", "--tokenizer", str(scenes / "tokenizer")]
    assert main(["convert", str(path), str(out), *HEADS, *options]) == 0
    assert meter_fast.load_model(out).config.vision.image_size == 96
    assert (out / "tokenizer" / "tokenizer.json").is_file()


def test_load_opens_an_export_a_run_directory_and_nothing_else(run_dir, scene_model, tmp_path):
    ids = torch.tensor([[2, 7, 8, 3]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    expected = scene_model.encode_text(ids, mask)
    for path in (run_dir, run_dir / "export", str(run_dir)):
        model = meter_fast.load_model(path)
        assert isinstance(model, meter_fast.Meter) and not model.training
        assert torch.equal(model.encode_text(ids, mask), expected)
    with pytest.raises(ValueError, match="has no model"):
        meter_fast.load_model(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        meter_fast.load_model(tmp_path / "nowhere")
    with pytest.raises(AttributeError, match="lode"):
        meter_fast.lode  # noqa: B018


def test_load_opens_a_published_checkpoint_of_published_head_counts(tmp_path):
    from meter_fast.interop import to_meter
    from meter_fast.models.config import FusionConfig, ModelConfig, TextConfig, VisionConfig
    from meter_fast.models.meter import Meter

    config = ModelConfig(
        VisionConfig(width=128, layers=1, heads=2, image_size=32),
        TextConfig(width=768, layers=1, ffn=64, vocab_size=50),
        FusionConfig(width=768, layers=1),
    )
    torch.manual_seed(1)
    model = Meter(config).eval()
    torch.save({"state_dict": to_meter(model)}, tmp_path / "small.ckpt")
    loaded = meter_fast.load_model(tmp_path / "small.ckpt")
    assert not loaded.training and loaded.config == config
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def test_a_checkpoint_that_wants_to_run_code_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was here"), "w"))

    torch.save({"state_dict": {"x": Evil()}}, tmp_path / "evil.ckpt")
    assert main(["convert", str(tmp_path / "evil.ckpt"), str(tmp_path / "out")]) == 2
    assert "evil.ckpt" in capsys.readouterr().err
    assert not (tmp_path / "was here").exists() and not (tmp_path / "out").exists()
