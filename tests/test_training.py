"""Training: stages, checkpoints that can be gone on from, several processes, precision, losses that are not finite."""

import inspect
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spinereg.files.labels import VERTEBRAE
from spinereg.files.problems import InputError, here
from spinereg.learning import fit as fitting
from spinereg.learning.cases import PrepareCase, find_cases
from spinereg.learning.crops import case_dataset
from spinereg.learning.fit import PRESETS, Settings, begin, enter_stage, fit, note_validation
from spinereg.learning.learner import Stage, apply_network, bone_of, crop_batch, learn, make_accelerator, make_learner
from spinereg.learning.validate import learns_nothing, rank, score
from spinereg.losses.objective import TERMS, Weights, loss_terms
from spinereg.losses.similarity import LNCC, MIND
from spinereg.measure.metrics import mean_dice
from spinereg.registration.networks import UNet, load_network
from spinereg.registration.run import weights_changed

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"spacing_mm": 5.0, "crop": (13, 19, 32), "crops_per_case": 1, "prealign": "header", "logger": "none", "device": "cpu", "learning_rate": 1e-3}
QUICK |= {"similarity": "lncc", "validate_every": 2}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    "Two cases to train on and one to validate on, prepared once."
    folder = tmp_path_factory.mktemp("cases")
    for place in ("train/easy_6", "train/easy_7", "val/easy_5"):
        shutil.copytree(ROOT / "data_samples" / place, folder / place)
    return folder


@pytest.fixture(scope="module")
def quick(cases):
    return QUICK | {"data_dir": cases, "cache_dir": cases / "prepared"}


@pytest.fixture(scope="module")
def four(quick, tmp_path_factory):
    "Two epochs of either stage in one go."
    out = tmp_path_factory.mktemp("four")
    return out, fit(out_dir=out, epochs_similarity=2, epochs_rigidity=2, **quick)


def state(folder):
    return torch.load(folder / "last.pt", weights_only=True)


def equal(a, b):
    "Whether two nested states are the same to the last bit."
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def run(code, *args, timeout=300, **kwargs):
    return subprocess.run([sys.executable, *args, code], capture_output=True, text=True, timeout=timeout, check=False, **kwargs)


# resuming


def test_c12_two_epochs_and_two_resumed_equal_four_bit_for_bit(four, quick, tmp_path):
    """C12: weights, moments, schedule, random numbers and tables; the interruption lies between the stages."""
    whole, _ = four
    fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=0, **quick)
    fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=2, resume=True, **quick)
    one, other = state(whole), state(tmp_path)
    assert all(equal(one[key], other[key]) for key in ("progress", "weights", "network", "optimiser", "schedule", "random"))
    for name in ("steps", "validation"):
        pd.testing.assert_frame_equal(pd.read_csv(whole / f"{name}.csv"), pd.read_csv(tmp_path / f"{name}.csv"), check_exact=True)


def test_c11_two_runs_are_bit_identical(four, quick, tmp_path):
    """C11: the same seed gives the same network."""
    again = fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=2, **quick)
    assert equal(four[1].network.state_dict(), again.network.state_dict())


def test_the_last_epoch_of_each_stage_is_kept_and_best_belongs_to_the_last_stage(four):
    out, fitted = four
    about = {name: load_network(out / f"{name}.safetensors").about["epoch"] for name in ("stage1", "best", "last")}
    assert about["stage1"] == 2 and about["last"] == 4 and about["best"] == 4
    assert fitted.weights == out / "best.safetensors"
    assert set(fitted.epochs.stage) == {"similarity", "rigidity"} and fitted.epochs[fitted.epochs.epoch == 1].rf.isna().all()


FOUND = pd.DataFrame(  # Dice, folded, residual: what each of eight validations finds, four in either stage
    [(0.60, 0.0, 0.1), (0.70, 0.0, 0.5), (0.90, 0.2, 0.1), (0.65, 0.0, 0.9)]
    + [(0.95, 0.1, 0.3), (0.50, 0.0, 0.4), (0.80, 0.0, 0.2), (0.85, 0.0, 0.3001)],
    columns=["dice_after", "folding_percent", "residual_median_mm"],
).assign(case="a", loss=0.0, displacement_mean_mm=1.0, similarity_after=0.0, similarity_before=1.0)


