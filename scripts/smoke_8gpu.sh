#!/usr/bin/env bash
# Confirm on real GPUs, in about a quarter of an hour, what could only be tested without them: TensorRT-LLM builds engines from
# our checkpoints, runs them, and answers as the torch backend does. One line PASS or FAIL a check; exit code 1 if any failed.
#
#   scripts/smoke_8gpu.sh            with arctic-trt, mpirun and TensorRT-LLM 1.0 to 1.2 on PATH and in this Python
#
# Settings, by environment variables:
#   RANKS=8          GPUs to use: 2, 4 or 8
#   WORK=out/smoke   everything goes there, with a log of every command: 30 GB for the settings below
#   WIDEN=16         the tiny model's sizes times this (4 or 16), without which TensorRT-LLM has no kernels for it
#   EXPERTS=16       experts of the model of Arctic's true width
#   LAYERS=2         its layers
#   WIDTH=           other sizes for it, as flags of scripts/synthesize_arctic
#   STEPS="doctor tiny ootb bf16 halves text inputs pipeline wide"   what to do; text and inputs need halves, inputs needs text
#
# Exit codes: 0 all passed, 1 some failed, 2 wrong settings, 3 refused before starting.
set -euo pipefail
if [ "${1:-}" = --help ] || [ "${1:-}" = -h ]; then
  sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
  exit 0
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ranks=${RANKS:-8}
work=${WORK:-out/smoke}
experts=${EXPERTS:-16}
layers=${LAYERS:-2}
read -ra width <<<"${WIDTH:-}"
all="doctor tiny ootb bf16 halves text inputs pipeline wide"
read -ra steps <<<"${STEPS:-$all}"
tiny=$work/tiny-model
texts=("The future of AI is" "Open weights" "Snowflake Arctic is" "SELECT region, SUM(amount)")
text=(--input_text "${texts[@]}" --max_output_len 24)
plain=(arctic-trt build --backend tensorrt_llm --checkpoint_dir "$work/tiny-fp8" --output_dir "$work/plain" --max_batch_size 4)
passed=0 failed=0 count=0

wrong() {
  echo "scripts/smoke_8gpu.sh: $1; see --help" >&2
  exit 2
}

case $ranks in 2 | 4 | 8) ;; *) wrong "RANKS is $ranks, expected 2, 4 or 8" ;; esac
for step in "${steps[@]}"; do
  case " $all " in
    *" $step "*) ;;
    *) wrong "STEPS names $step, which is no step" ;;
  esac
done
if ! python -c 'import importlib.metadata as m; m.version("tensorrt_llm")' 2>/dev/null; then
  echo "scripts/smoke_8gpu.sh: this Python has no tensorrt_llm, which is what is to be checked; pip install tensorrt-llm==1.2.1" >&2
  exit 3
fi
if [ -e "$work" ]; then
  echo "scripts/smoke_8gpu.sh: $work is there already; remove it, or name another directory: WORK=... scripts/smoke_8gpu.sh" >&2
  exit 3
fi
mkdir -p "$work/logs"

# run NAME COMMAND...: PASS if it succeeds; its output is in the log
run() {
  local name=$1 log
  shift
  count=$((count + 1))
  log=$(printf '%s/logs/%02d-%s.log' "$work" "$count" "${name//[^a-zA-Z0-9]/-}")
  local began=$SECONDS code=0
  "$@" >"$log" 2>&1 || code=$?
  if [ "$code" = 0 ]; then
    verdict 0 "PASS  $(printf %-34s "$name") $((SECONDS - began)) s"
  else
    verdict 1 "FAIL  $(printf %-34s "$name") expected exit code 0, found $code; $log: $(reason "$log")"
  fi
}

reason() { # the program's own sentence, which mpirun's come after, or else the last line
  grep -m 1 "arctic-trt: error:" "$1" || tail -n 1 "$1"
}

# compare ARGUMENTS...: scripts/compare_runs prints its own line
compare() {
  local line code=0
  line=$("$here/compare_runs" "$@" 2>"$work/logs/compare") || code=1
  verdict "$code" "${line:-FAIL  compare_runs $*: $(tail -n 1 "$work/logs/compare")}"
}

