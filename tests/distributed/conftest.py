"""A model of 2 layers under the demo model's tokenizer, and data that makes it learn."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

WORDS = ["river", "stone", "lamp", "云", "山", "letter", "glass", "雨", "seven", "bridge", "paper", "月"]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


@pytest.fixture(scope="session")
def tiny(demo_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2 of 1.6 million parameters, random weights."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    vocabulary = json.loads((demo_model_path / "config.json").read_text())["vocab_size"]
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
        initializer_range=0.2,  # logits that differ: a run of eight steps moves the loss
        eos_token_id=2,
        pad_token_id=2,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    for name in TOKENIZER:
        if (demo_model_path / name).exists():
            shutil.copy(demo_model_path / name, folder)
    return folder


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """44 short conversations: not a whole number of steps of eight."""
    file = tmp_path_factory.mktemp("data") / "data.jsonl"
    chance = random.Random(5)
    with file.open("w", encoding="utf-8") as out:
        for _ in range(44):
            ask, answer = (" ".join(chance.choices(WORDS, k=chance.randint(2, 12))) for _ in range(2))
            messages = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return file
