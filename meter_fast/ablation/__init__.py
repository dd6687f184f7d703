"""The paper's comparisons, run row by row: `meter-fast train ablation table=7 size=tiny data.root=DATA`.

    meter-fast train ablation table=7 size=tiny data.root=SCENES run.dir=runs/fusion
    meter-fast train ablation table=objectives size=base processes=8 data.root=/data run.dir=/shared/objectives
    meter-fast train ablation table=encoders size=base hostfile=hostfile data.root=/data rows=bert_clip32,roberta_swin

Each row is a few stages (pre-training, zero-shot retrieval, fine-tuning on VQAv2 and its score), each a run of the
trainer or of `meter-fast evaluate` in processes of its own. The same command goes on where it was stopped. RUN_DIR
holds table.md, table.json and table.png; rows/ROW the runs, their logs and scores. Exit codes: 0 all rows done, 75
asked to stop, 2 wrong settings, 1 a row failed.

Settings of the trainer are passed on to all training stages, or to one: `pretrain:run.max_steps=2000`. rows=A,B and
stages=retrieval (or vqa) leave out others; processes=N trains in N processes of this machine (default: one for each
GPU), hostfile=FILE on several machines.
"""

import sys
from collections.abc import Sequence

from meter_fast.ablation.plan import describe, make_plan
from meter_fast.ablation.stages import EXIT_WRONG, run_rows
from meter_fast.ablation.table import write_table
from meter_fast.ablation.transfer import describe_transfer, make_transfer_plan
from meter_fast.ablation.transfer_table import write_transfer_table
from meter_fast.config import ConfigError

COMPARISONS = {
    "ablation": (make_plan, describe, write_table),
    "transfer": (make_transfer_plan, describe_transfer, write_transfer_table),
}
"""Words after `meter-fast train` that run several rows: how each is planned, described and written."""


def main(name: str, argv: Sequence[str]) -> int:
    """Run a comparison; returns the exit code."""
    make, said, write = COMPARISONS[name]
    try:
        plan = make(argv)
    except ConfigError as error:
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        return EXIT_WRONG
    return run_rows(plan.rows, plan.launch, plan.folder, said(plan), lambda: write(plan))
