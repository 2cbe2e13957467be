"""hpcgpt.submit: the same job as with sbatch, and nothing queued that cannot run.

Slurm's programs are replaced by stand-ins that record their input, so that this file runs on any machine;
tests/slurm/test_run_on_slurm.py submits to a real one.
"""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from hpcgpt.errors import UserError
from hpcgpt.run import run_folder
from hpcgpt.slurm import code_snapshot, submission
from hpcgpt.slurm.partitions import minutes
from hpcgpt.storage import lease
from tests.programs import ROOT, clean_env, command
from tests.tiny_run import TINY

pytestmark = pytest.mark.processes

SCRIPT = ROOT / "slurm" / "pretrain.sbatch"

# The batch script is printed, and torch is not loaded to estimate what the job needs.
SCRIPT_ONLY = ("--dry-run", "--no-estimate")

# As a user might type them.
ODD = ["--run.name", 'it\'s a "run"', "--sample.prompt", "$HOME `id` \\ 萧炎; #!*\n\tnew line  "]


@pytest.fixture
def tiny(tiny: Path) -> Path:
    """A configuration file for a run on up to four ranks."""
    assert "micro_batch = 4" in tiny.read_text()
    tiny.write_text(tiny.read_text().replace("micro_batch = 4", "micro_batch = 2"))
    return tiny


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """Stand-ins for srun and sbatch; sbatch saves the script as submitted.sh beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "srun": "exit 1",
        "sbatch": f'[ "$1" = --help ] && exit; env > {folder}/environment; cp "$1" {folder}/submitted.sh; '
        "echo Submitted batch job 123",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    return folder


def submit(slurm: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return command("hpcgpt.submit", *arguments, env={"PATH": f"{slurm}:{os.environ['PATH']}"} | env)


def resources(script: str) -> dict[str, str]:
    """Return the options in the #SBATCH lines of a batch script."""
    pairs = re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", script, flags=re.MULTILINE)
    return {key: shlex.split(value)[0] if value else "" for key, value in pairs}


def run_by(script: str, folder: Path) -> list[str]:
    """Return the arguments that a batch script runs, as bash reads them; only `bash` and `srun` are stand-ins."""
    stand_ins = folder / "stand_ins"
    shutil.rmtree(stand_ins, ignore_errors=True)
    stand_ins.mkdir()
    (folder / "ran").unlink(missing_ok=True)
    for name in ("bash", "srun"):
        (stand_ins / name).write_text(f'#!/bin/sh\nprintf "%s\\0" {name} "$@" >> {folder}/ran\n')
        (stand_ins / name).chmod(0o755)
    path = folder / "script.sh"
    path.write_text(script)
    subprocess.run(["/bin/bash", str(path)], env=clean_env() | {"PATH": f"{stand_ins}:/usr/bin:/bin"}, check=True)
    return (folder / "ran").read_text().split("\0")[:-1]


# --- the same command ------------------------------------------------------------------------------


def test_the_job_runs_the_batch_script_with_exactly_these_arguments(slurm: Path, tiny: Path, tmp_path: Path) -> None:
    done = submit(slurm, "--nodes", "2", "--ntasks-per-node", "2", str(tiny), *ODD, *SCRIPT_ONLY)
    assert done.returncode == 0, done.stderr
    assert run_by(done.stdout, tmp_path) == ["bash", str(ROOT / "slurm" / "pretrain.sbatch"), str(tiny), *ODD]


def test_the_submitted_job_is_the_one_that_dry_run_shows(slurm: Path, tiny: Path, tmp_path: Path) -> None:
    flags = ["--nodes", "2", "--ntasks-per-node", "2", "--time", "1:30:00", str(tiny), *ODD]
    shown = submit(slurm, *flags, *SCRIPT_ONLY)
    assert not (slurm / "submitted.sh").exists()
    done = submit(slurm, *flags)
    assert done.returncode == 0, done.stderr
    submitted = (slurm / "submitted.sh").read_text()
    # A script of --dry-run logs where it is submitted: the run folder is not there yet.
    assert resources(submitted) | {"output": "slurm-%j.out"} == resources(shown.stdout)
    (code,) = (tmp_path / "runs" / ODD[1] / "code").iterdir()
    assert run_by(submitted, tmp_path) == ["bash", f"{code}/slurm/pretrain.sbatch", f"{code}/config/{tiny.name}", *ODD]
    live = submit(slurm, *flags, "--live")
    assert live.returncode == 0, live.stderr
    assert "\nunset HPCGPT_CODE; set -- " in (slurm / "submitted.sh").read_text()  # of the user's own shell
    assert run_by((slurm / "submitted.sh").read_text(), tmp_path) == ["bash", str(SCRIPT), str(tiny), *ODD]


