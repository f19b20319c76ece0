#!/usr/bin/env bash
# Composability at work: several pruned versions of one model, each fine-tuned twice for the same number of epochs,
# from the pruned weights (baseline) and from the library of fine-tuned blocks (composed), with the removed heads and
# neurons really taken out. Ends with a table and two pictures. Run it again after an interruption or a change of
# conf.json: what is there already is not made again.
set -euo pipefail

# --- what to run: every variable has a flag of its name, such as --attention "0.5 0.75" ----------------------------
type=t5-demo                # t5-demo, distilbert-demo, t5 or distilbert; also the first argument
model=                      # a model of your own (folder), instead of downloading or building one
tokenizer=                  # its tokenizer, if not the one in its record or folder
data=                       # its data (folder or hub id), if not those in its record
attention="0.25 0.5 0.25"   # attention rates, one for each configuration
linear="0.3 0.3 0.5"        # linear rates, one for each configuration
feed_forward=               # rates of feed-forward neurons, one for each configuration
output=                     # folder for everything that is made, else results/TYPE
device=auto                 # auto, cpu, cuda, …
data_args=                  # further flags for every stage that reads data, such as "--limit 1000 --max-length 128"
block_args=                 # further flags for block-level_finetuning.py
model_args=                 # further flags for model-level_finetuning.py, the same for baseline and composed
default_output=
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

if [[ $type == *-demo && -z $model ]]; then  # short runs: the demo is to take minutes
    block_args="--epoch-size 1000 $block_args" model_args="--epochs 2 --epoch-size 3000 $model_args"
fi
if [[ $type == distilbert-demo ]]; then  # small and quick to learn: it takes more pruning, and a higher rate, than IMDb
    was_given attention || attention="0.5 0.5 0.75"
    was_given linear || linear="0.5 0.7 0.5"
    model_args="--lr 1e-3 $model_args"
fi

# --- the stages ----------------------------------------------------------------------------------------------------
cd "$output"
if [[ -z $model ]]; then
    model=$repository/model/$type
    note download.json download_model.py "$type" -o "$repository"
fi
if [[ ! -f conf.json ]] || was_given attention || was_given linear || was_given feed_forward; then  # else perhaps edited
    stage config_generator.py -m "$model" --attention $attention --linear $linear \
        ${feed_forward:+--feed-forward $feed_forward} -n "$(wc -w <<<"$attention")" --overwrite >/dev/null
fi
note scheme.json prune_scheme_generator.py
note prune.json prune.py -m "$model" -o pruned
stage block-level_finetuning.py -m "$model" -p pruned -o tuned --stats blocks.csv $data_flags $block_args \
    >>block-level.jsonl  # a line a run: later runs add what changed

configurations=() series=() composed=() finished=()
for ((n = 0; n < $(sed 's/.*"configurations": \([0-9]*\).*/\1/' scheme.json); n++)); do
    configurations+=("$n" "$n") series+=(baseline composed)
    composed+=("pruned-$n" "tuned-$n") finished+=("baseline-$n" "composed-$n")
done
numbers=$(printf '%s\n' "${configurations[@]}" | uniq)

for run in baseline:pruned composed:tuned; do
    note "${run%:*}.json" model-level_finetuning.py -m "$model" -p "${run#*:}" -n $numbers -o "${run%:*}-{n}.pth" \
        --compact --overwrite $data_flags $model_args
    stage compose_model.py -m "$model" -p "${run#*:}" -n $numbers -o "${run#*:}-{n}" ${tokenizer:+-t "$tokenizer"} \
        --compact --overwrite >/dev/null
done
is_newer composed-scores.json "${composed[@]/%//record.json}" ||
    note composed-scores.json "$evaluate" -m "${composed[@]}" $data_flags
stale=()
for path in "$model" "${finished[@]/%/.pth}"; do
    is_newer "report-$(basename "$path" .pth).json" "$path" || stale+=("$path")
done
[[ ${#stale[@]} -eq 0 ]] || stage "$evaluate" -m "${stale[@]}" --report "report-{name}.json" $data_flags >/dev/null

"$PYTHON" "$repository/experiments/summarize.py" . >table.txt
stage plot_loss.py "${finished[@]/%/.csv}" --labels "${series[@]}" --panels $((${#series[@]} / 2)) --log --quiet >/dev/null
"$PYTHON" "$repository/experiments/pareto.py" $(printf 'report-%s.json ' "${finished[@]}") --relative \
    --labels "${configurations[@]}" --series "${series[@]}" --original "report-$(basename "$model" .pth).json" \
    -o pareto.png >/dev/null
cat table.txt
echo "table: $output/table.txt and table.json; pictures: loss.png and pareto.png beside it; $((SECONDS - started)) s" >&2