def test_the_best_weights_neither_fold_nor_bend_bone_more_than_the_first(quick, tmp_path, monkeypatch):
    "The first stage may bend bones but not fold; a fold is the best only until something better than Dice is found. Resumed, it goes on."
    training = begin(Settings(out_dir=tmp_path, epochs_similarity=4, epochs_rigidity=4, **quick), resume=False)
    progress, kept = training.learner.progress, []
    for epoch in range(8):
        progress.epoch = epoch
        enter_stage(training)
        progress.epoch += 1
        training.records.epochs.append({"epoch": progress.epoch, "stage": progress.stage})
        monkeypatch.setattr(fitting, "validate", lambda *_, epoch=epoch: FOUND.iloc[[epoch]])
        note_validation(training)
        kept.append(load_network(tmp_path / "best.safetensors").about["epoch"])
        fitting.checkpoint(training)
        assert state(tmp_path)["progress"] == vars(progress)
    assert kept == [1, 2, 2, 2, 5, 5, 7, 7]
    assert (progress.sound, progress.best, progress.limit_mm) == (True, 0.80, 0.3)


@settings(deadline=None)
@given(dice=st.tuples(st.floats(0, 1), st.floats(0, 1)), folded=st.sampled_from([1e-6, 100.0, float("nan")]))
def test_no_dice_makes_up_for_a_fold_or_for_bent_bone(dice, folded):
    "One of two cases is enough; a case without labels has no residual, and does not count."
    good = pd.DataFrame({"dice_after": dice[0], "folding_percent": 0.0, "residual_median_mm": [0.2, float("nan")], "loss": 1.0})
    other = good.assign(dice_after=dice[1])
    for worse in (other.assign(folding_percent=[0, folded]), other.assign(residual_median_mm=[0.21, float("nan")])):
        assert rank(good, 0.2) > rank(worse, 0.2)
    assert (rank(good, 0.2) > rank(other, 0.2)) == (dice[0] > dice[1])


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="the system has no SIGKILL")
def test_c12_kill_at_any_moment_leaves_a_checkpoint_that_can_be_gone_on_from(quick, tmp_path):
    """C12: killed at random moments (two; SPINEREG_KILLS for more), resumed each time."""
    script = tmp_path / "train.py"
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in quick.items()}
    arguments |= {"out_dir": str(tmp_path / "out"), "epochs_similarity": 500, "epochs_rigidity": 0, "resume": True}
    script.write_text(f"import spinereg\nspinereg.fit(**{arguments})\n")
    kills, done, dice = int(os.environ.get("SPINEREG_KILLS", 2)), 0, random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
        last, limit = tmp_path / "out/last.pt", time.monotonic() + 120
        before = last.stat().st_mtime_ns if last.exists() else 0
        while (not last.exists() or last.stat().st_mtime_ns == before) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 1.5))
        assert process.poll() is None, process.stderr.read().decode()
        process.send_signal(signal.SIGKILL)
        process.wait()
        epoch = state(tmp_path / "out")["progress"]["epoch"]
        assert epoch > done and load_network(tmp_path / "out").spacing_mm == 5.0
        done = epoch
    fitted = fit(out_dir=tmp_path / "out", epochs_similarity=done + 1, epochs_rigidity=0, resume=True, **quick)
    assert fitted.epochs.epoch.tolist() == list(range(1, done + 2)) and len(fitted.steps) == 2 * (done + 1)


