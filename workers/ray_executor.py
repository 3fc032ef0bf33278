"""Kept through 0.3: Ray loads the class of a stage host that 0.2 started by this module's name."""

from workers.executors.ray_executor import StageHost as StageHost
