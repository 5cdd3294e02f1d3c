#!/usr/bin/env bash
# Measures policies on the model directories MODELS in REAL: quote and lm, blind and aware, three budgets; the cells that
# matter most first, in SHARDS processes on one GPU. Writes $OUT/*.json (after every cell) and $OUT/*.md, at LIMIT seconds at
# the latest; run again with the same OUT it goes on.   From the repository's root:
#   OUT=... REAL=models QUOTE=texts.jsonl LM=texts.jsonl WEIGHTS="locret=heads.safetensors" bash examples/real_models/eval.sh
set -uo pipefail
real="${REAL:-/tmp/real}"; out="${OUT:?a folder for the results}"; py="${PYTHON:-python}"
device="${DEVICE:-cuda}"; shards="${SHARDS:-4}"; limit="${LIMIT:-350}"; batch="${BATCH:-20}"; tokens="${TOKENS:-4096}"
docs="${DOCS:-80}"; aware_docs="${AWARE_DOCS:-20}"; lm_docs="${LM_DOCS:-20}"; models="${MODELS:-smollm2 gemma3}"
budgets="${BUDGETS:-0.25 0.125 0.5}"; quote="${QUOTE:-$real/quote.jsonl}"; lm="${LM:-$real/lm.jsonl}"
policies="${POLICIES:-kvzip h2o snapkv locret kvzap fast_kvzip tova expected_attention keydiff adakv pyramidkv all}"
mkdir -p "$out"; head -n "$lm_docs" "$lm" > "$out/lm.jsonl"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS="${OMP_NUM_THREADS:-3}"
weighted=" $(for w in ${WEIGHTS:-}; do printf '%s ' "${w%%=*}"; done)"
need=" locret locret_q kvzap fast_kvzip trim_kv attention_gate duo_attention "  # which run only with a file of weights
chosen=(); for p in $policies; do [[ "$need" == *" ${p%%:*} "* && "$weighted" != *" ${p%%:*} "* ]] || chosen+=(-p "$p"); done
for w in ${WEIGHTS:-}; do chosen+=(--policy-weights "$w"); [[ " $policies " == *" ${w%%=*} "* || " $policies " == *" all "* ]] || chosen+=(-p "${w%%=*}"); done
for b in $budgets; do chosen+=(-b "$b"); done

part() {  # model mode documents shard
  local file="$out/$1_$2_$4.json" left=$((limit - SECONDS)) of=(-t quote --data "quote=$quote")
  [ "$2" = aware ] || of+=(-t lm --data "lm=$out/lm.jsonl")  # what follows a text has no question
  ((left > 10)) || return 0
  timeout "$left" "$py" -m kvrewrite eval "$real/$1" "${chosen[@]}" --mode "$2" "${of[@]}" \
    --tokens "$tokens" --samples "$3" --batch-size "$batch" --device "$device" --check off \
    --breadth-first --shard "$4/$shards" --out "$file" --resume > "$out/$1_$2_$4.log" 2>&1 || echo "ended with $?" >> "$out/$1_$2_$4.log"
}
shard() {
  for m in $models; do [ -d "$real/$m" ] && part "$m" blind "$docs" "$1"; done
  for m in $models; do [ -d "$real/$m" ] && part "$m" aware "$aware_docs" "$1"; done
}
jobs=(); for ((i = 0; i < shards; i++)); do shard "$i" & jobs+=($!); done
for j in "${jobs[@]}"; do wait "$j"; done
for m in $models; do for mode in blind aware; do
  files=("$out/${m}_${mode}"_[0-9]*.json); [ -e "${files[0]}" ] || continue
  "$py" -m kvrewrite report "${files[@]}" --markdown "$out/${m}_${mode}.md" --out "$out/${m}_${mode}.json" --force > "$out/${m}_${mode}.txt" 2>&1 || cat "$out/${m}_${mode}.txt"
  [ -e "$out/${m}_${mode}.md" ] && { echo "== $m $mode"; head -40 "$out/${m}_${mode}.md"; }
done; done
tail -qn 1 "$out"/*_[0-9].log
