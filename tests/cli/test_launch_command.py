"""``moejax launch``: each file is what its cluster reads; the command arrives as it was given."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from moejax.cli.launch import TARGETS, template_folder
from moejax.cli.main import main

from .launch_cases import CONFIG, FLAGS, arguments, words
from .launch_schemas import JOBSET, SKYPILOT

SHELLS = ("slurm", "tpu_vm")
SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(Path(sys.executable).parent)
)


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
        ("gke_tpu", ["--image="], "--image: give a container image, one that has moejax"),
        ("tpu_vm", ["--zone="], "--zone: give a zone of Google Cloud, such as"),
        ("slurm", ["--image=a"], "--image: goes with --target gke_tpu, gke_gpu, not slurm"),
        ("slurm", ["--spot"], "--spot: goes with --target gke_tpu"),
        ("gke_tpu", ["--topology=h100:8"], "--target gke_tpu has no h100; choose from: v4"),
        ("slurm", ["--topology=v5e:4x4", "--nodes=4"], "--target slurm has no v5e"),
        ("gke_tpu", ["--topology=v5p:3x3"], "no slice of that shape"),
        ("slurm", ["--nodes=3"], "16 GPUs make no 3 equal nodes"),
        ("slurm", ["--nodes=0"], "--nodes 0: must be at least 1"),
        ("slurm", ["--max-restarts=-1"], "--max-restarts -1: must be at least 0"),
        ("gke_tpu", ["--name=My_run"], "--name 'My_run': is not a DNS label: small letters"),
        ("gke_tpu", [f"--name={'a' * 41}"], "has more than 40 characters"),
        ("gke_tpu", ["--image=a b"], "--image 'a b': is not a container image"),
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
    files = {path.name for path in template_folder().iterdir()}
    assert files == {*(target.template for target in TARGETS.values()), "README.md"}
