#!/usr/bin/env bash
# What the README shows, for real: convert a ResNet-18, then convert a small network and train it on handwritten digits.
set -euo pipefail
cd "$(dirname "$0")/.."
out=demo

say() { printf '\n$ %s\n' "$*"; "$@"; }

say sphereify convert resnet18 --operator cosine --skip-shortcuts --output $out/resnet18-cosine --force
say sphereify convert test_resnet --num-classes 10 --in-chans 1 --skip-shortcuts --output $out/digits-start --force
say sphereify finetune $out/digits-start --data digits --epochs 8 --output $out/digits --force
say sphereify evaluate $out/digits/best --data digits --output $out/evaluation
say python examples/read_artifacts.py $out/resnet18-cosine $out/digits/best
