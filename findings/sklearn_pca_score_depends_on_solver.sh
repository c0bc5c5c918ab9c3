#!/usr/bin/env bash
# scikit-learn 1.9.1
# Expected: PCA.score, the mean log-likelihood of probabilistic PCA, is the same for every exact svd_solver.
# Seen: with fewer samples than features, covariance_eigh divides the remaining variance by d - k and the others by
#       min(n, d) - k. The noise variance differs by a factor and the log-likelihood by tens of nats.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check scikit-learn==1.9.1 numpy==2.4.6

venv/bin/python - <<'PYTHON'
import numpy as np
from sklearn.decomposition import PCA

samples, features, components = 40, 100, 5
data = np.random.default_rng(0).normal(size=(samples, features))
fitted = {solver: PCA(components, svd_solver=solver).fit(data) for solver in ("full", "covariance_eigh")}
for solver, pca in fitted.items():
    print(f"{solver:16} noise variance {pca.noise_variance_:.4f}, score {pca.score(data):.2f} nats")

ratio = fitted["full"].noise_variance_ / fitted["covariance_eigh"].noise_variance_
assert abs(ratio - (features - components) / (samples - components)) < 1e-6, f"the behaviour changed: ratio {ratio}"
PYTHON
