"""Other tools' maps, and fields made rigid in bone: against ITK, a Kabsch fit by NumPy, and files as they are left by others."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F

import spinereg
from spinereg.files.foreign import read_itk, read_map
from spinereg.files.problems import InputError
from spinereg.files.transforms import SpineTransform, itk_affine, itk_field, write_itk
from spinereg.files.volumes import read_labels
from spinereg.registration.rigidify import bone_poses, rigid_in_bone
from spinereg.space.fields import determinant, integrate, jacobian
from spinereg.space.geometry import crop_grid, respace_grid, transform_points
from spinereg.space.rigid import twist_matrix

CASE = Path(__file__).parent.parent / "data_samples" / "test" / "easy_0"
MASK = CASE / "ct_mask.nii.gz"


@pytest.fixture(scope="module")
def labels():
    return read_labels(MASK)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    "A label map of three of its vertebrae, one after the other."
    image, path = nib.load(MASK), tmp_path_factory.mktemp("three") / "ct_mask.nii.gz"
    data = np.asarray(image.dataobj)
    nib.save(nib.Nifti1Image(np.where((data >= 20) & (data <= 22), data, 0).astype(data.dtype), image.affine), path)
    return path


@pytest.fixture(scope="module")
def wavy(labels):
    "A smooth field of several millimetres that takes no notice of bone, after a rigid motion with the headers' offset in it."
    grid = respace_grid(labels.grid, 2.0)
    v = 2.5 * F.interpolate(torch.randn(1, 3, 5, 6, 9, generator=torch.Generator().manual_seed(3)), grid.shape, mode="trilinear", align_corners=True)
    for axis, n in enumerate(grid.shape, start=2):
        v = v * torch.sin(torch.linspace(0, np.pi, n)).view([-1 if a == axis else 1 for a in range(5)])
    rigid = twist_matrix(torch.tensor([0.05, -0.1, 0.2, 400.0, -30, 20]).double()).numpy()
    moved = type(labels)(labels.data, labels.names, labels.values, type(grid)(labels.grid.shape, rigid @ labels.grid.affine), labels.native)
    return SpineTransform(grid, integrate(v, grid), integrate(-v, grid), rigid), moved


@pytest.fixture(scope="module")
def made_rigid(wavy):
    return rigid_in_bone(wavy[0], wavy[1], wavy[0].grid)


def kabsch(x, y):
    "Largest distance from the rigid motion that fits best, by NumPy alone."
    a, b = x - x.mean(0), y - y.mean(0)
    U, _, Vt = np.linalg.svd(a.T @ b)
    R = Vt.T @ np.diag([1, 1, np.linalg.det(Vt.T @ U.T)]) @ U.T
    return np.linalg.norm(a @ R.T - b, axis=1).max()


def test_every_vertebra_is_rigid_and_the_rest_is_as_before(wavy, made_rigid):
    """Points all over kept bone, between voxels: 1e-3 mm by a fit of our own; the given field bends them; no fold; unchanged far away."""
    (given, labels), phi = wavy, made_rigid.transform
    generator = torch.Generator().manual_seed(0)
    for k, name in enumerate(labels.names, start=1):
        at = (labels.data == k).nonzero().double()
        y = transform_points(labels.grid.affine, at + torch.rand(at.shape, generator=generator).double() - 0.5)
        y = y[phi.bones.bone_at(transform_points(np.linalg.inv(phi.rigid), y), backward=True) == k]
        x = phi.inverse_points(y)
        assert len(y) > 0.95 * len(at) and kabsch(x.numpy(), phi.points(x).numpy()) < 1e-3 < 0.2 < kabsch(x.numpy(), given.points(x).numpy()), name
        assert np.allclose(transform_points(made_rigid.motions[name], x), y, atol=1e-6), name
    assert determinant(jacobian(phi.disp, phi.grid)).min() > 0
    x = phi.grid.points_mm(phi.disp.double())[::4, ::4, ::4].reshape(-1, 3)
    far = torch.stack([bone.at(x, pose) for bone, pose in zip(phi.bones.maps, phi.bones.poses)]).amin(0) > 20
    assert far.sum() > 50 and (phi.points(x) - given.points(x))[far].norm(dim=1).quantile(0.95) < 0.3
    assert (phi.inverse_points(phi.points(x)) - x)[~far].norm(dim=1).quantile(0.99) < 0.3


def test_a_rigid_field_stays_what_it_is(wavy):
    _, labels = wavy
    grid = respace_grid(type(labels.grid)(labels.data.shape, np.linalg.inv(wavy[0].rigid) @ labels.grid.affine), 2.0)
    still = torch.zeros(1, 3, *grid.shape)
    found = rigid_in_bone(SpineTransform(grid, still, still, wavy[0].rigid), labels, grid)
    assert len(found.notices) == 1 and "the field was up to 0.00 mm" in found.notices[0].text and found.transform.disp.abs().max() < 1e-3
    assert all(np.allclose(motion, wavy[0].rigid, atol=1e-4) for motion in found.motions.values())


def test_what_the_field_does_not_see_is_left_to_it_and_said(wavy):
    """Only the upper half is in view: the lower vertebrae get no motion, and a notice names them."""
    given, labels = wavy
    n = given.grid.shape[2]
    upper = crop_grid(given.grid, [0, 0, 2 * n // 3], given.grid.shape)
    found = bone_poses(given, labels, upper)
    assert "L5" in found.unseen and "T11" in found.names and len(found.poses) == len(found.names)
    made, left = (notice.text.partition("; ")[0] for notice in rigid_in_bone(given, labels, upper).notices[:2])
    assert made == f"made rigid: {', '.join(found.names)}" and left.endswith(f": {', '.join(found.unseen)}")


def test_the_file_is_rigid_as_itk_reads_it(tmp_path, three, wavy):
    """0.01 mm at bone 4 mm and more from other bone; the motions beside it are exact."""
    write_itk(tmp_path / "field.tfm", sitk.CompositeTransform([itk_affine(np.eye(4)), itk_field(wavy[0].disp, wavy[0].grid)]))
    phi, labels = spinereg.rigidify(tmp_path / "field.tfm", three, out_dir=tmp_path / "out"), read_labels(three)
    assert np.allclose(phi.grid.spacing_mm, 1.6) and not phi.disp[:, :, 0].any() and not phi.disp[..., -1].any()
    by_itk, inverse = (sitk.ReadTransform(str(tmp_path / "out" / f"{name}.h5")) for name in ("transform", "inverse"))
    y = transform_points(labels.grid.affine, labels.data.nonzero().double())[::37]
    number, x = phi.bones.bone_at(transform_points(np.linalg.inv(phi.rigid), y), backward=True), phi.inverse_points(y)
    each = enumerate(zip(phi.bones.maps, phi.bones.poses), start=1)
    other = torch.stack([torch.minimum(bone.at(y), bone.at(x, pose)).where(number != k, torch.inf) for k, (bone, pose) in each]).amin(0)
    lone = (number > 0) & (other > 4)
    flip = np.array([-1, -1, 1])
    there = np.array([by_itk.TransformPoint(tuple(p)) for p in x[lone].numpy() * flip]) * flip
    back = np.array([inverse.TransformPoint(tuple(p)) for p in y[lone].numpy() * flip]) * flip
    assert lone.sum() > 100 and np.abs(there - y[lone].numpy()).max() < 0.01 and np.abs(back - x[lone].numpy()).max() < 0.01
    motion = sitk.ReadTransform(str(tmp_path / "out" / "vertebrae" / "L2.tfm"))
    k = labels.names.index("L2") + 1
    own = x[number == k].numpy()
    assert np.abs(np.array([motion.TransformPoint(tuple(p)) for p in own * flip]) * flip - y[number == k].numpy()).max() < 1e-4


def test_register_makes_its_field_rigid_at_the_end(tmp_path, three):
    files = {"fixed": CASE / "mr_t1.nii.gz", "moving": CASE / "ct.nii.gz", "prealign": "header"}
    files |= {"spacing_mm": 3.0, "levels": (1,), "steps": (4,), "step_mm": 1.5}
    weights = {"weight_oc": 0.0, "weight_pc": 0.0, "weight_rf": 0.0, "weight_diffusion": 0.3}
    plain, rigid = (spinereg.register(**files, **weights, method="optimise", moving_labels=three, rigidify=last) for last in (False, True))
    assert plain.vertebrae.residual_max_mm.max() > 0.05 > 1e-3 > rigid.vertebrae.residual_max_mm.max()
    assert "released_percent" in rigid.vertebrae and "released_percent" not in plain.vertebrae
    rigid.save(tmp_path)
    assert torch.equal(spinereg.read_transform(tmp_path).bones.poses, rigid.transform.bones.poses)
    with pytest.raises(ValueError, match="rigidify=True: expected False, or True with moving_labels"):
        spinereg.register(**files, rigidify=True)


def test_files_of_other_tools_are_read_in_their_order(tmp_path, wavy):
    """A displacement image in NIfTI and a matrix, ANTs' way, is the composite of both; the other order is another map."""
    phi, points = wavy[0], torch.rand(50, 3).double() * 40 - 20 + torch.from_numpy(wavy[0].grid.centre_mm)
    sitk.WriteImage(itk_field(phi.disp, phi.grid).GetDisplacementField(), str(tmp_path / "1Warp.nii.gz"))
    write_itk(tmp_path / "0GenericAffine.mat", itk_affine(phi.rigid))
    names = "1Warp.nii.gz", "0GenericAffine.mat"
    there, other = (read_itk([tmp_path / name for name in order]) for order in (names, names[::-1]))
    by = [np.array([t.TransformPoint(tuple(p)) for p in points.numpy() * [-1, -1, 1]]) * [-1, -1, 1] for t in (there, other)]
    assert np.abs(by[0] - phi.points(points).numpy()).max() < 1e-3 < 0.1 < np.abs(by[1] - by[0]).max()
    found = read_map([tmp_path / "1Warp.nii.gz", tmp_path / "0GenericAffine.mat"])
    assert (found.points(points) - phi.points(points)).norm(dim=1).max() < 0.05 and found.bones is None


