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
criterion=reconstruction         # what goes: see prune.py --help
measure=parameters               # parameters, multiply-adds, bytes or latency
output=                          # folder for everything that is made, else results/search-TYPE
device=auto                      # auto, cpu, cuda, …
data_args=                       # further flags for every stage that reads data
block_args="--method reconstruct"  # further flags for block-level_finetuning.py
search_args=                     # further flags for the search, such as "--rounds 2 --score-examples 256"
model_args=                      # further flags for model-level_finetuning.py; "none" leaves that stage out
default_output=search-
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

if [[ $type == *-demo && -z $model_args ]] && ! was_given model; then
    model_args="--epochs 1"
fi

# --- the stages ----------------------------------------------------------------------------------------------------
cd "$output"
uniform=($budgets_of) searched=("${!uniform[@]}")  # the numbers of configurations in grid.json and in conf.json
names=("${uniform[@]/#/uniform-}" "${searched[@]/#/searched-}")
composed="$model_flags -p library --compact --overwrite"

stages <<END
${download-}
config_generator.py $model_flags -o grid.json --grid --attention $attention --linear $linear ${feed_forward:+--feed-forward $feed_forward} --overwrite
prune_scheme_generator.py -i grid.json
prune.py $model_flags -o pruned $criterion_flags --quiet
block-level_finetuning.py $model_flags -p pruned -o library --stats blocks.csv $data_flags $block_args
config_generator.py $model_flags --search library -c grid.json --budget-of $budgets_of --measure $measure -o conf.json --report search.json --overwrite $data_flags $search_args
compose_model.py $composed -c grid.json -n ${uniform[*]} -o uniform-{n} ${tokenizer:+-t ${tokenizer@Q}}
compose_model.py $composed -c conf.json -n ${searched[*]} -o searched-{n} ${tokenizer:+-t ${tokenizer@Q}}
END

reports=("${names[@]/#/report-}")
is_newer table.txt "${names[@]/%//record.json}" ||
    stages <<<"$evaluate -m ${model@Q} ${names[*]} --report report-{name}.json --device $device $data_flags"

if [[ $model_args != none ]]; then
    stages <<END
model-level_finetuning.py $composed -c grid.json -n ${uniform[*]} -o uniform-{n}.pth $data_flags $model_args
model-level_finetuning.py $composed -c conf.json -n ${searched[*]} -o searched-{n}.pth $data_flags $model_args
END
    is_newer table.txt "${names[@]/%/.pth}" ||
        stages <<<"$evaluate -m ${names[*]/%/.pth} --device $device $data_flags"
fi

tell_if_planned
"$PYTHON" "$repository/experiments/report.py" . >/dev/null
cat table.txt
echo "page: $output/report.html; table.txt and table.json beside it; $((SECONDS - started)) s" >&2
