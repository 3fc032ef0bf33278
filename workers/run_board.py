"""Kept through 0.3: Ray loads 0.2's run board, and ranks of 0.2's jobs ``board``, by this module's name."""

from workers.executors.run_board import RunBoard as RunBoard
from workers.executors.run_board import board as board
