"""What is wrong with the text of a turn, or odd about it."""

import re
from collections.abc import Iterator

# C0 but tab, line feed and carriage return, and DEL: no keyboard types them, and no reader shows them.
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\r")) + b"\x7f"
_CONTROL_TOKEN = re.compile(r"<\|[a-z_]{2,24}\|>")
_REPLACEMENT = "\ufffd"
_VIDEO_MARK = "<video>"


def text_faults(text: str, role: str | None, image_mark: str) -> Iterator[tuple[str, str]]:
    """Class of fault and what the turn has, for each that its text shows.

    Args:
        role: user, assistant, system, or None where that is a fault itself.
    """
    if not text.strip():
        yield "empty_text", "no text: drop the turn or the record"
        return
    try:
        encoded = text.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair
        yield "bad_text", "text that is not Unicode: mend it or drop the record"
        return
    if len(encoded.translate(None, _CONTROLS)) != len(encoded):
        found = next(byte for byte in encoded if byte in _CONTROLS)
        yield "control_characters", f"the control character U+{found:04X} in its text"
    if _REPLACEMENT in text:
        yield "lost_characters", "U+FFFD in its text: it was once read in the wrong encoding"
    if "<|" in text and (token := _CONTROL_TOKEN.search(text)):
        yield "control_token_text", f"the text {token[0]}, which is taken as text and not as a token"
    if role in ("assistant", "system") and image_mark in text:
        yield "mark_in_answer", f"{image_mark} in a {role} turn, where it stands for no picture"
    if role == "user" and _VIDEO_MARK in text:
        yield "video_mark", f"the mark {_VIDEO_MARK}, which is taken as text"
