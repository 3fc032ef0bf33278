"""Kept through 0.3: Ray loads the class of 0.2's run board from here, and ranks of 0.2's training jobs import ``board``."""

from workers.executors.run_board import RunBoard as RunBoard
from workers.executors.run_board import board as board
