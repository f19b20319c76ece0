#!/usr/bin/env bash
# Composability at work: several pruned versions of one model, each fine-tuned twice for the same number of epochs,
# from the pruned weights (baseline) and from the library of fine-tuned blocks (composed), with the removed heads and
# neurons really taken out. Ends with a table and two pictures. Rerun it after an interruption or a change of conf.json:
# what is there already is not made again.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: experiments/composability.sh [MODEL_TYPE] [options]

  MODEL_TYPE             t5-demo (default), distilbert-demo, t5 or distilbert
  -m, --model FOLDER     a model of your own, instead of downloading or building MODEL_TYPE
  --tokenizer FOLDER     its tokenizer, if not the one in its record or folder
  --data SOURCE          its data (folder or hub id), if not those in its record
  --attention "R …"      attention rates, one for each configuration (default "0.25 0.5 0.25"; distilbert-demo
                         "0.5 0.5 0.75")
  --linear "R …"         linear rates, one for each configuration (default "0.3 0.3 0.5"; distilbert-demo
                         "0.5 0.7 0.5")
  --feed-forward "R …"   rates of feed-forward neurons, one for each configuration (default: none are removed)
  -o, --output FOLDER    everything that is made (default results/MODEL_TYPE)
  --device NAME          auto, cpu, cuda, …
  --data-args "…"        further flags for every stage that reads data, such as "--limit 1000 --max-length 128"
  --block-args "…"       further flags for block-level_finetuning.py
  --model-args "…"       further flags for model-level_finetuning.py, the same for baseline and composed
TEXT
}

type=t5-demo model= tokenizer= data= attention= linear= feed_forward= out= device=auto
data_args= block_args= model_args=
default_attention="0.25 0.5 0.25" default_linear="0.3 0.3 0.5"
if [[ $# -gt 0 && $1 != -* ]]; then type=$1; shift; fi
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        -m | --model | --tokenizer | --data | --attention | --linear | --feed-forward | -o | --output | --device \
            | --data-args | --block-args | --model-args)
            [[ $# -ge 2 ]] || { echo "composability.sh: error: $1 needs a value" >&2; exit 2; } ;;&
        -m | --model) model=$2 ;;
        --tokenizer) tokenizer=$2 ;;
        --data) data=$2 ;;
        --attention) attention=$2 ;;
        --linear) linear=$2 ;;
        --feed-forward) feed_forward=$2 ;;
        -o | --output) out=$2 ;;
        --device) device=$2 ;;
        --data-args) data_args=$2 ;;
        --block-args) block_args=$2 ;;
        --model-args) model_args=$2 ;;
        *) echo "composability.sh: error: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
    shift 2
done
if [[ $type == *-demo && -z $model ]]; then  # short runs: the demo is to take minutes
    block_args="--epoch-size 1000 $block_args" model_args="--epochs 2 --epoch-size 3000 $model_args"
fi
if [[ $type == distilbert-demo ]]; then  # small and quick to learn: it takes more pruning, and a higher rate, than IMDb
    default_attention="0.5 0.5 0.75" default_linear="0.5 0.7 0.5"
    model_args="--lr 1e-3 $model_args"
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${out:-$(dirname "$here")/results/$type}
source "$here/stages.sh"

compose_and_score() {  # compose_and_score LIBRARY NTH
    stage compose_model.py -m "$model" -p "$out/$1" -c "$out/conf.json" -n "$2" ${tokenizer:+-t "$tokenizer"} \
        -o "$out/$1-$2" --compact --overwrite >/dev/null
    score "$out/$1-$2.json" "$out/$1-$2"
}

if [[ ! -f $out/conf.json || -n $attention$linear$feed_forward ]]; then  # one that is there may have been edited
    read -ra attention <<<"${attention:-$default_attention}"
    read -ra linear <<<"${linear:-$default_linear}"
    read -ra feed_forward <<<"$feed_forward"
    stage config_generator.py -m "$model" -o "$out/conf.json" --attention "${attention[@]}" --linear "${linear[@]}" \
        ${feed_forward:+--feed-forward "${feed_forward[@]}"} -n ${#attention[@]} --overwrite >/dev/null
fi
note "$out/scheme.json" prune_scheme_generator.py -i "$out/conf.json" -o "$out/conf_prune.json" --overwrite
note "$out/prune.json" prune.py -m "$model" -c "$out/conf_prune.json" -o "$out/pruned"
stage block-level_finetuning.py -m "$model" -p "$out/pruned" -o "$out/tuned" --stats "$out/blocks.csv" \
    "${from[@]}" $data_args $block_args >>"$out/block-level.jsonl"  # a line a run: later runs add what changed

count=$("$PYTHON" -c 'import json, sys; print(json.load(open(sys.argv[1]))["configurations"])' "$out/scheme.json")
for ((n = 0; n < count; n++)); do
    for run in baseline:pruned composed:tuned; do
        name=${run%:*}-$n
        note "$out/$name-training.json" model-level_finetuning.py -m "$model" -p "$out/${run#*:}" \
            -c "$out/conf.json" -n "$n" -o "$out/$name.pth" --stats "$out/$name.csv" --compact --overwrite \
            "${from[@]}" $data_args $model_args
    done
done

score "$out/dense.json" "$model" "$out/dense-report.json"
for ((n = 0; n < count; n++)); do
    compose_and_score pruned "$n"
    compose_and_score tuned "$n"
    for run in baseline composed; do
        score "$out/$run-$n.json" "$out/$run-$n.pth" "$out/$run-$n-report.json"
    done
done

"$PYTHON" "$repository/experiments/summarize.py" "$out" >"$out/table.txt"
curves=() labels=() reports=() points=() series=()
for ((n = 0; n < count; n++)); do
    curves+=("$out/baseline-$n.csv" "$out/composed-$n.csv")
    labels+=("baseline" "composed")
    reports+=("$out/baseline-$n-report.json" "$out/composed-$n-report.json")
    points+=("$n" "$n")
    series+=("baseline" "composed")
done
"$PYTHON" "$repository/plot_loss.py" "${curves[@]}" --labels "${labels[@]}" --panels "$count" --log -o "$out/loss.png" \
    --overwrite --quiet >/dev/null
"$PYTHON" "$repository/experiments/pareto.py" "${reports[@]}" --labels "${points[@]}" --series "${series[@]}" \
    --original "$out/dense-report.json" --relative -o "$out/pareto.png" >/dev/null
cat "$out/table.txt"
echo "table: $out/table.txt and $out/table.json; pictures: $out/loss.png, $out/pareto.png;" \
    "$((SECONDS - started)) s in all" >&2