def test_the_resources_are_the_requested_ones(slurm: Path, tiny: Path) -> None:
    done = submit(
        slurm, "-N2", "--tasks-per-node", "2", "--gpus-per-node=2", "--time", "1-2", "-p", "low",
        "--signal-lead-s", "90", "--exclusive", "--comment=a b", "--mail-type=END", "--sbatch", "bb-site=x",
        str(tiny), *SCRIPT_ONLY,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = resources(done.stdout)
    expected = {"nodes": "2", "ntasks-per-node": "2", "gpus-per-node": "2", "time": "1-2", "partition": "low",
                "job-name": "tiny", "requeue": "", "open-mode": "append", "exclusive": "", "comment": "a b",
                "mail-type": "END", "bb-site": "x", "signal": "USR1@90", "output": found["output"]}  # fmt: skip
    assert found == expected  # nothing else: no --wckey, which submitit adds


def test_a_flag_that_is_written_comes_before_the_variable_of_sbatch(slurm: Path, tiny: Path) -> None:
    """For sbatch, a variable comes before the lines of a script, which have the flags here."""
    variables = {"SBATCH_TIMELIMIT": "9", "SBATCH_GRES": "gpu:1", "SBATCH_QOS": "long", "SBATCH_SIGNAL": "USR1@30",
                 "SBATCH_NO_REQUEUE": "1", "SBATCH_JOB_NAME": "other", "SBATCH_DEBUG": "1"}  # fmt: skip
    done = submit(slurm, "--time=60", "--gpus-per-node=2", "--job-name=mine", str(tiny), **variables)
    assert done.returncode == 0, done.stderr
    found = resources((slurm / "submitted.sh").read_text())
    assert (found["time"], found["gpus-per-node"], found["job-name"]) == ("60", "2", "mine")
    assert (found["qos"], found["signal"], found["no-requeue"]) == ("long", "USR1@30", "")
    assert not found.keys() & {"gres", "requeue"}
    left = [line for line in (slurm / "environment").read_text().splitlines() if line.startswith("SBATCH_")]
    assert left == ["SBATCH_DEBUG=1"]


def test_the_defaults_are_those_of_the_batch_script(slurm: Path, tiny: Path) -> None:
    """Both ways give the same time limit, the same signal and an appended log."""
    done = submit(slurm, "--nodes", "1", str(tiny), *SCRIPT_ONLY)
    from_submit, from_script = resources(done.stdout), resources(SCRIPT.read_text())
    assert minutes(from_submit["time"]) == minutes(from_script["time"])
    assert from_submit["signal"] == from_script["signal"]
    assert (from_submit["requeue"], from_submit["open-mode"]) == (from_script["requeue"], from_script["open-mode"])


@pytest.mark.parametrize(
    ("variables", "runs"),
    [
        ({}, sys.executable),
        ({"HPCGPT_PYTHON": "/mine/python"}, "/mine/python"),
        ({"HPCGPT_SITE": "/mine/site.sh"}, ""),  # the site file may activate an environment, so no Python is named
        ({"HPCGPT_SITE": "/mine/site.sh", "HPCGPT_PYTHON": "/mine/python"}, "/mine/python"),
    ],
)
def test_the_job_runs_the_python_that_submitted_it_unless_another_is_named(
    variables: dict[str, str], runs: str, slurm: Path, tiny: Path, tmp_path: Path
) -> None:
    script = tmp_path / "script.sh"
    script.write_text(submit(slurm, str(tiny), *SCRIPT_ONLY).stdout)
    (slurm / "bash").write_text('#!/bin/sh\nprintf %s "$HPCGPT_PYTHON"\n')
    (slurm / "bash").chmod(0o755)
    env = {key: value for key, value in clean_env().items() if not key.startswith("HPCGPT_")}
    env |= {"PATH": f"{slurm}:/usr/bin:/bin"} | variables
    done = subprocess.run(["/bin/bash", script], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == runs


def test_the_job_id_is_printed_as_json(slurm: Path, tiny: Path, tmp_path: Path) -> None:
    done = submit(slurm, "--nodes", "2", str(tiny), "--json")
    assert json.loads(done.stdout) == {"job": "123", "run": str(tmp_path / "runs" / "tiny"), "steps": 12}


# --- checks before the job is queued ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--nodes", "3"], "train.global_batch 8 is not a multiple of 3 ranks"),
        (["--nodes", "0"], "--nodes"),
        (["--nodes", "-1"], "--nodes"),
        (["--tasks-per-node", "0"], "--ntasks-per-node=0: expected a whole number of at least 1"),
        (["--modle.n_layer=3"], "unknown flag --modle.n_layer"),
        (["--partion", "low"], "unknown flag --partion (did you mean --partition?)"),
        (["--gpu-per-node", "2"], "unknown flag --gpu-per-node (did you mean --gpus-per-node?)"),
        (["--nodes"], "--nodes needs a value"),
        (["--hold=1"], "--hold has no value"),
        (["--wrap", "true"], "--wrap: the job runs hpcgpt's own batch script"),
        (["--wait"], "--wait: submit returns when the job is queued"),
        (["--quiet"], "--quiet: the job's id would not be known"),
        (["-D", "/scratch/me"], "--chdir: the configuration's relative paths are those of the current folder"),
        (["--after", "7", "--dependency=singleton"], "--after 7 is --dependency=afterany:7: give one of the two"),
        (["--signal=TERM@60"], "--signal=TERM@60: expected USR1@SECONDS or USR2@SECONDS"),
        (["--gpus-per-node=x"], "--gpus-per-node=x: expected a number of GPUs"),
        (["--run.device", "auto"], "so say what to request: --gpus-per-node N, or --gpus-per-node 0 for CPUs only"),
        (["--lr", "1"], "unknown flag --lr (did you mean --optim.lr?)"),
        (["--signal-lead-s", "0"], "--signal=USR1@0: expected 1 to 65,535 seconds"),
        (["--signal-lead-s", "-5"], "--signal=USR1@-5: expected"),
        (["--signal-lead-s", "99999999"], "--signal=USR1@99999999: expected"),
        (["--time", "2", "--signal-lead-s", "120"], "and less than the time limit (--time 2, 120 s)"),
        (["--run.name", "a\ntouch b"], r"run.name 'a\ntouch b' must be a plain folder name: it has control char"),
        (["--run.name", "x" * 300], "it has 300 bytes, and 200 are the most"),
        (["--run.name", "sweep-%a"], "has %a in its path, which submitit replaces by a number"),
        (["--partition", "a\ntouch b"], r"control characters in a flag for Slurm: --partition 'a\ntouch b'"),
        (["--sbatch", "comment=a\ntouch b"], r"control characters in a flag for Slurm: --comment 'a\ntouch b'"),
        (
            ["--array=0-3"],
            "--array: submit makes an array of the runs of --grid KEY=VALUE,VALUE...; for any other use `sbatch --arr",
        ),
        (["--time", "tomorrow"], "--time tomorrow: expected minutes"),
        (["--data.dir", "nowhere"], "no folder of shards at nowhere"),
        (["--data.tokenizer", "gpt2"], "data.tokenizer is gpt2, but"),
        (["--model.block_size", "1000000"], "fewer than one global batch"),
    ],
)
def test_a_job_that_cannot_run_is_refused_and_not_queued(
    flags: list[str], sentence: str, slurm: Path, tiny: Path, tmp_path: Path
) -> None:
    done = submit(slurm, str(tiny), *flags)
    assert done.returncode == 2
    assert sentence in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (slurm / "submitted.sh").exists()
    assert not (tmp_path / "runs").exists()


