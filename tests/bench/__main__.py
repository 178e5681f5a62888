"""`make bench`: every benchmark in turn; each prints our figure, the peer's and their ratio from one run."""

from __future__ import annotations

import runpy

BENCHMARKS = ("bench_intake", "bench_stages", "bench_segment", "bench_predict", "bench_train")

for name in BENCHMARKS:
    print(f"\n== {name} ==", flush=True)
    runpy.run_module(f"tests.bench.{name}", run_name="__main__")
