mkdir -p "$OUT" || exit 4
OUT=$(realpath -s "$OUT")
paths=("$OUT" ${SOURCE:+"$SOURCE"})
