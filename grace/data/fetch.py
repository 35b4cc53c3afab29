"""One file fetched over HTTP: resumed where it stopped, checked, and in place only when it is whole.

While it arrives, `.NAME.part` holds the bytes and `.NAME.part.tag` the server's mark and length of the
version they are of, so that the two halves of a file that changed in between are never joined.
"""

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from grace.data.manifest import Download
from grace.errors import UserError
from grace.files import sha256_of, sync

_BLOCK = 1 << 20
_TIMEOUT = 60.0  # seconds without a byte
_ATTEMPTS = 4
_PERMANENT = {400, 401, 403, 404, 410, 451}
_ADVICE = {
    401: "it wants a login: fetch it by hand",
    403: "the server refuses: fetch it by hand",
    404: "it is not there any more: correct the manifest or fetch it by hand",
    410: "it is not there any more: correct the manifest or fetch it by hand",
}

Advance = Callable[[int, int | None], None]


class _Interrupted(Exception):
    """The transfer broke off; another attempt may go on from here."""


def fetch(
    one: Download, target: Path, advance: Advance = lambda done, total: None, pause: float = 1.0
) -> bool:
    """Brings a file to `target`; False if it was there already.

    Args:
        advance: called with the bytes so far and, where known, their total.
        pause: seconds before the second attempt; doubled for each further one.

    Raises:
        UserError: it cannot be had or is not what the manifest says. What has arrived stays for the
            next time, unless its checksum is wrong.
    """
    if _is_there(one, target):
        return False
    part = target.with_name(f".{target.name}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(_ATTEMPTS):
            try:
                _transfer(one, part, advance)
                break
            except _Interrupted as error:
                if attempt == _ATTEMPTS - 1:
                    raise UserError(
                        f"{one.url}: {error}: check the network and run the same command again, it goes on from there"
                    ) from error
                time.sleep(pause * 2**attempt)
        _check(one, part)
        sync(part)
        os.replace(part, target)
        _tag(part).unlink(missing_ok=True)
        sync(target.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {target} ({error.strerror or error}): make room or choose another --out"
        ) from error
    return True


def _is_there(one: Download, target: Path) -> bool:
    if not target.is_file():
        return False
    if one.bytes is not None and target.stat().st_size != one.bytes:
        raise UserError(
            f"{target} has {target.stat().st_size} bytes, not {one.bytes}: remove it to fetch it again"
        )
    if one.sha256 is not None and sha256_of(target) != one.sha256:
        raise UserError(f"{target} has another checksum than the manifest: remove it to fetch it again")
    return True


def _tag(part: Path) -> Path:
    return part.with_name(f"{part.name}.tag")


def _transfer(one: Download, part: Path, advance: Advance) -> None:
    """One attempt; returns when the file is whole by the server's account."""
    version = _read_version(part)
    have = part.stat().st_size if version is not None and part.is_file() else 0
    headers = {"User-Agent": "grace-data-download", "Accept-Encoding": "identity"}
    if version is not None and have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": version[0]} if version[0] else {})
    try:
        request = urllib.request.Request(one.url, headers=headers)
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            if response.status != 206:
                have = 0  # the server sends all of it
            total = _total(response, have)
            if response.status == 206 and (
                not _starts_at(response, have) or total != (version or ("", None))[1]
            ):
                part.unlink()
                raise _Interrupted("the server sends another part of the file than was asked for")
            tag = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
            # A weak mark is not good enough to join bytes by; the length has to do then.
            _tag(part).write_text(json.dumps(["" if tag.startswith("W/") else tag, total]))
            have = _receive(response, part, have, total, advance)
    except urllib.error.HTTPError as error:
        _refused(one, part, error)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise _Interrupted(f"no answer ({getattr(error, 'reason', None) or error})") from error
    else:
        if total is not None and have < total:
            raise _Interrupted(f"the transfer broke off after {have} of {total} bytes")


def _read_version(part: Path) -> tuple[str, int | None] | None:
    """Mark and length of the version that `part` is of; None where a rest could not be told to belong to it."""
    try:
        tag, total = json.loads(_tag(part).read_text())
    except (FileNotFoundError, ValueError):  # absent, or cut off by a kill
        return None
    return (tag, total) if tag or total is not None else None


def _receive(
    response: http.client.HTTPResponse, part: Path, have: int, total: int | None, advance: Advance
) -> int:
    """Appends the response's body to the first `have` bytes; the number of bytes then there."""
    with part.open("r+b" if have else "wb") as file:
        file.seek(have)
        file.truncate()
        while True:
            try:
                block = response.read(_BLOCK)
            except (http.client.HTTPException, TimeoutError, ConnectionError) as error:
                raise _Interrupted(f"the transfer broke off after {have} bytes ({error})") from error
            if not block:
                return have
            file.write(block)
            have += len(block)
            advance(have, total)


def _starts_at(response: http.client.HTTPResponse, have: int) -> bool:
    return response.headers.get("Content-Range", "").startswith(f"bytes {have}-")


def _total(response: http.client.HTTPResponse, have: int) -> int | None:
    length = response.headers.get("Content-Length", "")
    return have + int(length) if length.isdecimal() else None


def _refused(one: Download, part: Path, error: urllib.error.HTTPError) -> None:
    """Nothing, if the answer says that all bytes are there already."""
    if error.code == 416 and part.is_file():  # a range from the very end
        size = part.stat().st_size
        if error.headers.get("Content-Range") == f"bytes */{size}":
            return
        part.unlink()
        raise _Interrupted(f"the file on the server is not the one that {size} bytes were had of") from error
    if error.code in _PERMANENT:
        advice = _ADVICE.get(error.code, "fetch it by hand")
        raise UserError(f"{one.url}: HTTP {error.code} {error.reason}: {advice}") from error
    raise _Interrupted(f"HTTP {error.code} {error.reason}") from error


def _check(one: Download, part: Path) -> None:
    size = part.stat().st_size
    if one.bytes is not None and size != one.bytes:
        part.unlink()
        raise UserError(f"{one.url} has {size} bytes, the manifest says {one.bytes}: it is another file now")
    if one.sha256 is None:
        return
    if (found := sha256_of(part)) != one.sha256:
        part.unlink()
        raise UserError(
            f"{one.url} has the SHA-256 {found}, the manifest says {one.sha256}: it is another file now"
        )
