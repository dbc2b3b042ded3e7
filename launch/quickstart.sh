#!/usr/bin/env bash
# The whole workflow from scratch: set up, pack the built-in simulated recording, score pixels and frozen features,
# fine-tune, score, compare. Takes minutes on a 2-core CPU; finished steps are skipped.
#
#   DATA    shard folder to create or use   (default data/simulated)
#   RUNS    folder for the runs             (default runs/quickstart)
#   N       processes                       (default: one per GPU, or one per core up to 2)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
set_up

data=${DATA:-data/simulated}
runs=${RUNS:-runs/quickstart}
on=()
if [ -n "${N:-}" ]; then
    on=(-n "$N")
elif ! nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then
    on=(-n $(( $(nproc) < 2 ? 1 : 2 )))
fi

step() { echo; echo "== $*"; }
scored() { [ -e "$runs/$1/eval/val/metrics.json" ]; }
probe() { # an interrupted probe starts over
    scored "$1" || { rm -rf "${runs:?}/$1"; launch/local.sh "${on[@]}" train/probe.py --data "$data" --out "$runs/$1" "${@:2}"; }
}

step "pack the simulated recording into $data"
[ -e "$data/manifest.json" ] || "$python" data_prep/pack.py simulated --out "$data" > /dev/null
"$python" data_prep/show.py "$data"

step "ridge on pixels"
probe pixels --layers pixels --images.size 32

step "ridge on frozen, ImageNet-pretrained features, layer by layer"
probe frozen --layers blocks.3 blocks.4 blocks.5 --images.size 112

step "fine-tune the whole network"
if ! scored finetuned; then
    resume=()
    [ ! -e "$runs/finetuned/recipe.yaml" ] || resume=(--resume)
    launch/local.sh "${on[@]}" train/finetune.py train/recipes/quickstart.yaml --data "$data" --out "$runs/finetuned" "${resume[@]}"
    launch/local.sh "${on[@]}" train/evaluate.py "$runs/finetuned" --split val
fi

step "compare"
"$python" train/report.py "$runs/pixels" "$runs/frozen" "$runs/finetuned" --out "$runs"
echo
echo "read the report:  $runs/report.html"
echo "see the curves:   $python -m tensorboard.main --logdir $runs   (start with the tab Custom Scalars)"
