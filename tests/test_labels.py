"Label schemes against the values that their publishers state, and anatomical order."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinereg.files.labels import OTHER, SCHEMES, VERTEBRAE, fitting_schemes, scheme_table, upside_down, vertebra_values
from spinereg.files.problems import InputError, InputFile

PUBLISHED = {
    "verse": {1: "C1", 7: "C7", 8: "T1", 19: "T12", 20: "L1", 24: "L5", 25: "L6", 26: "S", 28: "T13"},
    "spineps": {1: "C1", 19: "T12", 20: "L1", 24: "L5", 26: "S", 28: "T13"},
    "totalseg_v1": {41: "C1", 35: "C7", 34: "T1", 23: "T12", 22: "L1", 18: "L5", 92: "S"},
    "totalseg_v2": {50: "C1", 44: "C7", 43: "T1", 32: "T12", 31: "L1", 27: "L5", 26: "S", 25: "S"},
    "totalseg_mr": {25: "C1", 19: "C7", 18: "T1", 7: "T12", 6: "L1", 2: "L5", 1: "S"},
    "totalspineseg_v1": {41: "C1", 35: "C7", 34: "T1", 23: "T12", 22: "L1", 18: "L5", 92: "S"},
    "totalspineseg_v2": {11: "C1", 17: "C7", 21: "T1", 32: "T12", 41: "L1", 45: "L5", 46: "L6", 50: "S"},
    "mrspineseg": {10: "T9", 7: "T12", 6: "L1", 2: "L5", 1: "S"},
}
DROPPED = {"verse": [27], "spineps": [27, 120, 220], "totalseg_v1": [1, 17, 42, 104], "totalseg_v2": [1, 24, 51, 79, 117]}
DROPPED |= {"totalseg_mr": [], "totalspineseg_v1": [200, 201, 202, 224], "totalspineseg_v2": [1, 2, 63, 71, 82, 91, 95, 100], "mrspineseg": [11, 19]}

MASK = InputFile("labels", "mask.nii.gz")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_B1_published_values(scheme):
    "B1; S1, S2, S3, S4, S6, S7, S8, S10: names of the first and last of each part of the spine, and what is no vertebra."
    assert {value: SCHEMES[scheme][value] for value in PUBLISHED[scheme]} == PUBLISHED[scheme]
    assert set(DROPPED[scheme]) <= OTHER[scheme]
    assert not OTHER[scheme] & set(SCHEMES[scheme])
    assert 0 not in OTHER[scheme] | set(SCHEMES[scheme])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_B1_whole_scheme(scheme):
    "S1, S2, S3, S4, S6, S7, S10: every cervical, thoracic and lumbar vertebra once; only a sacrum may have two values."
    names = list(SCHEMES[scheme].values())
    ordinary = [name for name in VERTEBRAE if name not in ("T13", "L6", "S")]
    assert set(names) <= set(VERTEBRAE)
    assert sorted(set(ordinary) & set(names)) == sorted(name for name in names if name in ordinary)
    if scheme != "mrspineseg":
        assert set(ordinary) <= set(names)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_B3_order_is_anatomical(data):
    "B3: whatever values are present, the names come from the skull down, T13 between T12 and L1."
    scheme = data.draw(st.sampled_from(sorted(SCHEMES)))
    present = data.draw(st.sets(st.sampled_from(sorted(SCHEMES[scheme])), min_size=1))
    named = vertebra_values(dict.fromkeys(present, 100), scheme, MASK)
    places = [VERTEBRAE.index(name) for name in named.values()]
    assert set(named) == present
    assert places == sorted(places)


def test_B3_thirteen_thoracic_six_lumbar():
    named = vertebra_values({19: 1, 28: 1, 20: 1, 24: 1, 25: 1, 26: 1}, "verse", MASK)
    assert list(named.values()) == ["T12", "T13", "L1", "L5", "L6", "S"]


def test_B1_unknown_value_lists_value_voxels_file_and_schemes():
    with pytest.raises(InputError) as caught:
        vertebra_values({20: 500, 21: 600, 99: 77, 30: 5}, "verse", InputFile("moving_labels", "case7/ct_mask.nii.gz"))
    text = str(caught.value)
    assert all(part in text for part in ("case7/ct_mask.nii.gz", "99 (77 voxels)", "30 (5 voxels)", "verse", "totalseg_v1", "totalseg_v2"))
    assert "spineps" not in text.split("All values are known to")[1]


def test_B1_values_no_scheme_knows():
    with pytest.raises(InputError, match="No built-in scheme"):
        vertebra_values({5000: 3}, "verse", MASK)


def test_B1_S3_table_dropped_count_and_two_values_of_one_bone():
    mask = InputFile("moving_labels", "mask.nii.gz")
    named = vertebra_values({31: 10, 32: 20, 79: 30, 5: 40, 25: 9, 26: 8}, "totalseg_v2", mask)
    assert named == {32: "T12", 31: "L1", 25: "S", 26: "S"}
    dropped, one_bone = map(str, mask.notices)
    assert "5, 79 (70 voxels)" in dropped
    assert "values 25 and 26 are both S" in one_bone


def test_B1_no_scheme_is_a_safe_guess():
    "The values of a lumbar spine are known to several schemes, under different names."
    values = {21: 1, 22: 1, 23: 1}
    names = {tuple(SCHEMES[scheme].get(value) for value in values) for scheme in fitting_schemes(values) if scheme in SCHEMES}
    assert len(names) >= 4


def test_B1_own_scheme():
    assert vertebra_values({1: 5, 2: 5, 9: 5}, {1: "L5", 2: "L4", 9: None}, MASK) == {2: "L4", 1: "L5"}
    with pytest.raises(InputError, match="unknown label values"):
        vertebra_values({3: 5}, {1: "L5"}, MASK)


@pytest.mark.parametrize("scheme", [{1: "L9"}, {"L5": 1}, {1: 5}])
def test_B1_own_scheme_that_cannot_be_read(scheme):
    with pytest.raises(InputError, match="cannot be read"):
        scheme_table(scheme, MASK)


def test_B1_unknown_scheme_names_the_choices():
    with pytest.raises(InputError, match="totalspineseg_v2"):
        scheme_table("vers", MASK)


def test_B1_spider_needs_a_level():
    "B1, S9: SPIDER counts from the lowest vertebra up, its file has no absolute level."
    with pytest.raises(InputError, match="spider:L5"):
        scheme_table("spider", MASK)
    assert [scheme_table("spider:L5", MASK)[0][value] for value in (1, 5, 6, 17, 18, 24)] == ["L5", "L1", "T12", "T1", "C7", "C1"]
    assert [scheme_table("spider:L6", MASK)[0][value] for value in (1, 2, 7)] == ["L6", "L5", "T12"]
    assert scheme_table("spider:T12", MASK)[0][1] == "T12"
    assert {100, 101, 125, 201, 225} <= scheme_table("spider:L5", MASK)[1]


@given(st.lists(st.floats(-500, 500), min_size=0, max_size=20, unique=True))
def test_upside_down_only_if_every_step_goes_up(heights_mm):
    falling = np.array(sorted(heights_mm, reverse=True))
    assert not upside_down(falling)
    assert upside_down(falling[::-1]) == (len(falling) >= 3)
