[ -z "${SLURM_ARRAY_TASK_ID:-}" ] || RUN_DIR=$RUN_DIR/$SLURM_ARRAY_TASK_ID
mkdir -p "$RUN_DIR" || exit 9
RUN_DIR=$(realpath -s "$RUN_DIR")
paths=("$RUN_DIR" ${DATA:+"$DATA"})
