"""The plan of every table of the paper: commands that the trainer accepts at both sizes, and what is refused."""

import os

import pytest

from meter_fast.ablation.plan import Plan, describe, make_plan
from meter_fast.ablation.rows import Launch
from meter_fast.ablation.stages import command_of
from meter_fast.cli import main
from meter_fast.config import ConfigError
from meter_fast.models.config import CLASS_TOKENS
from meter_fast.models.text_presets import TEXT_PRESETS
from meter_fast.recipes import resolve
from meter_fast.recipes.paper_tables import TABLES, VQA


def plan_of(table: str, size: str, *more: str, stages: str = "") -> Plan:
    return make_plan([f"table={table}", f"size={size}", f"stages={stages}", "data.root=DATA", "run.dir=RUN", *more])


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("table", TABLES)
def test_every_stage_is_a_command_of_the_trainer(table, size):
    plan = plan_of(table, size)
    assert [plan.row(planned.name) for planned in plan.rows] == list(TABLES[table].rows)
    for planned in plan.rows:
        training = [stage for stage in planned.stages if stage.config is not None]
        assert training and {stage.command[0] for stage in training} == {"train"}
        for stage in training:
            config = resolve(stage.command[1:])
            assert config == stage.config and config.data.root == "DATA"
            assert config.run.dir == f"RUN/rows/{planned.name}/{stage.name}"


@pytest.mark.parametrize("size", ["tiny", "base"])
@pytest.mark.parametrize("table", TABLES)
def test_fine_tuning_goes_on_from_the_rows_own_pretraining(table, size):
    plan = plan_of(table, size)
    for planned in plan.rows:
        names = [stage.name for stage in planned.stages]
        assert names[-2:] == ["vqa", "vqa_score"]
        tuned = planned.stages[-2].config
        assert bool(tuned.run.init) == TABLES[table].pretrained
        if "pretrain" in names:
            before = next(stage.config for stage in planned.stages if stage.name == "pretrain")
            assert tuned.run.init == f"{before.run.dir}/export"
            assert tuned.model.text == before.model.text and tuned.model.fusion == before.model.fusion


def rows(table: str, size: str, **arguments) -> dict:
    """Row name -> configuration of its first training stage."""
    plan = plan_of(table, size, **arguments)
    return {planned.name: planned.stages[0].config for planned in plan.rows}


def test_rows_differ_in_what_the_table_compares():
    encoders = rows("encoders", "base", stages="retrieval")
    assert len({(c.model.text, c.model.vision) for c in encoders.values()}) == len(encoders) == 6
    swin = encoders["roberta_swin"]
    assert (swin.model.vision.name, swin.model.vision.image_size, swin.data.transform) == ("swin", 384, "imagenet")
    rates = rows("learning_rates", "base", stages="retrieval")
    found = {(c.optim.lr, round(c.optim.lr * c.optim.cross_modal_multiplier, 9)) for c in rates.values()}
    assert found == {(1e-5, 1e-5), (2e-5, 2e-5), (3e-5, 3e-5), (5e-5, 5e-5), (1e-5, 5e-5)}
    assert all(c.optim.head_multiplier == c.optim.cross_modal_multiplier for c in rates.values())
    assert {c.model for c in rates.values()} == {encoders["bert_clip32"].model}  # the row that all tables share
    tiny = rows("learning_rates", "tiny", stages="retrieval")
    assert {c.optim.lr for c in tiny.values()} == {1e-4, 2e-4, 3e-4, 5e-4}


def test_rows_of_fusion_and_objectives():
    fused = rows("fusion", "base", stages="retrieval")
    found = {name: (c.model.fusion.name, c.model.fusion.layers, c.model.decoder.layers) for name, c in fused.items()}
    assert found == {
        "merged_attention": ("merged_attention", 12, 0),
        "co_attention": ("co_attention", 6, 0),
        "encoder_decoder": ("co_attention", 3, 3),
    }
    assert fused["co_attention"].model == rows("encoders", "base", stages="retrieval")["bert_clip32"].model
    plan = plan_of("objectives", "base", stages="retrieval")
    goals = [next(s for s in p.stages if s.name == "pretrain").config.objectives.names for p in plan.rows]
    both = ("mlm", "itm")
    assert goals == [("mlm",), ("itm",), both, (*both, "mim_in_batch"), (*both, "mim_codes")]


