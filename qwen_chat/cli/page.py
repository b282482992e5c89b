"""A chat page in the browser, in Chinese and English: a client of the service.

    qwen-chat serve &
    qwen-chat page --url http://127.0.0.1:8000

In: the service's address. Out: a page on http://127.0.0.1:7860 that streams answers, with a picker for models
and adapters, a system prompt, sampling, and example tools whose calls and results are shown. Needs gradio.
Nothing is sent to anybody but the service, and nothing is loaded from elsewhere: the
browser is told so too (POLICY), since an answer may hold pictures and forms that point anywhere.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from qwen_chat.conversation import Json
from qwen_chat.errors import ChatError, MissingDependency, OptionError
from qwen_chat.flags import parser
from qwen_chat.flags.parser import option
from qwen_chat.service.server import is_loopback
from qwen_chat.tools.client import HttpClient
from qwen_chat.tools.example_tools import EXAMPLE_TOOLS
from qwen_chat.tools.loop import Event, Limits, run_tools

PAGE_WORDS = {
    "en": {
        "title": "## Qwen chat",
        "about": "Answers come from your own service.",
        "model": "Model or adapter",
        "system": "System prompt",
        "system_hint": "You are a helpful assistant.",
        "temperature": "Temperature",
        "top_p": "Top p",
        "max_tokens": "Longest answer (tokens)",
        "tools": "Example tools: weather, time, calculator",
        "ask": "Ask something …",
        "empty": "Ask something to begin.",
    },
    "zh-CN": {
        "title": "## Qwen 对话",
        "about": "回答来自您自己的服务。",
        "model": "模型或适配器",
        "system": "系统提示词",
        "system_hint": "你是一个有用的智能助手。",
        "temperature": "温度",
        "top_p": "Top p",
        "max_tokens": "最长回答（词元数）",
        "tools": "示例工具：天气、时间、计算器",
        "ask": "请输入问题……",
        "empty": "请输入问题，开始对话。",
    },
}
# What a model writes may have been put into its mouth by a document it read, and a picture's address can carry
# away what the user said. gradio's own page needs inline scripts; its cleaning of answers keeps theirs out.
POLICY = "; ".join(
    [
        "default-src 'self'",
        "script-src 'self' 'unsafe-inline' 'unsafe-eval'",
        "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:",
        "media-src 'self' data: blob:",
        "font-src 'self' data:",
        "worker-src 'self' blob:",
        "object-src 'none'",
        "base-uri 'self'",
        "form-action 'self'",
        "frame-ancestors 'self'",
    ]
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-dns-prefetch-control", b"off"),  # else the host of a mere link is looked up
    (b"referrer-policy", b"no-referrer"),
]
FONTS = ["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"]
MONO = ["ui-monospace", "Consolas", "monospace"]
CSS = """
footer { display: none !important; }
.gradio-container { max-width: 100% !important; }
#about { opacity: 0.7; margin-top: -0.5rem; }
"""


@dataclass(frozen=True)
class PageArguments:
    """Page"""

    url: str = option("http://127.0.0.1:8000", "where the service listens")
    api_key: str | None = option(None, "the service's key; also API_KEY")
    host: str = option("127.0.0.1", "address of the page; other than this machine's own needs --login")
    port: int = option(7860, "port of the page")
    login: str | None = option(None, "NAME:PASSWORD that visitors must give")


def main(argv: Sequence[str], about: str = str(__doc__)) -> int:
    page = parser.read(argv, [PageArguments], about=about)[PageArguments]
    if page.login is None and not is_loopback(page.host):
        raise OptionError(
            f"--host {page.host}: everybody who reaches it could chat; give --login NAME:PASSWORD"
        )
    if page.login is not None and not all(page.login.partition(":")):
        raise OptionError("--login: expected NAME:PASSWORD")
    client = HttpClient(page.url, api_key=page.api_key or os.environ.get("API_KEY"))
    gradio = load_gradio()
    demo = build_page(gradio, client)
    try:
        demo.queue(default_concurrency_limit=16).launch(
            server_name=page.host,
            server_port=page.port,
            auth=tuple(page.login.split(":", 1)) if page.login else None,
            share=False,
            quiet=True,
            show_error=True,
            ssr_mode=False,
            pwa=False,
            prevent_thread_lock=True,
            enable_monitoring=False,
            footer_links=[],
            css=CSS,
            theme=gradio.themes.Default(primary_hue="indigo", font=FONTS, font_mono=MONO),
            i18n=demo.words,
            app_kwargs={"middleware": [(Guarded, (), {})]},
        )
    except OSError:
        raise OptionError(f"--port {page.port}: in use or not allowed; choose another") from None
    print(f"the page is on http://{page.host}:{page.port} (Ctrl-C ends it)", flush=True)
    demo.block_thread()
    return 0


class Guarded:
    """ASGI: the page with HEADERS in each of its answers."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Json, receive: Any, send: Any) -> None:
        async def guarded(message: Json) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS]
            await send(message)

        await self.app(scope, receive, guarded)


