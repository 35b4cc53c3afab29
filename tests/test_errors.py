"""Exit codes, and what each kind of failure says."""

import errno
import os
import subprocess
import sys

import pytest

from grace.errors import Parser, UserError, run_command


def failing(error: BaseException):
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_success_and_own_codes_pass_through(result: int | None, code: int, capsys) -> None:
    assert run_command(lambda: result) == code
    assert capsys.readouterr() == ("", "")


def test_users_error_is_one_line_and_exit_code_2(capsys) -> None:
    assert run_command(failing(UserError("no file there:\n  give a path"))) == 2
    assert capsys.readouterr() == ("", "error: no file there: give a path\n")


def test_our_fault_shows_its_trace_and_exit_code_1(capsys) -> None:
    assert run_command(failing(ZeroDivisionError("oh"))) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("Traceback") and err.endswith("ZeroDivisionError: oh\n")


@pytest.mark.parametrize(
    ("failing", "size", "code", "said"),
    [
        (errno.EPIPE, 10, 141, ""),
        (errno.EPIPE, 100_000, 141, ""),
        (errno.ENOSPC, 10, 2, "No space left on device"),
    ],
)
def test_an_output_that_takes_nothing_is_no_fault_of_ours(
    failing: int, size: int, code: int, said: str
) -> None:
    """As with `| head -c 1`, or a full disk behind `>`."""
    program = f"import sys; from grace.errors import run_command; sys.exit(run_command(lambda: print('x' * {size})))"
    read, write = os.pipe()
    os.close(read)
    with open("/dev/full", "w") if failing == errno.ENOSPC else os.fdopen(write, "w") as output:
        done = subprocess.run(
            [sys.executable, "-c", program],
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": ""},
        )
    assert done.returncode == code and said in done.stderr and done.stderr.count("\n") == bool(said)


def test_interruption_is_no_failure_of_ours(capsys) -> None:
    assert run_command(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "interrupted\n")


def test_exit_of_a_parser_is_left_alone() -> None:
    with pytest.raises(SystemExit):
        run_command(failing(SystemExit(2)))


@pytest.mark.parametrize("arguments", [["--what"], ["--rat", "3"], ["--rate", "fast"]])
def test_parser_says_one_line_and_exits_with_2(arguments: list[str], capsys) -> None:
    parser = Parser(prog="grace test")
    parser.add_argument("--rate", type=int)
    with pytest.raises(SystemExit) as left:
        parser.parse_args(arguments)
    out, err = capsys.readouterr()
    assert left.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.endswith("(see `grace test --help`)\n") and err.count("\n") == 1


def test_parser_takes_positionals_after_options() -> None:
    parser = Parser(rest="overrides")
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(["r.yaml", "a.b=1", "--dry-run", "c.d=2"])
    assert (args.recipe, args.overrides, args.dry_run) == ("r.yaml", ["a.b=1", "c.d=2"], True)
    with pytest.raises(SystemExit):
        parser.parse_args(["r.yaml", "--dry", "c.d=2"])
