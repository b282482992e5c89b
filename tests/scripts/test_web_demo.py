"""The chat page in a real browser, against a service over a scripted model."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from shutil import which
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

from qwen_chat.inference.engine import Engine, _Adapter
from qwen_chat.service.app import create_app
from qwen_chat.service.settings import ServiceSettings
from tests.support.scripted import LiveService, make_engine

PAGE = ROOT / "fast_start" / "web_demo.py"
CHROMIUM = which("chromium") or which("chromium-browser") or which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "杭州"}}\n</tool_call>'

browser_only = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (apt-get install chromium)")


class Served:
    """A service whose engine tells what it was asked, and the page before it."""

    def __init__(self, engine: Engine, service: str, url: str) -> None:
        self.engine = engine
        self.service = service
        self.requests: list[Any] = []
        self.url = url
        submit = engine.submit

        def watched(request: Any) -> Any:
            self.requests.append(request)
            return submit(request)

        engine.submit = watched  # type: ignore[method-assign]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start_page(service: str, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(PAGE), "--url", service, *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    pytest.importorskip("gradio")
    engine = make_engine()
    engine._adapters["mine"] = _Adapter(None)  # an adapter that changes nothing
    with LiveService(create_app(engine, settings=ServiceSettings(model_name="scripted"))) as live:
        page = start_page(live.url, "--port", str(port := free_port()))
        assert page.stdout is not None
        said = page.stdout.readline()
        assert said == f"the page is on http://127.0.0.1:{port} (Ctrl-C ends it)\n", page.communicate()
        yield Served(engine, live.url, f"http://127.0.0.1:{port}")
        page.terminate()
        page.wait(10)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def pictures(request: pytest.FixtureRequest) -> Path:
    """Screenshots are kept in pytest's cache: .pytest_cache/d/web_demo."""
    assert request.config.cache is not None
    return request.config.cache.mkdir("web_demo")


