"""One benchmark, `python -m bench`: turns of mechanisms on three levels, each checked against float64, called in turn, and a row.

cases.py says what is measured, run.py asks worker.py's process for it, where engine.py builds (subject.py), checks (gate.py) and
times (timer.py); rows.py, goals.py, report.py and plots.py read what was found. peers/ has the mechanisms, one page each.
"""
