"""A plain transcription of the published training step (Jian et al., MICCAI 2022), to measure ours against.

Written from the published description in plain torch, for one pair (B = 1) on isotropic voxels of 1 mm. It is slow where the published
algorithm is: descriptors by dilated convolutions, Jacobians by nine filters over the whole volume, a rigid motion refined for every vertebra by
fifty inner Adam steps on the whole volume. It keeps these defects of the original, which tests show ours is free of:

1. MIND clamps the mean distance relative to its own mean: NaN for a constant image, and one image of a batch changes the other.
2. The Jacobian is in voxels, and zeros lie beyond the border; a mean over no vertebra is NaN; B = 1 only.
3. Scaling and squaring reads zeros beyond the border.
4. The half-resolution displacement is doubled on upsampling under corner alignment, where the true ratio is (2n - 1) / (n - 1).
5. The rigid fit takes 256 random points, reads the field at the nearest voxel, and centres on the label's centroid.
8. The size is frozen, and the sampling grids sit in the state dict.

Crashes and arguments that never worked are not transcribed. Displacements are in voxels.
"""

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WEIGHTS = {"mind": 1.0, "diffusion": 0.01, "oc": 0.005, "pc": 0.01, "rd": 0.1, "rf": 0.01}


class UNet(nn.Module):
    "Moving and fixed image to a velocity at half resolution."

    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList([nn.Conv3d(a, b, 3, padding=1) for a, b in ((2, 32), (32, 32), (32, 64), (64, 64), (64, 64))])
        self.decoder = nn.ModuleList([nn.Conv3d(a, 64, 3, padding=1) for a in (64 + 64, 64 + 64, 64 + 32)])
        self.last = nn.ModuleList([nn.Conv3d(64, 32, 3, padding=1), nn.Conv3d(32, 32, 3, padding=1)])
        self.velocity = nn.Conv3d(32, 3, 3, padding=1)
        nn.init.normal_(self.velocity.weight, std=1e-5)
        nn.init.zeros_(self.velocity.bias)
        self.pool, self.upsample, self.activation = nn.MaxPool3d(2), nn.Upsample(scale_factor=2, mode="nearest"), nn.LeakyReLU(0.2)

    def forward(self, moving: Tensor, fixed: Tensor) -> Tensor:
        x = torch.cat([moving, fixed], 1)
        features = []
        for level, convolution in enumerate(self.encoder):
            x = self.activation(convolution(self.pool(x) if level else x))
            features.append(x)
        for convolution, skip in zip(self.decoder, features[3:0:-1]):
            x = self.activation(convolution(torch.cat([self.upsample(x), skip], 1)))
        for convolution in self.last:
            x = self.activation(convolution(x))
        return self.velocity(x)


class Warp(nn.Module):
    "Read a volume at every voxel plus a displacement; zeros beyond the border."

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.register_buffer("grid", torch.stack(torch.meshgrid(*[torch.arange(n) for n in shape], indexing="ij"))[None].float())

    def forward(self, volume: Tensor, disp: Tensor) -> Tensor:
        at = self.grid + disp
        for axis, n in enumerate(volume.shape[2:]):
            at[:, axis] = 2 * (at[:, axis] / (n - 1) - 0.5)
        at = at.permute(0, 2, 3, 4, 1)[..., [2, 1, 0]]
        return F.grid_sample(volume, at, mode="bilinear", padding_mode="zeros", align_corners=True)


class Warped(NamedTuple):
    "What the head makes of a velocity."

    disp: Tensor  # (1, 3, i, j, k), fixed -> moving
    disp_inv: Tensor
    moved: Tensor  # moving image on the fixed one
    moved_back: Tensor  # fixed image on the moving one
    labels: Tensor  # (1, n, i, j, k), one-hot labels of the moving image on the fixed one
    labels_back: Tensor  # those of the fixed image on the moving one


