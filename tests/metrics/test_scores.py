"""Scores per case and organ, their summary, and paired comparison."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy import stats

from medattn.data.cases import State
from medattn.labels import Organ
from medattn.metrics.scores import METRICS, Score, mean_over_organs, score_case, summarise
from medattn.metrics.statistics import compare, holm

STEM, LEFT, RIGHT, LENS = (
    Organ("Brainstem", tolerance_mm=2.5),
    Organ("Parotid_L", side="left", pair="Parotid_R"),
    Organ("Parotid_R", side="right", pair="Parotid_L"),
    Organ("Lens_L", tolerance_mm=1.0),
)
MM = (1.0, 1.0, 2.0)


def label(**boxes: int) -> np.ndarray:
    """A map of slabs along k: k0=1 puts value 1 at index 0."""
    array = np.zeros((4, 4, 8), np.uint8)
    for where, value in boxes.items():
        array[1:3, 1:3, int(where[1:])] = value
    return array


def score(case: str, organ: str = "A", dice: float | None = 0.5, **changes: object) -> Score:
    base = Score(case, organ, State.PRESENT, dice, dice, 1.0, 1.0, 1.0, 1.0, 1.0)
    return dataclasses.replace(base, **changes)


def test_organs_match_by_name_whatever_their_voxel_values() -> None:
    scores = score_case(
        "c",
        label(k1=9, k2=9, k5=4),
        label(k1=1, k2=1, k5=2),
        MM,
        prediction_organs={9: STEM, 4: LEFT},
        reference_organs={1: STEM, 2: LEFT, 3: RIGHT},
    )
    assert [(s.organ, s.dice, s.hd95_mm) for s in scores] == [("Brainstem", 1, 0), ("Parotid_L", 1, 0)]
    assert scores[0].surface_dice == 1
    assert scores[1].surface_dice is None, "no tolerance, no surface Dice"
    assert scores[0].volume_ml == scores[0].reference_volume_ml == pytest.approx(8 * 2 / 1000)


def test_the_states_of_an_organ_stay_apart() -> None:
    organs = {1: STEM, 2: LEFT, 3: RIGHT, 4: LENS}
    scores = {
        s.organ: s
        for s in score_case(
            "c",
            label(k0=2, k1=3),
            label(k3=1),
            MM,
            prediction_organs=organs,
            reference_organs=organs,
            contoured={"Brainstem", "Parotid_L", "Lens_L"},
        )
    }
    assert scores["Brainstem"].missed
    assert (scores["Brainstem"].dice, scores["Brainstem"].hd95_mm) == (0, math.inf)
    assert scores["Parotid_L"].false
    assert scores["Parotid_L"].dice == 0
    assert (scores["Lens_L"].state, scores["Lens_L"].dice, scores["Lens_L"].assd_mm) == (State.EMPTY, 1, 0)
    undrawn = scores["Parotid_R"]
    assert undrawn.state is State.NOT_CONTOURED
    assert [getattr(undrawn, metric) for metric in METRICS] == [None] * 4
    assert undrawn.reference_volume_ml is None
    assert undrawn.volume_ml > 0, "what was predicted there is still worth knowing"


def test_reference_voxels_of_an_organ_that_nobody_drew_play_no_part() -> None:
    organs = {3: RIGHT}
    result = score_case(
        "c", label(), label(k1=3), MM, prediction_organs=organs, reference_organs=organs, contoured=()
    )
    assert result[0].state is State.NOT_CONTOURED


def test_summary_counts_and_means_use_finite_values_only() -> None:
    scores = [
        score("a", dice=0.8, hd95_mm=2.0),
        score("b", dice=0.6, hd95_mm=4.0),
        score("c", dice=0.0, hd95_mm=math.inf, volume_ml=0.0),
        score("d", dice=0.0, hd95_mm=math.inf, state=State.EMPTY, reference_volume_ml=0.0),
        score("e", dice=None, surface_dice=None, hd95_mm=None, assd_mm=None, state=State.NOT_CONTOURED),
    ]
    organ = summarise(scores)["A"]
    assert (organ.n, organ.n_present, organ.n_empty, organ.n_not_contoured) == (4, 3, 1, 1)
    assert (organ.n_missed, organ.n_false) == (1, 1)
    hd95, overlap = organ.metrics["hd95_mm"], organ.metrics["dice"]
    assert (hd95.n, hd95.mean, hd95.worst, hd95.worst_case) == (2, 3.0, 4.0, "b")
    assert (overlap.n, overlap.mean, overlap.median) == (4, pytest.approx(0.35), pytest.approx(0.3))
    assert overlap.sd == pytest.approx(np.std([0.8, 0.6, 0, 0], ddof=1))
    assert organ.worst_case == "c"


def test_what_has_no_value_is_none_and_never_nan() -> None:
    nothing = score("a", dice=None, surface_dice=None, hd95_mm=None, assd_mm=None, state=State.NOT_CONTOURED)
    summary = summarise([nothing, score("a", "B", 0.5)])
    assert dataclasses.astuple(summary["A"].metrics["dice"]) == (0, None, None, None, None, None)
    assert summary["B"].metrics["dice"].sd is None
    overall = mean_over_organs(summary, "dice")
    assert (overall.n, overall.mean) == (1, 0.5)
    assert summarise([]) == {}
    assert mean_over_organs({}, "dice").mean is None


def test_every_organ_counts_once_in_the_overall_mean() -> None:
    scores = [score("a", "A", 1.0), score("b", "A", 1.0), score("c", "A", 1.0), score("a", "B", 0.0)]
    overall = mean_over_organs(summarise(scores), "dice")
    assert (overall.mean, overall.n, overall.worst_case) == (0.5, 2, "B")


def test_paired_difference_is_scipys_wilcoxon_over_shared_cases() -> None:
    rng = np.random.default_rng(3)
    now, then = rng.random(9), rng.random(9)
    paired = compare(
        [score(str(n), dice=float(v)) for n, v in enumerate(now)] + [score("alone")],
        [score(str(n), dice=float(v)) for n, v in enumerate(then)],
        "dice",
    )["A"]
    assert paired.n == 9
    assert paired.mean_difference == pytest.approx((now - then).mean())
    assert paired.p == pytest.approx(stats.wilcoxon(now, then).pvalue)


def test_equal_infinite_and_absent_values_compare_without_nan() -> None:
    same = compare([score("a"), score("b")], [score("a"), score("b")], "dice")["A"]
    assert (same.n, same.mean_difference, same.p) == (2, 0.0, 1.0)
    infinite = compare([score("a", hd95_mm=math.inf)], [score("a")], "hd95_mm")["A"]
    assert (infinite.n, infinite.mean_difference, infinite.p) == (0, None, None)


def test_holm_correction_of_a_textbook_example() -> None:
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, kept increasing."""
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": None})
    expected = {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    assert {name: corrected[name] for name in expected} == pytest.approx(expected)
    assert corrected["e"] is None