def test_the_limits_of_the_qos_are_looked_at_before_the_job_is_queued(slurm: Path, tiny: Path) -> None:
    (slurm / "sacctmgr").write_text("#!/bin/sh\necho 'short|DenyOnLimit|01:00:00|node=1|||||||'\n")
    (slurm / "sacctmgr").chmod(0o755)
    for flags, sentence in ((["--nodes=2", "--time=60"], "2 nodes: a job in QOS short can have 1"),
                            (["--time=61"], "--time=61 is more than QOS short allows, 60 minutes")):  # fmt: skip
        done = submit(slurm, str(tiny), "--qos=short", *flags)
        assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr
        assert not (slurm / "submitted.sh").exists()


@pytest.mark.parametrize("site", [[], ["--site", "generic"]])
def test_a_qos_may_replace_the_limits_of_the_partition(slurm: Path, tiny: Path, site: list[str]) -> None:
    for program, line in (("sinfo", "cpu*|up|30:00|1-4|4|8|16000|x|(null)|idle"),
                          ("sacctmgr", "long|PartitionTimeLimit|9:00:00||||||||\nshort||9:00:00||||||||")):  # fmt: skip
        (slurm / program).write_text(f"#!/bin/sh\ncat <<'END'\n{line}\nEND\n")
        (slurm / program).chmod(0o755)
    refused = submit(slurm, str(tiny), *site, "--time=60", "--qos=short", *SCRIPT_ONLY)
    assert (refused.returncode, "is more than partition cpu allows" in refused.stderr) == (2, True), refused.stderr
    done = submit(slurm, str(tiny), *site, "--time=60", "--qos=long", *SCRIPT_ONLY)
    assert done.returncode == 0, done.stderr
    assert "(not refused, since its QOS may allow more)" in done.stderr


