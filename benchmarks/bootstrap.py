"""The paired bootstrap: 10,000 resamples of 10,000 questions, beside scipy's.

python benchmarks/bootstrap.py
"""

from __future__ import annotations

import time

import numpy as np
from scipy.stats import bootstrap

from paw.evaluation.statistics import resampled_means

rng = np.random.default_rng(0)
right = rng.choice([-1.0, 0.0, 1.0], p=[0.05, 0.85, 0.1], size=(10_000, 1))
values = {
    "differences of right and wrong": right,
    "differences of log-likelihoods": rng.normal(0.02, 1, (10_000, 1)),
}
for name, x in values.items():
    began = time.perf_counter()
    ours = np.percentile(resampled_means(x)[:, 0], [2.5, 97.5])
    took = time.perf_counter() - began
    began = time.perf_counter()
    theirs = bootstrap(
        (x[:, 0],), np.mean, n_resamples=10_000, method="percentile", batch=1000, rng=1
    ).confidence_interval
    print(
        f"{name}: [{ours[0]:.4f}, {ours[1]:.4f}] in {took:.2f} s; "
        f"scipy [{theirs.low:.4f}, {theirs.high:.4f}] in {time.perf_counter() - began:.2f} s"
    )
