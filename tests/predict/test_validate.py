"""How wrong predictions are: the statistics by hand, and that what is promised is kept by the published rows."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.predict import coefficients, validate, validation
from harness.predict.bands import MIN_POINTS, Band, Bands, bands, use
from harness.predict.published import Case, Condition, Lengths, PublishedLoad, Row
from harness.predict.validate import Miss, median_error, quantile, weights
from harness.scenario import scenarios_dir

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> list[Miss]:
    """Every row beside its prediction, by the folds that ship. Some 10 seconds."""
    return validate.misses(coefficients.folds())


def miss(measured: float, predicted: float, card: str = "l4", kernel: str = "16bit", **other: object) -> Miss:
    row = Row("s", "g", "m", "vLLM", "0.7.3", "BF16", "", "10", "20", "1", "output_throughput", measured, "tok/s", "")
    condition = Condition(card, "qwen2.5-7b", kernel, "v0", "vLLM", "0.7.3", Lengths(10, 20), PublishedLoad("users", 8))
    case = Case(row, replace(condition, **other), "tok_s", measured)  # type: ignore[arg-type]
    return Miss(case, predicted, predicted)


# --- statistics -------------------------------------------------------------------------------------------------------


def test_no_card_weighs_more_than_a_quarter_by_hand() -> None:
    """Eight rows of one card and one each of four others: the four sum to 4, a quarter of 4 / 0.75 is 4 / 3, so each of
    the eight weighs 1 / 6."""
    found = weights(["a"] * 8 + ["b", "c", "d", "e"])
    assert found == pytest.approx([1 / 6] * 8 + [1.0] * 4)


@given(st.lists(st.integers(1, 300), min_size=5, max_size=20))
def test_no_card_weighs_more_than_a_quarter(counts: list[int]) -> None:
    names = [str(card) for card, count in enumerate(counts) for _ in range(count)]
    found = weights(names)
    shares = [found[np.array(names) == name].sum() / found.sum() for name in dict.fromkeys(names)]
    assert max(shares) <= validate.CAP + 1e-6
    assert found.min() > 0 and found.max() == pytest.approx(1.0)


def test_few_cards_weigh_the_same() -> None:
    found = weights(["a", "a", "a", "b"])
    assert found == pytest.approx([1 / 3, 1 / 3, 1 / 3, 1.0])


def test_a_weighted_median_by_hand() -> None:
    """Values 1, 2, 10 with weights 1, 1, 2: the middles of their shares are 1/8, 3/8 and 3/4, and half lies a third of
    the way from 2 to 10: 2 + 8 (1/2 - 3/8) / (3/4 - 3/8) = 4.667."""
    assert quantile([10, 1, 2], np.array([2.0, 1.0, 1.0]), 0.5) == pytest.approx(2 + 8 / 3)
    assert quantile([3.0], np.array([5.0]), 0.975) == 3.0


def test_errors_by_hand() -> None:
    """80 for 100 is 20 % off; a TPOT of 8 ms for 10 ms is 25 % too many tokens a second."""
    assert miss(100, 80).error == pytest.approx(0.2)
    tpot = miss(10, 8)
    tpot = replace(tpot, case=replace(tpot.case, quantity="tpot_p50_ms"))
    assert (tpot.error, tpot.rate_error) == (pytest.approx(0.2), pytest.approx(0.25))
    assert median_error([]) is None
    assert miss(100, 80).log() == pytest.approx(np.log(100 / 80))


def test_pairs_differ_in_the_precision_alone() -> None:
    plain = miss(100, 90)
    int4 = miss(150, 120, kernel="marlin")
    (pair,) = validate.pairs([plain, int4, miss(10, 10, kernel="w8a8")])
    assert (pair.measured, pair.predicted, pair.right) == (1.5, pytest.approx(4 / 3), True)
    assert not validate.pairs([plain, miss(150, 120, kernel="marlin", lengths=Lengths(10, 21))])
    wrong, near = miss(80, 120, kernel="marlin"), miss(104, 80, kernel="marlin")
    assert validate.signs(validate.pairs([plain, int4, wrong, near]))[:2] == (1, 2)  # 1.04 has no sign


# --- what ships -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(validate.PROMISES))
def test_what_is_promised_is_kept(found: list[Miss], name: str) -> None:
    belongs, most = validate.PROMISES[name]
    own = [item for item in found if item.case.kept and belongs(item)]
    assert len(own) >= 200 and len({item.condition.card for item in own}) >= 12
    error = median_error(own, as_rate=belongs is validate.is_decode)
    assert error is not None and error <= most


def test_the_sign_of_int4_is_right_in_nine_of_ten_pairs(found: list[Miss]) -> None:
    right, decided, share = validate.signs(validate.pairs([item for item in found if item.case.kept]))
    assert decided >= 100 and right / decided >= 0.9
    assert share is not None and share > 0.89


def test_documents_and_bands_are_those_of_the_folds_that_ship(found: list[Miss]) -> None:
    page = (ROOT / "docs" / "predictor.md").read_text(encoding="utf-8")
    assert validation.tables(found) in page
    text = (scenarios_dir() / "catalogue" / "bands.toml").read_text(encoding="utf-8")
    assert validation.bands_text(validate.bands(found), validate.published_points(found)) == text


def test_bands_hold_what_was_published(found: list[Miss]) -> None:
    """By construction 95 % of the weight; of the rows, at least nine in ten."""
    for figure in ("tok_s", "ttft_p50_ms"):
        own = [item for item in found if item.case.kept and item.quantity == figure]
        inside = 0
        for item in own:
            low, high = bands().ends(
                "tok_s" if figure == "tok_s" else "ttft_ms", validate.load_class(item.condition), "card"
            )
            inside += item.predicted * low <= item.measured <= item.predicted * high
        assert inside / len(own) > 0.9


def test_rows_that_break_the_rule_are_predicted_and_reported_apart(found: list[Miss]) -> None:
    left = [item for item in found if not item.case.kept]
    assert len(left) > 300
    assert "4 engine: HF Transformers" in validation.tables(found)


def test_each_fold_has_its_coefficients(found: list[Miss]) -> None:
    folds = coefficients.folds()
    cards = {item.condition.card for item in found if item.case.kept}
    assert cards <= set(folds.without_card)
    assert len({repr(fold) for fold in folds.without_card.values()}) == len(folds.without_card)
    assert set(folds.without_generation) == {"volta", "turing", "ampere", "ada", "hopper", "blackwell"}


def test_a_card_with_fewer_than_three_published_points_is_unvalidated() -> None:
    known = bands()
    assert known.basis("rtx-2000-ada") == "architecture"
    assert known.basis("l4") == "card"
    few = Bands(known.bands, {"l4": MIN_POINTS - 1})
    assert few.basis("l4") == "architecture"
    for figure in ("tok_s", "ttft_ms", "tpot_ms"):
        for load in ("one", "users", "open"):
            near, far = (known.ends(figure, load, basis) for basis in ("card", "architecture"))  # type: ignore[arg-type]
            assert far[0] <= near[0] <= 1 <= near[1] <= far[1]


def test_a_band_of_one_over_a_figure_by_hand() -> None:
    """Tokens a second between half and 1.6 times: TPOT between 1 / 1.6 = 0.625 and 2 times."""
    band = Band("tok_s", "users", "card", 0.5, 1.6, 10, 5, 0.1)
    assert use("tpot_ms", "users").ends(band) == (pytest.approx(0.625), pytest.approx(2.0))
    assert use("tok_s", "open").ends(band) == (0.5, 1.6)
    assert use("tok_s", "one").ends(replace(band, low=1.1)) == (1.0, 1.6)  # never beside the prediction


def test_coefficients_survive_their_file(tmp_path: Path) -> None:
    folds = coefficients.folds()
    coefficients.write(folds, tmp_path / "c.toml")
    table = tomllib.loads((tmp_path / "c.toml").read_text(encoding="utf-8"))
    assert table["all"]["read_16"] == pytest.approx(folds.whole.read_16, rel=1e-3)
    assert set(table["without_card"]) == set(folds.without_card)
