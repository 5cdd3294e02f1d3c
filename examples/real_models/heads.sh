#!/usr/bin/env bash
# Makes trained heads and gates for a real model; nothing of it is shipped. From the repository's root:
#   bash examples/real_models/heads.sh models/smollm2 texts heads
# MODEL: a model's directory; TEXTS: the folder that documents.py made; OUT gets
#   kvzap.safetensors   KVzap's models of a layer's input, on KVzip's scores: the first to try (scope=model, a budget)
#   locret.safetensors  Locret's heads of queries, keys and values, on the same scores
#   gates/              Attention-Gates with LoRA, fine-tuned on continuing quotes, and what they and others keep (needs peft)
# What is there is not made again. DEVICE, COLLECT (texts that heads read), STEPS and SECONDS_OF_GATES (0: none) can be given; a GPU
# takes minutes with the defaults, a CPU hours.
set -euo pipefail
model="${1:?a model directory}" texts="${2:?the folder of documents.py}" out="${3:?a folder for the results}"
py="${PYTHON:-python}" device="${DEVICE:-cuda}" collect="${COLLECT:-1400}" steps="${STEPS:-1500}" seconds="${SECONDS_OF_GATES:-90}"
mkdir -p "$out"

heads() {  # policy options...
  local policy="$1"; shift
  [ -e "$out/$policy.safetensors" ] || "$py" -m kvrewrite train "$model" -p "$policy" -d "$texts/train.jsonl" \
    --out "$out/$policy.safetensors" --device "$device" --collect "$collect" --collect-tokens 300 --batch-size "${BATCH:-8}" \
    --max-tokens "${TOKENS:-2000}" --steps "$steps" --warmup $((steps / 30 + 1)) --schedule cosine --clip-value 0 --clip-norm 1 "$@"
}

heads kvzap -o hidden_size=512 -o lr=2e-3
heads locret -o hidden_size=512 -o label=reconstruction -o smoothing=0 -o lr=2e-3
[ "$seconds" = 0 ] || "$py" -m benchmarks.gate_lora "$model" "$texts/train.jsonl" "$texts/quote.jsonl" "$out/gates" \
  --device "$device" --seconds "$seconds"
echo "try: kvrewrite convert $model -p kvzap --policy-weights $out/kvzap.safetensors \\"
echo "       -o threshold=none -o scope=model -o window=32 --budget 0.25 --out small"
