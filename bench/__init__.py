"""Both operators on a real photograph, checked against float64, beside their peers and the machine's limits.

    python -m bench.run            table, JSON and plots; `--quick` in under a minute, `--help` for the rest

image.py makes the tokens; cases.py says what is measured, and its cost in bytes and FLOPs; truth.py is the gate that a
result passes before its time counts; peers/ holds one file per comparator; measure.py times; machine.py measures the
limits; sweep.py runs it all into rows (rows.py); curves.py, goals.py, report.py, plots.py and style.py show them.
"""
