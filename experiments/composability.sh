#!/usr/bin/env bash
# Composability at work: several pruned versions of one model, made in two ways. The baseline fine-tunes each of them on
# its own, from the weights pruned by l1, and once more from those pruned as the library is. The other way fine-tunes one
# library, of blocks pruned by the criterion, and composes all versions out of it, without fine-tuning of their own unless
# --finish says so. Removed heads and neurons are really taken out. Ends with a table and a page. Run it again after an
# interruption or a change of conf.json: what is there already is not made again.
set -euo pipefail

# --- what to run: every variable has a flag of its name, such as --attention "0.5 0.75" ----------------------------
type=t5-demo                # t5-demo, distilbert-demo, t5 or distilbert; also the first argument
model=                      # a model of your own (folder), instead of downloading or building one
tokenizer=                  # its tokenizer, if not the one in its record or folder
data=                       # its data (folder or hub id), if not those in its record
attention="0.25 0.5 0.25 0.5 0.25 0.5 0.25 0.5"  # attention rates, one for each configuration
linear="0.3 0.3 0.5 0.5 0.3 0.3 0.5 0.5"         # linear rates, one for each configuration
feed_forward="0 0 0 0 0.5 0.5 0.5 0.5"           # rates of feed-forward neurons, likewise; none if other rates are given
criterion=reconstruction    # what goes from the library's blocks: see prune.py --help
finish=0                    # epochs of fine-tuning that each composed model gets of its own
output=                     # folder for everything that is made, else results/TYPE
device=auto                 # auto, cpu, cuda, …
data_args=                  # further flags for every stage that reads data, such as "--limit 1000 --max-length 128"
block_args=                 # further flags for block-level_finetuning.py; blocks are tuned together (--method joint)
model_args=                 # further flags for model-level_finetuning.py
default_output=
source "$(dirname "${BASH_SOURCE[0]}")/options.sh"

if { was_given attention || was_given linear; } && ! was_given feed_forward; then
    feed_forward=
fi
if [[ $type == t5-demo ]] && ! was_given model; then  # short runs: the demo is to take minutes
    block_args="--epochs 1 --epoch-size 4600 --distill 0 --calibration 1000 --held-out 128 $block_args"
    model_args="--epochs 2 --epoch-size 3000 $model_args"
fi
if [[ $type == distilbert-demo ]]; then  # small and quick to learn: it takes more pruning than IMDb
    if ! { was_given attention || was_given linear || was_given feed_forward; }; then
        attention="0.5 0.5 0.75 0.75 0.5 0.5 0.75 0.75"
        linear="0.5 0.7 0.5 0.7 0.5 0.7 0.5 0.7"
        feed_forward="0 0 0 0 0.75 0.75 0.75 0.75"
    fi
    if ! was_given model; then
        model_args="--epochs 2 --epoch-size 4000 $model_args"
    fi
fi
if [[ $type == *-demo ]] && ! was_given model; then
    evaluate+=" --quiet"  # takes a minute, and the table at the end says all of it
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
models="$model_flags -n ${numbers[*]} --compact --overwrite"
[[ $finish == 0 ]] && hush=--quiet || hush=  # nothing is trained then
pruned=pruned-$criterion library=library-$criterion composed=composed-$criterion
matched=  # the baselines that are pruned as the library is
[[ $criterion == l1 ]] || matched="$models -p $pruned -o baseline-$criterion-{n}.pth"

stages <<END
${download-}
$configure
prune_scheme_generator.py
prune.py $model_flags -o pruned-l1 --quiet
prune.py $model_flags -o $pruned $criterion_flags --quiet
block-level_finetuning.py $model_flags -p $pruned -o $library --stats $library.csv $data_flags --method joint $block_args
compose_model.py $models -p pruned-l1 -o pruned-{n} ${tokenizer:+-t ${tokenizer@Q}} --quiet
model-level_finetuning.py $models -p pruned-l1 -o baseline-{n}.pth $data_flags $model_args
${matched:+model-level_finetuning.py $matched $data_flags $model_args}
model-level_finetuning.py $models -p $library -o $composed-{n}.pth $data_flags $model_args --epochs $finish $hush
END

plain=() reported=()  # to evaluate: models whose figures are missing, or older than they are
original=report-$(basename "$model" .pth).json
is_newer "$original" "$model" || reported+=("${model@Q}")
for n in "${numbers[@]}"; do
    if ! is_newer "report-baseline-$n.json" "baseline-$n.pth"; then
        plain+=("pruned-$n" ${matched:+"baseline-$criterion-$n.pth"})
        reported+=("baseline-$n.pth")
    fi
    is_newer "report-$composed-$n.json" "$composed-$n.pth" || reported+=("$composed-$n.pth")
done
if [[ ${#reported[@]} -gt 0 ]]; then
    stages <<END
${plain:+$evaluate -m ${plain[*]} --device $device $data_flags}
$evaluate -m ${reported[*]} --report report-{name}.json --device $device $data_flags
END
fi

tell_if_planned
"$PYTHON" "$repository/experiments/report.py" . --criterion "$criterion" >/dev/null
cat table.txt
echo "page: $output/report.html; table.txt and table.json beside it; $((SECONDS - started)) s" >&2
