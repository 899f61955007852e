"""``moejax launch``: each file is what its cluster reads; the command arrives as it was given."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from moejax.cli.launch import template_folder
from moejax.cli.main import main

from .launch_schemas import JOBSET, SKYPILOT

FLAGS = {
    "gke_tpu": [
        "--topology=v5p:4x4x8",
        "--image=eu.gcr.io/me/moejax:1",
        "--workdir=gs://b-1/runs/a",
    ],
    "gke_gpu": ["--topology=h200:16", "--image=me/moejax@sha256:0a", "--workdir=gs://b-1/runs/a"],
    "tpu_vm": ["--topology=v5e:4x8", "--zone=us-east5-a", "--workdir=gs://b-1/runs/a"],
    "slurm": ["--topology=h100:16", "--nodes=4", "--workdir=/shared/runs/a"],
    "skypilot": ["--topology=h100:16", "--workdir=gs://b-1/runs/a"],
}
# Batches that divide over the chips above.
CONFIG = ["--config=quickstart:dense", "--config.data.batch_size=128"]
# What shells, YAML and Kubernetes read something into.
ODD = (
    r"""--config.data.source=folder:a  b/'c' "d" $HOME $(HOME) $$ `e` \ (f) {g} @{name} """
    "# ; & | * ~ \u00e9"
)
SHELLS = ("slurm", "tpu_vm")
SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(Path(sys.executable).parent)
)


def words(target):
    """What every host runs, after ``moejax``."""
    workdir = "/shared/runs/a" if target == "slurm" else "/bucket/runs/a"
    return ["train", *CONFIG, ODD, f"--workdir={workdir}"]


def arguments(target):
    return ["launch", f"--target={target}", *FLAGS[target], *CONFIG, ODD]


@pytest.fixture
def render(tmp_path, monkeypatch, capsys):
    """A function (target, *flags) -> the text; the current folder is empty and stays so."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def rendered(target, *flags, odd=True):
        assert main([*arguments(target)[: None if odd else -1], *flags, "--dry-run"]) == 0
        assert list(folder.iterdir()) == []
        return capsys.readouterr().out

    return rendered


@pytest.mark.parametrize("target", FLAGS)
@pytest.mark.parametrize("flags", [[], ["--spot", "--name=other"]])
def test_no_placeholder_is_left(render, target, flags):
    text = render(target, *(flag for flag in flags if target != "slurm" or flag != "--spot"))
    assert re.findall(r"@\{\w*\}", text.replace("@{name} #", "")) == []
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    assert (flags[1][7:] if flags else "quickstart-dense") in text


