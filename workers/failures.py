"""Kept through 0.3: ranks of a training job that 0.2 started import this function when they start."""

from workers.executors.failures import describe_failure as describe_failure
