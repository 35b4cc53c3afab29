"""`grace generate DIR --chat`: a conversation on the terminal, or from a file on standard input."""

import argparse
import io
import sys
from collections.abc import Generator

from PIL import Image

from grace.data.records import Turn
from grace.errors import UserError
from grace.runtime.engine import Engine, GenerationResult, question
from grace.runtime.generate import about, summary
from grace.runtime.pictures import load_picture
from grace.runtime.sampling import Sampling

_HELP = """Type a message; the answer follows.
  /image PICTURE...  files or URLs for the next message
  /reset             forget the conversation
  /quit              end (so does the end of input)"""


class Chat:
    """A conversation so far."""

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None):
        self.engine, self.sampling, self.system = engine, sampling, system
        self.pictures: list[Image.Image] = []  # of the turns so far
        self.waiting: list[Image.Image] = []  # for the next message
        self.turns: list[Turn] = []
        self.last: GenerationResult | None = None

    def reset(self) -> None:
        self.turns, self.pictures, self.waiting = [], [], []

    def say(self, text: str) -> Generator[str, None, None]:
        """The answer to a message, as it comes. Without an answer the message is forgotten, its pictures wait on.

        Raises:
            UserError: the conversation does not fit the context, or marks do not match pictures.
        """
        turns = [*self.turns, question(text, len(self.waiting))]
        pictures = [*self.pictures, *self.waiting]
        system = [Turn("system", self.system)] if self.system else []
        answer = self.engine.answer([*system, *turns], pictures, self.sampling)
        said: list[str] = []
        try:
            for piece in answer:
                said.append(piece)
                yield piece
        finally:
            if said:
                self.turns = [*turns, Turn("assistant", "".join(said))]
                self.pictures, self.waiting = pictures, []
        self.last = answer.result()


def run_chat(engine: Engine, args: argparse.Namespace, sampling: Sampling) -> int:
    """Entry point of `grace generate --chat`."""
    chat = Chat(engine, sampling, args.system)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a conversation is not lost to a slip of the keyboard
    chat.waiting = [load_picture(name) for name in args.image]
    print(f"{about(engine, args)}\n{_HELP}", file=sys.stderr)
    while (line := _next_line()) is not None:
        if not line.strip():
            continue
        command, *rest = line.split()
        try:
            if command == "/quit":
                break
            if command == "/help":
                print(_HELP, file=sys.stderr)
            elif command == "/reset":
                chat.reset()
            elif command == "/image":
                chat.waiting += [load_picture(name) for name in rest]
                print(f"pictures for the next message: {len(chat.waiting)}", file=sys.stderr)
            else:
                _print_answer(chat, line)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
    return 0


def _print_answer(chat: Chat, line: str) -> None:
    """Prints an answer as it comes; an interrupt ends the answer, not the conversation."""
    chat.last, answer = None, chat.say(line)
    try:
        for text in answer:
            print(text, end="", flush=True)
    except KeyboardInterrupt:
        answer.close()
    print(flush=True)
    print(f"[{summary(chat.last) if chat.last else 'interrupted'}]", file=sys.stderr)


def _next_line() -> str | None:
    """The next line of input; None at its end."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    try:
        print("> ", end="", file=sys.stderr, flush=True)
        return input()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return None
