"""OpenVINO GenAI's continuous batching, in a process and an environment of its own, without HTTP in its way.

    PYTHON_OF_ITS_ENVIRONMENT benchmarks/openvino_worker.py FOLDER_OF_THE_EXPORTED_MODEL THREADS

In: one JSON line a load on standard input: {"clients": [[[token id, ...], ...], ...], "max_tokens": N}; each
client sends its prompts one after the other. Out: one JSON line: {"seconds": S, "answers": [[tokens, ms to the first,
ms in all], ...]}; before the first load {"ready": true}.
"""

import json
import sys
import time
from typing import Any

import numpy as np
import openvino
import openvino_genai


def main() -> None:
    folder, threads = sys.argv[1:]
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = 2  # GiB of keys and values
    scheduler.enable_prefix_caching = True
    # Left alone it computes in bfloat16 where the processor has it, also over float32 weights.
    exact = {"INFERENCE_PRECISION_HINT": "f32"} if folder.endswith("fp32") else {}
    settings = {"INFERENCE_NUM_THREADS": int(threads), **exact}
    pipeline = openvino_genai.ContinuousBatchingPipeline(folder, scheduler, "CPU", settings)
    print(json.dumps({"ready": True}), flush=True)
    number = 0
    for line in sys.stdin:
        asked = json.loads(line)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = asked["max_tokens"]
        config.do_sample = False
        waiting = [list(prompts) for prompts in asked["clients"]]
        running: dict[
            int, list[Any]
        ] = {}  # client -> [handle, when it asked, when its first token came, tokens]
        answers = []
        begin = time.perf_counter()
        while running or any(waiting):
            for client, prompts in enumerate(waiting):
                if client not in running and prompts:
                    ids = openvino.Tensor(np.array([prompts.pop(0)], dtype=np.int64))
                    handle = pipeline.add_request(number, ids, config)
                    running[client] = [handle, time.perf_counter(), None, 0]
                    number += 1
            pipeline.step()
            now = time.perf_counter()
            for client, state in list(running.items()):
                handle, asked_at, first, _ = state
                while handle.can_read():
                    for output in handle.read().values():
                        state[3] += len(output.generated_ids)
                    state[2] = first = first or now
                if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                    answers.append([state[3], ((first or now) - asked_at) * 1000, (now - asked_at) * 1000])
                    del running[client]
        print(json.dumps({"seconds": time.perf_counter() - begin, "answers": answers}), flush=True)


if __name__ == "__main__":
    main()
