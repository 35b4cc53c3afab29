"""`grace generate --chat`: the conversation is remembered, and mistakes do not end it."""

import argparse
import io
from pathlib import Path

import pytest

from grace.errors import UserError
from grace.runtime.chat import Chat, run_chat
from grace.runtime.engine import Engine, load
from grace.runtime.sampling import Sampling

SAMPLING = Sampling(max_new_tokens=5)


@pytest.fixture(scope="module")
def engine(awq_dir: Path) -> Engine:
    return load(awq_dir)


@pytest.fixture(scope="module")
def picture(tiny_world_dir: Path) -> str:
    return str(sorted(tiny_world_dir.rglob("*.png"))[0])


def talk(
    engine: Engine, lines: list[str], monkeypatch: pytest.MonkeyPatch, images: tuple[str, ...] = ()
) -> int:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    args = argparse.Namespace(system="Be brief.", image=[*images], directory=Path("x"))
    return run_chat(engine, args, SAMPLING)


def test_a_conversation(engine: Engine, picture: str, monkeypatch, capsys):
    seen = []
    real = Engine.encode

    def encode(self, turns, images=()):
        seen.append(([(turn.role, turn.text) for turn in turns], len(images)))
        return real(self, turns, images)

    monkeypatch.setattr(Engine, "encode", encode)
    lines = [
        "Say yes",
        "",
        "/image " + picture,
        "Which digit?",
        "And now?",
        "/reset",
        "Say no",
        "/quit",
        "never",
    ]
    assert talk(engine, lines, monkeypatch, (picture,)) == 0
    out, err = capsys.readouterr()
    assert len(seen) == 4 and "pictures for the next message: 1" in err and "tokens, first after" in err
    said = out.split("\n")
    first, second, third, fourth = seen
    assert first == ([("system", "Be brief."), ("user", "<image>\nSay yes")], 1)
    assert second[1] == third[1] == 2 and second[0][:2] == first[0] and second[0][2] == ("assistant", said[0])
    assert second[0][3] == ("user", "<image>\nWhich digit?") and third[0][-1] == ("user", "And now?")
    assert fourth == ([("system", "Be brief."), ("user", "Say no")], 0)


def test_mistakes_are_told_and_forgotten(engine: Engine, picture: str, monkeypatch, capsys):
    lines = ["/image /nowhere.png", "what is <image>", "/help", "Say yes"]
    assert talk(engine, lines, monkeypatch) == 0
    out, err = capsys.readouterr()
    assert "error: the picture /nowhere.png cannot be read (no such file)" in err and "1 <image> mark" in err
    assert err.count("/reset") == 2 and out.count("\n") == 1


def test_an_answer_that_is_broken_off_counts(engine: Engine):
    chat = Chat(engine, Sampling(max_new_tokens=50), None)
    pieces = chat.say("List all digits")
    first = next(pieces)
    pieces.close()
    assert [turn.text for turn in chat.turns] == ["List all digits", first]
    assert engine.decoder.length(0) == 0
    with pytest.raises(UserError):
        list(chat.say("<image>"))
    assert len(chat.turns) == 2
