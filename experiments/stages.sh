# Sourced by the experiments, once they have read their flags: `type model tokenizer data out device data_args`.
# Sets `evaluate`, the evaluation script; `from`, the flags of stages that read data; `model`, downloaded if need be;
# and `started`. Defines `stage`, `note` and `score`. All stages run in one Python process (run_stages.py).

case $type in
    t5 | t5-demo) evaluate=evaluate-t5.py ;;
    distilbert | distilbert-demo) evaluate=evaluate-distilbert.py ;;
    *) echo "$(basename "$0"): error: unknown model type $type (see --help)" >&2; exit 2 ;;
esac

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
ensure_environment "$repository/requirements.txt"
mkdir -p "$out"
started=$SECONDS

coproc python_process { exec "$PYTHON" "$repository/experiments/run_stages.py"; }

stage() {  # stage SCRIPT ARGS…: run one of the suite's scripts
    local status line
    printf '%s\0' $(($# + 1)) "$@" --device "$device" >&"${python_process[1]}"
    IFS=' ' read -r status line <&"${python_process[0]}" || {
        echo "$(basename "$0"): error: the Python process ended in the middle of $1" >&2
        return 1
    }
    [[ -z $line ]] || printf '%s\n' "$line"
    return "$status"
}

note() {  # note FILE SCRIPT ARGS…: run a script, keep its JSON line in FILE
    stage "${@:2}" >"$1.part"
    mv "$1.part" "$1"
}

score() {  # score FILE MODEL [REPORT]: evaluate a model, and report its costs, unless FILE is newer than the model
    local changed=$2
    [[ -d $2 ]] && changed=$2/record.json
    [[ $1 -nt $changed && (-z ${3-} || -f $3) ]] || note "$1" "$evaluate" -m "$2" ${3:+--report "$3"} "${from[@]}" $data_args
}

if [[ -z $model ]]; then
    model=$repository/model/$type
    note "$out/download.json" download_model.py "$type" -o "$repository"
fi
from=()
[[ -z $tokenizer ]] || from+=(-t "$tokenizer")
[[ -z $data ]] || from+=(--data "$data")
