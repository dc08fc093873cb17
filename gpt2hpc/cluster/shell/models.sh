paths=(${MODEL:+"$MODEL"} ${HELLASWAG:+"$HELLASWAG"} ${DATA:+"$DATA"} "$(dirname "${OUT:-.}")")
