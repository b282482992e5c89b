#!/usr/bin/env bash
# What `make demo` runs: three questions to the small demo model, a LoRA run on the identity and everyday lines of the
# example data (a few minutes on two cores), and the same questions again.
#
#     bash finetune/demo.sh [OUTPUT_DIR]
set -euo pipefail

base_path="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
root="$(dirname "$base_path")"
output_dir="${1:-$base_path/io_file/output_data/demo}"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python=python3
questions=("Who are you?" "What is your name?" "What is the capital of France?")

work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

ask() {  # ask TITLE [--adapter DIR]
    printf '\n== %s ==\n' "$1"
    shift
    for question in "${questions[@]}"; do
        printf '> %s\n' "$question"
        "$python" "$root/fast_start/simple_try_0.py" "$@" --prompt "$question" --max_new_tokens 48 2> "$work/said" || {
            cat "$work/said" >&2
            exit 1
        }
        printf '\n'
    done
}

# Beside the result: merging, exporting and the report ask for a run's own data.
data="${output_dir%/}_data.jsonl"
mkdir -p "$(dirname "$data")"
grep -E '"type": "(identity|everyday)"' "$base_path/io_file/input_data/example_data.jsonl" > "$data"

ask "before"
printf '\n== fine-tuning ==\n'
bash "$base_path/finetune.sh" -d "$data" -o "$output_dir" --use_lora True --save_strategy no
ask "after" --adapter "$output_dir"
printf '\nTalk to it:  %s\n' "python fast_start/simple_try_0.py --adapter $output_dir"
