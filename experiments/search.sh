#!/usr/bin/env bash
# The best configuration for a budget, found without training: a library of every block at every rate of a grid, a score
# for each variant, and for each budget the combination that loses least; beside it the uniform configuration of equal
# cost, before and after equal model-level fine-tuning. Ends with a table and three pictures. Run it again after an
# interruption: what is there already is not made again.
set -euo pipefail

# --- what to run: every variable has a flag of its name, such as --linear "0 0.5" ----------------------------------
type=t5-demo                     # t5-demo, distilbert-demo, t5 or distilbert; also the first argument
model=                           # a model of your own (folder), instead of downloading or building one
tokenizer=                       # its tokenizer, if not the one in its record or folder
data=                            # its data (folder or hub id), if not those in its record
attention="0 0.25 0.5 0.75"      # the grid's attention rates
linear="0 0.3 0.5 0.7 0.9"       # the grid's linear rates
feed_forward=                    # the grid's rates of feed-forward neurons
budgets_of="5 9 10 13 14"        # the uniform configurations of the grid whose costs are the budgets
measure=parameters               # parameters, multiply-adds, bytes or latency
output=                          # folder for everything that is made, else results/search-TYPE
device=auto                      # auto, cpu, cuda, …
data_args=                       # further flags for every stage that reads data
block_args="--method reconstruct"  # further flags for block-level_finetuning.py
search_args=                     # further flags for the search, such as "--rounds 2 --score-examples 256"
model_args=                      # further flags for model-level_finetuning.py; "none" leaves that stage out
default_output=search-
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

if [[ $type == *-demo && -z $model && -z $model_args ]]; then
    model_args="--epochs 1"
    [[ $type == t5-demo ]] || model_args+=" --lr 1e-3"
fi

# --- the stages ----------------------------------------------------------------------------------------------------
cd "$output"
if [[ -z $model ]]; then
    model=$repository/model/$type
    note download.json download_model.py "$type" -o "$repository"
fi
stage config_generator.py -m "$model" -o grid.json --grid --attention $attention --linear $linear \
    ${feed_forward:+--feed-forward $feed_forward} --overwrite >/dev/null
note scheme.json prune_scheme_generator.py -i grid.json
stage prune.py -m "$model" -o pruned --quiet >/dev/null
stage block-level_finetuning.py -m "$model" -p pruned -o library --stats blocks.csv $data_flags $block_args \
    >>block-level.jsonl  # a line a run: later runs add what changed
note found.json config_generator.py -m "$model" --search library -c grid.json --budget-of $budgets_of \
    --measure "$measure" -o conf.json --report search.json --overwrite $data_flags $search_args

uniform=($budgets_of) searched=("${!uniform[@]}")
labels=("${searched[@]}" "${searched[@]}") series=("${uniform[@]/*/uniform}" "${searched[@]/*/searched}")
names=("${uniform[@]/#/uniform-}" "${searched[@]/#/searched-}")

compose=(stage compose_model.py -m "$model" -p library --compact --overwrite ${tokenizer:+-t "$tokenizer"})
"${compose[@]}" -c grid.json -n "${uniform[@]}" -o "uniform-{n}" >/dev/null
"${compose[@]}" -c conf.json -n "${searched[@]}" -o "searched-{n}" >/dev/null
is_newer composed-scores.json "${names[@]/%//record.json}" ||
    note composed-scores.json "$evaluate" -m "$model" "${names[@]}" --report "report-{name}.json" $data_flags

if [[ $model_args != none ]]; then
    finetune=(model-level_finetuning.py -m "$model" -p library --compact --overwrite $data_flags $model_args)
    note uniform-training.json "${finetune[@]}" -c grid.json -n "${uniform[@]}" -o "uniform-{n}.pth"
    note searched-training.json "${finetune[@]}" -c conf.json -n "${searched[@]}" -o "searched-{n}.pth"
    is_newer finetuned-scores.json "${names[@]/%/.pth}" ||
        note finetuned-scores.json "$evaluate" -m "$model" "${names[@]/%/.pth}" $data_flags
fi

"$PYTHON" "$repository/experiments/pareto.py" $(printf 'report-%s.json ' "${names[@]}") --relative \
    --labels "${labels[@]}" --series "${series[@]}" --original "report-$(basename "$model" .pth).json" \
    --against nonzero_parameters multiply_adds seconds_per_batch -o pareto.png >/dev/null
"$PYTHON" "$repository/experiments/search_report.py" . >table.txt
cat table.txt
echo "table: $output/table.txt and table.json; pictures: pareto.png, rates.png and prediction.png beside it;" \
    "$((SECONDS - started)) s" >&2
