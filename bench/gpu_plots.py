"""Two pictures of a run on a GPU: how far each goal is, and how far each row is from the machine's limit."""

from pathlib import Path


def draw_goals(goals: list[dict], path: Path) -> None:
    """Every measured goal as a bar: its share of the target, 1 = reached."""

    def share(goal):
        sign, target = goal["target"].split()
        return goal["value"] / float(target) if sign == ">=" else float(target) / goal["value"]

    measured = [g for g in goals if g["value"]]
    _bars([g["goal"] for g in measured], [share(g) for g in measured], "share of the target (1 = reached)", path)


def draw_roofline(rows: list[dict], path: Path) -> None:
    """The least time of every row over its measured time."""
    _bars(
        [r["what"] for r in rows], [r["floor"] for r in rows], "least time of bytes and products / measured time", path
    )


def _bars(names: list[str], values: list[float], label: str, path: Path) -> None:
    if not names:
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.3 * len(names) + 1), layout="constrained")
    axes.barh(names, values, color=["#2a7" if value >= 1 else "#c63" for value in values])
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.savefig(path, dpi=120)
    plt.close(figure)
