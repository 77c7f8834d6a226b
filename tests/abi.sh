#!/bin/sh
# One build serves several torch versions: takes the libraries that stand in fastnet/, built against
# the torch of .venv, and runs the op tests on them under another torch.
set -eu
cd "$(dirname "$0")/.."
other="${OTHER_TORCH:-2.13.0}"
environment=".venv-torch-$other"

built_with=$(.venv/bin/python -c 'import torch; print(torch.__version__)')
if [ ! -e "$environment/.installed" ]; then
    "${PYTHON:-python3}" -m venv "$environment"
    # Of the pins, those that the op tests need.
    grep -E '^(numpy|pytest|pytest-xdist|hypothesis|expecttest)==' requirements-dev.txt > "$environment/requirements.txt"
    "$environment/bin/pip" install --quiet "torch==$other" -r "$environment/requirements.txt"
    touch "$environment/.installed"
fi
"$environment/bin/python" - "$built_with" <<'PYTHON'
import sys, torch, fastnet
info = fastnet.build_info()
print(f"built with torch {info['torch_built_with']}, running on {torch.__version__}; "
      f"CUDA kernels {info['cuda_status']}")
assert info["torch_built_with"] == sys.argv[1] != torch.__version__
assert info["autograd"] == "Python"  # as the nodes in C++ are for the torch of the build
PYTHON
exec "$environment/bin/python" -m pytest -q -p no:cacheprovider tests/test_linear_relu.py tests/test_linear.py tests/test_cross_entropy.py tests/test_linear_cross_entropy.py tests/test_conv_relu_pool.py tests/test_accelerate.py tests/test_trainer.py tests/test_optim.py tests/test_gather_pictures.py "$@"
