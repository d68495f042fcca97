"""What the alignments of depth cost on one large map.

    python tests/benchmarks/alignment.py [--height 1365] [--width 2048] [--rounds 5]

Prints the median time of each alignment; of those with a subsample, on the 64x64 subsample and on all pixels. Goal for
2048x1365 pixels: robust on all pixels below 2 s on two CPU cores.
"""

import argparse
import statistics
import time
from functools import partial

import numpy as np

from mf_diffusers.evaluation import ALIGNMENTS, depth_metrics


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--height", type=int, default=1365)
parser.add_argument("--width", type=int, default=2048)
parser.add_argument("--rounds", type=int, default=5)
arguments = parser.parse_args()

# A floor and a wall with missing pixels; the prediction is curved, noisy, and wrong altogether at some pixels.
rng = np.random.default_rng(0)
rows, columns = np.mgrid[: arguments.height, : arguments.width]
truth = np.minimum(2 / (0.1 + rows / arguments.height), 6 + columns / arguments.width).astype(np.float32)
prediction = (0.3 * truth**0.9 + 0.4 + 0.02 * rng.normal(size=truth.shape)).astype(np.float32)
prediction[rng.random(truth.shape) < 0.05] = 9
truth[rng.random(truth.shape) < 0.1] = 0

runs = {name: partial(align, prediction, truth) for name, align in ALIGNMENTS.items()}
for name in ("robust", "scale"):
    runs[f"{name}, all pixels"] = partial(ALIGNMENTS[name], prediction, truth, grid=None)

print(f"{arguments.width}x{arguments.height}, {np.count_nonzero(truth)} pixels with true depth")
for name, run in runs.items():
    times = []
    for _ in range(arguments.rounds):
        start = time.perf_counter()
        result = run()
        times.append(time.perf_counter() - start)
    metrics = depth_metrics(result.apply(prediction), truth)
    print(f"{name:28}{1000 * statistics.median(times):8.1f} ms   abs_rel {metrics['abs_rel']:.5f}")
