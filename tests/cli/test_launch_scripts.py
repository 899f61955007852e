"""The scripts of ``moejax launch``, run with stand-ins for the programs of a cluster."""

import json
import stat
import subprocess
import sys

import pytest
import yaml

from .launch_cases import words


@pytest.fixture
def programs(tmp_path):
    """A folder for the PATH; ``programs.add(name, body)`` puts a program of bash in it."""
    return Programs(tmp_path / "bin", tmp_path / "calls")


class Programs:
    """Stands in for programs of a cluster.

    ``moejax`` notes its arguments and takes its exit codes from a list.
    """

    def __init__(self, folder, calls):
        self.folder, self.calls = folder, calls
        folder.mkdir()
        calls.mkdir()
        for name in ("pkill", "gcsfuse", "mountpoint", "python3", "scancel"):
            self.add(name)
        self.add("pgrep", "exit 1")

    def add(self, name, body=""):
        note = r"""echo "${*//$'\n'/ }" """
        self.write(name, f"#!/bin/bash\n{note} >>{self.calls}/{name}\n{body}\n")

    def write(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(stat.S_IRWXU)

    def add_moejax(self, *codes):
        (self.calls / "codes").write_text(json.dumps(codes))
        self.write(
            "moejax",
            f"#!{sys.executable}\n"
            "import json, os, sys\n"
            f"os.chdir({str(self.calls)!r})\n"
            "codes = json.load(open('codes'))\n"
            "json.dump(codes[1:], open('codes', 'w'))\n"
            "call = [sys.argv[1:], os.environ.get('MOEJAX_DISTRIBUTED')]\n"
            "print(json.dumps(call), file=open('moejax', 'a'))\n"
            "sys.exit(codes[0])\n",
        )

    def called(self, name):
        path = self.calls / name
        return path.read_text().splitlines() if path.exists() else []

    def trained(self):
        """(arguments, MOEJAX_DISTRIBUTED) of each start of moejax."""
        return [tuple(json.loads(line)) for line in self.called("moejax")]

    def run(self, script, folder, **variables):
        environment = {
            "PATH": f"{self.folder}:/usr/bin:/bin",
            "HOME": str(folder),
            "USER": "me",
            **variables,
        }
        return subprocess.run(
            ["bash", "-c", script],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )


def test_skypilot_runs_the_command(render, programs, tmp_path):
    programs.add_moejax(0)
    done = programs.run(
        yaml.safe_load(render("skypilot"))["run"],
        tmp_path,
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NODE_RANK="1",
    )
    assert done.returncode == 0, done.stderr
    assert programs.trained() == [(words("skypilot"), "10.0.0.1:55527,2,1")]


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [(0, 0, False), (1, 0, True), (134, 1, True), (1, 2, False), (2, 0, False), (130, 0, False)],
)
def test_slurm_requeues_what_a_restart_can_mend(
    render, programs, tmp_path, code, restarts, requeued
):
    programs.add("srun", '[ "$1" = --wait=120 ] && shift && exec "$@"')
    programs.add("scontrol")
    programs.add_moejax(code)
    script = render("slurm", "--max-restarts=2")
    done = programs.run(script, tmp_path, SLURM_JOB_ID="7", SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code, done.stderr
    assert programs.trained() == [(words("slurm"), None)]
    assert programs.called("scontrol") == (["requeue 7"] if requeued else [])


def test_slurm_saves_and_requeues_before_the_time_limit(render, programs, tmp_path):
    # The time limit's signal comes to the script, scancel's to the processes of srun.
    programs.add(
        "srun",
        "trap 'exit 130' TERM; echo $$ >step; kill -USR1 $PPID; while :; do sleep 0.05; done",
    )
    programs.add("scancel", 'until [ -s step ]; do sleep 0.05; done; kill -TERM "$(cat step)"')
    programs.add("scontrol")
    done = programs.run(f"exec bash {write(tmp_path, render('slurm'))}", tmp_path, SLURM_JOB_ID="7")
    assert programs.called("scancel") == ["--signal=TERM 7.0"]
    assert programs.called("scontrol") == ["requeue 7"]
    assert done.returncode == 130


def write(folder, text):
    path = folder / "script.sh"
    path.write_text(text)
    return path


# A slice of two hosts: its state is a file, `ssh` runs the command once on each host.
GCLOUD = """
set -e
verb="$4" name="$5" hosts=1 command=
for flag in "$@"; do
  case "$flag" in
    --worker=all) hosts=2 ;;
    --command=*) command="${flag#--command=}" ;;
  esac
done
case "$verb" in
  describe) cat state ;;
  create) echo READY >state ;;
  delete) rm state ;;
  scp) cp "$5" ./ ;;
  ssh)
    for ((host = 0; host < hosts; host++)); do bash -c "$command"; done ;;
esac
"""


@pytest.fixture
def tpu_vm(render, programs, tmp_path):
    """run(*exit codes of moejax, gcloud=...) -> the finished script."""

    def run(*codes, gcloud=GCLOUD, flags=()):
        programs.add_moejax(*codes)
        programs.add("gcloud", gcloud)
        folder = tmp_path / "source"
        folder.mkdir()
        (folder / "tiny.py").write_text("x = 1\n")
        git = ["git", "-C", folder, "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", "init", "-q", folder], check=True)
        subprocess.run([*git, "add", "tiny.py"], check=True)
        subprocess.run([*git, "commit", "-qm", "a"], check=True)
        return programs.run(render("tpu_vm", *flags), folder, RETRY_SECONDS="0")

    return run


