"""The chat page in a browser, against a model that repeats what it is told: its output is as hostile as the input."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chromium import BINARY, Chromium, chromium
from live_server import MadeUpDecoder, live, picture, service_for

from grace.models.processor import load_processor

pytestmark = pytest.mark.skipif(BINARY is None, reason="no Chromium here (Debian: apt-get install chromium)")

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script> what & <b>which</b>"
ANSWER = "document.querySelector('article.assistant:last-of-type p')"
SPEED = "document.querySelector('article.assistant:last-of-type .speed').textContent"


@pytest.fixture(scope="module")
def processor(tiny_student_dir: Path) -> Any:
    return load_processor(tiny_student_dir)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with chromium(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_ask_about_a_dropped_picture(browser: Chromium, processor, tmp_path):
    decoder = MadeUpDecoder(context=2000, seconds=0.002)
    with live(service_for(decoder, processor)) as url:
        browser.open(url)
        browser.wait("document.getElementById('about').textContent.includes('small: 0.00 MB of weights')")
        (tmp_path / "red.png").write_bytes(picture(size=(96, 96)))
        browser.drop(tmp_path / "red.png")
        browser.wait("document.querySelectorAll('#pictures img').length === 1")
        assert browser.value("document.activeElement.id") == "prompt"
        browser.type(HOSTILE)
        browser.press("Enter", 13)
        browser.wait(f"{ANSWER} && {ANSWER}.textContent.length > 5")
        early = browser.value(f"{ANSWER}.textContent.length")
        browser.wait("!document.getElementById('send').disabled")
        assert browser.value(f"{ANSWER}.textContent.length") > early  # it grew while we watched
        assert "256 tokens, " in browser.value(SPEED) and "tokens/s, first after" in browser.value(SPEED)
        text = browser.value(f"{ANSWER}.textContent")
        assert text.startswith("user\n" + HOSTILE)
        assert browser.value(f"{ANSWER}.children.length") == 0  # text, no markup
        assert browser.value("document.querySelectorAll('article.user img').length") == 1
        assert decoder.prompts_read[-1].count(processor.image_token_id) == 9
        if folder := os.environ.get("PAGE_SCREENSHOTS"):
            browser.screenshot(Path(folder) / "light.png")
        # The next question carries the conversation along.
        browser.type("And")
        browser.press("Enter", 13)
        browser.wait(
            "document.querySelectorAll('article.assistant').length === 2 && !document.getElementById('send').disabled"
        )
        assert HOSTILE in processor.tokenizer.decode(decoder.prompts_read[-1])
    assert browser.complaints == []


def test_stop_with_escape(browser: Chromium, processor):
    decoder = MadeUpDecoder(context=10**6, seconds=0.01)
    service = service_for(decoder, processor)
    with live(service) as url:
        browser.open(url)
        browser.wait("document.getElementById('about').textContent.includes('small')")
        browser.value("document.getElementById('limit').value = 100000")
        browser.type("which digit")
        browser.press("Enter", 13)
        browser.wait(f"{ANSWER} && {ANSWER}.textContent.length > 5")
        assert browser.value("document.getElementById('stop').hidden") is False
        browser.press("Escape", 27)
        browser.wait("document.getElementById('stop').hidden")
        browser.value("new Promise(resolve => setTimeout(resolve, 300))")
        assert decoder.taken == service.taken == 0
        assert browser.value("document.querySelectorAll('article.wrong').length") == 0
    assert browser.complaints == []


def test_errors_and_the_key(browser: Chromium, processor, tmp_path):
    with live(service_for(MadeUpDecoder(), processor), key="sesame") as url:
        browser.open(url)
        browser.wait("document.getElementById('about').textContent.includes('API key')")
        assert browser.value("document.getElementById('settings').open") is True
        browser.value("document.getElementById('prompt').focus()")
        browser.type("which digit")
        browser.press("Enter", 13)
        browser.wait("document.querySelector('article.wrong[role=alert]')?.textContent.includes('API key')")
        assert (
            browser.value("document.getElementById('prompt').value") == "which digit"
        )  # kept, to be sent again
        browser.value("document.getElementById('key').focus()")
        browser.type("sesame")
        browser.value("document.getElementById('prompt').focus()")
        browser.wait("document.getElementById('about').textContent.includes('small')")
        (tmp_path / "x.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
        browser.drop(tmp_path / "x.svg")
        browser.wait(
            "document.querySelector('article.wrong:last-of-type').textContent.includes('x.svg is no PNG')"
        )
        browser.press("Enter", 13)
        browser.wait(f"{ANSWER} && {ANSWER}.textContent.includes('which digit')")
    assert [
        line for line in browser.complaints if "401" not in line
    ] == []  # the browser logs refused requests
    browser.complaints.clear()


def test_dark_light_and_labels(browser: Chromium, processor):
    with live(service_for(MadeUpDecoder(), processor)) as url:
        grounds = {}
        for theme in ("dark", "light"):
            browser.call(
                "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}]
            )
            browser.open(url)
            browser.wait("document.getElementById('about').textContent.includes('small')")
            if folder := os.environ.get("PAGE_SCREENSHOTS"):
                browser.screenshot(Path(folder) / f"{theme}-empty.png")
            ground = "getComputedStyle(document.body).backgroundColor"
            grounds[theme] = browser.value(ground)
            browser.value("document.getElementById('theme').click()")
            assert browser.value(ground) != grounds[theme]
        assert grounds["dark"] != grounds["light"]
        assert browser.value(
            "[...document.querySelectorAll('input, textarea')].every(field => field.labels.length)"
        )
        assert browser.value(
            "document.documentElement.lang && document.querySelector('[role=log]').getAttribute('aria-label')"
        )
        reached = []
        browser.value("document.getElementById('prompt').focus()")
        for _ in range(4):
            browser.press("Tab", 9)
            reached.append(browser.value("document.activeElement.id || document.activeElement.tagName"))
        assert reached == ["files", "clear", "send", "SUMMARY"]
    assert browser.complaints == []