class Visitor:
    """Somebody with the page open."""

    def __init__(self, browser: Any, served: Served, locale: str) -> None:
        self.context = browser.new_context(locale=locale, viewport={"width": 1280, "height": 800})
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on(
            "console", lambda line: self.complaints.append(line.text) if line.type == "error" else None
        )
        self.page.goto(served.url)
        self.box = self.page.locator("#ask textarea")
        self.box.wait_for()

    def say(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def wait_for_answer(self, text: str) -> None:
        self.page.locator("#chat .bot").get_by_text(text).last.wait_for(timeout=15_000)
        self.page.locator("#ask .submit-button").wait_for(
            timeout=15_000
        )  # it is back when the answer is whole

    def close(self) -> None:
        outside = [
            url for url in self.asked if not re.match(r"(http|ws)://127\.0\.0\.1[:/]|data:|blob:", url)
        ]
        assert outside == []
        assert self.complaints == []
        self.context.close()


@pytest.mark.alone
@browser_only
def test_chat_in_english(chromium: Any, served: Served, pictures: Path) -> None:
    visitor = Visitor(chromium, served, "en-US")
    page = visitor.page
    assert page.get_by_role("heading", name="Qwen chat").is_visible()
    page.locator("#system textarea").fill("Answer in one word.")
    page.locator("#temperature input[type=number]").fill("0")
    page.locator("#max_tokens input[type=number]").fill("200")
    page.locator("#max_tokens input[type=number]").press("Tab")
    visitor.say("say **Bonjour** 你好\n\n1. one\n2. two")
    visitor.wait_for_answer("two")
    assert page.locator("#chat .bot strong").inner_text() == "Bonjour"
    page.screenshot(path=pictures / "english.png")
    (request,) = served.requests[-1:]
    assert (request.temperature, request.top_p, request.max_tokens) == (0, 0.9, 200)
    first = bytes(token for token in request.prompt_ids if token < 256)
    assert first.startswith(b"system\nAnswer in one word.\nuser\nsay **Bonjour**")
    visitor.say("say again")
    visitor.wait_for_answer("again")
    second = bytes(token for token in served.requests[-1].prompt_ids if token < 256)
    assert "assistant\n**Bonjour** 你好".encode() in second  # the earlier turns go along
    visitor.close()


@pytest.mark.alone
@browser_only
def test_chat_in_chinese(chromium: Any, served: Served, pictures: Path) -> None:
    visitor = Visitor(chromium, served, "zh-CN")
    page = visitor.page
    for words in ("Qwen 对话", "模型或适配器", "系统提示词", "温度", "示例工具：天气、时间、计算器"):
        assert page.get_by_text(words).first.is_visible()
    assert visitor.box.get_attribute("placeholder") == "请输入问题……"
    page.locator("#model input").click()
    page.get_by_role("option", name="mine").click()
    visitor.say("say 你好，世界")
    visitor.wait_for_answer("你好，世界")
    assert served.requests[-1].adapter == "mine"
    page.screenshot(path=pictures / "chinese.png")
    visitor.close()


@pytest.mark.alone
@browser_only
def test_calls_and_results_are_shown(chromium: Any, served: Served, pictures: Path) -> None:
    visitor = Visitor(chromium, served, "en-US")
    visitor.page.locator("#tools input").check()
    visitor.say(f"say Let me look.\n{CALL}")
    visitor.wait_for_answer("Let me look.")
    chat = visitor.page.locator("#chat").inner_text()
    assert "get_weather" in chat
    assert '"city": "杭州"' in chat
    assert '"city": "Hangzhou"' in chat  # what the tool gave back
    visitor.page.screenshot(path=pictures / "tools.png")
    visitor.close()


@pytest.mark.alone
@browser_only
def test_stop_ends_the_work(chromium: Any, served: Served, pictures: Path) -> None:
    visitor = Visitor(chromium, served, "en-US")
    visitor.say("slow 50 " + "and on " * 60)
    visitor.page.locator("#chat .bot").get_by_text("and on and").wait_for(timeout=15_000)
    assert served.engine.stats().running == 1
    visitor.page.screenshot(path=pictures / "streaming.png")
    visitor.page.locator("#ask .stop-button").click()
    end = time.monotonic() + 3
    while served.engine.stats().running:
        assert time.monotonic() < end, "the service still works for an answer that was stopped"
        time.sleep(0.02)
    visitor.say("say fresh")
    visitor.wait_for_answer("fresh")
    visitor.close()


@pytest.mark.alone
@browser_only
def test_refusals_are_shown(chromium: Any, served: Served, capfd: pytest.CaptureFixture[str]) -> None:
    visitor = Visitor(chromium, served, "en-US")
    visitor.say("crash")
    visitor.page.get_by_text("The server had an error while processing your request.").wait_for(
        timeout=15_000
    )
    visitor.close()


@pytest.mark.alone
@browser_only
def test_an_answer_reaches_nobody_outside(chromium: Any, served: Served) -> None:
    """Pictures, films and forms in an answer: shown or not, nothing is asked of another host."""
    reached = b""
    with socket.create_server(("127.0.0.1", 0)) as outside:
        outside.settimeout(0.3)
        host = f"//localhost:{outside.getsockname()[1]}"  # another origin than 127.0.0.1, and on this machine
        visitor = Visitor(chromium, served, "en-US")
        visitor.say(
            f"say ![x]({host}/a?q=secret) <img src={host}/b><video src={host}/c></video>"
            f"<form action={host}/d><button>press me</button></form> the end"
        )
        visitor.wait_for_answer("the end")
        visitor.page.locator("#chat .bot").get_by_text("press me").last.click(no_wait_after=True)
        visitor.page.wait_for_timeout(500)  # what the browser would do, it does by then
        with contextlib.suppress(TimeoutError):
            while True:  # pressing may open a connection ahead of time; what counts is that nothing is sent
                connection, _ = outside.accept()
                connection.settimeout(0.3)
                reached += connection.recv(200)
        refused = {
            word
            for word in ("img-src", "media-src", "form-action")
            for line in visitor.complaints
            if word in line
        }
        assert refused == {"img-src", "media-src", "form-action"}
        assert [line for line in visitor.complaints if "Content Security Policy" not in line] == []
        visitor.complaints.clear()
        visitor.asked = [url for url in visitor.asked if host not in url]  # those that were refused
        visitor.close()
    assert reached == b""


@pytest.mark.alone
@browser_only
@pytest.mark.slow
def test_soak(chromium: Any, served: Served) -> None:
    """Two hundred questions in one page, every answer its own question's."""
    visitor = Visitor(chromium, served, "en-US")
    for number in range(200):
        visitor.say(f"say answer number {number}.")
        visitor.wait_for_answer(f"answer number {number}.")
        if number % 20 == 19:
            visitor.page.get_by_label("Clear").click()
    visitor.close()


def run(*words: str, code: str | None = None) -> subprocess.CompletedProcess[str]:
    start = ["-c", code, str(PAGE)] if code else [str(PAGE)]
    return subprocess.run(
        [sys.executable, *start, *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_without_gradio() -> None:
    code = (
        "import runpy, sys\nsys.modules['gradio'] = None\nsys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = run(code=code)
    assert done.returncode == 2
    assert done.stderr == "error: the chat page needs the package 'gradio'; run: pip install gradio\n"


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--host", "0.0.0.0"], 2, r"--host 0\.0\.0\.0: everybody who reaches it could chat; give --login"),
        (["--login", "me"], 2, r"--login: expected NAME:PASSWORD"),
        (["--prot", "1"], 2, r"--prot: unknown flag; did you mean --port\?"),
        (
            ["--url", "http://127.0.0.1:9"],
            1,
            r"http://127\.0\.0\.1:9/v1/models cannot be reached .*start the service",
        ),
    ],
)
def test_bad_input(words: list[str], status: int, said: str) -> None:
    done = run(*words)
    assert done.returncode == status
    assert re.fullmatch(f"error: {said}.*\n", done.stderr)


@pytest.mark.alone
def test_port_in_use(served: Served) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        page = start_page(served.service, "--port", str(port))
        _, errors = page.communicate(timeout=60)
    assert page.returncode == 2
    assert errors == f"error: --port {port}: in use or not allowed; choose another\n"
