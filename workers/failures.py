"""Kept through 0.3: ranks of 0.2's training jobs load this function by this module's name."""

from workers.executors.failures import describe_failure as describe_failure
