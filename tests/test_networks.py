"The published networks, against counted weights, explicit padding and averaged coordinates."

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from spinereg.registration.networks import UNet, find_weights, halvings, load_network, predict, save_weights, velocity_grid
from spinereg.space.fields import resample_field
from spinereg.space.geometry import Grid

SMALL = {"encoder": (4, 4, 6, 6, 6), "decoder": 6, "last": (4, 4)}
OBLIQUE = np.array([[1.1, 0.2, 0.1, -20], [-0.2, 1.0, 0.3, 5], [-0.05, -0.35, 3.0, 12], [0, 0, 0, 1]])
BOTH = pytest.mark.parametrize("full", [False, True], ids=["half", "full"])


def pair(*shape, batch=1, seed=0):
    return torch.rand(2, batch, 1, *shape, generator=torch.Generator().manual_seed(seed))


def awake(full=False):
    "A small network whose last layer is not almost zero, so that its output can be compared."
    torch.manual_seed(0)
    network = UNet(full, **SMALL)
    torch.nn.init.normal_(network.velocity.weight, std=0.1)
    return network.eval()


# the network


@BOTH
def test_network_has_the_published_weights(full):
    """Channels of the paper: 2-32-32-64-64-64 down, 64 at each of three levels up (four at full resolution), 32-32, 3."""
    convolutions = [(2, 32), (32, 32), (32, 64), (64, 64), (64, 64)]
    convolutions += [(64 + 64, 64), (64 + 64, 64), (64 + 32, 64)] + [(64 + 32, 64)] * full
    convolutions += [(64, 32), (32, 32), (32, 3)]
    assert sum(p.numel() for p in UNet(full).parameters()) == sum(27 * a * b + b for a, b in convolutions)


@BOTH
def test_defects_8_and_9_nothing_but_weights_is_stored_and_they_fit_any_shape(full):
    """C10: no grid and no buffer in the state; the same weights take two shapes; repr works."""
    network = awake(full)
    assert not list(network.buffers())
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    with torch.no_grad():
        assert network(*pair(16, 24, 20)).isfinite().all()
        assert network(*pair(21, 9, 30)).isfinite().all()
    other = UNet(full, **SMALL)
    other.load_state_dict(network.state_dict())
    assert "Conv3d(2, 4" in repr(other)


@BOTH
def test_an_untrained_network_moves_nothing(full):
    with torch.no_grad():
        velocity = UNet(full)(*pair(16, 16, 16))
    assert 0 < velocity.abs().max() < 1e-3