def test_vision_encoders_of_the_tables_are_all_kinds_there_are():
    """In miniature, too; there only DeiT and ViT, which differ in nothing but their weights, are the same model."""
    full = rows("vision_encoders", "base", stages="vqa")
    assert {c.model.vision.name for c in full.values()} == set(CLASS_TOKENS)
    assert len({c.model.vision for c in full.values()}) == len(full) == 9
    assert all(c.model.vision.image_size in (224, 384, 448) for c in full.values())
    small = {name: c.model.vision for name, c in rows("vision_encoders", "tiny", stages="vqa").items()}
    assert {name: vision.name for name, vision in small.items()} == {n: c.model.vision.name for n, c in full.items()}
    assert len(set(small.values())) == 8 and small["deit"] == small["vit"] and small["clip16"] != small["clip32"]


def test_figures_are_those_of_the_papers_rows():
    for table in TABLES.values():
        assert len({row.name for row in table.rows}) == len({row.label for row in table.rows}) == len(table.rows)
        for row in table.rows:
            assert set(row.paper) <= set(table.metrics) and set(row.checked) <= set(row.paper)
            assert all(20 < value < 100 for value in row.paper.values())
    shared = [row.paper for name in ("encoders", "learning_rates", "fusion", "objectives") for row in TABLES[name].rows
              if row.name in ("bert_clip32", "1e-5_5e-5", "co_attention", "mlm_itm")]  # fmt: skip
    assert len(shared) == 4 and shared[0][VQA] == 74.98 and all(paper == shared[0] for paper in shared)
    texts = {text.split("=")[1] for row in TABLES["text_encoders"].rows for text in row.base.model if "text=" in text}
    assert texts <= set(TEXT_PRESETS) and len(texts) == 7


def test_overrides_go_to_every_stage_or_to_one():
    more = ("engine.micro_batch=8", "pretrain:run.max_steps=5", "optim.clip=2.0")
    plan = plan_of("learning_rates", "tiny", *more, "rows=1e-5_5e-5", "pictures=7", stages="retrieval")
    (planned,) = plan.rows
    pretrain, retrieval = planned.stages
    assert (pretrain.config.run.max_steps, pretrain.config.engine.micro_batch, pretrain.config.optim.clip) == (5, 8, 2)
    assert retrieval.command[:3] == ("evaluate", "RUN/rows/1e-5_5e-5/pretrain", "retrieval")
    assert retrieval.command[-4:] == ("--pictures", "7", "--json", "RUN/rows/1e-5_5e-5/retrieval.json")
    assert "data.val_sources=coco" in retrieval.command
    said = "\n".join(describe(plan))
    assert "optim.head_multiplier=5" in said and "pretrain 5 steps" in said and "table 6" in said


def test_only_models_that_learn_matching_are_scored_by_it():
    plan = make_plan(["table=objectives", "size=tiny", "stages=retrieval", "rows=mlm,itm", "data.root=D"])
    assert [[stage.name for stage in planned.stages] for planned in plan.rows] == [
        ["pretrain"],
        ["pretrain", "retrieval"],
    ]