def verbs(programs):
    return [call.split()[3] for call in programs.called("gcloud")]


def test_tpu_vm_runs_on_all_hosts_and_deletes_the_slice(tpu_vm, programs, tmp_path):
    done = tpu_vm(0, 0)
    assert done.returncode == 0, done.stderr
    # Once on each of two hosts; they find each other by the metadata of the slice.
    assert programs.trained() == [(words("tpu_vm"), None)] * 2
    assert verbs(programs).count("create") == verbs(programs).count("delete") == 1
    source = tmp_path / "source"
    assert not (source / "state").exists()
    assert (source / "moejax_source" / "tiny.py").read_text() == "x = 1\n"
    installs = [call for call in programs.called("python3") if "pip install" in call]
    assert installs[-1].endswith("moejax_venv/bin/python .[tpu]")


def test_tpu_vm_starts_again_on_the_same_slice(tpu_vm, programs):
    done = tpu_vm(1, 0, 0)
    assert done.returncode == 0, done.stderr
    assert programs.trained() == [(words("tpu_vm"), None)] * 3
    assert verbs(programs).count("create") == verbs(programs).count("delete") == 1
    # What a lost connection left running is ended first.
    assert "-x moejax" in programs.called("pkill")


def test_tpu_vm_makes_a_preempted_slice_anew(tpu_vm, programs):
    preempted = GCLOUD.replace(
        'bash -c "$command"; done',
        'bash -c "$command" || { echo PREEMPTED >state; exit 1; }; done',
    )
    done = tpu_vm(143, 0, 0, gcloud=preempted)
    assert done.returncode == 0, done.stderr
    assert verbs(programs).count("create") == verbs(programs).count("delete") == 2


def test_tpu_vm_does_not_try_a_mistake_again(tpu_vm, programs):
    done = tpu_vm(2)
    assert done.returncode == 2
    assert len(programs.trained()) == 1
    assert verbs(programs).count("create") == verbs(programs).count("delete") == 1


def test_tpu_vm_gives_up_after_its_restarts(tpu_vm, programs):
    done = tpu_vm(1, 1, 1, 1, flags=["--max-restarts=2"])
    assert done.returncode == 1
    assert len(programs.trained()) == 3
    assert verbs(programs)[-1] == "delete"
