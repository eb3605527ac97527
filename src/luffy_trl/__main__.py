"""`python -m luffy_trl` is the command `luffy-trl`."""

from .commands.cli import main


main()
