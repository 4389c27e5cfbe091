#!/usr/bin/env bash
# The embedded model from nothing, on two GPUs (one works too, more slowly), in three calls of ten minutes each:
#
#   bash engine/recipes/train_mini.sh prepare FOLDER    # VAE on one GPU; text encoder and probes on the other
#   bash engine/recipes/train_mini.sh teach FOLDER      # the teacher
#   bash engine/recipes/train_mini.sh distil FOLDER     # the student, then the evaluation with ten minutes' drift
#   python -m engine.recipes.export --folder FOLDER     # into engine/weights
#
# Or on from the shipped weights, in two calls. Teachers are not shipped, so this one begins as the student; the new
# student is then distilled from it anew:
#
#   bash engine/recipes/train_mini.sh continue FOLDER
#   bash engine/recipes/train_mini.sh distil FOLDER
#
# Every call resumes from the checkpoints in FOLDER and stops itself in time. SECONDS_PER_CALL (590) bounds a call.
set -euo pipefail
stage=$1 folder=$2 limit=${SECONDS_PER_CALL:-590}
gpus=$(nvidia-smi -L | wc -l)
left() { echo $((limit - SECONDS)); }
mini() { torchrun --nproc-per-node "$gpus" -m engine.recipes.mini --folder "$folder" "$@"; }
on() { CUDA_VISIBLE_DEVICES=$(($1 < gpus ? $1 : 0)) python3 -m "${@:2}" --folder "$folder"; }

mkdir -p "$folder"
case $stage in
prepare)
    on 0 engine.recipes.train_vae --seconds 320 &
    vae=$!
    { on 1 engine.recipes.text --seconds 25 && on 1 engine.recipes.probe --seconds 110; } &
    others=$!
    trap 'kill "$vae" "$others" 2>/dev/null || true' EXIT
    wait -n "$vae" "$others"
    wait "$vae"
    wait "$others"
    ;;
teach)
    # importing takes some 15 s, saving some 10 s
    mini --seconds $(($(left) - 25)) --distill-share 0
    ;;
continue)
    [ -e "$folder/teacher-0.safetensors" ] || on 0 engine.recipes.export --restore
    mini --seconds $(($(left) - 25)) --distill-share 0 --finish --pool 8000 --firsts 44000
    rm -f "$folder"/student-*.safetensors
    ;;
distil)
    mini --seconds $(($(left) - 150)) --distill-share 1 --seed 17
    on 0 engine.recipes.evaluate --prompts 192 --drift-minutes 10 --endless 800 --json "$folder/evaluation.json" --pictures "$folder"
    ;;
*)
    echo "stage must be prepare, teach, continue or distil" >&2
    exit 2
    ;;
esac
