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

if [[ $type == *-demo ]] && ! was_given model; then  # short runs: the demo is to take minutes
    block_args="--epoch-size 1000 $block_args" model_args="--epochs 2 --epoch-size 3000 $model_args"
fi
if [[ $type == distilbert-demo ]]; then  # small and quick to learn: it takes more pruning, and a higher rate, than IMDb
    was_given attention || attention="0.5 0.5 0.75"
    was_given linear || linear="0.5 0.7 0.5"
    model_args="--lr 1e-3 $model_args"
fi

# --- the stages ----------------------------------------------------------------------------------------------------
cd "$output"
count=$(wc -w <<<"$attention")
configure="config_generator.py $model_flags --attention $attention --linear $linear -n $count --overwrite"
configure+=${feed_forward:+ --feed-forward $feed_forward}
if [[ -f conf.json ]] && ! { was_given attention || was_given linear || was_given feed_forward; }; then  # perhaps edited
    count=$("$PYTHON" -c 'import json; print(len(json.load(open("conf.json"))["configs"]))')
    configure=
fi
numbers=($(seq 0 $((count - 1))))
baseline=("${numbers[@]/#/baseline-}") composed=("${numbers[@]/#/composed-}")

stages <<END
${download-}
$configure
prune_scheme_generator.py
prune.py $model_flags -o pruned
block-level_finetuning.py $model_flags -p pruned -o tuned --stats blocks.csv $data_flags $block_args
compose_model.py $model_flags -p pruned -n ${numbers[*]} -o pruned-{n} ${tokenizer:+-t ${tokenizer@Q}} --compact --overwrite
compose_model.py $model_flags -p tuned -n ${numbers[*]} -o tuned-{n} ${tokenizer:+-t ${tokenizer@Q}} --compact --overwrite
model-level_finetuning.py $model_flags -p pruned -n ${numbers[*]} -o baseline-{n}.pth --compact --overwrite $data_flags $model_args
model-level_finetuning.py $model_flags -p tuned -n ${numbers[*]} -o composed-{n}.pth --compact --overwrite $data_flags $model_args
END

before=() after=()  # fine-tuning: the models whose reports are missing or older than they are
is_newer "report-$(basename "$model" .pth).json" "$model" || after+=("${model@Q}")
for n in "${numbers[@]}"; do
    is_newer "report-baseline-$n.json" "baseline-$n.pth" || before+=("pruned-$n") after+=("baseline-$n.pth")
    is_newer "report-composed-$n.json" "composed-$n.pth" || before+=("tuned-$n") after+=("composed-$n.pth")
done
if [[ ${#after[@]} -gt 0 ]]; then
    stages <<END
${before:+$evaluate -m ${before[*]} --device $device $data_flags}
$evaluate -m ${after[*]} --report report-{name}.json --device $device $data_flags
END
fi

"$PYTHON" "$repository/experiments/summarize.py" . >table.txt
"$PYTHON" "$repository/plot_loss.py" $(paste -d ' ' <(printf '%s.csv\n' "${baseline[@]}") <(printf '%s.csv\n' "${composed[@]}")) \
    --labels $(printf 'baseline composed %.0s' "${numbers[@]}") --panels ${#numbers[@]} --log --quiet >/dev/null
"$PYTHON" "$repository/experiments/pareto.py" $(printf 'report-%s.json ' "${baseline[@]}" "${composed[@]}") --relative \
    --labels "${numbers[@]}" "${numbers[@]}" --series "${baseline[@]/*/baseline}" "${composed[@]/*/composed}" \
    --original "report-$(basename "$model" .pth).json" -o pareto.png >/dev/null
cat table.txt
echo "table: $output/table.txt and table.json; pictures: loss.png and pareto.png beside it; $((SECONDS - started)) s" >&2