@pytest.mark.parametrize("target", ["gke_tpu", "gke_gpu"])
def test_jobset(render, target):
    document = yaml.safe_load(render(target))
    jsonschema.validate(document, JOBSET)
    assert document["metadata"]["name"] == "quickstart-dense"
    assert document["spec"]["failurePolicy"]["maxRestarts"] == 50
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    hosts, kind, each = {"gke_tpu": (32, "google.com/tpu", 4), "gke_gpu": (2, "nvidia.com/gpu", 8)}[
        target
    ]
    assert job["parallelism"] == job["completions"] == hosts
    assert container["resources"]["limits"] == {kind: each}
    selected = {
        "gke_tpu": {
            "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
            "cloud.google.com/gke-tpu-topology": "4x4x8",
        },
        "gke_gpu": {"cloud.google.com/gke-accelerator": "nvidia-h200-141gb"},
    }[target]
    assert pod["nodeSelector"] == selected
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "b-1"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    # The pod's own container is the one whose exit code counts.
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]

    spot = yaml.safe_load(render(target, "--spot", "--service-account=trainer", "--max-restarts=3"))
    jsonschema.validate(spot, JOBSET)
    job = spot["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert pod["nodeSelector"] == {**selected, "cloud.google.com/gke-spot": "true"}
    assert pod["serviceAccountName"] == "trainer"
    assert spot["spec"]["failurePolicy"]["maxRestarts"] == 3


def expand(text, environment):
    """What Kubernetes makes of a word of ``command`` or of a value of ``env``."""
    known = lambda match: match[1] and environment.get(match[1], match[0]) or "$"  # noqa: E731
    return re.sub(r"\$\$|\$\(([^)]*)\)", known, text)


@pytest.mark.parametrize("target", ["gke_tpu", "gke_gpu"])
def test_the_command_of_a_pod(render, target):
    job = yaml.safe_load(render(target))["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    variables = {"HOME": "/root", "PROCESS_ID": "1"}
    command = [expand(word, variables) for word in container["command"]]
    assert command == ["moejax", *words(target)]
    if target == "gke_gpu":
        index, distributed, _ = container["env"]
        assert index["name"] == "PROCESS_ID" and "job-completion-index" in str(index["valueFrom"])
        assert distributed["name"] == "MOEJAX_DISTRIBUTED"
        # <JobSet>-<replicated job>-<job>-<pod>.<JobSet>
        address = "quickstart-dense-host-0-0.quickstart-dense:55527"
        assert expand(distributed["value"], variables) == f"{address},2,1"


def test_skypilot(render):
    document = yaml.safe_load(render("skypilot"))
    jsonschema.validate(document, SKYPILOT)
    assert document["num_nodes"] == 2
    assert document["resources"]["accelerators"] == "H100:8"
    assert document["resources"]["use_spot"] is False
    assert document["file_mounts"]["/bucket"]["source"] == "gs://b-1"
    assert "moejax_venv/bin/python '.[gpu]'" in document["setup"]
    spot = yaml.safe_load(render("skypilot", "--spot", "--package=moejax[gpu]==1; x"))
    jsonschema.validate(spot, SKYPILOT)
    assert spot["resources"]["use_spot"] is True
    assert "python 'moejax[gpu]==1; x'" in spot["setup"]


@pytest.mark.parametrize("target", SHELLS)
def test_shell_scripts_are_sound(render, target, tmp_path):
    for flags in ([], ["--spot"] if target == "tpu_vm" else ["--max-restarts=0"]):
        script = tmp_path / f"{target}.sh"
        script.write_text(render(target, *flags))
        subprocess.run(["bash", "-n", script], check=True)
        # It would have words on what looks like a variable in quotes.
        script.write_text(render(target, *flags, odd=False))
        if SHELLCHECK:
            done = subprocess.run([SHELLCHECK, script], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not SHELLCHECK, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", ["SETUP", "TRAIN"])
def test_what_the_hosts_of_a_slice_run_is_sound(render, name):
    """These stand in quotes, where shellcheck does not look."""
    body = render("tpu_vm", odd=False).split(f"{name}=\"$(\n  cat <<'END'\n")[1].split("\nEND\n")[0]
    done = subprocess.run(
        [SHELLCHECK, "-s", "bash", "-"], input=body, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_sbatch_gets_a_task_for_each_gpu(render):
    text = render("slurm")
    for line in ("--nodes=4", "--ntasks-per-node=4", "--gpus-per-node=4", "--requeue"):
        assert f"#SBATCH {line}\n" in text


def test_a_slice_of_three_dimensions_is_made_by_its_shape(render):
    assert "tpu create --accelerator-type=v5litepod-32 --version=v2-alpha-tpuv5-lite\n" in render(
        "tpu_vm"
    )
    text = render("tpu_vm", "--topology=v5p:4x4x4", "--spot")
    assert "tpu create --type=v5p --topology=4x4x4 --version=v2-alpha-tpuv5 --spot\n" in text


# What the scripts do, with programs of the same names that write down how they were called.


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


# The command itself.


def test_the_file_is_written_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments("gke_tpu")) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "quickstart-dense_gke_tpu.yaml: 128 chips on 32 hosts; start it with: kubectl apply -f "
        "quickstart-dense_gke_tpu.yaml"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["quickstart-dense_gke_tpu.yaml"]
    before = (tmp_path / "quickstart-dense_gke_tpu.yaml").read_text()

    assert main([*arguments("gke_tpu"), "--spot"]) == 2
    assert "is there already; --force writes over it" in capsys.readouterr().err
    assert (tmp_path / "quickstart-dense_gke_tpu.yaml").read_text() == before
    assert main([*arguments("gke_tpu"), "--spot", "--force"]) == 0
    assert "gke-spot" in (tmp_path / "quickstart-dense_gke_tpu.yaml").read_text()
    assert len(list(tmp_path.iterdir())) == 1

    assert main([*arguments("slurm"), "--output=my job.sh", "--json"]) == 0
    document = json.loads(capsys.readouterr().out.split("\n", 1)[1])
    assert document["start"] == "sbatch 'my job.sh'" and document["output"] == "my job.sh"
    assert (document["hosts"], document["chips"]) == (4, 16)
    assert (tmp_path / "my job.sh").read_text() == document["text"]


def test_a_template_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "mine.sh"
    mine.write_text("#!/bin/bash\n  @{command}\n@{spot}\necho @{hosts}\n")
    assert main([*arguments("slurm")[:-1], "--template=mine.sh", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n  moejax train \\\n    --config=quickstart:dense \\\n")
    assert out.endswith("--workdir=/shared/runs/a\necho 4\n")
    mine.write_text("@{hots}\n")
    assert main([*arguments("slurm"), "--template=mine.sh"]) == 2
    assert "mine.sh: no value @{hots}; did you mean 'hosts'?" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.sh"]


def test_the_config_may_be_a_file_in_the_folder_that_is_copied(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own"
    own.mkdir()
    shutil.copy(template_folder().parent.parent / "configs" / "quickstart.py", own / "mine.py")
    gke = ["launch", "--target=gke_tpu", *FLAGS["gke_tpu"], CONFIG[1], "--dry-run"]
    assert main([*gke, "--config=own/mine.py"]) == 0
    assert '"--config=own/mine.py"' in capsys.readouterr().out
    for spec in (str(own / "mine.py"), "../elsewhere.py"):
        assert main([*gke, f"--config={spec}"]) == 2
    monkeypatch.setenv("MOEJAX_CONFIG_PATH", str(own))
    assert main([*gke, "--config=mine"]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "is found by MOEJAX_CONFIG_PATH, which the hosts do not have; name its file" in last
    # On a cluster with shared folders any path will do.
    slurm = ["launch", "--target=slurm", *FLAGS["slurm"], CONFIG[1], "--dry-run"]
    assert main([*slurm, f"--config={own / 'mine.py'}"]) == 0


@pytest.mark.parametrize(
    ("target", "flags", "message"),
    [
        ("gke_tup", [], "--target: no target 'gke_tup'; did you mean 'gke_tpu'?"),
        ("", [], "--target: name one; choose from: gke_gpu, gke_tpu, skypilot"),
        ("gke_tpu", ["--topology="], "--topology: give the chips"),
        ("gke_tpu", ["--workdir="], "--workdir: give the folder of the run"),
        ("gke_tpu", ["--config="], "--config: give a config"),
        ("gke_tpu", ["--image="], "--image: give the container image that has moejax"),
        ("tpu_vm", ["--zone="], "--zone: give of Google Cloud"),
        ("slurm", ["--image=a"], "--image: goes with --target gke_tpu, gke_gpu, not slurm"),
        ("slurm", ["--spot"], "--spot: goes with --target gke_tpu"),
        ("gke_tpu", ["--topology=h100:8"], "--target gke_tpu has no h100; choose from: v4"),
        ("slurm", ["--topology=v5e:4x4", "--nodes=4"], "--target slurm has no v5e"),
        ("gke_tpu", ["--topology=v5p:3x3"], "no slice of that shape"),
        ("slurm", ["--nodes=3"], "16 GPUs make no 3 equal nodes"),
        ("slurm", ["--nodes=0"], "--nodes 0: must be at least 1"),
        ("slurm", ["--max-restarts=-1"], "--max-restarts -1: must be at least 0"),
        ("gke_tpu", ["--name=My_run"], "--name 'My_run': is not small letters"),
        ("gke_tpu", [f"--name={'a' * 41}"], "has more than 40 characters"),
        ("gke_tpu", ["--image=a b"], "--image 'a b': is not the container image"),
        ("gke_tpu", ["--workdir=runs/a"], "--workdir runs/a: name a folder of a bucket"),
        ("gke_tpu", ["--workdir=gs://b-1"], "name a folder of a bucket, gs://BUCKET/FOLDER"),
        ("gke_tpu", ["--workdir=gs://b-1/../c"], "name a folder of a bucket"),
        ("slurm", ["--workdir=gs://b-1/a"], "name a path that all nodes share"),
        ("slurm", ["--config.data.source=folder:a\nb"], "is not printable"),
        ("slurm", ["--config=quickstat"], "no config 'quickstat'; did you mean 'quickstart'?"),
        ("slurm", ["--config.train.stepz=6"], "did you mean 'steps'?"),
        ("slurm", ["--config.data.batch_size=12"], "12 rows do not divide over 16 devices"),
        ("slurm", ["--config.mesh.expert=3"], "mesh.data=-1"),
        ("slurm", ["--template=none.sh"], "--template none.sh: cannot be read"),
        ("slurm", ["--output=none/job.sh"], "--output none/job.sh: cannot be written"),
        ("slurm", ["--import=no_such_package"], "no_such_package"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, target, flags, message
):
    monkeypatch.chdir(tmp_path)
    given = ["launch", f"--target={target}", *FLAGS.get(target, []), *CONFIG, *flags]
    assert main(given) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith("moejax: error: ") and message in line
    assert out == "" and list(tmp_path.iterdir()) == []


def test_every_template_has_a_target():
    from moejax.cli.launch import TARGETS

    files = {path.name for path in template_folder().iterdir()} - {"README.md"}
    assert files == {target.template for target in TARGETS.values()}
    assert os.path.exists(template_folder() / "README.md")
