#!/bin/sh
# The contract on a GPU: tests/cuda.sh PYTHON. Needs torch built for it, transformers and pytest, nothing installed of
# ours; trainings are left out where accelerate or peft is missing. Without a GPU it says so and ends well.
set -eu
python=${1:-python3}
cd "$(dirname "$0")/.."
export PYTHONPATH=src HF_HUB_OFFLINE=1
if ! found=$("$python" -c 'import pytest, torch, transformers; print(torch.cuda.is_available())' 2>&1); then
  echo "$python lacks what the tests of the GPU need, torch, transformers and pytest: $found" >&2
  exit 2
fi
if [ "$found" != True ]; then
  echo "no CUDA GPU that PyTorch can use on this machine: the tests of the GPU were left out"
  exit 0
fi
OFFRAMP_TEST_DEVICE=cuda exec "$python" -m pytest -q -o minversion=7.0 --durations 10 \
  tests/device_contract.py tests/test_cuda_engine.py tests/exit_kernels.py
