"""Stand-ins for the programs that documents name and a test cannot run: each checks its arguments and does what it can.

python docs_stand_ins.py PROGRAM ARGUMENT...
"""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVERS = Path("servers.pid")  # processes that `grace serve` left running, for the test to end


def need(condition: object, what: str) -> None:
    if not condition:
        raise SystemExit(f"{Path(sys.argv[1]).name}: {what}: {sys.argv[2:]}")


def make(arguments: list[str]) -> None:
    targets = {line.split(":")[0] for line in (ROOT / "Makefile").read_text().splitlines() if ":" in line}
    need(arguments and set(arguments) <= targets, "no such target")


def python311(arguments: list[str]) -> None:
    need(arguments[:2] == ["-m", "venv"], "only -m venv")
    activate = Path(arguments[2], "bin", "activate")
    activate.parent.mkdir(parents=True, exist_ok=True)
    activate.touch()


def pip(arguments: list[str]) -> None:
    import tomllib

    need(arguments[0] == "install", "only install")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for argument in arguments:
        if "[" in argument:
            asked = argument.partition("[")[2].rstrip("]").split(",")
            need(set(asked) <= set(extras), "no such extra")


def accelerate(arguments: list[str]) -> None:
    """One process in place of the machine that the configuration describes."""
    from accelerate.commands.config.config_args import load_config_from_file

    need(arguments[0] == "launch", "only launch")
    if arguments[1] == "--config_file":
        load_config_from_file(arguments[2])
        del arguments[1:3]
    need(arguments[1] == "-m", "only -m MODULE")
    os.execv(sys.executable, [sys.executable, *arguments[1:]])


def sbatch(arguments: list[str]) -> None:
    files = [argument for argument in arguments if argument.startswith("recipes/")]
    need(len(files) >= 2 and all(Path(file).is_file() for file in files), "script and recipe")


def container_or_engine(arguments: list[str]) -> None:
    """docker, vllm, python -m sglang: the files and directories they are given are there."""
    for argument in arguments:
        if argument.startswith(("export/", "exports/", "runs/")):
            need(Path(argument).exists(), "no such path")


def grace(arguments: list[str]) -> None:
    """The command itself, but a server is left running and nothing is downloaded."""
    real = [sys.executable, "-m", "grace", *arguments]
    if arguments[:2] == ["data", "download"] and "--list" not in arguments:
        import yaml

        from grace.cli import build_parser

        args = build_parser().parse_args(arguments)
        manifest = yaml.safe_load((ROOT / "data" / "sharegpt4v.yaml").read_text())
        need(set(args.only or ()) <= known_names(manifest), "not in the manifest")
    elif arguments[:1] == ["serve"] and "--engine" in arguments:
        from grace.cli import build_parser

        build_parser().parse_args(arguments)  # it is not installed here
    elif arguments[:1] == ["serve"]:
        serve(real)
    else:
        os.execv(real[0], real)


def known_names(manifest: object) -> set[str]:
    """Every `name` and every key of the manifest."""
    if isinstance(manifest, dict):
        own = {str(key) for key in manifest} | {str(manifest.get("name"))}
        return own.union(*map(known_names, manifest.values()))
    return set().union(*map(known_names, manifest)) if isinstance(manifest, list) else set()


def serve(command: list[str]) -> None:
    with open("server.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    with SERVERS.open("a") as file:
        print(process.pid, file=file)
    port = command[command.index("--port") + 1] if "--port" in command else "8000"
    for _ in range(240):
        need(process.poll() is None, Path("server.log").read_text()[-2000:])
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    need(False, "no answer from /health")


PROGRAMS = {
    "make": make, "python3.11": python311, "pip": pip, "accelerate": accelerate, "sbatch": sbatch, "grace": grace,
    "docker": container_or_engine, "vllm": container_or_engine, "hf": container_or_engine,
}  # fmt: skip

if __name__ == "__main__":
    PROGRAMS[sys.argv[1]](sys.argv[2:])
