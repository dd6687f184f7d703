"""What is run to see what pre-training is worth: rows, their commands, and what is refused."""

import pytest

from meter_fast.ablation.transfer import TASKS, describe_transfer, make_transfer_plan
from meter_fast.cli import main
from meter_fast.config import ConfigError
from meter_fast.recipes import resolve


@pytest.fixture
def init(tmp_path):
    """A run directory with an export."""
    (tmp_path / "run" / "export").mkdir(parents=True)
    return tmp_path / "run"


def plan_of(init, *more: str):
    return make_transfer_plan([f"init={init}", "data.root=DATA", "run.dir=RUN", *more])


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_every_row_is_a_run_of_the_trainer_and_its_score(init, size):
    plan = plan_of(init, f"size={size}", "seeds=3,5")
    by_name = {row.name: row for row in plan.rows}
    fine_tuned = {f"{task}-{start}-{seed}" for task in TASKS for start in ("pretrained", "scratch") for seed in (3, 5)}
    assert by_name.keys() == fine_tuned | {"retrieval-zero_shot"}
    for name in fine_tuned:
        train, score = by_name[name].stages
        config = train.config
        assert resolve(train.command[1:]) == config and config.data.root == "DATA"
        assert config.run.dir == f"RUN/rows/{name}/train" == score.command[1]
        assert score.command[2] == by_name[name].task
        assert config.run.seed == by_name[name].seed
        assert config.run.init == (str(init / "export") if "pretrained" in name else "")
    (alone,) = by_name["retrieval-zero_shot"].stages
    assert alone.command[:4] == ("evaluate", str(init / "export"), "retrieval", "data.val_sources=" +
                                 ("coco" if size == "tiny" else "f30k"))  # fmt: skip
    assert "data.root=DATA" in alone.command


def test_both_starts_have_the_same_budget(init):
    plan = plan_of(init, "size=tiny")
    for task in TASKS:
        own, scratch = (
            next(row for row in plan.rows if (row.task, row.start) == (task, start)).stages[0].config
            for start in ("pretrained", "scratch")
        )
        assert own.run.max_steps == scratch.run.max_steps > 0
        assert own.engine.global_batch == scratch.engine.global_batch and own.optim == scratch.optim
        assert (own.data.tokenizer, scratch.data.tokenizer) == ("init", "trained")


def test_settings_go_to_every_task_or_to_one(init):
    plan = plan_of(init, "size=tiny", "nlvr2:run.max_steps=7", "optim.clip=0.5", "tasks=nlvr2,vqa", "starts=scratch")
    steps = {row.task: row.stages[0].config.run.max_steps for row in plan.rows}
    assert steps["nlvr2"] == 7 != steps["vqa"] and len(plan.rows) == 2
    assert {row.stages[0].config.optim.clip for row in plan.rows} == {0.5}
    assert "2 rows, 4 stages" in "\n".join(describe_transfer(plan))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init=nowhere"], "init=nowhere: name a pre-trained model"),
        ([], "init=: name a pre-trained model"),
        (["init=.", "tasks=vqa,irtr"], "tasks=irtr: one of vqa, nlvr2, snli_ve, retrieval"),
        (["init=.", "starts=zero"], "starts=zero: one of"),
        (["init=.", "seeds=0,0"], "seeds=0,0: each once"),
        (["init=.", "seeds=x"], "seeds=x: a whole number"),
        (["init=.", "tasks=vqa", "starts=zero_shot"], "only retrieval is scored without fine-tuning"),
        (["init=.", "seed=1"], "did you mean seeds=?"),
        (["init=.", "caption:run.max_steps=1"], "caption is no stage that trains"),
        (["init=.", "run.init=x"], "the stages set run.init themselves"),
        (["init=.", "optim.lrr=1", "size=tiny"], "row vqa-scratch-0: unknown setting"),
    ],
)
def test_refusals_name_key_value_and_remedy(words, said, capsys):
    with pytest.raises(ConfigError) as error:
        make_transfer_plan(words)
    assert said in str(error.value)
    assert main(["train", "transfer", *words]) == 2
    assert said in capsys.readouterr().err
