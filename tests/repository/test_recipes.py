"""recipes/: every script is run with programs that only note what they are asked, and torchrun and the trainer take it.

The cluster is not there: that a scheduler does what the files ask of it is not tested, but that they ask in its words.

Planted bugs that turn it red: `--output.checkpoint-evry`; `--rdzv-endpoints`; a job queued again that was told nothing;
pods without the shared folder; `maxRestart`; `nprocPerNode: 8`; `job_recovery` beside `resources`; `$SLURM_NNODES`
without quotes; another number in the page's table.
"""

import os
import re
import signal
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from torch.distributed.run import get_args_parser

from advgrpo import config
from advgrpo.plan.work import efficiency
from advgrpo.train import parse, resume_of

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
NOTE = """#!/bin/bash
{ flock 9; printf '%s\\0' "$(basename "$0")" "$@" >&9; printf '\\n' >&9; } 9>>"$NOTES"
"""
STUBS = {  # what a program does beside noting its arguments
    "torchrun": "",
    "scontrol": '[ "$1" = show ] && printf "gpu1\\ngpu2\\n"; true',
    "scancel": 'kill -TERM "$(cat "$NOTES.pid")"',
    "srun": 'shift; if [ -n "${LASTS:-}" ]; then echo $$ > "$NOTES.pid"; exec sleep 60; fi; exec "$@"',
    "ssh": 'bash -c "${@: -1}"',
}
SLURM = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "gpu[1-2]", "SLURM_NNODES": "2", "SLURM_CPUS_PER_TASK": "32"}
SKYPILOT = {
    "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    "SKYPILOT_TASK_ID": "sky-1",
}  # fmt: skip


def fields(required: str = "", **known: Any) -> dict[str, Any]:
    """JSON schema of a mapping with no other keys."""
    return {"type": "object", "additionalProperties": False, "properties": known, "required": required.split()}


def list_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEXT, COUNT, TEXTS = {"type": "string"}, {"type": "integer", "minimum": 0}, {"additionalProperties": {"type": "string"}}
AMOUNT = {"type": ["integer", "string"]}  # a number, or text such as 16Gi
# Of what these files use: manifests/base/crds/kubeflow.org_pytorchjobs.yaml of kubeflow/training-operator v1.9.0, whose
# text "8" is no number, and sky/utils/schemas.py of SkyPilot 0.14.
POD = fields(
    "containers",
    terminationGracePeriodSeconds=COUNT,
    containers=list_of(
        fields(
            "name image",
            name=TEXT, image=TEXT, command=list_of(TEXT), args=list_of(TEXT),
            env=list_of(fields("name", name=TEXT, value=TEXT,
                               valueFrom=fields(secretKeyRef=fields("key", name=TEXT, key=TEXT)))),
            resources=fields(limits={"type": "object", "additionalProperties": AMOUNT}),
            volumeMounts=list_of(fields("name mountPath", name=TEXT, mountPath=TEXT)),
        )
    ),
    volumes=list_of(
        fields("name", name=TEXT, persistentVolumeClaim=fields("claimName", claimName=TEXT),
               emptyDir=fields(medium=TEXT, sizeLimit=AMOUNT))
    ),
)  # fmt: skip
REPLICAS = fields(replicas=COUNT, template=fields(spec=POD),
                  restartPolicy={"enum": ["Always", "OnFailure", "Never", "ExitCode"]})  # fmt: skip
PYTORCH_JOB = fields(
    "apiVersion kind metadata spec",
    apiVersion={"const": "kubeflow.org/v1"}, kind={"const": "PyTorchJob"}, metadata=fields("name", name=TEXT),
    spec=fields(
        "pytorchReplicaSpecs",
        nprocPerNode=TEXT,
        elasticPolicy=fields(rdzvBackend=TEXT, minReplicas=COUNT, maxReplicas=COUNT, maxRestarts=COUNT),
        runPolicy=fields(cleanPodPolicy={"enum": ["None", "Running", "All"]}),
        pytorchReplicaSpecs={"type": "object", "additionalProperties": False,
                             "properties": {"Master": REPLICAS, "Worker": REPLICAS}},
    ),
)  # fmt: skip
SKYPILOT_TASK = fields(
    name=TEXT, num_nodes={"type": "integer", "minimum": 1}, workdir=TEXT, setup=TEXT, run=TEXT,
    resources=fields(accelerators=TEXT, use_spot={"type": "boolean"},
                     job_recovery=fields(max_restarts_on_errors=COUNT)),
    volumes={"type": "object", **TEXTS},
    secrets={"type": "object", "additionalProperties": {"type": ["string", "null"]}},  # null: given by --secret
)  # fmt: skip


@pytest.mark.parametrize(("name", "schema"), [("kubernetes.yaml", PYTORCH_JOB), ("skypilot.yaml", SKYPILOT_TASK)])
def test_a_schedulers_file_has_its_fields_and_no_others(name, schema):
    jsonschema.validate(yaml.safe_load((RECIPES / name).read_text()), schema)


