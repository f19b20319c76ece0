#!/usr/bin/env bash
# Composability at work: several pruned versions of one model, each fine-tuned for the same number of epochs from the
# pruned weights (baseline) and from a library of fine-tuned blocks (composed), with the removed heads and neurons really
# taken out. There are two libraries: of blocks pruned by l1, as the baseline is, and of blocks pruned by the criterion.
# Ends with a table and two pictures. Run it again after an interruption or a change of conf.json: what is there already
# is not made again.
set -euo pipefail

# --- what to run: every variable has a flag of its name, such as --attention "0.5 0.75" ----------------------------
type=t5-demo                # t5-demo, distilbert-demo, t5 or distilbert; also the first argument
model=                      # a model of your own (folder), instead of downloading or building one
tokenizer=                  # its tokenizer, if not the one in its record or folder
data=                       # its data (folder or hub id), if not those in its record
attention="0.25 0.5 0.25"   # attention rates, one for each configuration
linear="0.3 0.3 0.5"        # linear rates, one for each configuration
feed_forward=               # rates of feed-forward neurons, one for each configuration
criterion=reconstruction    # what goes: reconstruction (beside l1), or l1 alone; the baseline's is always l1
output=                     # folder for everything that is made, else results/TYPE
device=auto                 # auto, cpu, cuda, …
data_args=                  # further flags for every stage that reads data, such as "--limit 1000 --max-length 128"
block_args=                 # further flags for block-level_finetuning.py; blocks are tuned apart (--method both)
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
series=(baseline composed) libraries=(pruned tuned) names=(baseline composed) by_criterion=
if [[ $criterion != l1 ]]; then
    series+=("composed-$criterion") libraries+=("tuned-$criterion") names=(baseline "composed, l1" "composed, $criterion")
    by_criterion="prune.py $model_flags -o pruned-$criterion $criterion_flags
block-level_finetuning.py $model_flags -p pruned-$criterion -o tuned-$criterion --stats blocks-$criterion.csv $data_flags --method both $block_args"
fi

stages <<END
${download-}
$configure
prune_scheme_generator.py
prune.py $model_flags -o pruned
block-level_finetuning.py $model_flags -p pruned -o tuned --stats blocks.csv $data_flags --method both $block_args
$by_criterion
$(for i in "${!series[@]}"; do
    from="$model_flags -p ${libraries[i]} -n ${numbers[*]} --compact --overwrite"
    echo "compose_model.py $from -o ${libraries[i]}-{n} ${tokenizer:+-t ${tokenizer@Q}}"
    echo "model-level_finetuning.py $from -o ${series[i]}-{n}.pth $data_flags $model_args"
done)
END

before=() after=()  # fine-tuning: the models whose reports are missing or older than they are
models=() configurations=() owners=()  # all fine-tuned models, with the configuration and the series of each
is_newer "report-$(basename "$model" .pth).json" "$model" || after+=("${model@Q}")
for n in "${numbers[@]}"; do
    for i in "${!series[@]}"; do
        name=${series[i]}-$n
        is_newer "report-$name.json" "$name.pth" || before+=("${libraries[i]}-$n") after+=("$name.pth")
        models+=("$name") configurations+=("$n") owners+=("${names[i]}")
    done
done
if [[ ${#after[@]} -gt 0 ]]; then
    stages <<END
${before:+$evaluate -m ${before[*]} --device $device $data_flags}
$evaluate -m ${after[*]} --report report-{name}.json --device $device $data_flags
END
fi

reports=("${models[@]/#/report-}")
"$PYTHON" "$repository/experiments/summarize.py" . "$criterion" >table.txt
"$PYTHON" "$repository/plot_loss.py" "${models[@]/%/.csv}" --labels "${owners[@]}" --panels ${#numbers[@]} --log --quiet >/dev/null
"$PYTHON" "$repository/experiments/pareto.py" "${reports[@]/%/.json}" --relative \
    --labels "${configurations[@]}" --series "${owners[@]}" --original "report-$(basename "$model" .pth).json" \
    -o pareto.png >/dev/null
cat table.txt
echo "table: $output/table.txt and table.json; pictures: loss.png and pareto.png beside it; $((SECONDS - started)) s" >&2
