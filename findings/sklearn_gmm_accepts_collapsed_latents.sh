#!/usr/bin/env bash
# scikit-learn 1.9.1
# Expected: GaussianMixture warns about latents of a fully collapsed encoder, or does not report convergence: 1,000
#           equal points have no density.
# Seen: ten components converge, and the score is a large positive log-likelihood set by reg_covar alone. The only
#       warning, from the k-means start, is that there are fewer distinct points than clusters.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check scikit-learn==1.9.1 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import math
import warnings

import numpy as np
from sklearn.mixture import GaussianMixture

dimensions = 32
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    latents = np.zeros((1000, dimensions))
    mixture = GaussianMixture(10, random_state=0).fit(latents)
score = mixture.score(latents)
of_floor = -dimensions / 2 * math.log(2 * math.pi * mixture.reg_covar)
print(f"converged {mixture.converged_}, {score:.1f} nats; a Gaussian of variance reg_covar gives {of_floor:.1f}")
print("warnings:", sorted({f"{entry.category.__name__}: {entry.message}" for entry in caught}))
assert mixture.converged_ and abs(score - of_floor) < 1, "the behaviour changed"
assert all("distinct clusters" in str(entry.message) for entry in caught), "the behaviour changed: a new warning"
PYTHON
