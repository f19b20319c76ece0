# Sourced by the experiments after their variables. Reads the flags: --some-name VALUE sets the variable some_name;
# the first argument, if it is no flag, sets `type`; --help shows the variables with what stands behind them. Then finds
# or makes a Python environment (PYTHON) and the folder $output.
# Defines `was_given NAME`; `stages`, which runs the stages on its stdin, one a line, in one process, and adds their
# results to results.jsonl, or with --plan plans them; `tell_if_planned`; and `is_newer`. Sets `evaluate`, the evaluation
# script; `model_flags`, for the stages that read the model; `data_flags`, for those that read data too; and
# `criterion_flags`, for prune.py. What may hold a space is quoted: ${model@Q}.

script=$(basename "$0")
again=$(printf ' %q' bash "$0" "$@")
export EXPERIMENT=${again# }  # which the results tell
given=" " plan=

usage() {
    echo "usage: experiments/$script [TYPE] [--plan] [--NAME VALUE …]"
    sed -n 's/^\([a-z_]*\)=\("[^"]*"\|[^ ]*\) *# \(.*\)/\1\t\3\t\2/p' "$0" | while IFS=$'\t' read -r name text default; do
        printf '  --%-15s %s%s\n' "${name//_/-}" "$text" "${default:+ (default: ${default//\"/})}"
    done
}

fail() {
    echo "$script: error: $* (see --help)" >&2
    exit 2
}

was_given() {  # was_given NAME: whether the flag stood on the command line
    [[ $given == *" $1 "* ]]
}

if [[ $# -gt 0 && $1 != -* ]]; then type=$1; shift; fi
while [[ $# -gt 0 ]]; do
    case $1 in
        -h | --help) usage; exit 0 ;;
        --plan) plan=plan.jsonl; shift; continue ;;
        -m) name=model ;;
        -o) name=output ;;
        --*) name=${1#--} name=${name//-/_} ;;
        *) fail "unknown option $1" ;;
    esac
    grep -q "^$name=.* # " "$0" || fail "unknown option $1"
    [[ $# -ge 2 ]] || fail "$1 needs a value"
    printf -v "$name" '%s' "$2"
    given+="$name "
    shift 2
done

case $type in
    t5 | t5-demo) evaluate=evaluate-t5.py ;;
    distilbert | distilbert-demo) evaluate=evaluate-distilbert.py ;;
    *) fail "unknown type $type" ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
needs_data=$(PYTHONPATH=$repository "${PYTHON:-python3}" -c '
import sys
from common.pruning.criteria import CRITERIA
sys.exit(" or ".join(CRITERIA)) if sys.argv[1] not in CRITERIA else print(CRITERIA[sys.argv[1]].needs_data)
' "$criterion" 2>&1) || fail "--criterion is $needs_data, not $criterion"
ensure_environment "$repository/requirements.txt"
started=$SECONDS
output=$(realpath -m "${output:-$repository/results/$default_output$type}")
if [[ -n $plan ]]; then  # among links to what is there, in a folder that is thrown away
    planned=$(mktemp -d)
    trap 'rm -rf "$planned"' EXIT
    [[ ! -d $output ]] || cp -rs "$output/." "$planned"
    output=$planned
fi
mkdir -p "$output"
for name in model tokenizer data; do  # folders, or a hub id
    [[ ! -e ${!name} ]] || printf -v "$name" '%s' "$(realpath "${!name}")"
done
if [[ -z $model ]]; then  # the first stage makes it
    model=$repository/model/$type
    download="download_model.py $type -o ${repository@Q} --device $device"
    if [[ -n $plan ]]; then
        [[ -e $model ]] || fail "--plan: there is no model yet; make it with python $download"
        download=
    fi
fi
model_flags="-m ${model@Q} --device $device"
data_flags="${tokenizer:+-t ${tokenizer@Q}} ${data:+--data ${data@Q}} $data_args"
criterion_flags="--criterion $criterion"
[[ $needs_data == False ]] || criterion_flags+=" $data_flags"

stages() {  # in the background, since bash heeds no signal while it waits for what runs in the foreground
    if [[ -n $plan ]]; then
        "$PYTHON" "$repository/experiments/plan.py" "$plan" <&0 &
    else
        "$PYTHON" "$repository/experiments/stages.py" <&0 >>results.jsonl &
    fi
    running=$!
    local code=0
    wait "$running" || code=$?
    running=
    return "$code"
}

tell_if_planned() {  # with --plan: tell the plan of all stages so far, and end
    [[ -z $plan ]] || { stages </dev/null; exit 0; }
}

end() {  # end SIGNAL: the running stage saves where it is
    trap - INT TERM HUP  # a second signal ends the script at once
    if [[ -n $running ]]; then
        kill -TERM "$running" 2>/dev/null || true
        wait "$running" || true
    fi
    echo "$script: interrupted by SIG$1; to go on:$again" >&2
    exit $((128 + $(kill -l "$1")))
}

running=
for signal in INT TERM HUP; do trap "end $signal" "$signal"; done

is_newer() {  # is_newer FILE PATHS…: whether FILE is there, and newer than all the paths
    local path
    for path in "${@:2}"; do [[ $1 -nt $path ]] || return 1; done
}
