#!/usr/bin/env bash
# scikit-learn 1.9.1
# Expected: GaussianMixture.sample returns independent draws, so that the first 16 make a fair grid of samples and
#           two calls differ.
# Seen: draws are sorted by component, and a mixture with an integer random_state returns the same draws at each call.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check scikit-learn==1.9.1 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import numpy as np
from sklearn.mixture import GaussianMixture

generator = np.random.default_rng(0)
data = np.concatenate([generator.normal(center, 1, size=(500, 2)) for center in (-20, 0, 20)])
mixture = GaussianMixture(3, random_state=0).fit(data)
draws, components = mixture.sample(300)
again, _ = mixture.sample(300)
print(f"components of the first 16 of 300 draws: {components[:16].tolist()}")
print(f"sorted {bool((np.diff(components) >= 0).all())}, a second call equal {np.array_equal(draws, again)}")
assert len(set(components.tolist())) == 3
assert (np.diff(components) >= 0).all() and np.array_equal(draws, again), "the behaviour changed"
PYTHON
