#!/usr/bin/env bash
# The smallest of many configurations that keeps the quality: N configurations drawn at random, one library of all their
# blocks, tuned together, and then the composed models from the smallest up, until one is good enough as it is. Only if
# none is, the best of them is fine-tuned. Ends with a compact model, a table and a page. Run it again after an interruption, or
# with another --drop: what is there already is not made again.
set -euo pipefail

# --- what to run: every variable has a flag of its name, such as --linear "0.5 0.7" --------------------------------
type=t5-demo                     # t5-demo, distilbert-demo, t5 or distilbert; also the first argument
model=                           # a model of your own (folder), instead of downloading or building one
tokenizer=                       # its tokenizer, if not the one in its record or folder
data=                            # its data (folder or hub id), if not those in its record
number=500                       # how many configurations
attention="0.25 0.5"             # attention rates that each block's is drawn from
linear="0.3 0.5"                 # linear rates that each block's is drawn from
feed_forward=                    # rates of feed-forward neurons, likewise
seed=0                           # of the draws
drop=                            # how much quality may be lost, else 1 BLEU or 0.01 of the accuracy
criterion=reconstruction         # what goes: see prune.py --help
measure=parameters               # what size is counted in: parameters, multiply-adds, bytes or latency
output=                          # folder for everything that is made, else results/explore-TYPE
device=auto                      # auto, cpu, cuda, …
data_args=                       # further flags for every stage that reads data
block_args=                      # further flags for block-level_finetuning.py
model_args="--epochs 1"          # further flags for model-level_finetuning.py, if it is needed
default_output=explore-
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

if [[ -z $drop ]]; then
    [[ $evaluate == evaluate-t5.py ]] && drop=1 || drop=0.01
fi
if [[ $type == *-demo ]] && ! was_given model; then  # small models, of which an epoch takes seconds
    block_args="--epochs 6 $block_args"
fi

# --- the stages ----------------------------------------------------------------------------------------------------
cd "$output"
rates="--attention $attention --linear $linear ${feed_forward:+--feed-forward $feed_forward}"

stages <<END
${download-}
config_generator.py $model_flags --random -n $number --seed $seed $rates --overwrite
prune_scheme_generator.py
prune.py $model_flags -o pruned $criterion_flags --quiet
block-level_finetuning.py $model_flags -p pruned -o library --stats library.csv $data_flags $block_args
experiments/explore.py $model_flags -p library --drop $drop --measure $measure -o smallest.json --report explored.json --overwrite $data_flags
END
tell_if_planned

smallest="$model_flags -p library -c smallest.json -n 0 -o smallest --compact --overwrite"
if grep -q '"good_enough": true' explored.json; then
    finish="compose_model.py $smallest ${tokenizer:+-t ${tokenizer@Q}}"
else
    finish="model-level_finetuning.py $smallest --stats smallest.csv $data_flags $model_args"
fi
if [[ -f smallest/record.json ]] && ! grep -q "\"script\": \"${finish%% *}\"" smallest/record.json; then
    rm -r smallest  # of an earlier run whose other --drop ended in the other way; no script replaces another's output
fi
stages <<<"$finish"
is_newer report-smallest.json "$model" smallest/record.json || stages <<END
$evaluate -m ${model@Q} smallest --split validation --device $device $data_flags
$evaluate -m ${model@Q} --device $device $data_flags
$evaluate -m smallest --report report-{name}.json --original ${model@Q} --device $device $data_flags
END

"$PYTHON" "$repository/experiments/report.py" . >/dev/null
cat table.txt
echo "page: $output/report.html; table.txt and table.json, and the model, smallest, beside it; $((SECONDS - started)) s" >&2
