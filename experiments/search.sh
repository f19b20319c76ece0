#!/usr/bin/env bash
# The best configuration for a budget, found without training: a library of every block at every rate of a grid, a score
# for each variant, and for each budget the combination that loses least; beside it the uniform configuration of equal
# cost, before and after equal model-level fine-tuning. Ends with a table and three pictures. Rerun it after an
# interruption: what is there already is not made again.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: experiments/search.sh [MODEL_TYPE] [options]

  MODEL_TYPE             t5-demo (default), distilbert-demo, t5 or distilbert
  -m, --model FOLDER     a model of your own, instead of downloading or building MODEL_TYPE
  --tokenizer FOLDER     its tokenizer, if not the one in its record or folder
  --data SOURCE          its data (folder or hub id), if not those in its record
  --attention "R …"      the grid's attention rates (default "0 0.25 0.5 0.75")
  --linear "R …"         the grid's linear rates (default "0 0.3 0.5 0.7 0.9")
  --feed-forward "R …"   the grid's rates of feed-forward neurons (default: none are removed)
  --budgets-of "N …"     the uniform configurations of the grid whose costs are the budgets (default "5 9 10 13 14")
  --measure NAME         parameters (default), multiply-adds, bytes or latency
  -o, --output FOLDER    everything that is made (default results/search-MODEL_TYPE)
  --device NAME          auto, cpu, cuda, …
  --data-args "…"        further flags for every stage that reads data
  --block-args "…"       further flags for block-level_finetuning.py (default "--method reconstruct")
  --search-args "…"      further flags for the search, such as "--rounds 2 --score-examples 256"
  --model-args "…"       further flags for model-level_finetuning.py; "none" leaves that stage out
TEXT
}

type=t5-demo model= tokenizer= data= out= device=auto
attention="0 0.25 0.5 0.75" linear="0 0.3 0.5 0.7 0.9" feed_forward=
budgets="5 9 10 13 14" measure=parameters data_args= block_args="--method reconstruct" search_args= model_args=
if [[ $# -gt 0 && $1 != -* ]]; then type=$1; shift; fi
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        -m | --model | --tokenizer | --data | --attention | --linear | --feed-forward | --budgets-of | --measure | -o \
            | --output | --device | --data-args | --block-args | --search-args | --model-args)
            [[ $# -ge 2 ]] || { echo "search.sh: error: $1 needs a value" >&2; exit 2; } ;;&
        -m | --model) model=$2 ;;
        --tokenizer) tokenizer=$2 ;;
        --data) data=$2 ;;
        --attention) attention=$2 ;;
        --linear) linear=$2 ;;
        --feed-forward) feed_forward=$2 ;;
        --budgets-of) budgets=$2 ;;
        --measure) measure=$2 ;;
        -o | --output) out=$2 ;;
        --device) device=$2 ;;
        --data-args) data_args=$2 ;;
        --block-args) block_args=$2 ;;
        --search-args) search_args=$2 ;;
        --model-args) model_args=$2 ;;
        *) echo "search.sh: error: unknown option $1 (see --help)" >&2; exit 2 ;;
    esac
    shift 2
done
if [[ $type == *-demo && -z $model && -z $model_args ]]; then
    model_args="--epochs 1"
    [[ $type == t5-demo ]] || model_args+=" --lr 1e-3"
fi

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${out:-$(dirname "$here")/results/search-$type}
source "$here/stages.sh"

read -ra attention <<<"$attention"
read -ra linear <<<"$linear"
read -ra feed_forward <<<"$feed_forward"
read -ra budgets <<<"$budgets"

stage config_generator.py -m "$model" -o "$out/grid.json" --grid --attention "${attention[@]}" \
    --linear "${linear[@]}" ${feed_forward:+--feed-forward "${feed_forward[@]}"} --overwrite >/dev/null
note "$out/scheme.json" prune_scheme_generator.py -i "$out/grid.json" -o "$out/conf_prune.json" --overwrite
stage prune.py -m "$model" -c "$out/conf_prune.json" -o "$out/pruned" --quiet >/dev/null
stage block-level_finetuning.py -m "$model" -p "$out/pruned" -o "$out/library" --stats "$out/blocks.csv" \
    "${from[@]}" $data_args $block_args >>"$out/block-level.jsonl"
note "$out/found.json" config_generator.py -m "$model" --search "$out/library" -c "$out/grid.json" \
    --budget-of "${budgets[@]}" --measure "$measure" -o "$out/conf.json" --report "$out/search.json" --overwrite \
    "${from[@]}" $data_args $search_args

score "$out/dense.json" "$model" "$out/dense-report.json"
reports=() labels=() series=()
for ((n = 0; n < ${#budgets[@]}; n++)); do
    for way in "uniform:$out/grid.json:${budgets[n]}" "searched:$out/conf.json:$n"; do
        IFS=: read -r name configurations nth <<<"$way"
        name=$name-$n
        wanted=(-m "$model" -p "$out/library" -c "$configurations" -n "$nth" --compact --overwrite)
        stage compose_model.py "${wanted[@]}" ${tokenizer:+-t "$tokenizer"} -o "$out/$name" >/dev/null
        score "$out/$name-composed.json" "$out/$name" "$out/$name-composed-report.json"
        if [[ $model_args != none ]]; then
            note "$out/$name-training.json" model-level_finetuning.py "${wanted[@]}" -o "$out/$name.pth" \
                --stats "$out/$name.csv" "${from[@]}" $data_args $model_args
            score "$out/$name-finetuned.json" "$out/$name.pth"
        fi
        reports+=("$out/$name-composed-report.json")
        labels+=("$n")
        series+=("${name%-*}")
    done
done

"$PYTHON" "$repository/experiments/pareto.py" "${reports[@]}" --labels "${labels[@]}" --series "${series[@]}" \
    --original "$out/dense-report.json" --relative --against nonzero_parameters multiply_adds seconds_per_batch \
    -o "$out/pareto.png" >/dev/null
"$PYTHON" "$repository/experiments/search_report.py" "$out" >"$out/table.txt"
cat "$out/table.txt"
echo "table: $out/table.txt and $out/table.json; pictures: $out/pareto.png, rates.png and prediction.png beside it;" \
    "$((SECONDS - started)) s in all" >&2
