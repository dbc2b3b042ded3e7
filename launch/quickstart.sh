#!/usr/bin/env bash
# The main job from nothing: set up, pack the built-in simulated recording, score pixels and frozen features, fine-tune,
# score, compare. Minutes on a 2-core CPU; what is finished already is not done again.
#
#   DATA    shard folder to make or use     (default data/simulated)
#   RUNS    folder for the runs             (default runs/quickstart)
#   N       processes                       (default: one per GPU, or one per core up to 2)
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

data=${DATA:-data/simulated}
runs=${RUNS:-runs/quickstart}
n=${N:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
[ "$n" -gt 0 ] || n=$(( $(nproc) < 2 ? 1 : 2 ))

step() { echo; echo "== $*"; }
scored() { [ -e "$runs/$1/eval/val/metrics.json" ]; }

step "pack the simulated recording into $data"
[ -e "$data/manifest.json" ] || "$python" data_prep/pack.py simulated --out "$data" > /dev/null
"$python" data_prep/show.py "$data"

step "ridge on pixels"
scored pixels || launch/local.sh -n "$n" train/probe.py --data "$data" --out "$runs/pixels" --layers pixels --images.size 32

step "ridge on frozen, ImageNet-pretrained features, layer by layer"
scored frozen || launch/local.sh -n "$n" train/probe.py train/recipes/quickstart_probe.yaml --data "$data" --out "$runs/frozen"

step "fine-tune the whole network"
if ! scored finetuned; then
    resume=()
    [ ! -e "$runs/finetuned/recipe.yaml" ] || resume=(--resume)
    launch/local.sh -n "$n" train/finetune.py train/recipes/quickstart.yaml --data "$data" --out "$runs/finetuned" "${resume[@]}"
    launch/local.sh -n "$n" train/evaluate.py "$runs/finetuned" --split val
fi

step "compare"
"$python" train/report.py "$runs/pixels" "$runs/frozen" "$runs/finetuned" --out "$runs"
echo
echo "see the curves:   ${venv#"$root"/}/bin/tensorboard --logdir $runs"
