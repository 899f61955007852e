"""What the tests of moejax launch share: a command that is hard to quote, for every target."""

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


def words(target):
    """What every host runs, after ``moejax``."""
    workdir = "/shared/runs/a" if target == "slurm" else "/bucket/runs/a"
    return ["train", *CONFIG, ODD, f"--workdir={workdir}"]


def arguments(target):
    return ["launch", f"--target={target}", *FLAGS[target], *CONFIG, ODD]
