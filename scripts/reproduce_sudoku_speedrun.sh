#!/usr/bin/env bash
# The Sudoku-Extreme speedrun, whole: train, evaluate, publish, think longer.
#
#   bash scripts/reproduce_sudoku_speedrun.sh --train train1k.csv.gz --test test.csv.gz
#   bash scripts/reproduce_sudoku_speedrun.sh                    # data from the public hub
#
#   --seed N            0 if left out
#   --name NAME         of the run folders and the weights; speedrun-seedN
#   --cut STEP[,STEP]   cut the training there into sittings: parameters go over exactly, moments
#                       and averages in bfloat16, every row starts on a new puzzle
#   --sitting           end at the next cut, to go on at another time: call it again with the same
#                       arguments; all that must travel is runs/NAME.safetensors (≤ 50 MiB)
#   --no-thinking       leave out the sweep over test-time compute
#   key=value           on top of experiment=sudoku_speedrun, such as max_steps=20000
#
# Training time is that of all sittings together, without evaluations; logs say it.
set -euo pipefail
here=$PWD
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
  bash scripts/setup.sh requirements.txt
  python=.venv/bin/python
fi

fail() { echo "reproduce_sudoku_speedrun: $1" >&2; exit 2; }
file() { case $1 in /*|hf:*) echo "$1" ;; *) echo "$here/$1" ;; esac; }

seed=0 name='' cuts='' sitting=no thinking=yes train='' test='' more=()
while [ $# -gt 0 ]; do
  case $1 in
    --train|--test|--seed|--name|--cut)
      [ $# -ge 2 ] || fail "$1 needs a value"
      case $1 in
        --train) train=$(file "$2") ;;
        --test) test=$(file "$2") ;;
        --seed) seed=$2 ;;
        --name) name=$2 ;;
        --cut) cuts=$2 ;;
      esac
      shift 2 ;;
    --sitting) sitting=yes; shift ;;
    --no-thinking) thinking=no; shift ;;
    *=*) more+=("$1"); shift ;;
    *) fail "there is no option $1; see the head of this file" ;;
  esac
done
name=${name:-speedrun-seed$seed}
[[ $name =~ ^[A-Za-z0-9_.-]+$ ]] || fail "--name $name should be letters, digits and ._-"
[[ $cuts =~ ^([1-9][0-9]*(,[1-9][0-9]*)*)?$ ]] || fail "--cut $cuts should be steps, as in 4000,8000"
if [ -n "$train$test" ]; then
  [ -n "$train" ] && [ -n "$test" ] || fail "give both --train and --test, or neither"
  data=(data.train_csv="$train" data.test_csv="$test")
  test_data=(data.test_csv="$test")
else
  data=(data=sudoku_extreme_hub eval.max_examples=4000)
  test_data=(eval.max_examples=4000)
fi

# Sitting k lies in runs/NAME-k; from one to the next goes nothing but the packed state.
state=runs/$name.safetensors
at=0  # the step that the state is from
if [ -f "$state" ]; then
  at=$("$python" -c 'import sys; from pathlib import Path; from training import packing
print(packing.read_index(Path(sys.argv[1]))["step"])' "$state")
fi
number=0
for cut in ${cuts//,/ } end; do
  number=$((number + 1))
  run=runs/$name-$number
  until=(stop_at="$cut")
  if [ "$cut" = end ]; then
    until=()
  elif [ "$at" -ge "$cut" ]; then
    echo "== sitting $number: done, as $state tells"
    continue
  fi
  if [ "$at" = 0 ]; then
    from=(experiment=sudoku_speedrun seed="$seed")
  else
    from=(load_checkpoint="$state")
  fi
  echo "== sitting $number, from step $at"
  "$python" pretrain.py "${from[@]}" run_name="$name-$number" resume=auto "${data[@]}" \
    ${more[@]+"${more[@]}"} ${until[@]+"${until[@]}"}
  [ "$cut" = end ] && break
  "$python" scripts/pack_state.py "$run" "$state" --step "$cut"
  at=$cut
  if [ $sitting = yes ]; then
    echo "to go on: keep $state, and call this again with the same arguments"
    exit 0
  fi
done

if ! grep -q '"finished": true' "$run/summary.json"; then
  echo "reproduce_sudoku_speedrun: stopped before the end; the same arguments go on with it" >&2
  exit 1
fi

echo "== evaluation: weights in bfloat16, 16 ACT steps"
rm -rf "runs/weights/$name"
"$python" scripts/publish_weights.py "$run" "$name" --into runs/weights
"$python" evaluate.py checkpoint="runs/weights/$name" "${test_data[@]}" output_dir="$run"

"$python" scripts/report_run.py runs/"$name"-[0-9]* --weights "runs/weights/$name" \
  --evaluation "$run/evaluation-$name.json" --out "$run/report"

if [ $thinking = yes ]; then
  echo "== test-time compute on the same weights"
  "$python" scripts/thinking_curve.py checkpoint="runs/weights/$name" "${test_data[@]}" \
    output_dir="$run" eval.augment=true --depth 16 64 --breadth 1 2 4 8 16 \
    --select halt vote --confidence 0.99 --agree 1 2 3 --out "$run/thinking-curve"
fi
