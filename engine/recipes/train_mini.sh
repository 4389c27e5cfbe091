#!/usr/bin/env bash
# The embedded model from nothing, on two GPUs (one works too, more slowly), in three calls of ten minutes each:
#
#   bash engine/recipes/train_mini.sh judge FOLDER     # VAE on one GPU, both probes on the other; then the teacher
#   bash engine/recipes/train_mini.sh teach FOLDER     # the rest of the teacher, and the student
#   bash engine/recipes/train_mini.sh finish FOLDER    # more distillation, then the evaluation with ten minutes' drift
#   python -m engine.recipes.export --folder FOLDER    # into engine/weights
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
judge)
    on 0 engine.recipes.train_vae --seconds 270 &
    vae=$!
    on 1 engine.recipes.probe --seconds 125
    wait "$vae"
    # importing takes some 15 s, saving some 10 s
    mini --seconds $(($(left) - 25)) --distill-share 0
    ;;
teach)
    mini --seconds $(($(left) - 25)) --distill-share 0.4 --seed 17
    ;;
finish)
    mini --seconds $(($(left) - 150)) --distill-share 1 --seed 27
    on 0 engine.recipes.evaluate --prompts 192 --drift-minutes 10 --json "$folder/evaluation.json" --pictures "$folder"
    ;;
*)
    echo "stage must be judge, teach or finish" >&2
    exit 2
    ;;
esac