def test_a_truncated_shard_is_found_before_the_job_is_queued(
    slurm: Path, tiny: Path, shards_folder: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in shards_folder.glob("*.*"):
        (broken / path.name).write_bytes(path.read_bytes()[:-2])
    (broken / "manifest.json").write_bytes((shards_folder / "manifest.json").read_bytes())
    done = submit(slurm, str(tiny), "--data.dir", str(broken))
    assert done.returncode == 2
    assert ".bin is truncated" in done.stderr
    assert not (slurm / "submitted.sh").exists()


def test_slurms_refusal_is_reported_as_a_message(slurm: Path, tiny: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid partition name' >&2\nexit 1\n")
    done = submit(slurm, "--nodes", "1", str(tiny))
    assert done.returncode == 2
    assert "Slurm refused the job" in done.stderr
    assert "Invalid partition name" in done.stderr
    assert "Traceback" not in done.stderr
    refused = "Batch job submission failed: Requested node configuration is not available"
    (slurm / "sbatch").write_text(f"#!/bin/sh\necho 'sbatch: error: {refused}' >&2\nexit 1\n")
    assert "request fewer with --cpus-per-task, and --mem" in submit(slurm, "--nodes", "1", str(tiny)).stderr
    (slurm / "sbatch").write_text('#!/bin/sh\n[ "$1" = --help ] || echo queued\n')
    done = submit(slurm, "--nodes", "1", str(tiny))
    assert done.returncode == 2
    assert "sbatch printed no job's id; the job may be queued: see `squeue --me`" in done.stderr
    assert "Traceback" not in done.stderr


def test_sbatch_is_not_told_to_wait_for_the_end_of_the_job(slurm: Path, tiny: Path) -> None:
    done = submit(slurm, "--nodes", "1", str(tiny), SBATCH_WAIT="1")
    assert done.returncode == 0, done.stderr
    assert "SBATCH_WAIT" not in (slurm / "environment").read_text()


def test_without_slurm_there_is_a_message(tiny: Path, tmp_path: Path) -> None:
    done = command("hpcgpt.submit", "--nodes", "1", str(tiny), env={"PATH": str(tmp_path)})
    assert done.returncode == 2
    assert "there is no srun on this machine" in done.stderr
    assert "Traceback" not in done.stderr


def test_without_a_configuration_the_plan_is_shown_and_has_to_be_confirmed(slurm: Path, tiny: Path) -> None:
    settings = tomllib.loads(tiny.read_text())
    flags = [f"--model.{key}={value}" for key, value in settings["model"].items()]
    small = [*flags, "--data.dir", settings["data"]["dir"], "--run.dir", str(tiny.parent), "--train.steps", "7",
             "--train.global_batch", "8", "--train.micro_batch", "8", "--gpus-per-node=0"]  # fmt: skip
    done = submit(slurm, *small)
    assert done.returncode == 2
    assert "no configuration is named. This would queue 1 node, 1 rank on CPUs: 7 steps of 256 tokens" in done.stderr
    assert "(gpt2-124m, " in done.stderr
    assert not (slurm / "submitted.sh").exists()
    assert submit(slurm, *small, "--yes").returncode == 0
    assert (slurm / "submitted.sh").exists()


def test_an_sbatch_that_does_not_answer_is_given_up(
    slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\nexec sleep 100\n")
    monkeypatch.setenv("PATH", f"{slurm}:{os.environ['PATH']}")
    monkeypatch.setattr(submission, "_SBATCH_S", 1)
    parameters = submission.job_parameters({"time": "5"}, tmp_path / "run")
    with pytest.raises(UserError, match=r"sbatch did not answer within 1 s\. The job may be queued nevertheless"):
        submission.submit(tmp_path / "run", parameters, [code_snapshot.live([])])


def test_a_percent_sign_in_a_name_is_escaped_for_slurm(slurm: Path, tiny: Path, tmp_path: Path) -> None:
    done = submit(slurm, str(tiny), "--run.name", "50%x")
    assert done.returncode == 0, done.stderr
    assert resources((slurm / "submitted.sh").read_text())["output"] == f"{tmp_path}/runs/50%%x/submit/%j_0_log.out"


def test_without_a_time_limit_any_lead_is_fine(slurm: Path, tiny: Path) -> None:
    assert submit(slurm, str(tiny), "--time", "0", "--signal-lead-s", "3600", *SCRIPT_ONLY).returncode == 0


# --- an existing run -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(shards_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run "tiny" of 12 steps; tests that change it copy it."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.toml").write_text(f'{TINY}\n[data]\ndir = "{shards_folder}"\n')
    done = command("hpcgpt.train", "tiny.toml", "--run.name", "tiny", cwd=folder, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def continuing_arguments(tiny: Path, trained: Path, tmp_path: Path) -> list[str]:
    """The arguments of a submit that continues a copy of that run to 100 steps."""
    shutil.copytree(trained / "runs" / "tiny", tmp_path / "runs" / "tiny")
    return [str(tiny), "--train.steps", "100"]


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in folder.rglob("*")}


def refusal(slurm: Path, *arguments: str) -> str:
    """Check that nothing is queued or changed, with --dry-run and without; return the message."""
    before = snapshot(slurm.parent)
    for flags in ([], ["--dry-run"]):
        done = submit(slurm, *arguments, *flags)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
    assert snapshot(slurm.parent) == before
    return done.stderr


def test_a_run_that_stopped_before_its_end_is_queued_again(slurm: Path, continuing_arguments: list[str]) -> None:
    assert submit(slurm, *continuing_arguments).returncode == 0
    assert (slurm / "submitted.sh").exists()


def test_the_warning_comes_as_early_as_the_saves_of_the_run_need(
    slurm: Path, continuing_arguments: list[str], tmp_path: Path
) -> None:
    with open(tmp_path / "runs" / "tiny" / "events.jsonl", "a") as file:
        file.write(json.dumps({"event": "save", "time": 1.0, "attempt": 1, "step": 12, "seconds": 200.0}) + "\n")
    done = submit(slurm, *continuing_arguments, *SCRIPT_ONLY)
    assert resources(done.stdout)["signal"] in ("USR1@420", "USR1@430", "USR1@440"), done.stderr
    assert "a step and two saves of this run take as long" in done.stderr
    for flags, signal in ((["--signal=USR1@90"], "USR1@90"), (["--time=5"], "USR1@150"),
                          (["--time=3"], "USR1@120"),
                          (["--time=0"], resources(done.stdout)["signal"])):  # fmt: skip
        assert resources(submit(slurm, *continuing_arguments, *SCRIPT_ONLY, *flags).stdout)["signal"] == signal


def test_a_finished_run_has_nothing_to_do_and_is_not_queued(slurm: Path, continuing_arguments: list[str]) -> None:
    done = submit(slurm, continuing_arguments[0])
    assert (done.returncode, done.stderr) == (0, "")
    assert "is finished already, at step 12 of 12: nothing to do, nothing queued" in done.stdout
    reported = json.loads(submit(slurm, continuing_arguments[0], "--json").stdout)
    assert (reported["job"], reported["steps"]) == (None, 12)
    assert not (slurm / "submitted.sh").exists()


def test_a_run_that_is_longer_than_it_should_be_is_refused_as_by_train(
    slurm: Path, continuing_arguments: list[str]
) -> None:
    reported = refusal(slurm, continuing_arguments[0], "--train.steps", "10")
    assert "the run has made 12 steps already, and train.steps 10 means 10: give at least 12, go back to" in reported


def test_settings_other_than_the_runs_are_refused(slurm: Path, continuing_arguments: list[str]) -> None:
    reported = refusal(slurm, *continuing_arguments, "--model.n_layer", "3", "--run.seed", "5")
    assert "with other settings than these: model.n_layer was 2 and is now 3; run.seed was 1 and" in reported


def test_a_run_with_a_stop_file_is_not_queued(slurm: Path, continuing_arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny" / "STOP").touch()
    assert "STOP keeps this run stopped: remove it to continue" in refusal(slurm, *continuing_arguments)


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(
    slurm: Path, continuing_arguments: list[str], tmp_path: Path
) -> None:
    for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir():
        (path / "manifest.json").write_bytes(b"{}")
    assert "has checkpoints, but all are damaged (step_000000012: its" in refusal(slurm, *continuing_arguments)


def test_a_run_that_a_process_holds_is_refused_until_it_exits(
    slurm: Path, continuing_arguments: list[str], tmp_path: Path
) -> None:
    held = lease.acquire(tmp_path / "runs" / "tiny", "")
    try:
        done = submit(slurm, *continuing_arguments, "--json")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"pid {os.getpid()}), which is alive: end it first, or give this run another --run.name" in done.stderr
        assert not (slurm / "submitted.sh").exists()
    finally:
        held.release()
    assert submit(slurm, *continuing_arguments).returncode == 0


def test_a_run_whose_job_is_still_in_slurm_is_refused_or_queued_after_it(
    slurm: Path, continuing_arguments: list[str]
) -> None:
    assert submit(slurm, *continuing_arguments).returncode == 0
    (slurm / "submitted.sh").unlink()
    (slurm / "squeue").write_text(f'#!/bin/sh\necho "$@" > {slurm}/arguments\necho 123 PENDING\n')
    (slurm / "squeue").chmod(0o755)
    done = submit(slurm, *continuing_arguments)
    assert done.returncode == 2
    assert "is the run of job 123, which waits in the queue: end that job first (scancel 123)" in done.stderr
    assert "--me" in (slurm / "arguments").read_text()
    assert not (slurm / "submitted.sh").exists()
    assert submit(slurm, *continuing_arguments, "--after", "123").returncode == 0
    assert "#SBATCH --dependency=afterany:123" in (slurm / "submitted.sh").read_text()
    (slurm / "squeue").write_text("#!/bin/sh\necho 123 COMPLETED\n")
    assert submit(slurm, *continuing_arguments).returncode == 0


def test_of_a_sweep_each_run_is_refused_while_its_own_task_lives(
    slurm: Path, continuing_arguments: list[str], tmp_path: Path
) -> None:
    """The task of another run of the sweep is no reason, though the script is in the folder of the first."""
    folder = tmp_path / "runs" / "tiny"
    run_folder.record(folder, "submit", job="55_0")
    (folder / "submit").mkdir()
    (folder / "submit" / "55_submission.sh").touch()
    (slurm / "squeue").write_text(f'#!/bin/sh\necho "$@" > {slurm}/arguments\necho 55_0 COMPLETED\n')
    (slurm / "squeue").chmod(0o755)
    assert submit(slurm, *continuing_arguments, *SCRIPT_ONLY).returncode == 0
    assert "--jobs=55_0,55_0" in (slurm / "arguments").read_text()
    (slurm / "squeue").write_text("#!/bin/sh\necho 55_0 PENDING\n")
    assert "is the run of job 55_0, which waits in the queue" in refusal(slurm, *continuing_arguments)


# --- on a login node -------------------------------------------------------------------------------


def test_submitting_never_loads_torch(slurm: Path, tiny: Path) -> None:
    done = command("hpcgpt.submit", "--nodes", "2", str(tiny),
                   env={"PATH": f"{slurm}:{os.environ['PATH']}", "PYTHONPROFILEIMPORTTIME": "1"})  # fmt: skip
    assert (slurm / "submitted.sh").exists(), done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "submitit" in loaded
    assert "torch" not in loaded


def test_help_loads_neither_torch_nor_numpy() -> None:
    done = command("hpcgpt.submit", "--help", env={"PYTHONPROFILEIMPORTTIME": "1"})
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "--nodes" in done.stdout
    assert "hpcgpt.config.options" in loaded
    assert not loaded & {"torch", "numpy", "submitit"}


# --- a sweep ---------------------------------------------------------------------------------------


def test_each_task_of_a_grid_trains_its_own_run(slurm: Path, tiny: Path, tmp_path: Path) -> None:
    grid = ["--grid", "optim.lr=1e-4,3e-4", "--grid=run.seed=1,2", "--at-once", "2", str(tiny)]
    done = submit(slurm, *grid)
    assert done.returncode == 0, done.stderr
    assert "job 123: 4 runs, each with 1 node, 1 rank on CPUs: 12 steps of 256 tokens" in done.stdout
    script = (slurm / "submitted.sh").read_text()
    assert resources(script)["array"] == "0-3%2"
    names = ["tiny-lr1e-4-seed1", "tiny-lr1e-4-seed2", "tiny-lr3e-4-seed1", "tiny-lr3e-4-seed2"]
    for task, name in enumerate(names):
        assert f"task {task}: {tmp_path}/runs/{name}\n" in done.stdout
        bash, _, config, *flags = run_by(f"SLURM_ARRAY_TASK_ID={task}\n{script}", tmp_path)
        assert (bash, Path(config).read_bytes()) == ("bash", tiny.read_bytes())
        assert config.startswith(f"{tmp_path}/runs/{name}/code/")
        assert flags[-1] == f"--run.name={name}"
    shown = json.loads(submit(slurm, *grid, "--json").stdout)
    assert [Path(run["run"]).name for run in shown["runs"]] == names


def test_finished_runs_of_a_grid_get_no_task(slurm: Path, tiny: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "runs" / "tiny", tmp_path / "runs" / "tiny-seed1")
    done = submit(slurm, "--grid=run.seed=1,2", str(tiny))
    assert "tiny-seed1 is finished already, at step 12 of 12" in done.stdout
    assert f"task 0: {tmp_path}/runs/tiny-seed2\n" in done.stdout
    assert resources((slurm / "submitted.sh").read_text())["array"] == "0-0"


def test_a_limit_of_tasks_without_a_grid_is_refused(slurm: Path, tiny: Path) -> None:
    done = submit(slurm, "--at-once", "2", str(tiny))
    assert (done.returncode, "--at-once 2: it is for the tasks of --grid" in done.stderr) == (2, True)


# --- a site ----------------------------------------------------------------------------------------


def test_a_site_gives_the_flags_and_the_environment_of_the_job(slurm: Path, tiny: Path, tmp_path: Path) -> None:
    (slurm / "sinfo").write_text(
        "#!/bin/sh\necho 'boost_usr_prod|up|1-00:00:00|1-64|3456|32|494000|x|gpu:a100:4|idle'\n"
    )
    (slurm / "sinfo").chmod(0o755)
    done = submit(slurm, "--site", "leonardo", "--account=abc", str(tiny), "--run.device", "cuda", *SCRIPT_ONLY)
    assert done.returncode == 0, done.stderr
    asked = resources(done.stdout)
    assert {key: asked[key] for key in ("partition", "gres", "ntasks-per-node", "cpus-per-task", "mem", "account")} == {
        "partition": "boost_usr_prod", "gres": "gpu:4", "ntasks-per-node": "4", "cpus-per-task": "8", "mem": "482G",
        "account": "abc",
    }  # fmt: skip
    assert "gpus-per-node" not in asked
    assert 'export NCCL_SOCKET_IFNAME="${NCCL_SOCKET_IFNAME-ib0}"' in done.stdout
    assert run_by(done.stdout, tmp_path)[:3] == ["bash", str(SCRIPT), str(tiny)]
    refused = submit(slurm, "--site", "leonardo", str(tiny), *SCRIPT_ONLY)
    assert refused.returncode == 2
    assert "needs the account that pays for the job" in refused.stderr


# --- more than a limit of GPU hours ----------------------------------------------------------------


def test_a_job_above_the_limit_of_gpu_hours_is_confirmed_or_refused(slurm: Path, tiny: Path) -> None:
    """Its speed is not known, so it is counted until its time limit: 2 nodes x 2 GPUs x 3 hours."""
    job = ["--nodes", "2", "--gpus-per-node", "2", "--time", "3:00:00", str(tiny), "--run.device", "auto"]
    refused = submit(slurm, *job, "--ask-above", "11.5")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "this would take about 12 GPU hours, by one start, until its time limit" in refused.stderr
    assert "more than --ask-above 11.5: confirm with --yes, or give a higher limit" in refused.stderr
    assert not (slurm / "submitted.sh").exists()
    wrong = submit(slurm, *job, "--ask-above", "much")
    assert (wrong.returncode, "expected a number of hours, not 'much'" in wrong.stderr) == (2, True)
    assert submit(slurm, *job, "--ask-above", "11.5", "--yes").returncode == 0
    assert (slurm / "submitted.sh").exists()


def test_a_job_with_idle_gpus_is_confirmed_or_refused(slurm: Path, tiny: Path) -> None:
    job = ["--gpus-per-node=8", "--ntasks-per-node=1", str(tiny), "--run.device", "auto", "--time=5"]
    refused = submit(slurm, *job)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "7 of 8 GPUs would be idle: there is 1 rank, and a rank uses one GPU: confirm with --yes" in refused.stderr
    assert not (slurm / "submitted.sh").exists()
    assert submit(slurm, *job, "--yes").returncode == 0


def test_a_job_below_the_limit_is_queued_without_a_question(slurm: Path, tiny: Path) -> None:
    job = ["--nodes", "2", "--gpus-per-node", "2", "--time", "3:00:00", str(tiny), "--run.device", "auto"]
    done = submit(slurm, *job, "--ask-above", "12")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 2), ("", 2)])
def test_on_a_terminal_the_question_is_asked(slurm: Path, tiny: Path, answer: str, status: int) -> None:
    own_end, terminal = pty.openpty()
    os.write(own_end, f"{answer}\n".encode())
    words = [sys.executable, "-m", "hpcgpt.submit", "--gpus-per-node", "2", "--ask-above", "1", str(tiny),
             "--run.device", "auto"]  # fmt: skip
    env = clean_env() | {"PATH": f"{slurm}:{os.environ['PATH']}"}
    done = subprocess.run(
        words, cwd=ROOT, env=env, stdin=terminal, stdout=subprocess.PIPE, stderr=terminal, check=False
    )
    os.close(terminal)
    shown = os.read(own_end, 65536).decode()
    os.close(own_end)
    assert done.returncode == status
    assert "48 GPU hours" in shown
    assert "Queue it? [y/N]" in shown
    assert (slurm / "submitted.sh").exists() is (status == 0)


def test_a_probe_is_for_an_estimate(slurm: Path, tiny: Path) -> None:
    for words in (["--probe"], ["--dry-run", "--probe-steps", "20"]):
        done = submit(slurm, "--gpus-per-node", "1", str(tiny), *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert "give --dry-run and --probe together" in done.stderr
    assert not (slurm / "submitted.sh").exists()


def test_a_dry_run_without_an_estimate_does_not_load_torch(slurm: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch is loaded')\n")
    flags = ["--nodes", "2", str(tiny), "--no-estimate"]
    printed = submit(slurm, *flags, "--dry-run", PYTHONPATH=str(tmp_path))
    assert printed.returncode == 0, printed.stderr
    assert printed.stderr.endswith("\n\nno estimate: --no-estimate is given\n")
    done = submit(slurm, *flags, "--dry-run=json", PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    shown = json.loads(done.stdout)
    assert (shown["estimate"], shown["no_estimate"]) == (None, "no estimate: --no-estimate is given")
    assert shown["script"] == printed.stdout


@pytest.mark.parametrize(
    "words", [[], ["--dry-run", "--probe"], ["--dry-run", "--probe-steps", "20"], ["--dry-run", "--gpu", "a100-80"]]
)
def test_settings_of_an_estimate_are_refused_without_one(slurm: Path, tiny: Path, words: list[str]) -> None:
    refused = submit(slurm, "--nodes", "2", str(tiny), "--no-estimate", *words)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert ("are for an estimate: leave them out" if words else "--no-estimate is for --dry-run") in refused.stderr
    assert not (slurm / "submitted.sh").exists()
