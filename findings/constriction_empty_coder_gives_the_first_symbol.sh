#!/usr/bin/env bash
# constriction 0.4.2
# Expected: a coder that has no bits left refuses to decode, or gives arbitrary symbols, as it does just before its end.
# Seen: it goes on with the first symbol of the model, for ever, and stays empty. In bits-back coding, where latents are drawn by
# decoding, those of the first images are then the lowest ones in place of draws. Every image still comes back exactly.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check constriction==0.4.2 numpy==2.4.6

cat > empty.py <<'PYTHON'
import constriction
import numpy as np

model = constriction.stream.model.Categorical(np.array([0.1, 0.2, 0.3, 0.4]), perfect=False)
coder = constriction.stream.stack.AnsCoder()
symbols = coder.decode(model, 1000)
print("from an empty coder:", np.bincount(symbols, minlength=4).tolist(), "empty after it:", coder.is_empty())
coder.encode_reverse(symbols, model)
print("encoded again:", coder.num_bits(), "bits")
words = np.random.default_rng(0).integers(0, 2**32, 200, dtype=np.uint32)
symbols = constriction.stream.stack.AnsCoder(words).decode(model, 1000)
print("from random words:", np.bincount(symbols, minlength=4).tolist())
PYTHON
venv/bin/python empty.py | tee output
grep -q '^from an empty coder: \[1000, 0, 0, 0\] empty after it: True$' output && grep -q '^encoded again: 0 bits$' output ||
    { echo "the behaviour changed" >&2; exit 1; }