class Head(nn.Module):
    "Velocity at half resolution to displacements, images and labels, both ways."

    def __init__(self, shape: tuple[int, int, int], steps: int = 7):
        super().__init__()
        self.steps, self.warp_half, self.warp_full = steps, Warp(tuple(n // 2 for n in shape)), Warp(shape)

    def integrate(self, velocity: Tensor) -> Tensor:
        disp = velocity / 2**self.steps
        for _ in range(self.steps):
            disp = disp + self.warp_half(disp, disp)
        return 2 * F.interpolate(disp, scale_factor=2, mode="trilinear", align_corners=True)

    def forward(self, velocity: Tensor, fixed: Tensor, moving: Tensor, fixed_labels: Tensor, labels: Tensor) -> Warped:
        disp, disp_inv = self.integrate(velocity), self.integrate(-velocity)
        images = self.warp_full(moving, disp), self.warp_full(fixed, disp_inv)
        return Warped(disp, disp_inv, *images, self.warp_full(labels, disp), self.warp_full(fixed_labels, disp_inv))


def mind_descriptor(image: Tensor, radius: int = 2, dilation: int = 2) -> Tensor:
    "MIND-SSC: twelve channels, by two convolutions with one-hot kernels."
    neighbours = [(1, 1, 0), (1, 1, 2), (1, 0, 1), (1, 2, 1), (0, 1, 1), (2, 1, 1)]
    pairs = [(p, q) for p, q in itertools.combinations(neighbours, 2) if sum((a - b) ** 2 for a, b in zip(p, q)) == 2]
    first, second = (torch.zeros(12, 1, 3, 3, 3).to(image) for _ in range(2))
    for n, (p, q) in enumerate(pairs):
        first[n, 0][p], second[n, 0][q] = 1, 1
    padded = F.pad(image, [dilation] * 6, mode="replicate")
    difference = F.conv3d(padded, first, dilation=dilation) - F.conv3d(padded, second, dilation=dilation)
    distance = F.avg_pool3d(F.pad(difference**2, [radius] * 6, mode="replicate"), 2 * radius + 1, stride=1)
    excess = distance - distance.amin(1, keepdim=True)
    mean = excess.mean(1, keepdim=True)
    mean = mean.clamp(0.001 * mean.mean().item(), 1000 * mean.mean().item())
    return torch.exp(-excess / mean)


def mind(fixed: Tensor, moved: Tensor) -> Tensor:
    return ((mind_descriptor(fixed) - mind_descriptor(moved)) ** 2).mean()


def diffusion(velocity: Tensor, multiplier: float = 2) -> Tensor:
    return multiplier * sum((velocity.diff(dim=axis) ** 2).mean() for axis in (2, 3, 4)) / 3


def jacobian(disp: Tensor) -> Tensor:
    "Component, axis of the derivative, i, j, k; by nine central-difference filters."
    J = []
    for component in range(3):
        row = []
        for axis in range(3):
            kernel = torch.tensor([-0.5, 0, 0.5]).to(disp).reshape([1, 1, *(3 if a == axis else 1 for a in range(3))])
            slope = F.conv3d(disp[:, component : component + 1], kernel, padding=tuple(int(a == axis) for a in range(3)))
            row.append(slope[0, 0] + float(component == axis))
        J.append(torch.stack(row))
    return torch.stack(J)


def orthonormality(J: Tensor, bone: Tensor) -> Tensor:
    "Mean of |J^T J - I|^2 over the voxels of all vertebrae; J (3, 3, i, j, k), bone (n, i, j, k)."
    eye = torch.eye(3).to(J)[..., None, None, None]
    products = bone[:, None, None, None] * (J[:, :, None] * J[:, None, :])
    excess = products.sum(1) - bone[:, None, None] * eye
    return (excess**2).sum() / bone.sum()


def properness(J: Tensor, bone: Tensor) -> Tensor:
    "Mean of (det J - 1)^2 over the voxels of all vertebrae."
    (a, b, c), (d, e, f), (g, h, i) = J
    det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    return ((bone * (det - 1)) ** 2).sum() / bone.sum()


def fit_rigid(bone: Tensor, disp: Tensor, points: int = 256) -> tuple[Tensor, Tensor]:
    "Rotation and translation of one vertebra, (i, j, k) bool, from points drawn at random; about the centroid of the label."
    every = bone.nonzero().to(disp)
    x = every[torch.randint(len(every), (points,))]
    i, j, k = x.round().long().T
    y = x + disp[0, :, i, j, k].T
    centre_x = every.mean(0)
    centre_y = centre_x + disp[0, :, *centre_x.round().long()]
    U, _, V = torch.svd((x - centre_x).T @ (y - centre_y))
    flip = torch.diag(torch.stack([V.new_tensor(1), V.new_tensor(1), torch.det(V @ U.T)]))
    R = V @ flip @ U.T
    return R, centre_y - R @ centre_x


def rigid_disp(grid: Tensor, rotation: Tensor, translation: Tensor) -> Tensor:
    "Displacement of a rigid motion at every voxel of a grid (1, 3, i, j, k)."
    return (rotation @ grid.flatten(2) + translation[:, None]).view_as(grid) - grid


def rigid_field(disp: Tensor, labels: Tensor, grid: Tensor, minimum: int = 100) -> Tensor:
    "Mean distance, over the voxels of each vertebra, of the field from the rigid motion fitted to it."
    losses = []
    for bone in labels[0] > 0.5:
        if bone.sum() > minimum:
            rigid = rigid_disp(grid, *fit_rigid(bone, disp.detach()))
            losses.append(((disp - rigid).norm(dim=1) * bone).sum() / bone.sum())
    return torch.stack(losses).mean()


def rotation_matrix(vector: Tensor) -> Tensor:
    "Rodrigues' formula."
    angle = (vector @ vector + 1e-12).sqrt()
    x, y, z = vector / angle
    o = torch.zeros_like(x)
    K = torch.stack([o, -z, y, z, o, -x, -y, x, o]).reshape(3, 3)
    return torch.eye(3).to(vector) + angle.sin() * K + (1 - angle.cos()) * K @ K


def dice_loss(p: Tensor, t: Tensor) -> Tensor:
    return 1 - 2 * (p * t).sum() / (p.sum() + t.sum())


def closest_rigid(
    moving: Tensor, warped: Tensor, rotation: Tensor, translation: Tensor, warp: Warp, iterations: int = 50, rate: float = 0.01
) -> Tensor:
    "The label, rigidly moved to where it overlaps the warped one most: Adam on a rotation and a translation, from a first guess."
    turn, shift = (torch.zeros(3).to(rotation).requires_grad_() for _ in range(2))
    centre = (warped[0, 0] > 0.5).nonzero().to(rotation).mean(0)
    optimiser = torch.optim.Adam([turn, shift], lr=rate)

    def moved():
        R = rotation_matrix(turn) @ rotation
        return warp(moving, rigid_disp(warp.grid, R, rotation @ centre + translation + shift - R @ centre))

    for _ in range(iterations):
        optimiser.zero_grad()
        dice_loss(moved(), warped).backward()
        optimiser.step()
    with torch.no_grad():
        return moved()


def rigid_dice(disp: Tensor, moving_labels: Tensor, labels: Tensor, warp: Warp, minimum: int = 100) -> Tensor:
    "Mean Dice loss of each warped vertebra and the closest rigidly moved one."
    losses = []
    for n, bone in enumerate(labels[0] > 0.5):
        if bone.sum() > minimum:
            moving, warped = moving_labels[:, n : n + 1], labels[:, n : n + 1]
            target = closest_rigid(moving, warped.detach(), *fit_rigid(bone, disp.detach()), warp)
            losses.append(dice_loss(warped, target))
    return torch.stack(losses).mean()
