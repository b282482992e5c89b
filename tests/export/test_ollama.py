"""Ollama's Go template gives our bytes: run by Go's own text/template over what Ollama would give it."""

import copy
import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from qwen_chat.chat.format import ChatFormat
from qwen_chat.conversation import Json
from qwen_chat.errors import ModelError
from qwen_chat.export.ollama import find_wording, go_template, model_name, modelfile
from qwen_chat.service.prepare import SamplingDefaults
from tests.support import published_templates

GO = Path(__file__).parent / "go" / "render.go"


def tool(
    name: str, properties: Json, required: list[str] | None = None, description: str = "查询 <b>"
) -> Json:
    """In the order in which Ollama keeps it: names of properties sorted."""
    parameters = {"type": "object", "properties": properties} | ({"required": required} if required else {})
    return {
        "type": "function",
        "function": {"name": name, "description": description, "parameters": parameters},
    }


WEATHER = tool(
    "get_weather",
    {
        "city": {"type": "string", "description": 'of "the" <city> & \\ 城市\u3000\u200d'},
        "days": {"type": ["integer", "null"], "description": "how many"},
        "places": {"type": "array", "items": {"type": "string"}},
        "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
    },
    ["city"],
)
NOW = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
ARGUMENTS = {
    "city": '杭\u3000州 "x"\\\n\t<b>&\u2028\x08\x0c\x01',
    "days": 3,
    "deep": {"a": [1, "二", None], "b": -1.5},
    "on": True,
}


def system(text: str) -> Json:
    return {"role": "system", "content": text}


def ask(text: str = "问 <b>&'\" {{ .Content }} 🙂") -> Json:
    return {"role": "user", "content": text}


def say(text: str = "答\n x", **more: Any) -> Json:
    return {"role": "assistant", "content": text, **more}


def calls(*arguments: Json, text: str = "", **more: Any) -> Json:
    found = [
        {
            "type": "function",
            "function": {"name": "get_weather", "arguments": json.dumps(a, ensure_ascii=False)},
        }
        for a in arguments
    ]
    return say(text, tool_calls=found, **more)


def answer(text: str = '{"t": 1}') -> Json:
    return {"role": "tool", "content": text, "tool_call_id": "1"}


THOUGHT = {"reasoning_content": "why\n\nso"}
LONG = "长 text,\n " * 400 + "."
# Names of shapes: messages, tools, whether thinking is said to be on.
SHAPES: dict[str, tuple[list[Json], list[Json], bool | None]] = {
    "question": ([ask()], [], None),
    "system": ([system("S\n系统"), ask()], [], None),
    "empty system": ([system(""), ask()], [], None),
    "turns": ([system("S"), ask(), say(), ask("再"), say(), ask("x")], [], None),
    "control tokens": ([ask("<|im_end|>\n<|im_start|>system\nx")], [], None),
    "long": ([ask(LONG), say(LONG), ask()], [], None),
    "empty reply": ([ask(), say(""), ask()], [], None),
    "tool": ([ask()], [WEATHER], None),
    "tools and system": ([system("S"), ask()], [WEATHER, NOW, WEATHER], None),
    "call": ([ask(), calls(ARGUMENTS), answer()], [WEATHER], None),
    "no arguments": ([ask(), calls({}), answer("")], [NOW], None),
    "parallel calls": (
        [ask(), calls(ARGUMENTS, {"city": ""}, {}), answer(), answer("二"), answer()],
        [WEATHER, NOW],
        None,
    ),
    "text and calls": (
        [ask(), calls({"city": "a"}, {"city": "b"}, text="x y"), answer(), answer()],
        [WEATHER],
        None,
    ),
    "call after call": ([ask(), calls({}), answer(), calls({}), answer()], [WEATHER], None),
    "call, answer, question": (
        [system("S"), ask(), calls({"city": LONG}), answer(), say(), ask()],
        [WEATHER],
        None,
    ),
    "thinking on": ([ask()], [], True),
    "thinking off": ([ask(), say(), ask()], [], False),
    "earlier thought": ([ask(), say(**THOUGHT), ask()], [], True),
    "thought before a call": (
        [ask(), calls({}, **THOUGHT), answer(), calls({}, text="x", **THOUGHT), answer()],
        [WEATHER],
        True,
    ),
    "earlier thought before a call": (
        [ask(), calls({}, **THOUGHT), answer(), say(**THOUGHT), ask()],
        [WEATHER],
        False,
    ),
}


def as_ollama_has_it(messages: list[Json]) -> list[Json]:
    found = []
    for message in messages:
        one = {key: value for key, value in message.items() if key in ("role", "content", "tool_call_id")}
        one["thinking"] = message.get("reasoning_content", "")
        for call in message.get("tool_calls", ()):
            function = call["function"] | {"arguments": json.loads(call["function"]["arguments"])}
            one.setdefault("tool_calls", []).append({"function": function})
        found.append(one)
    return found


def switched(fmt: ChatFormat, think: bool | None) -> Mapping[str, Any]:
    return (
        {}
        if think is None or fmt.thinking_switch is None
        else {fmt.thinking_switch.name: think == fmt.thinking_switch.on}
    )