def test_c12_nothing_of_somebody_is_overwritten_by_a_training(four, quick, tmp_path):
    """C12: weights that were copied into the folder, or that it starts from, and tables of somebody; all refused before the first case is read."""
    shutil.copy(four[0] / "best.safetensors", tmp_path)
    (tmp_path / "steps.csv").write_text("day,steps\nMonday,9000\n")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    given = quick | {"data_dir": "no such data", "out_dir": tmp_path}
    with pytest.raises(InputError, match=r"out_dir .*: best.safetensors, steps.csv would be replaced, and no training into this folder wrote that"):
        fit(**given)
    for start in (tmp_path, tmp_path / "best.safetensors"):
        with pytest.raises(InputError, match=r"best.safetensors in it would be replaced, and the training starts from that. Give another folder"):
            fit(**given, start=start)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_c12_what_a_killed_training_left_aside_is_removed_even_when_nothing_is_left_to_do(quick, four):
    """C12, D-kill: beside the prepared cases too."""
    dead = f".partial-99999999-1-{here()}-a"
    cache = quick["cache_dir"]
    for folder in (four[0], cache):
        (folder / dead).mkdir()
    fit(out_dir=four[0], epochs_similarity=2, epochs_rigidity=2, resume=True, **quick)
    assert not (four[0] / dead).exists() and not (cache / dead).exists()


def test_a_training_is_never_overwritten_and_never_resumed_at_another_voxel_size(four, quick):
    out, _ = four
    with pytest.raises(ValueError, match="resume=True goes on"):
        fit(out_dir=out, epochs_similarity=1, epochs_rigidity=0, **quick)
    with pytest.raises(ValueError, match=r"spacing_mm=4.0, was 5.0"):
        fit(out_dir=out, epochs_similarity=1, epochs_rigidity=0, resume=True, **(quick | {"spacing_mm": 4.0}))


# one step


@pytest.fixture
def batch(cases):
    item = case_dataset(find_cases(cases, "val")[0], PrepareCase(5.0, "header"), "disk", cases / "prepared")[0]
    return {name: value[None] for name, value in item.items() if isinstance(value, torch.Tensor)} | {"case": ["val/easy_5"]}


RIGID, FREE = Stage("rigidity", 1, rigidity=True), Stage("similarity", 1, rigidity=False)
ALL = Weights(diffusion=0.02, oc=0.005, pc=0.01, rd=0.1, rf=0.01)


@pytest.fixture
def learner():
    "An untrained network in the second stage."
    torch.manual_seed(0)
    learner = make_learner(make_accelerator("cpu"), UNet(), MIND(), 5.0, ALL, learning_rate=1e-3)
    learner.stage = RIGID
    return learner


def test_a_step_is_adam_on_the_weighted_sum_of_the_terms(learner, batch):
    """Against the same step written out with torch's own Adam and `backward`; the terms themselves are tested in test_objective."""
    plain = UNet()
    plain.load_state_dict(learner.network.state_dict())
    optimiser = torch.optim.Adam(plain.parameters(), lr=1e-3)
    pairs = crop_batch(batch, 5.0)
    what = apply_network(plain, pairs)
    terms = loss_terms(what, pairs, MIND(), bone_of(what, pairs))
    sum(getattr(ALL, name) * value.mean() for name, value in terms.items()).backward()
    optimiser.step()
    row = learn(learner, [batch])
    assert row["loss"] == pytest.approx(sum(getattr(ALL, name) * value.item() for name, value in terms.items()), rel=1e-6)
    assert row["gradient_norm"] == pytest.approx(torch.cat([p.grad.flatten() for p in plain.parameters()]).norm().item(), rel=1e-5)
    assert equal(plain.state_dict(), learner.network.state_dict())


