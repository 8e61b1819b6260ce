#!/usr/bin/env bash
# Runs recipes as a Slurm job array, one in each task; one that fails stops no other.
#
#   recipes=(recipes/*.yml)
#   sbatch --array="0-$((${#recipes[@]} - 1))" --gpus=1 examples/slurm_transplants.sh out/ "${recipes[@]}"
#
# Each recipe is one mergekit-yaml run, whose log is beside its output folder. Without --gpus it runs on CPUs. Finished
# outputs are kept, so that the same commands again run what is missing.
#SBATCH --job-name=transplant
#SBATCH --output=transplant-%A_%a.txt
set -euo pipefail

task=${SLURM_ARRAY_TASK_ID:?is not set; start this with sbatch --array, as its first lines say}
out=$1
shift
if [ "$task" -ge $# ]; then
    echo "The array has a task $task, but the last of the $# recipes is $(($# - 1))." >&2
    exit 2
fi
shift "$task"
recipe=$1
model=$out/$(basename "$recipe" .yml)
if [ -e "$model" ]; then
    echo "kept    $recipe"
    exit
fi
set -- "$recipe" "$model"
if [ "${SLURM_GPUS_ON_NODE:-0}" -gt 0 ]; then
    set -- "$@" --cuda
fi
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export OMP_NUM_THREADS=$SLURM_CPUS_PER_TASK
fi

mkdir -p "$out"
status=0
mergekit-yaml "$@" >"$model.log" 2>&1 || status=$?
if [ "$status" -eq 0 ]; then
    echo "ok      $recipe"
else
    echo "FAILED  $recipe: $(tail -n 1 "$model.log")"
fi
exit "$status"