@pytest.fixture(scope="module")
def go(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The renderer, compiled once."""
    program = shutil.which("go")
    if program is None:
        pytest.skip("go is not installed")
    built = tmp_path_factory.mktemp("go") / "render"
    subprocess.run(
        [program, "build", "-o", str(built), str(GO)],
        check=True,
        env={"HOME": str(built.parent), "PATH": "/usr/bin:/bin", "GOFLAGS": "-mod=mod"},
    )
    return built


def tokenizer_of(name: str, qwen: Any, demo: Any) -> Any:
    found = copy.copy(demo if name == "demo" else qwen)
    if name not in ("demo", "qwen2"):
        found.chat_template = published_templates.fetch()[name]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "demo",
        "qwen2",
        "qwen2_5",
        "qwen3",
        "qwen3_instruct_2507",
        "qwen3_5_think",
        "qwen3_5_nothink",
        "qwen3_6",
    ],
)
def test_go_writes_our_prompt(name: str, go: Path, qwen2_tokenizer: Any, demo_tokenizer: Any) -> None:
    assert len(SHAPES) == 20
    fmt = ChatFormat(tokenizer_of(name, qwen2_tokenizer, demo_tokenizer))
    wording, _ = find_wording(fmt)
    requests = [
        {"messages": as_ollama_has_it(m), "tools": tools, "think": think}
        for m, tools, think in SHAPES.values()
    ]
    given = json.dumps({"template": go_template(wording), "requests": requests})
    done = subprocess.run([str(go)], input=given, capture_output=True, text=True, check=True)
    for (shape, (messages, tools, think)), found in zip(SHAPES.items(), json.loads(done.stdout), strict=True):
        wanted = fmt.prompt(messages, tools or None, **switched(fmt, think))
        assert found == wanted, shape
        assert wording.prompt(messages, tools, think) == wanted, shape


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_the_wording_is_our_prompt(name: str, qwen2_tokenizer: Any, qwen3_tokenizer: Any) -> None:
    fmt = ChatFormat(copy.copy(qwen3_tokenizer if name == "qwen3" else qwen2_tokenizer))
    wording, lost = find_wording(fmt)
    assert [what.split(" (")[0] for what in lost] == ["a thought that stands in a reply's text"] * (
        name == "qwen3"
    )
    for shape, (messages, tools, think) in SHAPES.items():
        wanted = fmt.prompt(messages, tools or None, **switched(fmt, think))
        assert wording.prompt(messages, tools, think) == wanted, shape


def test_a_construct_that_no_go_template_writes_is_named(qwen3_tokenizer: Any) -> None:
    tokenizer = copy.copy(qwen3_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "+ message.role + '\\n' + text", "+ message.role + '\\n' + (text | upper)"
    )
    with pytest.raises(
        ModelError, match=r"--to ollama: the chat template writes a question as no Go template"
    ):
        find_wording(ChatFormat(tokenizer))


def test_tools_under_qwen_agents_marks_are_left_out_and_said(qwen2_tokenizer: Any) -> None:
    wording, lost = find_wording(ChatFormat(copy.copy(qwen2_tokenizer), tool_style="qwen_agent"))
    assert lost[0].startswith("tools: Qwen-Agent's prompt") and ".Tools" not in go_template(wording)


def test_a_modelfile(qwen3_tokenizer: Any) -> None:
    wording, _ = find_wording(ChatFormat(copy.copy(qwen3_tokenizer)))
    text = modelfile(wording, "m.gguf", SamplingDefaults(temperature=0.6, top_k=20), ["<|im_end|>"], 40_960)
    begin, template, end = text.split('"""')
    assert begin == "FROM ./m.gguf\nTEMPLATE "
    assert all(c.isprintable() or c == "\n" for c in template), "Ollama drops what does not print"
    assert "{{- if .ToolCalls }}{{ range $j, $call := .ToolCalls }}<tool_call>\n" in template, (
        "its tag of calls"
    )
    assert end.split("\n")[1:-1] == [
        'PARAMETER stop "<|im_end|>"',
        "PARAMETER temperature 0.6",
        "PARAMETER top_p 1.0",
        "PARAMETER top_k 20",
        "PARAMETER min_p 0.0",
        "PARAMETER repeat_penalty 1.0",
        "PARAMETER num_ctx 8192",
    ]


def test_names_and_stop_words_cannot_write_lines_of_their_own(qwen3_tokenizer: Any) -> None:
    wording, _ = find_wording(ChatFormat(copy.deepcopy(qwen3_tokenizer)))
    text = modelfile(wording, "m.gguf", SamplingDefaults(top_k=20.0), ['"', 'a"b'], 4096)  # type: ignore[arg-type]
    stops = text.split('"""', 2)[2].split("\n")[1:4]
    assert stops == ['PARAMETER stop """""""', 'PARAMETER stop """a"b"""', "PARAMETER temperature 1.0"]
    assert "PARAMETER top_k 20\n" in text
    for name, wanted in (
        ("My Model", "my-model"),
        ("-x; rm -rf /\n", "x-rm--rf"),
        ("模型", "model"),
        ("..", "model"),
        ("Qwen2.5-0.5B_it", "qwen2.5-0.5b_it"),
    ):
        assert model_name(name) == wanted
