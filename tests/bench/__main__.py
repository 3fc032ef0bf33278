"""``make bench``: runs the benchmarks of training, updates and uploads one after another."""

import sys

from tests.bench import training, update, upload, upload_http

for benchmark in (training, update, upload, upload_http):
    print(f"== {benchmark.__name__.rpartition('.')[2]}", flush=True)
    sys.argv = [benchmark.__name__]
    benchmark.main()
