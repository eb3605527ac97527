"""The command `luffy-trl`: one module a sub-command, and what `train.py`, the command and notebooks share."""
