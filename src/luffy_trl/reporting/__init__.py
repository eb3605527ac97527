"""`luffy-trl report`: runs as one self-contained page, and pictures."""


class ReportError(Exception):
    """What keeps a report from being written, as one sentence for a person."""