@pytest.mark.parametrize("what", ["missing", "words", "elastix", "scalar image", "points"])
def test_what_is_no_transform_is_refused(tmp_path, what):
    file = tmp_path / ("image.nii.gz" if what == "scalar image" else "TransformParameters.0.txt")
    if what == "scalar image":
        nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.eye(4)), file)
    elif what != "missing":
        file.write_text({"words": "hello", "elastix": '(Transform "BSplineTransform")\n', "points": "x_mm,y_mm\n1,2\n"}[what])
    with pytest.raises(InputError, match="transform .*Give a transform"):
        read_itk(file)


def test_a_map_without_a_grid_asks_for_the_fixed_image(tmp_path, three):
    write_itk(tmp_path / "affine.tfm", itk_affine(np.eye(4)))
    with pytest.raises(ValueError, match="give the fixed image"):
        spinereg.rigidify(tmp_path / "affine.tfm", three)
    phi = spinereg.rigidify(tmp_path / "affine.tfm", three, fixed=CASE / "mr_t1.nii.gz", spacing_mm=3.0)
    assert phi.disp.abs().max() < 1e-3 and len(phi.bones.poses) == 3


def test_a_map_of_labels_without_vertebrae_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8), np.uint8), np.eye(4)), tmp_path / "empty.nii.gz")
    with pytest.raises(InputError, match="holds no vertebra"):
        spinereg.rigidify(tmp_path / "any.tfm", tmp_path / "empty.nii.gz")