def test_an_image_tokenizer_is_trained_for_the_objective_that_needs_one():
    for size, grid in (("tiny", 3), ("base", 7)):
        plan = plan_of("objectives", size, "rows=mlm_itm_mim_codes,mlm_itm")
        both, codes = plan.rows
        assert [stage.name for stage in both.stages] == ["pretrain", "retrieval", "vqa", "vqa_score"]
        tokenizer, pretrain = codes.stages[:2]
        assert tokenizer.config.image_tokenizer.grid == pretrain.config.model.vision.grid == grid
        assert pretrain.config.objectives.image_tokenizer == f"{tokenizer.config.run.dir}/export"
        given = plan_of("objectives", size, "rows=mlm_itm_mim_codes", "pretrain:objectives.image_tokenizer=encoder.pkl")
        assert [stage.name for stage in given.rows[0].stages] == ["pretrain", "retrieval", "vqa", "vqa_score"]
        assert given.rows[0].stages[0].config.objectives.image_tokenizer == "encoder.pkl"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "table=: one of table=3 (text_encoders: "),
        (["table=8"], "figure=5 (resolution: "),
        (["table=fusions"], "table=fusions: one of"),
        (["table=7", "figure=5"], "table=7 figure=5: give one of them"),
        (["table=encoders", "size=huge"], "size=huge: one of base, tiny"),
        (["table=encoders", "rows=bert"], "rows=bert: one of emb_only_clip32"),
        (["table=encoders", "stages=nlvr2"], "stages=nlvr2: one of pretrain, retrieval, vqa"),
        (["table=text_encoders", "stages=retrieval"], "table=text_encoders has none of these"),
        (["table=encoders", "processes=0"], "processes=0: a whole number, 1 or more"),
        (["table=encoders", "pictures=1"], "pictures=1: a whole number, 2 or more"),
        (["table=encoders", "hostfile=nowhere"], "hostfile=nowhere: there is no such file"),
        (["table=encoders", "row=bert"], "did you mean rows=?"),
        (["table=encoders", "text=bert_base"], "unknown argument 'text'"),
        (["table=encoders", "run.init=x"], "the stages set run.init themselves"),
        (["table=encoders", "retrieval:data.root=x"], "retrieval is no stage that trains"),
        (["table=encoders", "tiny"], "settings are written key=value"),
        (["table=resolution", "rows=px384"], "px384 starts from the pre-training of px224"),
        (["table=learning_rates", "stages=retrieval", "pretrain:optim.lr=1"], "differ in that setting"),
        (["table=encoders", "stages=retrieval", "optim.lrr=1"], "row emb_only_clip32, stage pretrain: unknown setting"),
    ],
)
def test_refusals_name_key_value_and_remedy(argv, said, capsys):
    with pytest.raises(ConfigError) as error:
        make_plan(argv)
    assert said in str(error.value)
    assert main(["train", "ablation", *argv]) == 2
    assert said in capsys.readouterr().err


def test_several_processes_go_through_the_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=8\n")
    (planned,) = plan_of("encoders", "base", "rows=bert_clip32", stages="retrieval").rows
    pretrain, retrieval = planned.stages
    alone, environment = command_of(pretrain, Launch(1))
    assert alone[1:5] == ["-m", "meter_fast.cli", "train", "pretrain"] and "OMP_NUM_THREADS" not in environment
    several, environment = command_of(pretrain, Launch(8))
    assert os.path.basename(several[1]) == "deepspeed" and several[2:4] == ["--num_gpus", "8"]
    at = several.index("--module")
    assert several[at : at + 3] == ["--module", "meter_fast.train", "pretrain"]
    assert several[at + 2 :] == alone[4:]
    nodes, _ = command_of(pretrain, Launch(hostfile=str(hosts)))
    assert nodes[2:4] == ["--hostfile", str(hosts)] and nodes[at + 2 :] == alone[4:]
    for launch in (Launch(8), Launch(hostfile=str(hosts))):
        assert command_of(retrieval, launch)[0][1:4] == ["-m", "meter_fast.cli", "evaluate"]


@pytest.mark.parametrize(
    ("argument", "name"),
    [
        ("table=3", "text_encoders"),
        ("table=4", "vision_encoders"),
        ("table=5", "encoders"),
        ("table=6", "learning_rates"),
        ("table=7", "fusion"),
        ("table=10", "objectives"),
        ("figure=5", "resolution"),
    ],
)
def test_numbers_of_the_paper(argument: str, name: str):
    assert make_plan([argument, "size=tiny"]).table.name == make_plan([f"table={name}", "size=tiny"]).table.name == name
