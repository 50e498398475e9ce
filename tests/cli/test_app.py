"""``lit-unlearn app``: the page is used in a browser."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

MAIN = [sys.executable, "-W", "ignore", "-m", "lit_unlearn"]
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="needs gradio: pip install 'lit-unlearn[app]'")


def test_without_gradio_the_extra_is_named(
    refuses: Callable[..., str], run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.commands.app.find_spec", lambda name: None)
    assert refuses("app", str(run_folder)) == "app needs Gradio: pip install 'lit-unlearn[app]'."


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--num_inference_steps", "0"], "num_inference_steps=0 must be at least 1."),
        (["--port", "0"], "port=0 must be at least 1."),
        (["--port", "70000"], "port=70000 must be at most 65535."),
        (["--host", "192.0.2.1"], "host=192.0.2.1 cannot be listened on"),  # an address of no machine
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_bad_input(
    run_folder: Path, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.setattr("lit_unlearn.commands.app.find_spec", lambda name: True)
    assert message in refuses("app", str(run_folder), *args)


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(
    run_folder: Path, refuses: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_unlearn.commands.app.find_spec", lambda name: True)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        said = refuses("app", str(run_folder), "--port", port)
    assert said.startswith(f"port={port} on host=127.0.0.1 cannot be listened on (Address already in use)")


def pictures(browser: Any, place: str) -> list[str]:
    """Addresses of the pictures in a gallery."""
    found = browser.find_elements("css selector", f"#{place} img")
    return list(dict.fromkeys(one.get_attribute("src") for one in found))


def until(condition: Callable[[], Any], seconds: float = 60) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.2)
    raise TimeoutError("It has not come.")


def pixels(browser: Any, address: str) -> str:
    """Content of a picture, as the browser gets it; empty if the page has replaced it meanwhile."""
    script = """
        const done = arguments[arguments.length - 1];
        fetch(arguments[0]).then(answer => answer.blob()).then(blob => {
            const reader = new FileReader();
            reader.onload = () => done(reader.result);
            reader.readAsDataURL(blob);
        }).catch(() => done(""));"""
    return str(browser.execute_async_script(script, address))


@needs_gradio
@pytest.mark.slow
def test_an_edit_is_looked_at_and_its_strength_moved(run_folder: Path, browser: Any, tmp_path: Path) -> None:
    options = ["--no_browser", "--device", "cpu"]
    with open(tmp_path / "said", "w", encoding="utf-8") as said:
        server = subprocess.Popen(
            [*MAIN, "app", str(run_folder), *options],
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # Ctrl-C is ignored by what runs in the background of a script, and so by the tests there.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        address = until(
            lambda: re.search(r"http://\S+?(?=/?:\s)", (tmp_path / "said").read_text(encoding="utf-8")), 120
        )
        browser.get(address[0])
        until(lambda: browser.find_elements("css selector", "#prompt textarea"))
        assert "Before and after an edit" in browser.find_element("tag name", "body").text
        browser.find_element("css selector", "#prompt textarea").send_keys("a dog")
        browser.find_element("css selector", "#draw").click()
        first = until(lambda: len(pictures(browser, "after")) == 2 and pictures(browser, "after"))
        assert len(pictures(browser, "before")) == 2
        unedited = until(lambda: pixels(browser, pictures(browser, "before")[0]))
        edited = until(lambda: pixels(browser, pictures(browser, "after")[0]))
        assert unedited.startswith("data:image/png") and unedited != edited
        # At strength 0 the edited model is the unedited one.
        number = browser.find_element("css selector", "#strength input[type=number]")
        number.send_keys("\ue009a\ue000", "0", "\ue004")  # select all, type, leave
        browser.find_element("css selector", "#draw").click()

        def unmoved() -> bool:
            now = pictures(browser, "after")
            return len(now) == 2 and now != first and pixels(browser, now[0]) == unedited

        until(unmoved)
        browser.set_window_size(400, 900)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map(one => one.name)")
        assert [one for one in loaded if not one.startswith((address[0], "data:", "blob:"))] == []
    finally:
        server.send_signal(signal.SIGINT)
        try:
            assert server.wait(60) == 0  # though the page is still open
        finally:
            server.kill()
