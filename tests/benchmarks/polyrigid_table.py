"""Bend a label map of real vertebrae and print what the polyrigid map does to it, as markdown tables.

python tests/benchmarks/polyrigid_table.py ct_mask.nii.gz verse L2 L4
python tests/benchmarks/polyrigid_table.py mask.nii.gz totalseg_v2 T1 L1 --drop 118 --tables rigid rivals
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from spinereg.files.labels import OTHER, SCHEMES
from spinereg.files.volumes import read_labels, renumber
from spinereg.measure.metrics import diffeomorphism
from spinereg.space.fields import compose, determinant, integrate, jacobian, read_index
from spinereg.space.geometry import Grid, crop_grid, inside, respace_grid, slabs, transform_points
from spinereg.space.images import label_centres_mm
from spinereg.space.polyrigid import DistanceMap, Polyrigid, closeness_weights, distance_map, fine_labels, flow_on, near_bone, release
from spinereg.space.rigid import motion_matrix, procrustes, twist_matrix

MOTIONS = {  # turn of a vertebra against the one below it, from the moving to the fixed posture: rotation vector, degrees
    "flexion 5": (-5, 0, 0),
    "extension 5": (5, 0, 0),
    "lateral 5": (0, 5, 0),
    "axial 2": (0, 0, 2),
    "flexion 5, lateral 5, axial 2": (-5, 5, 2),
    "extension 5, lateral 5, axial 2": (5, 5, 2),
    "flexion 3": (-3, 0, 0),
}


class Spine(NamedTuple):
    "Vertebrae of a moving image."

    labels: Tensor  # (i, j, k), 1 ... n
    grid: Grid
    names: tuple[str, ...]  # from the top


class Bent(NamedTuple):
    "A spine and the map from another posture of it."

    poly: Polyrigid  # of the kept bone
    bones: tuple[DistanceMap, ...]  # before anything was released
    released: tuple
    grid: Grid  # the labels' own voxels, around the bones in both postures


def read_spine(path: str, scheme: str, first: str, last: str, drop: list[int]) -> Spine:
    "The vertebrae between two names, from the top."
    labels = read_labels(path, {**dict.fromkeys(OTHER[scheme] | set(drop)), **SCHEMES[scheme]})
    names = labels.names[labels.names.index(first) : labels.names.index(last) + 1]
    return Spine(renumber(labels.data, labels.names, names), labels.grid, names)


def surroundings(spine: Spine, poses: Tensor, which: Sequence[int], margin_mm: float = 25.0) -> Grid:
    "The labels' own voxels around some bones in both postures."
    y = [transform_points(spine.grid.affine, (spine.labels == k + 1).nonzero().double()) for k in which]
    x = [transform_points(torch.linalg.inv(poses[k]), own) for k, own in zip(which, y)]
    index = transform_points(np.linalg.inv(spine.grid.affine), torch.cat(x + y)).numpy()
    margin = margin_mm / spine.grid.spacing_mm
    return crop_grid(spine.grid, np.floor(index.min(0) - margin).astype(int), np.ceil(index.max(0) + margin).astype(int) + 1)


def bend(spine: Spine, turn_deg: tuple[float, float, float]) -> Bent:
    "Turn every vertebra about the point midway between its centroid and the next one's; the middle vertebra stays."
    centres = torch.from_numpy(label_centres_mm(spine.labels, spine.grid, len(spine.names)))
    turn, motions = twist_matrix(torch.tensor([*np.deg2rad(turn_deg), 0, 0, 0])), [torch.eye(4).double()]
    for about in (centres[1:] + centres[:-1]).flip(0) / 2:
        turn[:3, 3] = about - turn[:3, :3] @ about
        motions.insert(0, motions[0] @ turn)
    poses, still = torch.linalg.inv(torch.stack(motions)) @ motions[len(motions) // 2], torch.eye(4).double()
    whole, voxels = fine_labels(spine.labels, spine.grid)
    kept, released = release(whole, voxels, poses, still)
    bones, maps = (tuple(distance_map(labels == k, voxels) for k in range(1, len(poses) + 1)) for labels in (whole, kept))
    return Bent(Polyrigid(maps, poses, still), bones, released, surroundings(spine, poses, range(len(poses))))


def ndv(disp: Tensor, grid: Grid, find: bool) -> tuple[float, list[np.ndarray]]:  # voxels turned inside out; where, world
    "Non-diffeomorphic volume by blocks, and its voxels by halving the blocks that have some."
    if np.prod(grid.shape) < 2**15:
        ten = diffeomorphism(disp, grid)
        if not (ten.n_failing and find) or max(grid.shape) == 3:
            return ten.ndv_percent / 100 * ten.n_voxels, [grid.centre_mm] * ten.n_failing
    axis = int(np.argmax(grid.shape))
    half, volume, found = grid.shape[axis] // 2, 0.0, []
    for low, high in ((0, half + 1), (half - 1, grid.shape[axis])):
        start, stop = np.zeros(3, int), np.array(grid.shape)
        start[axis], stop[axis] = low, high
        part, where = ndv(disp.narrow(axis + 2, low, high - low), crop_grid(grid, start, stop), find)
        volume, found = volume + part, found + where
    return volume, found


class Figures(NamedTuple):
    "How a field does on a grid."

    given_mm: float  # the worst residual in kept bone: of the pose that was asked for
    fit_mm: float  # and of the rigid motion that fits best
    volume_percent: float  # the largest |det J - 1| where all voxels of the difference are one kept bone
    least: float  # smallest det J
    folds: Tensor  # (f, 3), world: voxels with det J <= 0
    failing: Tensor  # (f, 3), world: voxels that count for the NDV
    ndv_percent: float
    cpu_s: float


def measure(
    field: Callable[[Grid], Tensor],  # displacement on a grid
    poly: Polyrigid,
    grid: Grid,
    voxels: int = 2**22,  # at a time
    find: bool = True,  # where the NDV's voxels are
) -> Figures:
    "Evaluate a field piece by piece, one voxel more on each side, because differences need it."
    volume, least, turned, cpu_s, points, moved, bones, folds, bad = 0.0, np.inf, 0.0, 0.0, [], [], [], [], []
    for piece in slabs(grid, voxels):
        wide = crop_grid(piece, [-1] * 3, np.array(piece.shape) + 1)
        start = time.process_time()
        disp = field(wide)
        cpu_s += time.process_time() - start
        owner, det = near_bone(poly, wide)[1], determinant(jacobian(disp, wide))[0, 1:-1, 1:-1, 1:-1]
        own = owner[1:-1, 1:-1, 1:-1]
        alike = torch.stack([owner.roll(step, axis)[1:-1, 1:-1, 1:-1] == own for axis in range(3) for step in (-1, 1)]).all(0) & (own > 0)
        volume, least = max(volume, float(((det - 1).abs() * alike).max())), min(least, float(det.min()))
        folds.append(transform_points(piece.affine, (det <= 0).nonzero().double()))
        part, where = ndv(disp, wide, find)
        turned, bad = turned + part, bad + where
        at = own.nonzero()
        points.append(transform_points(piece.affine, at.double()))
        moved.append(points[-1] + disp[0, :, *(at + 1).T].T.double() @ torch.as_tensor(grid.axes.T))
        bones.append(own[tuple(at.T)] - 1)
    x, y, bone = torch.cat(points), torch.cat(moved), torch.cat(bones)
    residuals = [
        max(float((transform_points(pose, x[bone == k]) - y[bone == k]).norm(dim=1).max()) for k, pose in enumerate(poses) if (bone == k).any())
        for poses in (poly.poses, motion_matrix(procrustes(x, y, torch.ones(len(x)).double(), bone, len(poly.poses))))
    ]
    failing, percent = torch.from_numpy(np.array(bad).reshape(-1, 3)), 100 * turned / np.prod(grid.shape)
    return Figures(*residuals, 100 * volume, least, torch.cat(folds), failing, percent, cpu_s)


def on_the_way(bent: Bent, x: Tensor, steps: int = 8) -> tuple[Tensor, Tensor]:  # mm; (p, 2), the two bones
    "Smallest sum of the distances to the two nearest bones, before anything was released, that points meet on their way."
    gap, pair = torch.full((len(x),), torch.inf).double(), torch.zeros(len(x), 2, dtype=torch.long)
    for step in range(steps + 1):
        there = twist_matrix((1 - step / steps) * bent.poly.twists)
        near = torch.stack([bone.at(x, pose) for bone, pose in zip(bent.bones, there)]).topk(2, dim=0, largest=False)
        closer = near.values.sum(0) < gap
        gap, pair[closer] = torch.minimum(near.values.sum(0), gap), near.indices.T[closer].sort(dim=1).values
        half = x + bent.poly.velocity(x, step / steps) / (2 * steps)
        x = x + bent.poly.velocity(half, (step + 0.5) / steps) / steps
    return gap, pair


def pairs_text(spine: Spine, bent: Bent, pairs: Tensor) -> str:
    "Pairs of bones, how many voxels each, and how deep they lie in one another."
    depth, text = {}, []
    for f in bent.released:
        pair = tuple(sorted((f.bone - 1, f.other - 1)))
        depth[pair] = max(depth.get(pair, 0), -f.gap_mm)
    for (a, b), n in zip(*(part.tolist() for part in pairs.unique(dim=0, return_counts=True))):
        text.append(f"{n} {spine.names[a]}-{spine.names[b]} ({depth.get((a, b), 0):.1f})")
    return ", ".join(text) or "0"


def figures_row(figures: Figures) -> dict:
    "What every table of fields has."
    return {
        "residual given / fit, mm": f"{figures.given_mm:.0e} / {figures.fit_mm:.0e}",
        "volume, %": f"{figures.volume_percent:.1g}",
        "least det J": f"{figures.least:.2f}",
        "folds": len(figures.folds),
        "NDV voxels": len(figures.failing),
        "NDV, %": f"{figures.ndv_percent:.1g}",
        "CPU s": f"{figures.cpu_s:.0f}",
    }


def released_rows(spine: Spine) -> Iterator[dict]:
    "What comes too close on the way, and what that frees."
    for motion, turn in MOTIONS.items():
        released = bend(spine, turn).released
        worst, least = max(released, key=lambda f: f.percent), min(released, key=lambda f: f.gap_mm)
        yield {
            "motion": motion,
            "smallest gap on the way, mm": f"{least.gap_mm:.2f} ({spine.names[least.bone - 1]} to {spine.names[least.other - 1]})",
            "largest overlap, mm3": f"{max(f.overlap_mm3 for f in released):.0f}",
            "released, worst bone, %": f"{worst.percent:.1f} ({spine.names[worst.bone - 1]} for {spine.names[worst.other - 1]})",
        }


def rigid_rows(spine: Spine, spacing_mm: float) -> Iterator[dict]:
    "Residual, volume, folds and NDV of every motion, on the labels' own grid and another one."
    for motion, turn in MOTIONS.items():
        bent = bend(spine, turn)
        fine, n = respace_grid(bent.grid, spacing_mm), len(spine.names)
        if np.prod(fine.shape) > 1.5e7:
            fine = respace_grid(surroundings(spine, bent.poly.poses, range(n // 2 - 2, n // 2 + 2)), spacing_mm)
        for grid in (bent.grid, fine):
            figures = measure(partial(flow_on, bent.poly), bent.poly, grid)
            row = {"motion": motion, "grid, mm": " x ".join(f"{s:.2g}" for s in grid.spacing_mm), **figures_row(figures)}
            for name, points in (("folds", figures.folds), ("NDV", figures.failing)):
                gap, pairs = on_the_way(bent, points)
                wide = gap > 2 * grid.spacing_mm.max()
                row |= {f"{name}, gap > 2 voxels": pairs_text(spine, bent, pairs[wide]), f"{name}, elsewhere": pairs_text(spine, bent, pairs[~wide])}
            yield row


def shares(poly: Polyrigid, x: Tensor) -> Tensor:  # (n, p)
    "Our weights in the fixed posture."
    return closeness_weights(torch.stack([bone.at(x, pose) for bone, pose in zip(poly.maps, poly.poses)]), poly.leak_mm)


def blended(poly: Polyrigid, x: Tensor) -> Tensor:
    "Mean of where the bones' motions take a point."
    there = torch.stack([transform_points(pose, x) - x for pose in poly.poses])
    return (shares(poly, x)[..., None] * there).sum(0)


def direct(poly: Polyrigid, x: Tensor) -> Tensor:
    "Exponential of the mean logarithm, weights 1 / (1 + d^2) times the size of the bone (PolyPose, Gopalakrishnan et al. 2025)."
    size = torch.tensor([float((bone.values < 0).sum()) for bone in poly.maps])[:, None]
    weight = size / (1 + torch.stack([bone.at(x, pose) for bone, pose in zip(poly.maps, poly.poses)]).clamp_min(0) ** 2)
    motion = twist_matrix((weight / weight.sum(0)).T.double() @ poly.twists).to(x)
    return (motion[:, :3, :3] @ x[..., None])[..., 0] + motion[:, :3, 3] - x


def static(poly: Polyrigid, x: Tensor) -> Tensor:
    "Velocity of the log-Euclidean polyrigid map: our weights, but they stay where the bones are in the fixed posture."
    twist = shares(poly, x).T @ poly.twists.to(x)
    return torch.linalg.cross(twist[:, :3], x) + twist[:, 3:]


def everywhere(method: Callable[[Polyrigid, Tensor], Tensor], poly: Polyrigid, grid: Grid) -> Tensor:  # (1, 3, i, j, k)
    "A method at every voxel of a grid."
    x = grid.points_mm(poly.maps[0].values).reshape(-1, 3)
    vectors = torch.cat([method(poly, part) for part in x.split(2**16)]) @ torch.as_tensor(grid.axes).to(x)
    return vectors.T.reshape(1, 3, *grid.shape)


def staying(poly: Polyrigid, grid: Grid) -> Tensor:  # (1, 3, i, j, k)
    "The static map on a grid, by scaling and squaring."
    return integrate(everywhere(static, poly, grid), grid)


def rival_rows(spine: Spine) -> Iterator[dict]:
    "Our map beside three others, on the labels' own grid."
    for motion, turn in MOTIONS.items():
        bent = bend(spine, turn)
        fields = {
            "blended displacements": partial(everywhere, blended, bent.poly),
            "direct exponential": partial(everywhere, direct, bent.poly),
            "static log-Euclidean": partial(staying, bent.poly),
            "ours": partial(flow_on, bent.poly),
        }
        for name, field in fields.items():
            yield {"motion": motion, "map": name, **figures_row(measure(field, bent.poly, bent.grid, voxels=2**30, find=False))}


def trip_rows(spine: Spine, n: int = 100_000) -> Iterator[dict]:
    "How far points come back from where they started: n anywhere in the box, and n within 3 mm of the surface of a bone."
    random = np.random.default_rng(0)
    for motion, turn in MOTIONS.items():
        bent = bend(spine, turn)
        anywhere = transform_points(bent.grid.affine, torch.from_numpy(random.uniform(-0.5, np.array(bent.grid.shape) - 0.5, (n, 3))))
        y = transform_points(spine.grid.affine, spine.labels.nonzero().double())
        surface = torch.stack([bone.at(y) for bone in bent.bones]).amin(0) > -1.5 * spine.grid.spacing_mm.max()
        y = y[surface][torch.from_numpy(random.integers(int(surface.sum()), size=n))] + torch.from_numpy(random.uniform(-3, 3, (n, 3)))
        for steps in (2, 4, 8):
            poly = replace(bent.poly, steps=steps)
            x = torch.cat([anywhere, poly.inverse_points(y)])
            there, flown = poly.points(x), poly.flow(x)
            off = (poly.inverse_points(there) - x).norm(dim=1)
            bone = poly.bone_at(x) > 0
            yield {
                "motion": motion,
                "steps": steps,
                **trip_row(off[bone], off[~bone]),
                "flow alone off the pose, bone, max mm": f"{float((flown - there)[bone].norm(dim=1).max()):.0e}",
            }
        forward, back = (flow_on(bent.poly, bent.grid, backward) for backward in (False, True))
        off = compose(back, forward, bent.grid)[0].norm(dim=0)
        stays = inside(read_index(bent.grid, bent.grid, forward)[0], bent.grid.shape, 0.0)
        bone = near_bone(bent.poly, bent.grid)[1] > 0
        yield {"motion": motion, "steps": f"{bent.poly.steps}, sampled", **trip_row(off[bone], off[stays & ~bone])}


def trip_row(bone_mm: Tensor, soft_mm: Tensor) -> dict:
    "Distances to the start, in bone and elsewhere."
    soft = soft_mm.double().numpy()
    return {"bone, max mm": f"{float(bone_mm.max()):.2g}", "elsewhere, 99.9 % / max mm": f"{np.quantile(soft, 0.999):.2g} / {soft.max():.2g}"}


def seconds_rows(spine: Spine, shape: tuple[int, int, int] = (115, 143, 328), bones: int = 11) -> Iterator[dict]:
    "Time for one field on a large grid of 1 mm, of the lowest bones, on one thread."
    above = max(len(spine.names) - bones, 0)
    bent = bend(Spine((spine.labels - above).clamp_min(0), spine.grid, spine.names[above:]), MOTIONS["flexion 3"])
    affine = np.eye(4)
    affine[:3, 3] = bent.grid.centre_mm - (np.array(shape) - 1) / 2
    wall, cpu = time.perf_counter(), time.process_time()
    flow_on(bent.poly, Grid(shape, affine))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    yield {"motion": "flexion 3", "grid": " x ".join(map(str, shape)), "bones": len(bent.bones), "CPU s": f"{cpu:.1f}", "s": f"{wall:.1f}"}


def show(title: str, rows: Iterator[dict]) -> None:
    "Print rows as a markdown table, one by one."
    print(f"\n{title}\n")
    for n, row in enumerate(rows):
        for line in (row, ["---"] * len(row)) * (n == 0) + (row.values(),):
            print("| " + " | ".join(map(str, line)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("labels", help="label map of a CT")
    parser.add_argument("scheme", choices=OTHER)
    parser.add_argument("first", help="uppermost vertebra, such as T1")
    parser.add_argument("last", help="lowest")
    parser.add_argument("--drop", type=int, nargs="+", default=[], help="values that the scheme does not know")
    parser.add_argument("--spacing", type=float, default=0.75, help="voxel size of the finer grid, mm")
    parser.add_argument("--tables", nargs="+", default=["released", "rigid", "rivals", "trip", "seconds"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    spine = read_spine(given.labels, given.scheme, given.first, given.last, given.drop)
    tables = {
        "released": ("Released bone", released_rows(spine)),
        "rigid": ("Every motion on two grids; in brackets how deep the pair lies in one another, mm", rigid_rows(spine, given.spacing)),
        "rivals": ("Beside other maps", rival_rows(spine)),
        "trip": ("There and back", trip_rows(spine)),
        "seconds": ("A field on a large grid", seconds_rows(spine)),
    }
    for name in given.tables:
        show(*tables[name])


if __name__ == "__main__":
    main()
