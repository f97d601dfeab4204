"""The command ``bdu``."""

from bdu.cli.command_line import main

__all__ = ["main"]