@pytest.fixture
def cluster(tmp_path):
    """Programs of a cluster that note how they are called; the environment of a script that finds them first."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, does in STUBS.items():
        (programs / name).write_text(NOTE + does)
        (programs / name).chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "NOTES": str(tmp_path / "notes"), "FOLDER": str(tmp_path), "HOSTS": "gpu1 gpu2"}


def calls(environment, program: str) -> list[list[str]]:
    """The arguments of every call of a program so far."""
    lines = Path(environment["NOTES"]).read_text().split("\0\n")[:-1]
    return [arguments for name, *arguments in (line.split("\0") for line in lines) if name == program]


def script_of(name: str, tmp_path: Path) -> list[str]:
    """What to run of a recipe."""
    if not name.endswith(".yaml"):
        return ["bash", str(RECIPES / name)]
    script = tmp_path / "run.sh"
    script.write_text(f"set -e\n{yaml.safe_load((RECIPES / name).read_text())['run']}")
    return ["bash", str(script)]


def check_training(arguments: list[str]) -> None:
    """torchrun takes the arguments, and the trainer those that are its own: a run that can be started again."""
    launched = get_args_parser().parse_args(arguments)
    assert (launched.module, launched.training_script) == (True, "advgrpo.train")
    settings, start = parse(launched.training_script_args)
    config.check(settings, with_data=False)
    assert resume_of(start).mode == "auto"
    assert 0 < settings.output.checkpoint_every <= 10
    folders = [settings.output_dir, settings.data.cache_dir, settings.data.prompts, settings.data.references]
    assert len({Path(folder).parts[:2] for folder in folders}) == 1, "what all machines share"


@pytest.mark.parametrize(
    ("name", "given", "machines"), [("slurm.sh", SLURM, 1), ("ssh.sh", {}, 2), ("skypilot.yaml", SKYPILOT, 1)]
)
def test_a_script_starts_a_run_that_torchrun_and_the_trainer_take(name, given, machines, cluster, tmp_path):
    done = subprocess.run(script_of(name, tmp_path), env=cluster | given, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    started = calls(cluster, "torchrun")
    assert len(started) == machines
    for arguments in started:
        launched = get_args_parser().parse_args(arguments)
        assert (launched.nnodes, launched.nproc_per_node, launched.rdzv_backend) == ("2", "8", "c10d")
        assert launched.max_restarts > 0
        assert launched.rdzv_endpoint.split(":")[0] in ("gpu1", "10.0.0.1")
        assert launched.rdzv_id == started[0][started[0].index("--rdzv-id") + 1], "one job"
        check_training(arguments)


def test_slurm_saves_before_the_limit_and_stands_in_line_again(cluster, tmp_path):
    environment = cluster | SLURM | {"LASTS": "long"}
    process = subprocess.Popen(script_of("slurm.sh", tmp_path), env=environment, cwd=tmp_path)
    started, pid = time.monotonic(), Path(f"{environment['NOTES']}.pid")
    while not (pid.exists() and pid.read_text().strip()):
        assert time.monotonic() - started < 20
        time.sleep(0.02)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    names = [line.split("\0")[0] for line in Path(environment["NOTES"]).read_text().split("\0\n")]
    assert names[-3:] == ["scancel", "scontrol", ""]
    assert calls(environment, "scancel") == [["--signal=TERM", "4242"]]
    assert calls(environment, "scontrol")[-1] == ["requeue", "4242"]
    text = (RECIPES / "slurm.sh").read_text()
    assert "#SBATCH --requeue\n" in text
    assert "#SBATCH --signal=B:USR1@180\n" in text
    assert "#SBATCH --ntasks-per-node=1\n" in text, "torchrun starts the others"


def test_pods_run_what_torchrun_and_the_trainer_take_on_a_folder_that_they_share():
    spec = yaml.safe_load((RECIPES / "kubernetes.yaml").read_text())["spec"]
    elastic, worker = spec["elasticPolicy"], spec["pytorchReplicaSpecs"]["Worker"]
    assert 1 <= elastic["minReplicas"] <= worker["replicas"] <= elastic["maxReplicas"]
    assert elastic["rdzvBackend"] == "c10d"
    pod = worker["template"]["spec"]
    (container,) = pod["containers"]
    assert container["name"] == "pytorch"
    assert int(spec["nprocPerNode"]) == container["resources"]["limits"]["nvidia.com/gpu"]
    program, *arguments = container["command"]
    assert program == "torchrun"
    check_training([*arguments, *container["args"]])
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted == {"work": "/volume", "shm": "/dev/shm"}
    assert mounted.keys() == {volume["name"] for volume in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] > 30, "torchrun's own patience"


def test_skypilot_mounts_what_the_run_reads_and_writes():
    task = yaml.safe_load((RECIPES / "skypilot.yaml").read_text())
    assert task["num_nodes"] > 1
    assert list(task["volumes"]) == ["/volume"]
    assert "/volume/runs" in task["run"]


def test_shellcheck_finds_nothing(tmp_path):
    """In the recipes and in all other scripts of a shell."""
    _, skypilot = script_of("skypilot.yaml", tmp_path)
    scripts = [file for folder in ("recipes", "bench", "tests") for file in (ROOT / folder).rglob("*.sh")]
    assert len(scripts) >= 5
    program = Path(sysconfig.get_path("scripts")) / "shellcheck"
    command = [program, "--shell=bash", skypilot, ROOT / ".ci" / "run", *scripts]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_page_says_how_well_a_number_of_gpus_is_used():
    settings = config.load("sd35m-dino-paper")
    rows = re.findall(r"^\| ([\d,]+) \| (.*%) \|$", (ROOT / "docs" / "clusters.md").read_text(), re.M)
    assert len(rows) > 10
    for gpus, shown in rows:
        found = [efficiency(settings, int(gpus.replace(",", "")), micro_batch=size) for size in (8, 4, 2, 1)]
        assert shown == " | ".join(f"{each:.0%}".replace("%", " %") for each in found), gpus