@BOTH
@pytest.mark.parametrize("shape", [(14, 33, 50), (8, 8, 8), (9, 17, 23), (12, 40, 16)])
def test_a6_c10_any_shape_from_8_voxels_and_no_axis_is_pooled_below_4(full, shape):
    """A6, C10: thick-slice stacks and odd sizes go in as they are."""
    network, seen = awake(full), []
    for convolution in network.encoder:
        convolution.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[2:]))
    with torch.no_grad():
        velocity = network(*pair(*shape))
    assert velocity.shape == (1, 3, *(shape if full else [(n + 1) // 2 for n in shape]))
    assert min(min(size) for size in seen) >= 4
    assert all(before[axis] in (after[axis], 2 * after[axis]) for before, after in zip(seen, seen[1:]) for axis in range(3))


def test_a6_an_axis_is_halved_as_often_as_it_can_be():
    for n in range(8, 200):
        left = [-(-n // 2**h) for h in range(5)]
        assert left[halvings(n)] >= 4
        assert halvings(n) == 4 or left[halvings(n) + 1] < 4


@BOTH
def test_c10_padding_is_that_of_repeated_border_voxels_and_is_cropped_away(full):
    """C10: the answer for an odd shape is that for the same images padded by hand."""
    fixed, moving = pair(17, 30, 13)
    by_hand = [torch.from_numpy(np.pad(x.numpy(), [(0, 0), (0, 0), (0, 3), (0, 2), (0, 3)], mode="edge")) for x in (fixed, moving)]
    assert [n * 2**h for n, h in zip((5, 8, 4), (2, 2, 2))] == list(by_hand[0].shape[2:])
    network = awake(full)
    with torch.no_grad():
        got, wanted = network(fixed, moving), network(*by_hand)
    i, j, k = got.shape[2:]
    assert torch.allclose(got, wanted[:, :, :i, :j, :k], atol=1e-6)


def test_a6_x12_too_few_voxels_are_refused_with_their_number():
    with pytest.raises(ValueError, match=r"\(7, 20, 20\).*at least 8"):
        awake()(*pair(7, 20, 20))


@BOTH
def test_two_in_a_batch_are_twice_one(full):
    network, (fixed, moving) = awake(full), pair(18, 16, 11, batch=2)
    with torch.no_grad():
        both, single = network(fixed, moving), torch.cat([network(fixed[n : n + 1], moving[n : n + 1]) for n in (0, 1)])
    assert torch.allclose(both, single, atol=1e-6)
    assert not torch.allclose(both[0], both[1], atol=1e-3)


# where the velocity lives


@pytest.mark.parametrize("shape", [(16, 12, 8), (15, 12, 9)])
def test_a12_voxels_at_half_resolution_lie_in_the_middle_of_eight(shape):
    """A12: the world point of each is the mean of the points it stands for; odd sizes reach half a voxel further."""
    grid = Grid(shape, OBLIQUE)
    even = Grid(tuple(n + n % 2 for n in shape), OBLIQUE)
    points = even.points_mm(torch.zeros(1, dtype=torch.float64)).movedim(-1, 0)[None]
    place = velocity_grid(grid)
    assert torch.allclose(F.avg_pool3d(points, 2)[0].movedim(0, -1), place.points_mm(torch.zeros(1, dtype=torch.float64)), atol=1e-9)
    assert velocity_grid(grid, full_resolution=True) is grid


def test_a13_a_linear_field_survives_half_resolution():
    """A13: a strain of 10 % written at half resolution and read at full is exact up to the border, small axes included."""
    grid = Grid((16, 21, 9), np.diag([1.0, 1.5, 4.0, 1.0]))
    strain = torch.tensor([[0.1, 0.02, 0.0], [0.0, -0.1, 0.03], [0.01, 0.0, 0.1]])
    half, wanted = ((g.points_mm(torch.zeros(1)) @ strain.T).movedim(-1, 0)[None] for g in (velocity_grid(grid), grid))
    assert (resample_field(half, velocity_grid(grid), grid) - wanted).abs().max() < 1e-4


@BOTH
def test_a13_a_network_speaks_in_voxels_and_predict_in_millimetres(full):
    grid = Grid((10, 12, 9), np.diag([2.0, 3.0, 4.0, 1.0]))
    network = awake(full)
    with torch.no_grad():
        velocity, place = predict(network, *pair(*grid.shape), grid)
        voxels = network(*pair(*grid.shape))
    size = torch.tensor([2.0, 3.0, 4.0]) * (1 if full else 2)
    assert place.shape == tuple(velocity.shape[2:])
    assert torch.allclose(velocity, voxels * size[:, None, None, None])


# weights on disk


def test_e5_weights_come_back_with_what_they_were_trained_for(tmp_path):
    network = UNet(full_resolution=True)
    save_weights(tmp_path / "last.safetensors", network, 1.25, {"epoch": 7, "scheme": "verse"})
    trained = load_network(tmp_path)
    assert (trained.spacing_mm, trained.about) == (1.25, {"epoch": 7, "scheme": "verse"})
    assert trained.network.full_resolution
    assert not trained.network.training
    assert all(torch.equal(a, b) for a, b in zip(network.state_dict().values(), trained.network.state_dict().values(), strict=True))
    save_weights(tmp_path / "best.safetensors", UNet(), 2.0, {})
    assert find_weights(tmp_path).name == "best.safetensors"


def test_c12_a_failed_write_leaves_the_old_weights(tmp_path, monkeypatch):
    """C12: written aside and put in place in one step."""
    file = save_weights(tmp_path / "best.safetensors", UNet(), 1.0, {"epoch": 1})

    def half_written(path, content):
        with open(path, "wb") as out:
            out.write(content[: len(content) // 2])
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half_written)
        with pytest.raises(OSError, match="disk full"):
            save_weights(file, UNet(), 1.0, {"epoch": 2})
    assert load_network(file).about == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["best.safetensors"]


def test_e5_what_is_no_weights_file_is_refused(tmp_path):
    """E5: each message names the file, what was found and what is expected."""
    (tmp_path / "text.safetensors").write_text("not weights at all")
    save_file({"w": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    future = {"format": "spinereg-unet-99", "spinereg": "9.0", "full_resolution": False, "spacing_mm": 1.0, "about": {}}
    save_file({"w": torch.zeros(2)}, tmp_path / "future.safetensors", {"spinereg": json.dumps(future)})
    for name, spacing_mm, epoch in (("flat", 0.0, 1), ("inside_out", -2.0, 1), ("nowhere_mm", math.nan, 1), ("never", 1.0, math.nan)):
        save_weights(tmp_path / f"{name}.safetensors", UNet(), spacing_mm, {"epoch": epoch})
    spoilt = UNet()
    spoilt.velocity.bias.data[1] = math.nan
    save_weights(tmp_path / "spoilt.safetensors", spoilt, 1.0, {})
    for name, words in {
        "text": r"text\.safetensors is no safetensors file",
        "foreign": r"foreign\.safetensors has the format None.*reads 'spinereg-unet-1'",
        "future": r"future\.safetensors has the format 'spinereg-unet-99'",
        "flat": r"flat\.safetensors: spacing_mm=0.0: expected a number from 0.2 to 5",
        "inside_out": r"spacing_mm=-2.0: expected a number from 0.2 to 5",
        "nowhere_mm": r"spacing_mm=nan: expected a number from 0.2 to 5",
        "never": r"never\.safetensors: epoch=nan: expected a whole number, at least 0",
        "spoilt": r"1 of \d+ tensors hold numbers that are not finite, such as velocity\.bias",
    }.items():
        with pytest.raises(ValueError, match=words):
            load_network(tmp_path / f"{name}.safetensors")
    torch.save({"format": "spinereg-training-2"}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"give the last\.safetensors beside it; a last\.pt is for resume=True") as caught:
        load_network(tmp_path / "last.pt")
    assert "weights_only" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="best.safetensors"):
        load_network(tmp_path / "nowhere")


def test_damaged_numbers_of_weights_are_told(tmp_path):
    """One bit of one number, which stays finite: the hash in the file tells; missing settings are told in words."""
    path = save_weights(tmp_path / "w.safetensors", UNet(False), 2.0, {})
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="its numbers have the SHA-256 .*expected .*take other weights"):
        load_network(path)
    for old, new in ((b"full_resolution", b"full_resolutioX"), (b'\\"about\\": {}', b'\\"about\\": 12')):
        assert good.count(old) == 1
        path.write_bytes(good.replace(old, new))
        with pytest.raises(ValueError, match="w.safetensors.*the file was damaged or changed"):
            load_network(path)
