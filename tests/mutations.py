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
RESUME, INTERRUPTION = "meter_fast/training/resume.py", "meter_fast/training/interruption.py"
WATCHDOG, TRAIN, RESTARTS = "meter_fast/training/watchdog.py", "meter_fast/train.py", "meter_fast/restarts.py"
FILES = "meter_fast/models/files.py"
MOMENTS = "    for kind in KINDS:\n        for name in state.names:"
WITHOUT_MOMENTS = "    for kind in KINDS[:1]:\n        for name in state.names:"
FLAG, AT_ONCE = "lambda number, frame: self._note(number)", "lambda number, frame: os._exit(75)"
HIDDEN = 'folder / f".writing-step-{step:08d}-{uuid.uuid4().hex[:8]}"'
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
             HIDDEN, "self.final",
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
    Mutation("the watchdog", WATCHDOG, "                self._end_hung(waited, peers)\n", "                pass\n",
             "training/test_train_faults.py::test_a_step_that_hangs_shows_stacks_and_ends"),
    Mutation("the watchdog's last words", WATCHDOG, "                self._end_hung(waited, peers)\n",
             "                pass\n", "training/test_watchdog.py::test_a_rank_that_hangs_is_named_and_both_end"),
    Mutation("the moments of a checkpoint", RESUME, MOMENTS, WITHOUT_MOMENTS,
             "training/test_train_resume.py::test_ten_and_ten_steps_are_twenty_bit_for_bit"),
    Mutation("the moments, on other processes", RESUME, MOMENTS, WITHOUT_MOMENTS,
             "training/test_train_resume.py::test_another_number_of_processes_sees_the_same_samples"),
    Mutation("the moments, at another stage", RESUME, MOMENTS, WITHOUT_MOMENTS,
             "training/test_train_resume.py::test_another_zero_stage_goes_on"),
    Mutation("the moments, in a replay", RESUME, MOMENTS, WITHOUT_MOMENTS,
             "training/test_replay.py::test_a_step_done_again_gives_the_recorded_loss"),
    Mutation("tables at the run's resolution", RESUME,
             "tensors[name] = fit_positions(tensors[name], own.shape, config.model.vision.grid, name)", "pass",
             "training/test_train_resume.py::test_weights_only_start"),
    Mutation("a signal only sets a flag", INTERRUPTION, FLAG, AT_ONCE,
             "training/test_more_faults.py::test_a_request_within_a_step_waits_for_its_end"),
    Mutation("a signal only sets a flag, whenever it comes", INTERRUPTION, FLAG, AT_ONCE,
             "training/test_more_faults.py::test_a_request_at_any_moment"),
    Mutation("a signal only sets a flag, on either process", INTERRUPTION, FLAG, AT_ONCE,
             "training/test_train_faults.py::test_a_signal_to_one_process_saves_together"),
    Mutation("the look after the launcher", INTERRUPTION,
             "if not self.reason and not all(_is_alive(p) for p in self._launchers):", "if False:",
             "training/test_train_command.py::test_launcher_interrupted_and_started_again"),
    Mutation("the time in which a second signal is an echo", INTERRUPTION,
             "if self.reason and time.monotonic() - self._since > ECHO_SECONDS:", "if self.reason:",
             "training/test_train_faults.py::test_signals_from_outside_save_and_a_second_one_ends_at_once"),
    Mutation("the stack of the process that is left", TRAIN, "        traceback.print_exc()\n", "",
             "training/test_train_faults.py::test_a_killed_process_ends_the_other_and_the_run_goes_on"),
    Mutation("the question who is missing", TRAIN,
             'gone = [f"\\n  {text}" for text in peers.missing()] if peers else []', "gone = []",
             "training/test_watchdog.py::test_the_rank_that_was_killed_is_named"),
    Mutation("the rule on numbers that are not finite", RESTARTS, "now.not_finite == before.not_finite", "False",
             "training/test_restarts.py::test_a_step_that_is_not_finite_twice_ends_it"),
    Mutation("the restart", RESTARTS, "            if code in FINAL:", "            if True:",
             "training/test_restarts.py::test_two_crashes_cost_nothing_but_time"),
    Mutation("exit code 2 as an end", RESTARTS, "FINAL = (0, 2, EXIT_INTERRUPTED)", "FINAL = (0, EXIT_INTERRUPTED)",
             "training/test_restarts.py::test_wrong_settings_and_a_full_disk_are_not_tried_again"),
    Mutation("the request that is passed on", "meter_fast/launching.py",
             "        if self._process is not None and self._process.poll() is None:", "        if False:",
             "training/test_restarts.py::test_a_request_to_stop_reaches_the_run_and_ends_both"),
    Mutation("writing under a hidden name", CHECKPOINT, HIDDEN, "self.final",
             "training/test_train_faults.py::test_killed_while_writing_leaves_the_older_checkpoint"),
    Mutation("writer.abandon in a run", SAVING, "                writer.abandon()", "                pass",
             "training/test_train_faults.py::test_no_room_on_the_disk"),
    Mutation("the wait in a run for an earlier write", SAVING, "        self.wait()\n        self._step = step",
             "        self._step = step", "training/test_more_faults.py::test_a_slow_disk"),
    Mutation("the comparison of sha256 before a checkpoint is taken", CHECKPOINT, "if _sha256(path) != sha256:",
             "if False:", "training/test_train_faults.py::test_damaged_checkpoints_are_passed_over_by_name"),
    Mutation("prune's except OSError in a run", CHECKPOINT,
             "        except OSError as error:\n            failed.append",
             "        except KeyError as error:\n            failed.append",
             "training/test_more_faults.py::test_a_checkpoint_that_cannot_be_removed"),
    Mutation("micro-batches cut from the global batch", "meter_fast/data/order.py", "slice((a * world + rank) *",
             "slice((rank * found + a) *",
             "data/test_loader.py::test_every_division_gives_the_same_global_batches"),
    Mutation("results in the order of the tasks", "meter_fast/data/loader.py", "pending.popleft().result()",
             "pending.pop().result()", "data/test_loader.py::test_threads_change_nothing"),
    Mutation("the check that sizes divide", "meter_fast/training/engine.py", "    if global_batch % at_once == 0:",
             "    if True:", "training/test_train_command.py::test_three_processes_do_not_divide_eight_pairs"),
    Mutation("epochs that begin anew", "meter_fast/data/order.py", "np.divmod(turns, size)",
             "(turns // size, np.minimum(turns, size - 1))",
             "data/test_loader.py::test_a_set_smaller_than_the_batch_or_the_world_works"),
    Mutation("the look at a picture's end", "meter_fast/data/image_check.py", "    _check_end(data, header.format)\n",
             "", "data/test_image_check.py::test_unusable_files_are_refused_with_their_cause"),
    Mutation("the pixel limit, for memory", "meter_fast/data/image_check.py",
             "if header.width * header.height > max_pixels:", "if False:",
             "data/test_image_check.py::test_bombs_need_no_memory"),
    Mutation("the look at a member's size", "meter_fast/data/tar_headers.py",
             "if not 0 <= size <= min(LARGEST_MEMBER, end - content):", "if False:",
             "data/test_shards.py::test_a_shard_cut_at_any_block_keeps_its_whole_pairs"),
    Mutation("the count of lone pictures", "meter_fast/data/shards.py",
             '            problems["image without caption"] += 1', "            pass",
             "data/test_shards.py::test_lone_members_and_duplicates_are_counted_and_the_first_counts"),
    Mutation("the look for something visible", "meter_fast/data/caption_check.py",
             "if not any(character.isprintable() and not character.isspace() for character in text):", "if False:",
             "data/test_text.py::test_bad_captions_name_their_cause"),
    Mutation("the longest text", "meter_fast/data/text.py", "        self._encoder.enable_truncation(max_length)\n", "",
             "data/test_text.py::test_odd_captions_are_tokenised"),
    Mutation("a count of one where there is none", "meter_fast/objectives/joint.py", "max(1.0, count)", "count",
             "objectives/test_joint.py::test_no_masked_token"),
    Mutation("draws by the number of the bad sample", "meter_fast/data/samples.py", "(self.seed, purpose, number)",
             "(self.seed, purpose)", "data/test_loader_bad_samples.py::"
             "test_the_same_bad_picture_is_replaced_differently_for_each_caption_but_always_alike"),
    Mutation("the arithmetic of AdamW", "meter_fast/training/optimizer.py", "beta1, beta2 = group[",
             "beta2, beta1 = group[",
             "training/test_recorded_curve.py::test_the_curve_is_the_recorded_one"),
    Mutation("the threshold of slowness", "meter_fast/training/progress.py", "CLEARLY_SLOWER = 0.2",
             "CLEARLY_SLOWER = 2",
             "training/test_phases.py::test_a_rank_that_sleeps_is_named_with_its_phase"),
    Mutation("the threshold of data-bound", "meter_fast/training/monitor.py", "DATA_BOUND = 0.5", "DATA_BOUND = 2",
             "training/test_phases.py::test_slow_decoding_is_shown_with_a_hint_and_ends_in_order"),
    Mutation("the trial of the port", "meter_fast/doctor/network.py", '            trial.bind(("", asked.port))',
             "            pass", "doctor/test_doctor_surroundings.py::test_a_port_that_is_taken_and_by_whom"),
    Mutation("the look for the interface", "meter_fast/doctor/network.py", "    if not chosen:", "    if False:",
             "doctor/test_doctor_surroundings.py::test_named_interfaces"),
    Mutation("weights_only, for DALL-E", FILES, "weights_only=True)", "weights_only=False)",
             "models/test_dalle_encoder.py::test_a_file_that_asks_to_run_code_is_refused"),
    Mutation("weights_only, for a run", FILES, "weights_only=True)", "weights_only=False)",
             "training/test_train_command.py::test_refusals_say_why"),
    Mutation("the refusal of what is not safetensors in a checkpoint", CHECKPOINT,
             "except safetensors.SafetensorError as error", "except KeyError as error",
             "training/test_checkpoint.py::test_a_pickle_in_place_of_a_file_is_refused_and_not_run"),
    Mutation("JSON and nothing else", FILES, 'json.loads(path.read_text(encoding="utf-8"))',
             '__import__("pickle").loads(path.read_bytes())',
             "training/test_hostile_files.py::test_pickles_in_place_of_json_are_not_opened"),
    Mutation("the comparison of names and shapes", "meter_fast/models/export.py",
             "    copy_into(model, read_tensors(folder / WEIGHTS), str(folder / WEIGHTS))\n",
             "    read_tensors(folder / WEIGHTS)\n", "models/test_export.py::test_what_does_not_fit_is_refused"),
    Mutation("the run's own folder", "meter_fast/training/run.py", 'Path(config.run.dir) / "config.json"',
             'Path(config.run.dir).parent / "config.json"',
             "training/test_hostile_files.py::test_a_run_writes_under_its_directory_alone"),
    Mutation("text stays text", "meter_fast/config.py", "    elif kind is str:\n        return text\n",
             "    elif kind is str:\n        return eval(text)\n",
             "training/test_hostile_files.py::test_values_are_never_evaluated"),
    Mutation("inert classes", FILES,
             "with torch.serialization.safe_globals(list(inert)):\n            return torch.load(",
             "with torch.serialization.safe_globals([]):\n            return torch.load(",
             "interop/test_published.py::test_lightning_file"),
    Mutation("what is left alone in a table", "meter_fast/data/tables.py",
             "        schema = pa.ipc.open_file(mapped).schema\n", "        schema = pa.ipc.open_file(mapped).schema\n"
             '        [__import__("pickle").loads(value) for value in (schema.metadata or {}).values()]\n',
             "training/test_hostile_files.py::test_pickles_in_a_table_are_not_opened"),
    Mutation("settings from the command line alone", "meter_fast/recipes/__init__.py",
             "return override(recipe(**arguments), settings)",
             'return override(recipe(**arguments), [f"{k}={v}" for k, v in __import__("os").environ.items() '
             'if k.startswith("optim.")] + settings)',
             "training/test_hostile_files.py::test_the_environment_overrides_nothing"),
    Mutation("the barrier after all have met", "meter_fast/training/world.py", "        dist.barrier(host)\n", "",
             "training/test_world.py::test_nobody_goes_on_before_all_have_met"),
    Mutation("the restart, over a soak", RESTARTS, "            if code in FINAL:", "            if True:",
             "training/test_soak.py::test_two_thousand_steps_under_faults"),
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
