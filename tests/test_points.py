"""Points in the files people have: whatever the file, they come out in the RAS world, or with an error that says why not."""

import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spinereg.files.points import AXES, read_points, write_points
from spinereg.files.problems import InputError

HEAD = "# Markups fiducial file version = 4.11\n# CoordinateSystem = {}\n# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
PLACES = np.array([[10.0, 20, 30], [-5, 20, 31.5]])


def markups(path, places, **said):
    points = [{"label": f"F-{n}", "position": place} for n, place in enumerate(places.tolist())]
    path.write_text(json.dumps({"markups": [{"type": "Fiducial", "controlPoints": points} | said]}))
    return path


def fiducials(path, places, system):
    lines = [f"{n},{x},{y},{z},0,0,0,1,1,1,0,F-{n},," for n, (x, y, z) in enumerate(places.tolist())]
    path.write_text(HEAD.format(system) + "\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(("system", "signs"), [("RAS", [1, 1, 1]), ("LPS", [-1, -1, 1])])
def test_F6_markups_have_their_own_coordinate_system(tmp_path, system, signs):
    table = read_points(markups(tmp_path / "a.mrk.json", PLACES * signs, coordinateSystem=system))
    assert np.array_equal(table[AXES], PLACES)
    assert table.name.tolist() == ["F-0", "F-1"]


def test_F6_markups_that_say_nothing_are_lps_as_slicer_reads_them(tmp_path):
    assert np.array_equal(read_points(markups(tmp_path / "a.mrk.json", PLACES * [-1, -1, 1]))[AXES], PLACES)


@pytest.mark.parametrize(("system", "signs"), [("RAS", [1, 1, 1]), ("0", [1, 1, 1]), ("LPS", [-1, -1, 1]), ("1", [-1, -1, 1])])
def test_F6_fiducials_have_their_own_coordinate_system(tmp_path, system, signs):
    assert np.array_equal(read_points(fiducials(tmp_path / "a.fcsv", PLACES * signs, system))[AXES], PLACES)


BAD = {
    "voxel numbers": lambda folder: fiducials(folder / "a.fcsv", PLACES, "2"),
    "no coordinate system": lambda folder: fiducials(folder / "a.fcsv", PLACES, ""),
    "another unknown one": lambda folder: markups(folder / "a.mrk.json", PLACES, coordinateSystem="IJK"),
    "no markups": lambda folder: (folder / "a.mrk.json").write_text("{}") and folder / "a.mrk.json",
    "no JSON": lambda folder: (folder / "a.mrk.json").write_text("x,y") and folder / "a.mrk.json",
    "undefined position": lambda folder: (folder / "a.mrk.json").write_text('{"markups": [{"controlPoints": [{}]}]}') and folder / "a.mrk.json",
    "two numbers": lambda folder: markups(folder / "a.mrk.json", PLACES[:, :2]),
    "NaN": lambda folder: markups(folder / "a.mrk.json", PLACES * np.nan),
    "empty place": lambda folder: (folder / "a.csv").write_text("x_mm,y_mm,z_mm\n1,,3\n") and folder / "a.csv",
    "decimal comma": lambda folder: (folder / "a.csv").write_text('x_mm,y_mm,z_mm\n"1,5",2,3\n') and folder / "a.csv",
    "other columns": lambda folder: (folder / "a.csv").write_text("x,y,z\n1,2,3\n") and folder / "a.csv",
    "nothing": lambda folder: (folder / "a.csv").write_text("\n") and folder / "a.csv",
}


@pytest.mark.parametrize("what", BAD)
def test_F6_points_that_cannot_be_read(tmp_path, what):
    path = BAD[what](tmp_path)
    with pytest.raises(InputError) as caught:
        read_points(path)
    assert path.name in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(*[st.floats(-1e4, 1e4)] * 3), min_size=1, max_size=5), st.sampled_from(["csv", "mrk.json"]))
def test_points_written_are_points_read(tmp_path_factory, places, ending):
    table = pd.DataFrame(places, columns=AXES)
    read = read_points(write_points(tmp_path_factory.mktemp("points") / f"p.{ending}", table))
    assert np.allclose(read[AXES], table, rtol=0, atol=1e-9)