def test_c1_a_loss_that_is_not_finite_is_named_and_skipped_and_five_in_a_row_stop(learner, batch, capsys):
    """C1: the weights stay, case and term are printed, the fifth in a row raises."""
    learner.stage, learner.similarity = FREE, LNCC()
    spoilt = batch | {"fixed": batch["fixed"].clone().fill_(torch.nan)}
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    for _ in range(4):
        assert np.isnan(learn(learner, [spoilt])["loss"])
    said = capsys.readouterr().out
    assert said.count("step skipped") == 4 and "val/easy_5" in said and "similarity [nan]" in said
    assert equal(before, learner.network.state_dict())
    learn(learner, [batch])
    assert learner.skipped == 0
    before = {name: value.clone() for name, value in learner.network.state_dict().items()}
    hook = next(learner.network.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    assert np.isnan(learn(learner, [batch])["loss"]), "a finite loss with a gradient that is not"
    hook.remove()
    assert equal(before, learner.network.state_dict()) and "gradient" in capsys.readouterr().out
    learn(learner, [batch])
    for _ in range(4):
        learn(learner, [spoilt])
    with pytest.raises(FloatingPointError, match="val/easy_5.*fifth step in a row"):
        learn(learner, [spoilt])


def test_c2_mixed_precision_starts_with_the_same_loss(quick, four, tmp_path):
    """C2: bfloat16 in the network, float32 in the losses: the first step's loss within 1 %."""
    row = fit(out_dir=tmp_path, epochs_similarity=1, epochs_rigidity=0, mixed_precision="bf16", start=four[0], **quick).steps.iloc[0]
    full = fit(out_dir=tmp_path / "full", epochs_similarity=1, epochs_rigidity=0, start=four[0], **quick).steps.iloc[0]
    assert row.loss == pytest.approx(full.loss, rel=0.01) and row.loss != full.loss
    assert row.displacement_mean_mm == pytest.approx(full.displacement_mean_mm, rel=0.1)


def test_accumulated_batches_count_as_one_larger_batch(quick, tmp_path):
    once = quick | {"epochs_similarity": 1, "epochs_rigidity": 0}
    one, other = (fit(out_dir=tmp_path / name, **once, **{name: 2}).steps.iloc[0] for name in ("accumulate", "batch_size"))
    assert one.loss == pytest.approx(other.loss, rel=1e-5) and one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-4)


