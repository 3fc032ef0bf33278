"""Kept through 0.3: jobs that 0.2 submitted and Ray starts after the upgrade run this module."""

import sys

from workers.executors.ray_job import main

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
