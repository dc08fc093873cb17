#!/bin/sh
# From text to a trained GPT-2 on two CPU cores, with a preemption half-way. Every command it runs is shown.
set -eu

data=data/demo
run=runs/quickstart-$(date +%Y%m%d-%H%M%S)
log=$run.log
mkdir -p "$(dirname "$run")"

show() {
    printf '\n$'
    for word; do
        case $word in
            *[!A-Za-z0-9_./=-]*) printf " '%s'" "$word" ;;
            *) printf ' %s' "$word" ;;
        esac
    done
    echo
    "$@"
}

fail() {
    echo "quickstart: $*; see $log" >&2
    exit 1
}

echo "== 1. Tokenize real text: the documentation that this Python carries"
show gpt2hpc prepare --source demo --out "$data"

steps=$(gpt2hpc submit --cluster local --dry-run --preset smoke --data.dir "$data" --run-dir "$run" | sed -n 's/.*train\.total_steps = \([0-9]*\).*/\1/p')
half=$((steps / 2))

echo
echo "== 2. Train a small GPT-2 with two processes, as a job that is restarted until it is finished"
printf '\n$ gpt2hpc submit --cluster local --nproc 2 --preset smoke --data.dir %s --run-dir %s\n' "$data" "$run"
gpt2hpc submit --cluster local --nproc 2 --preset smoke --data.dir "$data" --run-dir "$run" >"$log" 2>&1 &
job=$!
trap 'kill "$job" 2>/dev/null || true' EXIT INT TERM

# Follow its output. `tail --pid` is not everywhere, so this tail is ended by us.
tail -n +1 -f "$log" &
follower=$!
trap 'kill "$job" "$follower" 2>/dev/null || true' EXIT INT TERM

until grep -q "^$half train" "$run/log.txt" 2>/dev/null; do
    kill -0 "$job" 2>/dev/null || fail "training ended before step $half"
    sleep 0.5
done

rank0=$(gpt2hpc status --json "$run" | sed -n 's/.*"pid": \([0-9]*\).*/\1/p')
printf '\n== 3. Preempt it, as a cluster would: kill -TERM %s (one of its processes)\n\n' "$rank0"
kill -TERM "$rank0"

wait "$job" || fail "training failed"
sleep 1
kill "$follower" 2>/dev/null || true
trap - EXIT INT TERM
grep -q '^resuming at step' "$log" || fail "the job did not resume"

echo
echo "== 4. What came of it"
show gpt2hpc status "$run"
show gpt2hpc sample "$run" --prompt This --max-tokens 60 --temperature 1.1 --top-k 200 --seed 7

before=$(sed -n 's/^0 val //p' "$run/log.txt")
after=$(sed -n "s/^$steps val //p" "$run/log.txt")
cat <<END

Validation loss: $(printf %.2f "$before") before training, $(printf %.2f "$after") after $steps steps, with a preemption in between
                 ($(grep '^resuming at step' "$log")).
                 The sample above is what two minutes on two cores buy: words and habits of the text, no sense yet.
Look at:         $run/log.txt (losses), $run/config.yaml (settings), $run/attempts/ (what happened),
                 $run/checkpoints/ (weights and optimizer state), $log (all output)
Next:            . .venv/bin/activate
                 gpt2hpc prepare --source my_texts/ --out data/mine
                 gpt2hpc submit --cluster local --preset smoke --data.dir data/mine --run-dir runs/mine
                 and on a cluster, or where there are GPUs, --preset gpt2-124m
END
awk -v loss="$after" 'BEGIN { exit !(loss > 0 && loss < 5.5) }' || fail "the validation loss should be below 5.5"
