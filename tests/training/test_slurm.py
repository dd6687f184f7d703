"""What srun tells its processes."""

import pytest

from meter_fast.training.slurm import first_host, rank, variables

STEP = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "2", "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1", "SLURM_JOB_NODELIST": "gpu[1-9]", "SLURM_STEP_NODELIST": "gpu[4-5]",
}  # fmt: skip


def test_a_process_of_a_step():
    assert variables(STEP) == {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "gpu4", "MASTER_PORT": "24713",
    }  # fmt: skip
    assert rank(STEP) == 3


def test_a_given_address_stays():
    given = variables({**STEP, "MASTER_ADDR": "10.0.0.4", "MASTER_PORT": "29500"})
    assert given["MASTER_ADDR"] == "10.0.0.4" and given["MASTER_PORT"] == "29500"


def test_a_launcher_inside_a_step_is_believed():
    assert variables({**STEP, "RANK": "0"}) == {} and rank({**STEP, "RANK": "0"}) == 0


def test_the_shell_of_a_batch_script_is_no_process_of_a_run():
    """It has SLURM_NTASKS and SLURM_PROCID; a process started there without srun would wait for others."""
    shell = {name: value for name, value in STEP.items() if "STEP" not in name}
    assert variables(shell) == {} and rank(shell) == 0


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("node7", "node7"),
        ("node7,node9", "node7"),
        ("gpu[01-04,07],login1", "gpu01"),
        ("gpu[012,014]", "gpu012"),
        ("rack[2-3]-n[08-11].local,x", "rack2-n08.local"),
    ],
)
def test_the_first_of_a_list(hosts, first):
    assert first_host(hosts) == first


def test_no_list():
    with pytest.raises(ValueError, match="set MASTER_ADDR"):
        first_host("")