def load_gradio() -> Any:
    """gradio, told before it is imported to send nothing about its use."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError:
        raise MissingDependency("gradio", "the chat page", extra="page") from None
    return gradio


def build_page(gradio: Any, client: HttpClient) -> Any:
    """The page, not yet served. Raises ServiceError where the service does not answer."""
    models = client.models()
    word = gradio.I18n(**PAGE_WORDS)
    with gradio.Blocks(title="Qwen chat", analytics_enabled=False, fill_height=True) as demo:
        with gradio.Sidebar(width=340):
            gradio.Markdown(word("title"), elem_id="title")
            gradio.Markdown(word("about"), elem_id="about")
            picker = gradio.Dropdown(models, value=models[0], label=word("model"), elem_id="model")
            system = gradio.Textbox(
                label=word("system"), placeholder=word("system_hint"), lines=3, elem_id="system"
            )
            temperature = gradio.Slider(
                0, 2, 0.7, step=0.05, label=word("temperature"), elem_id="temperature"
            )
            top_p = gradio.Slider(0, 1, 0.9, step=0.05, label=word("top_p"), elem_id="top_p")
            max_tokens = gradio.Slider(16, 4096, 512, step=16, label=word("max_tokens"), elem_id="max_tokens")
            tools = gradio.Checkbox(label=word("tools"), elem_id="tools")
        gradio.ChatInterface(
            answerer(gradio, client),
            chatbot=gradio.Chatbot(
                elem_id="chat",
                placeholder=word("empty"),
                show_label=False,
                buttons=["copy"],
                feedback_options=None,
                scale=1,
                allow_tags=False,
            ),
            textbox=gradio.Textbox(
                placeholder=word("ask"),
                show_label=False,
                submit_btn=True,
                stop_btn=True,
                autofocus=True,
                elem_id="ask",
            ),
            additional_inputs=[picker, system, temperature, top_p, max_tokens, tools],
            additional_inputs_accordion=gradio.Accordion(visible=False),
            analytics_enabled=False,
            flagging_mode="never",
            api_visibility="private",
        )
        demo.load(lambda: gradio.Dropdown(choices=client.models()), outputs=picker, api_visibility="private")
    demo.words = word
    return demo


def answerer(gradio: Any, client: HttpClient) -> Callable[..., AsyncIterator[list[Json]]]:
    """What the page calls with each question; yields what the answer's messages look like so far."""

    async def answer(
        question: str,
        history: list[Json],
        model: str,
        system: str,
        temperature: float,
        top_p: float,
        max_tokens: int,
        tools: bool,
    ) -> AsyncIterator[list[Json]]:
        beginning = [{"role": "system", "content": system}] if system.strip() else []
        messages = [*beginning, *plain_history(history), {"role": "user", "content": question}]
        request = {"temperature": temperature, "top_p": top_p, "max_tokens": int(max_tokens)}
        shown = Shown()
        try:
            async for event in events(client, messages, model, tools, request):
                shown.add(event)
                yield shown.messages
        except ChatError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    return answer


async def events(
    client: HttpClient, messages: list[Json], model: str, tools: bool, request: Json
) -> AsyncIterator[Event]:
    """The events of one answer. Where the page stops listening, the request to the service is closed."""
    loop = asyncio.get_running_loop()
    queue: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()
    stopped = threading.Event()

    def on_event(event: Event) -> None:
        if stopped.is_set():
            raise Stopped  # leaves run_tools, and with it the answer that is open
        loop.call_soon_threadsafe(queue.put_nowait, event)

    def work() -> None:
        outcome: BaseException | None = None
        try:
            run_tools(
                client,
                messages,
                EXAMPLE_TOOLS if tools else {},
                model=model,
                stream=True,
                limits=Limits(seconds=10, rounds=4),
                on_event=on_event,
                **request,
            )
        except Stopped:  # not kept: its traceback would hold the answer open
            pass
        except Exception as error:
            outcome = error
        loop.call_soon_threadsafe(queue.put_nowait, outcome)

    threading.Thread(target=work, daemon=True).start()
    try:
        while (event := await queue.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        stopped.set()


class Stopped(Exception):
    """Nobody reads on."""


class Shown:
    """An answer as the page shows it: text as it is written; thinking, calls and results to fold away."""

    def __init__(self) -> None:
        self.messages: list[Json] = []
        self._open = False  # whether the last message is the text being written

    def add(self, event: Event) -> None:
        """Bring the messages up to date."""
        if event.kind == "text":
            if not self._open:
                self.messages.append({"role": "assistant", "content": ""})
            self._open = True
            self.messages[-1]["content"] += event.text
            return
        if event.kind == "message" and event.message is not None:
            if event.message.get("reasoning_content"):
                place = len(self.messages) - self._open
                self.messages.insert(place, folded("…", event.message["reasoning_content"]))
            for call in event.message.get("tool_calls", ()):
                function = call["function"]
                self.messages.append(
                    folded(f"→ {function['name']}", f"```json\n{function['arguments']}\n```")
                )
        elif event.kind == "result":
            self.messages.append(folded("←", f"```\n{event.text}\n```"))
        elif event.kind == "stopped":
            self.messages.append({"role": "assistant", "content": event.text})
        self._open = False


def folded(title: str, content: str) -> Json:
    """A message that can be folded away."""
    return {"role": "assistant", "content": content, "metadata": {"title": title}}


def plain_history(history: list[Json]) -> list[Json]:
    """The earlier turns as the service takes them: what was said, without the calls that led to it."""
    turns: list[Json] = []
    for message in history:
        if message.get("metadata") and message["metadata"].get("title"):
            continue
        turns.append({"role": message["role"], "content": text_of(message["content"])})
    return turns


def text_of(content: Any) -> str:
    """gradio keeps a text as it is, or as a list of parts."""
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text", "") for part in content)
