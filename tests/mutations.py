"""Takes one guard after another out of the program and sees its test fail: `python -m tests.mutations [WORD]`.

Works in a copy of the tree. WORD: only guards whose description holds it. Exit code 1 if a test passes without its
guard. The table of docs/reliability.md names the guards of this list beside their tests.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutation:
    """guard: what is taken out, for people. `old` becomes `new` in `file`, where it is there once. test: of tests/."""

    guard: str
    file: str
    old: str
    new: str
    test: str


CHECKPOINT, SAVING = "meter_fast/training/checkpoint.py", "meter_fast/training/saving.py"
MUTATIONS = (
    Mutation("the comparison of sha256", CHECKPOINT, "if _sha256(path) != sha256:", "if False:",
             "training/test_checkpoint.py::test_every_flipped_byte_is_found"),
    Mutation("the comparison of sizes and sha256", CHECKPOINT,
             "        if path.stat().st_size != size:", "        continue\n        if path.stat().st_size != size:",
             "training/test_checkpoint.py::test_truncated_and_missing_files_are_found"),
    Mutation("prune's except OSError", CHECKPOINT, "        except OSError as error:\n            failed.append",
             "        except KeyError as error:\n            failed.append",
             "training/test_checkpoint.py::test_a_failing_delete_is_told_and_ends_nothing"),
    Mutation("the check of names in a manifest", CHECKPOINT, "if Path(name).name != name:", "if False:",
             "training/test_checkpoint.py::test_a_manifest_that_points_outside_is_refused"),
    Mutation("the write probe", CHECKPOINT, 'write_durably(trial, b"probe")', "pass",
              "training/test_checkpoint.py::test_the_write_probe_names_the_folder"),
    Mutation("the order of writing: visible only at the end", CHECKPOINT,
             'folder / f".writing-step-{step:08d}-{uuid.uuid4().hex[:8]}"', "self.final",
             "training/test_checkpoint.py::test_nothing_is_visible_before_the_end"),
    Mutation("the copy of the state", SAVING, '"cpu", copy=True).contiguous()', '"cpu").contiguous()',
             "training/test_saving.py::test_steps_go_on_while_the_disk_is_slow"),
    Mutation("the wait for an earlier write", SAVING, "        self.wait()\n        self._step = step",
             "        self._step = step", "training/test_saving.py::test_writing_never_overlaps_itself"),
    Mutation("writer.abandon after an error", SAVING, "                writer.abandon()", "                pass",
             "training/test_saving.py::test_a_full_disk_is_told_once_and_leaves_the_older_one"),
    Mutation("the error that the writing thread hands over", SAVING, "        except Exception as error:",
             "        except KeyError as error:", "training/test_saving.py::test_a_folder_that_becomes_a_file"),
    Mutation("weights_only", "meter_fast/models/files.py", "weights_only=True)", "weights_only=False)",
             "interop/test_published.py::test_malicious_file"),
    Mutation("the list of admitted classes", "meter_fast/models/torchscript.py",
             'raise pickle.UnpicklingError(f"it asks for {module}.{name}")', "return super().find_class(module, name)",
             "models/test_weights.py::test_torchscript_archive_cannot_run_code"),
    Mutation("allow_pickle=False", "meter_fast/data/shards.py", "allow_pickle=False", "allow_pickle=True",
             "data/test_shards.py::test_an_index_that_is_damaged_or_holds_objects_is_made_anew"),
    Mutation("the checks of names and kinds", "meter_fast/data/shards.py", "    elif not member.regular:",
             "    elif False:", "data/test_shards.py::test_hostile_members_are_refused_and_others_unaffected"),
    Mutation("trust_remote_code=False", "meter_fast/data/tokenizer.py", "trust_remote_code=False",
             "trust_remote_code=True", "data/test_tokenizer.py::test_code_that_comes_with_a_tokenizer_is_not_run"),
    Mutation("the pixel limit", "meter_fast/data/image_check.py",
             "if header.width * header.height > max_pixels:", "if False:",
             "data/test_image_check.py::test_bombs_are_refused_from_the_header"),
    Mutation("the stop after bad samples in a row", "meter_fast/data/samples.py",
             "if len(row) == BAD_IN_A_ROW:", "if len(row) == 10 * BAD_IN_A_ROW:",
             "data/test_loader_bad_samples.py::test_nothing_but_garbage_stops_with_causes_counts_and_names"),
    Mutation("the rule on progress", "meter_fast/restarts.py",
             "now.saved <= before.saved and now.step <= before.step", "False",
             "training/test_restarts.py::test_when_to_give_up"),
    Mutation("the threshold of a spike", "meter_fast/training/spikes.py", "if loss > middle +", "if loss < middle -",
             "training/test_replay.py::test_a_leap_is_told_and_noise_is_not"),
    Mutation("the hooks that look for it", "meter_fast/replay.py", "if name and on]", "if False]",
             "training/test_replay.py::test_the_first_module_that_is_not_finite_is_named"),
    Mutation("the check of shapes and types before reading", "meter_fast/training/resume.py",
             "    world.together(lambda: _check_fit(start.reader, state.shapes()))\n", "",
             "training/test_hostile_files.py::test_moments_that_do_not_fit_are_refused"),
    Mutation("what is said of a port in use", "meter_fast/training/world.py", "except dist.DistNetworkError as error",
             "except KeyError as error", "training/test_more_faults.py::test_a_port_in_use"),
    Mutation("the refusal of what is not safetensors", "meter_fast/training/checkpoint.py",
             "except safetensors.SafetensorError as error", "except KeyError as error",
             "training/test_hostile_files.py::test_crafted_safetensors_are_refused"),
    Mutation("the stop at what is not finite", "meter_fast/train.py", "    if not news.not_finite:\n", "    if True:\n",
             "training/test_train_faults.py::test_all_stop_together_when_one_is_not_finite"),
    Mutation("Saver.poll", SAVING, "return self._written is not None and self._written.error is not None",
             "return False", "training/test_saving.py::test_a_full_disk_is_told_once_and_leaves_the_older_one"),
    Mutation("what outlives a closed terminal", "meter_fast/train.py", "    outlive_terminal()\n", "",
             "training/test_more_faults.py::test_a_closed_terminal"),
    Mutation("the watchdog", "meter_fast/training/interruption.py",
             "    faulthandler.dump_traceback_later(seconds, exit=True)", "    pass",
             "training/test_train_faults.py::test_a_step_that_hangs_shows_stacks_and_ends"),
)  # fmt: skip


def guards() -> dict[str, str]:
    """Test -> what it was seen to fail without."""
    tests = {mutation.test for mutation in MUTATIONS}
    return {test: "; ".join(one.guard for one in MUTATIONS if one.test == test) for test in tests}


def fails_without(mutation: Mutation, copy: Path) -> bool:
    """Whether the test fails in a copy of the tree without the guard."""
    path = copy / mutation.file
    whole = path.read_text(encoding="utf-8")
    if whole.count(mutation.old) != 1:
        raise SystemExit(f"{mutation.file} does not hold once: {mutation.old}")
    path.write_text(whole.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/{mutation.test}"]
        ended = python(copy, *words)
        if ended.returncode not in (0, 1):
            raise SystemExit(ended.stdout + ended.stderr)
        return ended.returncode == 1
    finally:
        path.write_text(whole, encoding="utf-8")


def python(copy: Path, *words: str) -> subprocess.CompletedProcess:
    """Run this Python with the package of the copy."""
    path = os.pathsep.join(filter(None, [str(copy), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *words], cwd=copy, env=environment, capture_output=True, text=True, check=False
    )


def main(word: str = "") -> int:
    """Carry out those whose guard holds `word`. Returns the exit code."""
    passed = []
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info"))
        where = python(copy, "-c", "import meter_fast; print(meter_fast.__file__)").stdout.strip()
        if not Path(where).is_relative_to(copy):
            raise SystemExit(
                f"{where} is imported and not the copy of the tree: the installation goes before PYTHONPATH"
            )
        for mutation in MUTATIONS:
            if word not in mutation.guard:
                continue
            failed = fails_without(mutation, copy)
            print(f"{'fails' if failed else 'PASSES'} without {mutation.guard}: {mutation.test}", flush=True)
            passed += [] if failed else [mutation]
    return 1 if passed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