verdict() {
  if [ "$1" = 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
  echo "$2"
}

generate() { # ENGINE OUT.json FLAGS...
  local engine=$1 out=$2
  shift 2
  mpirun -n "$ranks" --allow-run-as-root arctic-trt run --engine_dir "$engine" --json "$@" >"$out"
}

extended() { # PROMPTS RUN OUT ENGINE LOGITS: the torch engine's own logits of its prompts and tokens
  "$here/compare_runs" extend "$1" "$2" "$3" && generate "$4" "$3.json" --input_file "$3" --max_output_len 1 --end_id -1 --output_logits_npy "$5"
}

# both NAME CHECKPOINT PROMPTS BUILD_FLAGS...: build the checkpoint for both backends, run both, compare tokens and logits
both() {
  local name=$1 checkpoint=$2 prompts=$3 dir=$work/$1
  shift 3
  mkdir -p "$dir"
  local common=(--input_file "$prompts" --max_output_len 32 --end_id -1)
  run "$name: build torch" arctic-trt build --backend torch --checkpoint_dir "$checkpoint" --output_dir "$dir/torch" --max_seq_len 256
  run "$name: build TensorRT" arctic-trt build --backend tensorrt_llm --checkpoint_dir "$checkpoint" --output_dir "$dir/trt" \
    --max_batch_size 16 --max_seq_len 256 --max_num_tokens 2048 --gather_context_logits "$@"
  run "$name: run torch" generate "$dir/torch" "$dir/torch.json" "${common[@]}" --output_logits_npy "$dir/torch.npy"
  run "$name: run TensorRT" generate "$dir/trt" "$dir/trt.json" "${common[@]}" --output_logits_npy "$dir/trt.npy"
  run "$name: run torch on its own text" extended "$prompts" "$dir/torch.json" "$dir/whole.npy" "$dir/torch" "$dir/whole-logits.npy"
  compare --name "$name:" logits "$dir/torch.npy" "$dir/trt.npy" --tolerance_file "$dir/tolerance"
  local tolerance=()
  if [ -s "$dir/tolerance" ]; then tolerance=(--tolerance "$(cat "$dir/tolerance")"); fi
  compare --name "$name:" tokens "$prompts" "$dir/torch.json" "$dir/trt.json" "$dir/whole-logits.npy" "${tolerance[@]}"
}

quantize() { # MODEL OUT FLAGS...
  local model=$1 out=$2
  shift 2
  arctic-trt quantize --model_dir "$model" --output_dir "$out" "$@"
}

prepare() { # once: the tiny model in sizes that TensorRT-LLM has kernels for, its checkpoint, token ids, and texts as token ids
  if [ -e "$tiny" ]; then return; fi
  run "tiny: widen" "$here/synthesize_arctic" --output_dir "$tiny" --widen "$here/../tests/data/tiny-arctic" --factor "${WIDEN:-16}"
  run "tiny: prompts" python - "$work" "$tiny" "${texts[@]}" <<'PYTHON'
import sys
from pathlib import Path
import numpy as np
from arctic_trt.model.tokenizer import Tokenizer

work, tiny, *texts = sys.argv[1:]
np.save(Path(work) / "ids.npy", np.random.default_rng(3).integers(3, 400, (16, 24)))
rows = [Tokenizer(Path(tiny)).encode(text) for text in texts]
longest = max(map(len, rows))
np.save(Path(work) / "texts.npy", np.array([row + [-1] * (longest - len(row)) for row in rows]))
PYTHON
  run "tiny: quantize" quantize "$tiny" "$work/tiny-fp8" --tp_size "$ranks" --calib_size 16
}

reference() { # the torch engine's answer to the texts, and its logits of all of it
  if [ -e "$work/reference" ]; then return; fi
  mkdir "$work/reference"
  run "texts: build torch" arctic-trt build --backend torch --checkpoint_dir "$work/tiny-fp8" \
    --output_dir "$work/reference/engine" --max_seq_len 256
  run "texts: run torch" generate "$work/reference/engine" "$work/reference/run.json" "${text[@]}"
  run "texts: run torch on its own text" extended "$work/texts.npy" "$work/reference/run.json" "$work/reference/whole.npy" \
    "$work/reference/engine" "$work/reference/logits.npy"
}

like_reference() { # NAME RUN.json: the tokens of an engine that gathers no logits
  compare --name "$1:" tokens "$work/texts.npy" "$work/reference/run.json" "$2" "$work/reference/logits.npy"
}

step_doctor() { run "doctor" arctic-trt doctor --output_dir "$work"; }

step_tiny() { both "tiny" "$work/tiny-fp8" "$work/ids.npy"; }

step_ootb() { both "tiny without plugins" "$work/tiny-fp8" "$work/ids.npy" --gemm_plugin disable --moe_plugin disable; }

step_bf16() {
  run "tiny bf16: quantize" quantize "$tiny" "$work/tiny-bf16" --tp_size "$ranks" --calib_size 16 --qformat full_prec
  both "tiny bf16" "$work/tiny-bf16" "$work/ids.npy"
}

step_halves() { # one engine, built in two parts, as two machines would
  run "halves: first" "${plain[@]}" --ranks "0-$((ranks / 2 - 1))"
  run "halves: second" "${plain[@]}" --ranks "$((ranks / 2))-$((ranks - 1))"
  run "again: nothing to do" bash -c '"$@" 2>&1 | grep "nothing to do"' bash "${plain[@]}"
}

step_text() { # on the engine of step halves
  reference
  run "text" generate "$work/plain" "$work/text.json" "${text[@]}"
  like_reference "text" "$work/text.json"
  run "text, streamed" generate "$work/plain" "$work/streamed.json" "${text[@]}" --streaming
  compare --name "streamed or not:" equal "$work/text.json" "$work/streamed.json"
}

step_inputs() { # the same questions in every form: the answers are those of step text
  local sampling=(--temperature 0.8 --top_p 0.9 --random_seed 1) line word
  word=$("$here/compare_runs" word "$work/text.json" 2>/dev/null) || word=
  run "stop word" generate "$work/plain" "$work/stop.json" "${text[@]}" --stop_words "${word:-the}"
  compare --name "stop word:" stopped "$work/text.json" "$work/stop.json" "${word:-the}"
  run "stop word, streamed" generate "$work/plain" "$work/stop-streamed.json" "${text[@]}" --stop_words "${word:-the}" --streaming
  compare --name "stop word, streamed or not:" equal "$work/stop.json" "$work/stop-streamed.json"
  for line in "${texts[@]}"; do
    printf '{"text": "%s"}\n' "$line" >>"$work/texts.jsonl"
    printf '{"messages": [{"role": "user", "content": "%s"}]}\n' "$line" >>"$work/chat.jsonl"
  done
  run "token ids" generate "$work/plain" "$work/ids.json" --input_file "$work/texts.npy" --max_output_len 24
  compare --name "token ids or text:" equal "$work/text.json" "$work/ids.json"
  run "jsonl" generate "$work/plain" "$work/jsonl.json" --input_file "$work/texts.jsonl" --max_output_len 24
  compare --name "jsonl or text:" equal "$work/text.json" "$work/jsonl.json"
  run "chat" generate "$work/plain" "$work/chat.json" "${text[@]}" --chat
  run "chat, jsonl" generate "$work/plain" "$work/chat-jsonl.json" --input_file "$work/chat.jsonl" --max_output_len 24
  compare --name "chat or messages:" equal "$work/chat.json" "$work/chat-jsonl.json"
  run "sampling" generate "$work/plain" "$work/sampled.json" "${text[@]}" "${sampling[@]}"
  run "sampling, again" generate "$work/plain" "$work/sampled-again.json" "${text[@]}" "${sampling[@]}"
  compare --name "the same seed:" equal "$work/sampled.json" "$work/sampled-again.json"
  run "block reuse, chunked context" generate "$work/plain" "$work/reuse.json" "${text[@]}" \
    --kv_cache_enable_block_reuse --enable_chunked_context --kv_cache_free_gpu_memory_fraction 0.5
  like_reference "block reuse" "$work/reuse.json"
}

step_pipeline() {
  reference
  run "pipeline: quantize" quantize "$tiny" "$work/tiny-pp2" --tp_size "$((ranks / 2))" --pp_size 2 --calib_size 16
  run "pipeline: build" arctic-trt build --backend tensorrt_llm --checkpoint_dir "$work/tiny-pp2" --output_dir "$work/pp2"
  run "pipeline: run" generate "$work/pp2" "$work/pp2.json" "${text[@]}"
  like_reference "pipeline" "$work/pp2.json"
}

step_wide() {
  local wide=$work/wide
  run "wide: synthesize" "$here/synthesize_arctic" --output_dir "$wide" --layers "$layers" --experts "$experts" "${width[@]}"
  run "wide: quantize" quantize "$wide" "$work/wide-fp8" --tp_size "$ranks" --calib_dataset "$wide/samples.jsonl"
  both "wide" "$work/wide-fp8" "$wide/prompts.npy"
}

for step in "${steps[@]}"; do
  case $step in doctor | wide) ;; *) prepare ;; esac
  "step_$step"
done
echo "$passed passed, $failed failed; logs in $work/logs"
[ "$failed" = 0 ]
