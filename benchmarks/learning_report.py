"""Table and figures."""


def write_report(results, docs):
    pass
