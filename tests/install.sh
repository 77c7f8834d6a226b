#!/bin/sh
# What a user does: an isolated `pip install .` into an environment with nothing in it, then the
# examples in README.md that need nothing else (those before its trainings), run outside of this
# checkout.
set -eu
cd "$(dirname "$0")/.."
unset TORCH_CUDA_ARCH_LIST # every card that a user's build is for
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# The pinned torch, in the build environment too: older pips read the one variable, newer the other.
grep -E '^(torch|numpy)==' requirements-dev.txt > "$folder/constraints.txt"
export PIP_CONSTRAINT="$folder/constraints.txt" PIP_BUILD_CONSTRAINT="$folder/constraints.txt"

"${PYTHON:-python3}" -m venv "$folder/venv"
git ls-files -z --cached --others --exclude-standard | xargs -0 tar cf - | (mkdir "$folder/source" && tar xf - -C "$folder/source")
"$folder/venv/bin/pip" install --quiet "$folder/source"
sed '/^## Trainings$/,$d' README.md | sed -n '/^```python$/,/^```$/p' | sed '/^```/d' > "$folder/readme.py"
cd "$folder"
venv/bin/python readme.py
venv/bin/python - <<'PYTHON'
import sys, fastnet, torch
assert "site-packages" in fastnet.__file__, fastnet.__file__
# The kernels need nothing but torch.
assert not {"torchvision", "matplotlib", "typer", "mlxtend"} & set(sys.modules)
print(fastnet.build_info())
layer = fastnet.Linear(784, 28, activation="relu")
layer(torch.randn(64, 784)).sum().backward()
assert layer.weight.grad.shape == (28, 784)
PYTHON
# The command line says what it lacks, in one sentence.
if message=$(venv/bin/fastnet list 2>&1); then
    echo "the command line ran without its requirements" >&2; exit 1
fi
case "$message" in
    *"pip install 'fastnet[train]'"*) echo "$message" ;;
    *) echo "$message" >&2; exit 1 ;;
esac
