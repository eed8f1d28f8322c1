"""Whether a compressed model segments worse than the dense one: paired tests, intervals, and a gate."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tucker_ops.errors import ConfigError, SegmentationError
from tucker_ops.nnunet.evaluate import Evaluation

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95
RESAMPLES = 9999
# Of fewer pairs the signed-rank test cannot reach 0.05, whatever they are.
FEWEST_PAIRS = 6


@dataclass(frozen=True)
class Comparison:
    """Dice that compression costs, class by class, over the same cases.

    ``classes`` has a row per class: dense and compressed (mean Dice over cases), drop (dense - compressed), low and
    high (95 % interval of the drop: BCa bootstrap over cases, Efron 1987), p (Wilcoxon's signed-rank test of no
    difference, two-sided) and p_holm (corrected for the number of classes, Holm 1979), cases (pairs). p is NaN for
    fewer than six pairs; the interval of a single pair is NaN. ``mean_drop``, ``mean_low`` and ``mean_high`` are of
    the mean over classes; its interval draws whole cases. A class that one of both models puts where it is not, and
    the other rightly leaves out, counts as 1 for the latter.
    """

    classes: pd.DataFrame
    mean_dense: float
    mean_compressed: float
    mean_low: float
    mean_high: float

    @property
    def mean_drop(self) -> float:
        return self.mean_dense - self.mean_compressed

    @property
    def worst_class(self) -> tuple[str, float]:
        """The class that loses most, and its drop."""
        drops = self.classes["drop"].dropna()
        return str(drops.idxmax()), float(drops.max())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; null for NaN."""
        rows = self.classes.astype(object).where(self.classes.notna(), None)
        return {
            "mean_drop": self.mean_drop,
            "mean_drop_interval": [None if np.isnan(v) else v for v in (self.mean_low, self.mean_high)],
            "worst_class": self.worst_class[0],
            "worst_class_drop": self.worst_class[1],
            "classes": {str(name): dict(row) for name, row in rows.iterrows()},
        }


def compare(dense: Evaluation, compressed: Evaluation, *, seed: int = 0) -> Comparison:
    """Compare two evaluations against the same labels; `seed` is the bootstrap's.

    Raises SegmentationError where they are of other cases or classes, or have no Dice in common.
    """
    a, b = dense.per_case, compressed.per_case
    if set(a.index) != set(b.index) or set(a.columns) != set(b.columns):
        raise SegmentationError(
            f"{dense.prediction} and {compressed.prediction} are of different cases or classes; predict the same "
            "with both"
        )
    return compare_tables(a, b.loc[a.index, a.columns], seed=seed)


def compare_tables(dense: pd.DataFrame, compressed: pd.DataFrame, *, seed: int = 0) -> Comparison:
    """`compare` of Dice by case (rows) and class (columns)."""
    import pandas as pd
    from statsmodels.stats.multitest import multipletests

    # A class that only one of both models puts there has no Dice in the other, which was right to leave it out.
    anywhere = dense.notna() | compressed.notna()
    dense, compressed = (table.where(table.notna() | ~anywhere, 1.0) for table in (dense, compressed))
    drops = dense - compressed
    rows = {}
    for name in dense.columns:
        values = drops[name].dropna().to_numpy()
        if not len(values):
            continue
        paired = drops[name].notna()
        low, high = _interval(values, seed)
        rows[name] = {
            "dense": float(dense.loc[paired, name].mean()),
            "compressed": float(compressed.loc[paired, name].mean()),
            "drop": float(values.mean()),
            "low": low,
            "high": high,
            "p": _signed_rank(values),
            "cases": len(values),
        }
    if not rows:
        raise SegmentationError(
            "no class has a Dice in any case of both evaluations; there is nothing to compare"
        )
    table = pd.DataFrame.from_dict(rows, orient="index")
    tested = table["p"].notna()
    table["p_holm"] = np.nan
    if tested.any():
        table.loc[tested, "p_holm"] = multipletests(table.loc[tested, "p"], method="holm")[1]
    low, high = _interval_of_mean(drops[list(rows)].dropna(how="all").to_numpy(), seed)
    return Comparison(table, float(table["dense"].mean()), float(table["compressed"].mean()), low, high)


def _interval_of_mean(drops: np.ndarray, seed: int) -> tuple[float, float]:
    """Of the mean over classes of the mean over cases; cases [n, classes] are drawn as a whole, NaN where a class is
    absent.
    """

    def mean(cases: np.ndarray) -> float:
        with warnings.catch_warnings():
            # A draw may lack a class altogether.
            warnings.simplefilter("ignore", RuntimeWarning)
            return float(np.nanmean(np.nanmean(drops[cases.astype(int)], axis=0)))

    return _bootstrap(
        np.arange(len(drops)), mean, np.nanmax(drops) - np.nanmin(drops), seed, vectorized=False
    )


def _interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    return _bootstrap(values, np.mean, np.ptp(values), seed)


def _bootstrap(
    values: np.ndarray, statistic: Callable, spread: float, seed: int, vectorized: bool | None = None
) -> tuple[float, float]:
    """`spread` 0 says that all differences are equal, and so the interval is a point."""
    from scipy.stats import bootstrap

    if len(values) < 2:
        return float("nan"), float("nan")
    if spread == 0:
        return (float(statistic(values)),) * 2
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            # BCa has no answer where nearly all differences are equal; the plain percentiles then do.
            warnings.simplefilter("ignore")
            result = bootstrap(
                (values,),
                statistic,
                vectorized=vectorized,
                confidence_level=CONFIDENCE,
                n_resamples=RESAMPLES,
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite(result.low) and np.isfinite(result.high):
            break
    return float(result.low), float(result.high)


def _signed_rank(values: np.ndarray) -> float:
    from scipy.stats import wilcoxon

    if len(values) < FEWEST_PAIRS:
        return float("nan")
    return float(wilcoxon(values).pvalue) if np.any(values != 0) else 1.0


@dataclass(frozen=True)
class Gate:
    """How much Dice a compression may cost: in the mean over classes, and in any one class.

    Raises ConfigError for limits outside [0, 1].
    """

    max_drop: float = 0.01
    max_class_drop: float = 0.03

    def __post_init__(self):
        for name in ("max_drop", "max_class_drop"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ConfigError(f"{name} must be a Dice from 0 to 1, got {value!r}")

    def failures(self, comparison: Comparison) -> list[str]:
        """What falls through, in words; empty where all is well."""
        found = []
        if not comparison.mean_drop <= self.max_drop:
            found.append(f"mean Dice falls by {comparison.mean_drop:.4f}, more than {self.max_drop:g}")
        for name, row in comparison.classes.iterrows():
            if not row["drop"] <= self.max_class_drop:
                found.append(f"Dice of {name} falls by {row['drop']:.4f}, more than {self.max_class_drop:g}")
        return found
