"""The learning rate of each cell of the learning study: by the same rule for all, on a seed that is not used again."""

from learning_runs import Cell

MOST_RATES = 6  # that tuning tries: where a cell hardly learns, the best may lie at an edge for ever


def tuning_score(row: dict) -> float:
    """What tuning minimises: the Frechet distance at the end; a run that diverged is the worst."""
    return row["curve"][-1]["frechet"] if row["complete"] else float("inf")


def next_lr(scores: dict[float, float], first: float, factor: float) -> float | None:
    """The learning rate to try next, by the rule that is the same for all cells; None: tuning is done.

    The first, then its neighbours on a grid of constant ratio, and further while the best lies at an edge, up to
    `MOST_RATES` in all.

    :param scores: by learning rate.
    """
    if not scores:
        return first
    if len(scores) >= MOST_RATES:
        return None
    best = best_lr(scores)
    for lr in (best / factor, best * factor):
        if not any(abs(lr / other - 1) < 1e-6 for other in scores):
            return float(f"{lr:.6g}")
    return None


def tuning_cell(cell: Cell) -> Cell:
    """The cell whose runs tune the learning rate of a cell: the same without Min-SNR.

    Both optimizers divide by the size of the gradients, which is most of what the weighting changes.
    """
    return cell._replace(min_snr=False)


def tried(rows: list[dict], cell: Cell) -> dict[float, float]:
    """Score by learning rate, of a cell's tuning runs."""
    own = tuning_cell(cell)._asdict().items()
    return {row["lr"]: tuning_score(row) for row in rows if own <= row.items()}


def best_lr(scores: dict[float, float]) -> float:
    return min(scores, key=lambda lr: (scores[lr], lr))


def tuned_lr(rows: list[dict], cell: Cell, first: float, factor: float) -> float | None:
    """The learning rate that tuning has chosen for a cell; None while it is not finished."""
    scores = tried(rows, cell)
    return best_lr(scores) if scores and next_lr(scores, first, factor) is None else None
