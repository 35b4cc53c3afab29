"""The chat page and the policy that lets it run its own script and nothing else."""

import base64
import hashlib
import re
from pathlib import Path


def load_page() -> tuple[bytes, str]:
    """The page, and its Content-Security-Policy: the one script and the one style by their hashes."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")

    def digest(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"frame-ancestors 'none'; script-src {digest('script')}; style-src {digest('style')}"
    )
    return page.encode(), policy
