#!/usr/bin/env bash
# A tour in about a minute: the plan of a conversion, a trained network that is converted and keeps what it knows, and
# its accuracy on corrupted images beside the original's. Each command is printed before it runs.
#
#     bash examples/demo.sh [FOLDER]      # FOLDER, by default demo/, gets the weights, the artifact and the pictures
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-demo}
mkdir -p "$out"

step() { printf "\n\n── %s\n" "$1"; (($# < 2)) || printf "%s\n" "${@:2}"; }
run() {  # print a command, in lines of at most 80 characters, and run it
    local line=$'\n'"$ $1" word
    for word in "${@:2}"; do
        if ((${#line} + ${#word} > 76)); then
            printf '%s \\\n' "$line"
            line="   "
        fi
        line+=" $word"
    done
    printf '%s\n' "$line"
    "$@"
}
network=examples/cnn.py:small

step "1. The plan: what a conversion makes of a ResNet-18, and why"
run sphereify inspect resnet18 --skip-shortcuts

step "2. A plain network, trained on handwritten digits: the one to convert"
run python examples/plain_digits.py "$out/plain.pt"

step "3. Converted; a calibration on unlabelled digits keeps what it knows"
run sphereify convert $network --num-classes 10 --in-chans 1 --weights "$out/plain.pt" \
    --radius 2 --calibrate digits --output "$out/converted" --force

step "4. Tested on corrupted images, beside the original and its rival:" \
    "   the original behind one line of preprocessing, contrast standardisation"
run sphereify evaluate "$out/converted" --factory $network --data digits --corruptions \
    --against $network --against-weights "$out/plain.pt" --output "$out/report"

step "Look at the picture: $out/report/robustness.png"
cat <<TEXT

What to type next:

  # train the converted network further; curves and metrics go to $out/run
  sphereify finetune $out/converted --factory $network \\
      --data digits --epochs 2 --output $out/run
  # a pretrained network, calibrated on pictures of your own
  sphereify convert resnet18 --pretrained --skip-shortcuts --calibrate PHOTOS \\
      --agreement 0.98
TEXT