def test_two_processes_take_the_steps_of_one_with_twice_the_batch(quick, tmp_path):
    """The loss of the first five steps, within 1e-5."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in quick.items()}
    arguments |= {"epochs_similarity": 5, "epochs_rigidity": 0, "validate_every": 5}
    script = tmp_path / "train.py"
    script.write_text(f"import spinereg\nspinereg.fit(out_dir={str(tmp_path / 'two')!r}, **{arguments})\n")
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = run(script, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    one = fit(out_dir=tmp_path / "one", batch_size=2, **(quick | {"epochs_similarity": 5, "epochs_rigidity": 0, "validate_every": 5}))
    two = pd.read_csv(tmp_path / "two/steps.csv")
    assert len(two) == len(one.steps) == 5
    np.testing.assert_allclose(two.loss, one.steps.loss, atol=1e-5)
    np.testing.assert_allclose(two.displacement_max_mm, one.steps.displacement_max_mm, rtol=1e-3)


def test_start_must_be_a_network_of_the_same_kind(four, quick, tmp_path):
    with pytest.raises(ValueError, match=r"start=.* has .*\(False, 5.0\), expected \(True, 5.0\)"):
        fit(out_dir=tmp_path, start=four[0], full_resolution=True, **quick)


def test_a_tracker_that_is_not_installed_is_an_error(quick, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking._available_trackers", [])
    with pytest.raises(ValueError, match="logger='wandb', but wandb is not installed here"):
        fit(out_dir=tmp_path, **(quick | {"logger": "wandb"}))


def test_e5_a_foreign_checkpoint_is_refused(quick, tmp_path):
    """E5: by the format written in it; one of an earlier version is told what to do."""
    for name in ("something else", "spinereg-unet-1"):
        torch.save({"format": name}, tmp_path / "last.pt")
        with pytest.raises(ValueError, match=f"has the format '{name}'.*start='last.safetensors'"):
            fit(out_dir=tmp_path, resume=True, **quick)


def test_a_damaged_checkpoint_is_refused(four, quick, tmp_path):
    """E5: cut off, another file, an epoch that is no number; in words of ours, and with a way on."""
    good, spoilt = (four[0] / "last.pt").read_bytes(), state(four[0])
    spoilt["progress"]["epoch"] = math.nan
    torch.save(spoilt, tmp_path / "nan.pt")
    said = dict.fromkeys((good[:1000], b"", b"text", pickle.dumps(Path, 2)), "is no checkpoint, or damaged")
    for content, words in (said | {(tmp_path / "nan.pt").read_bytes(): "epoch=nan: expected a whole number"}).items():
        (tmp_path / "last.pt").write_bytes(content)
        with pytest.raises(ValueError, match=f"{words}.*start='last.safetensors'") as caught:
            fit(out_dir=tmp_path, resume=True, **quick)
        assert "weights_only" not in str(caught.value)


# what is known of a training


def test_b4_without_labels_of_the_fixed_image_the_loss_decides_and_without_any_rigidity_is_off(cases, tmp_path, capsys):
    """B4: trains and validates without `mr_mask`, and with neither mask."""
    for kept, what in (("ct_mask.nii.gz", "moving labels only"), ("mr_mask.nii.gz", "fixed labels only"), (None, "none")):
        folder = tmp_path / what
        for place in ("train/easy_6", "val/easy_5"):
            shutil.copytree(cases / place, folder / place)
            for mask in ("ct_mask.nii.gz", "mr_mask.nii.gz"):
                if mask != kept:
                    (folder / place / mask).unlink()
        fitted = fit(folder, folder / "out", epochs_similarity=1, epochs_rigidity=1, **QUICK)
        assert fitted.validation.dice_after.isna().all() and np.isfinite(fitted.validation.loss).all()
        assert score(fitted.validation[fitted.validation.epoch == 2]) == -fitted.validation.loss[fitted.validation.epoch == 2].mean()
    assert "rigidity off: no labels" in capsys.readouterr().out
    assert (fitted.steps.rf.dropna() == 0).all()


def test_c4_a_network_that_learns_nothing_is_told_from_one_that_does():
    """C4: nothing moves; or things move and the images are no more alike."""
    table = pd.DataFrame({"displacement_mean_mm": [0.02], "similarity_before": [0.5], "similarity_after": [0.5]})
    assert "nothing moves" in learns_nothing(table)
    assert "no more alike" in learns_nothing(table.assign(displacement_mean_mm=2.0))
    assert learns_nothing(table.assign(displacement_mean_mm=2.0, similarity_after=0.4)) == ""


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31 - 1))
def test_mean_dice_is_the_mean_over_all_labels_that_one_of_the_maps_has(seed):
    a, b = np.random.default_rng(seed).integers(0, 4, (2, 5, 4, 3))
    each = [2 * ((a == k) & (b == k)).sum() / ((a == k).sum() + (b == k).sum()) for k in (1, 2, 3) if (a == k).any() or (b == k).any()]
    assert mean_dice(torch.tensor(a), torch.tensor(b)) == pytest.approx(np.mean(each), rel=1e-6)


def test_a_vertebra_that_is_lost_counts_as_zero():
    fixed = torch.zeros(8, 8, 8, dtype=torch.int32)
    fixed[:4], fixed[5:] = 1, 2
    moved = torch.where(fixed == 1, 1, 0)
    assert mean_dice(moved, fixed) == 0.5 and len(VERTEBRAE) > 2


@pytest.mark.parametrize("logger", ["tensorboard", "wandb"])
def test_epochs_are_logged(logger, quick, tmp_path, monkeypatch):
    """TensorBoard reads the values back; Weights & Biases writes an offline run. CSV in any case."""
    pytest.importorskip(logger)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    fitted = fit(out_dir=tmp_path / "out", epochs_similarity=2, epochs_rigidity=0, **(quick | {"logger": logger}))
    assert len(pd.read_csv(tmp_path / "out/epochs.csv")) == 2
    if logger == "wandb":
        assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next((tmp_path / "out").rglob("events.*")).parent)).Reload()
    values = [event.value for event in events.Scalars("loss")]
    np.testing.assert_allclose(values, fitted.epochs.loss, rtol=1e-5)
    assert "validation_dice_after" in events.Tags()["scalars"]


# settings


def test_a_preset_is_parameters_of_fit_and_trains(quick, tmp_path):
    """C5: all forty-eight are accepted; one of the full-resolution ones takes a step."""
    for preset in PRESETS.values():
        assert preset.items() <= vars(Settings("data", "out", **preset)).items()
    chosen = PRESETS["mi_full_pc_rd"] | {"epochs_similarity": 0, "epochs_rigidity": 1}
    assert np.isfinite(fit(out_dir=tmp_path, **(quick | chosen)).steps.loss).all()


def test_fit_shows_every_setting_in_its_signature():
    """Help, completion and the apps know names, types and defaults; what is unknown is refused. D11: no other process unless asked for."""
    shown = inspect.signature(fit).parameters
    assert list(shown) == [field.name for field in fields(Settings)] + ["resume", "on_step"]
    assert all(shown[field.name].annotation == field.type for field in fields(Settings))
    assert all(shown[field.name].default == field.default for field in fields(Settings) if field.default is not MISSING)
    assert shown["workers"].default == 0
    with pytest.raises(TypeError, match="learning_rat"):
        fit("data", "out", learning_rat=1e-3)


def test_all_wrong_settings_are_named_at_once(tmp_path):
    with pytest.raises(ValueError, match="^fit: ") as error:
        fit(tmp_path, tmp_path, similarity="ssd", weight_oc=-1.0, batch_size=0, crop=(64, 64), moving_scheme="spider")
    assert all(said in str(error.value) for said in ("weight_oc=-1", "batch_size=0", "crop=(64, 64)", "moving_scheme='spider'"))
    assert "similarity='ssd': expected one of lncc, mind, mi" in str(error.value)


def test_x2_a_split_without_cases_says_what_was_looked_for(tmp_path):
    with pytest.raises(ValueError, match="no case found as .*train"):
        fit(tmp_path, tmp_path / "out", **(QUICK | {"epochs_similarity": 1}))


def test_resume_refuses_what_would_silently_be_another_training(four, quick, capsys):
    """Another similarity or seed; more epochs of a stage that is over; nothing left to do is said."""
    same = quick | {"out_dir": four[0], "epochs_similarity": 2, "epochs_rigidity": 2, "resume": True}
    for change in ({"similarity": "mi"}, {"seed": 1}, {"epochs_similarity": 3}):
        with pytest.raises(ValueError, match=f"resume: {next(iter(change))}="):
            fit(**(same | change))
    assert len(fit(**same).epochs) == 4 and "nothing is trained" in capsys.readouterr().out


def test_a_crop_larger_than_every_case_is_cut(quick, tmp_path, capsys):
    fit(out_dir=tmp_path, epochs_similarity=1, epochs_rigidity=0, **(quick | {"crop": (64, 128, 64)}))
    assert "crops of 64 x 128 x 64 voxels are larger than any case at this spacing_mm; cut to 13 x 20 x 32" in capsys.readouterr().out
    assert (tmp_path / "last.safetensors").stat().st_mode == (tmp_path / "epochs.csv").stat().st_mode


# followed and steered


def at_step(number, act):
    "A callback that acts after one step."
    return lambda step: act(step) if step.row["step"] == number else None


def test_d3_a_stop_in_the_midst_of_an_epoch_loses_nothing(four, quick, tmp_path):
    """D3, C12: the step is finished, a checkpoint written, nothing more done; resumed, the training is the same to the last bit."""
    stopped = fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=2, on_step=at_step(5, lambda step: setattr(step, "stop", True)), **quick)
    assert stopped.stopped and list(stopped.steps.step) == [1, 2, 3, 4, 5] and len(stopped.epochs) == 2
    assert stopped.weights == tmp_path / "last.safetensors", "the second stage has no best weights yet"
    assert state(tmp_path)["progress"]["taken"] == 1
    resumed = fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=2, resume=True, **quick)
    assert not resumed.stopped and equal(four[1].network.state_dict(), resumed.network.state_dict())
    one, other = state(four[0]), state(tmp_path)
    assert all(equal(one[key], other[key]) for key in ("progress", "optimiser", "schedule"))
    for name in ("steps", "validation"):
        pd.testing.assert_frame_equal(pd.read_csv(four[0] / f"{name}.csv"), pd.read_csv(tmp_path / f"{name}.csv"), check_exact=True)


def test_a_stop_before_the_first_validation_leaves_weights(quick, tmp_path):
    fitted = fit(out_dir=tmp_path, epochs_similarity=1, epochs_rigidity=0, on_step=at_step(1, lambda step: setattr(step, "stop", True)), **quick)
    assert load_network(fitted.weights).about["epoch"] == 0 and fitted.weights.name == "last.safetensors"


def test_a_changed_weight_counts_from_the_next_step_and_is_logged_with_it(four, quick, tmp_path, capsys):
    """The loss of every step is the sum of its terms with the weights of its row, and the rows say when they changed."""
    change = at_step(6, lambda step: setattr(step.weights, "oc", 7.0))
    steps = fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=2, on_step=change, **quick).steps
    assert weights_changed(steps[steps.stage == "rigidity"]) == [(2, "oc", 0.005, 7.0)]
    terms = [*TERMS]
    total = sum((steps[f"weight_{term}"] * steps[term]).fillna(0) for term in terms)
    np.testing.assert_allclose(total, steps.loss, rtol=1e-5)
    pd.testing.assert_frame_equal(steps.iloc[:6], four[1].steps.iloc[:6])
    assert steps.iloc[7].similarity != four[1].steps.iloc[7].similarity
    resumed = fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=3, resume=True, **quick).steps
    assert "the weight of oc 7, as it was changed on the way" in capsys.readouterr().out and resumed.iloc[-1].weight_oc == 7.0
    resumed = fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=4, resume=True, weight_oc=0.3, **quick).steps
    assert resumed.iloc[-1].weight_oc == 0.3, "a parameter that is given anew counts"


def test_all_weights_may_be_zero_and_numbers_may_be_of_any_kind(quick, tmp_path):
    def change(step):
        step.weights.similarity, step.weights.diffusion = np.float64(0.0), np.float32(0.0)
        step.stop = step.row["step"] == 2

    steps = fit(out_dir=tmp_path, epochs_similarity=1, epochs_rigidity=0, on_step=change, **quick).steps
    assert steps.loss.iloc[1] == 0
    assert fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=0, resume=True, **quick).steps.loss.iloc[-1] == 0


def test_a_stop_among_steps_that_are_skipped_keeps_the_last_good_checkpoint(quick, tmp_path, capsys):
    fit(out_dir=tmp_path, epochs_similarity=1, epochs_rigidity=0, **quick)
    good = state(tmp_path)

    def spoil(step):
        step.weights.diffusion = float("nan")
        step.stop = step.row["step"] == 4

    fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=0, resume=True, on_step=spoil, **quick)
    now = state(tmp_path)
    assert "step skipped" in capsys.readouterr().out and equal(good["network"], now["network"]) and now["progress"]["epoch"] == 1


def test_the_rest_of_an_epoch_is_only_taken_in_the_same_portions(quick, tmp_path):
    fit(out_dir=tmp_path, epochs_similarity=1, epochs_rigidity=0, on_step=at_step(1, lambda step: setattr(step, "stop", True)), **quick)
    with pytest.raises(ValueError, match="resume: batch_size=2, was 1"):
        fit(out_dir=tmp_path, epochs_similarity=1, epochs_rigidity=0, resume=True, batch_size=2, **quick)


def test_a_look_shows_a_case_as_the_network_sees_it_now_and_changes_nothing(four, quick, tmp_path):
    seen = []

    def look(step):
        seen.append((step.done, step.cases, *step.look(0)))

    fitted = fit(out_dir=tmp_path, epochs_similarity=2, epochs_rigidity=2, on_step=look, **quick)
    done, cases, view, figures = seen[-1]
    assert done == 1.0 and cases == ("val/easy_5",) and view.moved.shape == view.grid.shape and view.labels.max() > 0
    assert figures["dice_after"] == pytest.approx(fitted.validation.iloc[-1].dice_after)
    assert equal(four[1].network.state_dict(), fitted.network.state_dict())


def test_d5_a_training_that_fails_lets_go_of_its_memory(quick, tmp_path):
    """D5: the exception lives on, as the last one does in a notebook; network and activations do not."""
    held = []

    def fails(step):
        view, _ = step.look(0)
        network = step.look.__self__.training.learner.network
        held.extend([weakref.ref(network), weakref.ref(view.moved)])
        raise MemoryError("CUDA out of memory")

    with pytest.raises(MemoryError) as caught:
        fit(out_dir=tmp_path, epochs_similarity=1, epochs_rigidity=0, on_step=fails, **quick)
    assert caught.value.__traceback__ is not None and [ref() for ref in held] == [None, None]
    assert not fit(out_dir=tmp_path / "again", epochs_similarity=1, epochs_rigidity=0, **quick).stopped
