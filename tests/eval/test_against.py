"""`diffdistill eval --against`: a model's distance to its teacher, images as a protocol, and what does not fit."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import Result
from conftest import MakeConfig
from PIL import Image
from support.pictures import encode, write_folder
from typer.testing import CliRunner

from diffdistill.commands.cli import app
from diffdistill.data.digits import Digits
from diffdistill.eval.evaluation.against_images import protocol_of_images
from diffdistill.eval.evaluation.reference import open_reference
from diffdistill.eval.evaluation.workers import find_workers
from diffdistill.eval.protocols.own import Made
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.eval.records.record import Record, read_records
from diffdistill.models.load import find_checkpoint
from diffdistill.storage.checkpoint import load_checkpoint, save_checkpoint
from diffdistill.training.trainer import Trainer


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["eval", *map(str, arguments)])


def done(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def refused(*arguments: object) -> str:
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.stderr.split())


@pytest.fixture(scope="module")
def quick_student(make_config: MakeConfig) -> Path:
    config = make_config("dmd2")
    Trainer(config, quiet=True).run()
    return Path(config.run)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFDISTILL_REFERENCES", str(tmp_path / "references"))
    monkeypatch.setenv("DIFFDISTILL_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "cache"


@pytest.fixture
def protocol(tmp_path: Path) -> Path:
    """Few images, for speed."""
    return write_protocol(tmp_path / "small.yaml")


def write_protocol(file: Path, **changes: object) -> Path:
    plain = {
        "name": "small-digits",
        "num_images": 60,
        "image_shape": [1, 8, 8],
        "labels": {"policy": "cyclic", "num_classes": 10},
        "preparation": {"quantiser": "none"},
        "metrics": [{"name": "frechet", "features": {"name": "pixels"}}],
    }
    file.write_text(yaml.safe_dump(plain | changes))
    return file


REAL = {"name": "digits-train", "dataset": "digits", "split": "train", "num_images": 1437}


def only(file: Path) -> Record:
    (record,) = read_records(file)
    return record


def test_a_teacher_against_itself_is_at_its_floor(quick_teacher: Path, tmp_path: Path) -> None:
    protocol = write_protocol(tmp_path / "small.yaml", reference=REAL)
    file, table = tmp_path / "records.jsonl", tmp_path / "table.json"
    text = done(quick_teacher, "--against", quick_teacher, "--protocol", protocol, "--records", file, "--out", table)
    assert f"against {quick_teacher}: 60 images each, from independent noise" in text
    record = only(file)
    assert record.against is not None
    found = record.against.metrics["fd-pixels"]
    assert found.excess.value == 0
    assert found.student == found.floor
    assert found.floor.value > 0
    assert record.against.seeds == (0, 60)
    assert record.against.independent_seeds == (60, 120)
    assert record.against.place == str(quick_teacher)
    assert record.against.sha256 == record.model.sha256  # type: ignore[union-attr]
    assert record.against.end_points is not None
    assert record.against.end_points.same_noise.value == 0
    assert record.against.end_points.unrelated > 0
    assert record.metrics["fd-pixels"].mean != found.student.value  # that one is to real images
    (row,) = json.loads(table.read_text())
    assert row["against_fd_pixels"] == row["against_fd_pixels_floor"] == found.floor.value


def test_what_is_measured_against_changes_no_other_number(
    quick_teacher: Path, quick_student: Path, tmp_path: Path
) -> None:
    protocol = write_protocol(tmp_path / "small.yaml", reference=REAL)
    plain, both = tmp_path / "plain.jsonl", tmp_path / "both.jsonl"
    done(quick_student, "--protocol", protocol, "--records", plain)
    done(quick_student, "--protocol", protocol, "--records", both, "--against", quick_teacher)
    assert only(plain).metrics == only(both).metrics
    assert only(plain).protocol_id == only(both).protocol_id
    assert only(plain).against is None
    against = only(both).against
    assert against is not None
    assert against.metrics["fd-pixels"].excess.low > 0
    assert against.end_points is not None
    assert against.end_points.same_noise.value > 0


def test_models_that_number_the_same_classes_otherwise_are_compared_by_name(
    quick_teacher: Path, protocol: Path, tmp_path: Path
) -> None:
    """Equal weights under the reverse names are another model."""
    names = list("abcdefghij")
    for place, given in (("student", names), ("teacher", names[::-1])):
        whole = load_checkpoint(find_checkpoint(quick_teacher))
        whole.state["model"]["class_names"] = given
        save_checkpoint(tmp_path / place / "checkpoints", whole, keep=None)
    file = tmp_path / "records.jsonl"
    done(tmp_path / "student", "--against", tmp_path / "teacher", "--protocol", protocol, "--records", file)
    record = only(file)
    assert record.sampler is not None
    assert record.sampler.settings["classes"] == list(range(9, -1, -1))
    assert record.against is not None
    assert record.against.end_points is not None
    assert record.against.end_points.same_noise.value > 0
    done(tmp_path / "teacher", "--against", tmp_path / "teacher", "--protocol", protocol, "--records", file)
    itself = read_records(file)[1].against
    assert itself is not None
    assert itself.end_points is not None
    assert itself.end_points.same_noise.value == 0


def test_the_teacher_is_sampled_once(
    quick_teacher: Path, quick_student: Path, protocol: Path, cache: Path, tmp_path: Path
) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    done(quick_student, "--protocol", protocol, "--against", quick_teacher, "--records", first)
    (kept,) = (folder for folder in (cache / "features").iterdir() if any(folder.glob("seeds-*")))
    assert sorted(one.name for one in kept.glob("seeds-*")) == ["seeds-0-60", "seeds-60-120"]
    times = {file: file.stat().st_mtime_ns for file in kept.rglob("*.safetensors")}
    done(quick_student, "--protocol", protocol, "--against", quick_teacher, "--records", second)
    assert {file: file.stat().st_mtime_ns for file in kept.rglob("*.safetensors")} == times
    assert only(first).against == only(second).against


def test_without_a_protocol_of_real_images_the_teachers_samples_are_the_reference(
    quick_teacher: Path, quick_student: Path, protocol: Path, tmp_path: Path
) -> None:
    file = tmp_path / "records.jsonl"
    done(quick_student, "--protocol", protocol, "--against", quick_teacher, "--records", file)
    record = only(file)
    assert record.against is not None
    assert record.metrics["fd-pixels"].mean == record.against.metrics["fd-pixels"].student.value
    assert record.protocol["reference"]["dataset"] == str(quick_teacher)  # type: ignore[index, call-overload]


def test_images_are_measured_against_a_model_without_end_points(
    quick_teacher: Path, protocol: Path, tmp_path: Path
) -> None:
    images, _ = Digits().tensors()
    np.savez(tmp_path / "digits.npz", images=((images + 1) * 127.5).round().to(dtype=images.dtype).numpy().astype("u1"))
    file = tmp_path / "records.jsonl"
    done(tmp_path / "digits.npz", "--protocol", protocol, "--against", quick_teacher, "--records", file)
    against = only(file).against
    assert against is not None
    assert against.end_points is None


def save_digits(folder: Path, count: int = 100, side: int = 8) -> Path:
    folder.mkdir()
    images, _ = Digits().tensors()
    for number in range(count):
        pixels = ((images[number, 0] + 1) * 127.5).round().numpy().astype("u1")
        Image.fromarray(pixels).resize((side, side)).save(folder / f"{number:04d}.png")
    return folder


def test_images_become_a_protocol_that_is_kept(quick_teacher: Path, tmp_path: Path) -> None:
    folder, file = save_digits(tmp_path / "real"), tmp_path / "records.jsonl"
    save_digits(tmp_path / "made", count=70)
    first = done(tmp_path / "made", "--against", folder, "--records", file)
    assert f"{folder}: 100 images; compared with 70 in pixels, as the images are tiny. Kept: " in first
    second = done(tmp_path / "made", "--against", folder, "--records", file)
    assert "as before (" in second
    one, other = read_records(file)
    assert one.metrics == other.metrics
    assert list(one.metrics) == ["fd-pixels", "kid-pixels"]
    assert one.against is None
    (kept,) = (tmp_path / "references").rglob("protocol.yaml")
    assert "protocol.yaml" in kept.name
    again = done(tmp_path / "made", "--protocol", kept, "--reference", f"pixels={kept.parent / 'pixels.npz'}")
    assert f"{one.metrics['fd-pixels'].mean:.3f}" in again


def test_larger_images_come_to_the_models_size(quick_teacher: Path, tmp_path: Path) -> None:
    """A class-conditional model; its 6,000 images are cut to few by the judged folder's size in the test above."""
    folder = save_digits(tmp_path / "real", side=12)
    kept = protocol_of_images(str(folder), Made((1, 8, 8), 10, False), find_workers("cpu"))
    found = find_protocol(str(kept.file))
    assert "their middle squares at 8 x 8" in kept.told
    assert (found.preparation.crop, found.preparation.side, found.preparation.filter) == ("centre_square", 8, "lanczos")
    assert (found.num_images, found.labels.policy, found.labels.num_classes) == (6000, "cyclic", 10)
    (subset_size,) = (metric.subset_size for metric in found.metrics if metric.name == "kid")
    assert subset_size == 100, "no more than there are real images"


def test_other_images_make_another_protocol(tmp_path: Path) -> None:
    one, other = save_digits(tmp_path / "real"), save_digits(tmp_path / "made", count=90)
    done(other, "--against", one)
    (one / "0000.png").unlink()
    assert "99 images" in done(other, "--against", one)
    assert len(list((tmp_path / "references").rglob("protocol.yaml"))) == 2


def run_with(folder: Path, source: Path, **model: object) -> Path:
    """A run whose newest checkpoint is `source`'s but for what its description says."""
    checkpoint = find_checkpoint(source)
    target = folder / "checkpoints" / checkpoint.name
    shutil.copytree(checkpoint, target)
    state = json.loads((target / "state.json").read_text())
    state["model"] |= model
    (target / "state.json").write_text(json.dumps(state))
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_shape": [1, 16, 16]}, "makes 1 x 16 x 16 images, and {student} makes 1 x 8 x 8"),
        ({"image_shape": [3, 8, 8]}, "makes 3 x 8 x 8 images, and {student} makes 1 x 8 x 8"),
        ({"num_classes": 7}, "knows 7 classes, and {student} knows 10 classes"),
        ({"num_classes": 0}, "is unconditional, and {student} knows 10 classes"),
    ],
)
def test_another_kind_of_model_is_refused_in_one_sentence(
    quick_teacher: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    other = run_with(tmp_path / "other", quick_teacher, **changes)
    text = refused(quick_teacher, "--against", other)
    assert f"--against {other}: {said.format(student=quick_teacher)}; use a model of the same images" in text


def test_what_is_wrong_is_said_before_the_teacher_is_sampled(
    quick_teacher: Path, protocol: Path, cache: Path, tmp_path: Path
) -> None:
    by = ("--protocol", protocol, "--against", quick_teacher)
    assert "no such folder" in refused(tmp_path / "nothing", *by)
    assert "--sampler" in refused(quick_teacher, *by, "--sampler", "nonsense")
    assert "nonsense" in refused(quick_teacher, *by, "--ema", "nonsense")
    assert not (cache / "features").exists()


def test_what_are_no_images_to_compare_with_is_said(quick_teacher: Path, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(quick_teacher, runs / "one" / "teacher")
    save_digits(runs / "pictures", count=3)
    text = refused(quick_teacher, "--against", runs)
    assert f"{runs}: holds runs, not images; name one of them: {runs / 'one' / 'teacher'}" in text
    assert f"{runs}: holds runs" in refused(runs, "--protocol", "digits-pixels")
    one = save_digits(tmp_path / "one", count=1)
    assert f"--against {one}: holds 1 image; a distance needs at least 2" in refused(quick_teacher, "--against", one)
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: holds no images; image files end in" in refused(
        quick_teacher, "--against", tmp_path / "empty"
    )
    large = save_digits(tmp_path / "large", count=5, side=12)
    said = f"--against {large}: holds images of 3 x 12 x 12, and {one} of 3 x 8 x 8"
    assert said in refused(one, "--against", large)
    small = save_digits(tmp_path / "small", count=5)
    assert f"{large} of 3 x 12 x 12" in refused(small, large, "--against", small)
    assert not (tmp_path / "references").exists()
    assert "--against: is empty" in refused(quick_teacher, "--against", "")


def test_images_of_any_size_are_compared_where_all_are_resized(tmp_path: Path) -> None:
    real, made = save_digits(tmp_path / "real", count=6, side=40), save_digits(tmp_path / "made", count=6, side=36)
    Image.new("L", (48, 48), 90).save(real / "large.png")
    assert "7 images" in done(made, "--against", real)


def test_files_are_enough_for_one_repeat_where_the_model_is_the_reference(quick_teacher: Path, tmp_path: Path) -> None:
    protocol = write_protocol(tmp_path / "small.yaml", repeats=3)
    images, _ = Digits().tensors()
    np.savez(tmp_path / "digits.npz", images=((images[:60] + 1) * 127.5).round().numpy().astype("u1"))
    file = tmp_path / "records.jsonl"
    done(tmp_path / "digits.npz", "--protocol", protocol, "--against", quick_teacher, "--records", file)
    assert only(file).protocol["repeats"] == 1


def test_the_intervals_replicates_are_the_users(quick_teacher: Path, protocol: Path, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    by = ("--protocol", protocol, "--replicates", 3)
    done(quick_teacher, "--against", quick_teacher, *by, "--records", file)
    assert only(file).against.replicates == 3  # type: ignore[union-attr]
    assert "--replicates 3: goes with eval compare and with --against" in refused(quick_teacher, *by)


def test_what_goes_not_with_against_is_refused(quick_teacher: Path, protocol: Path, tmp_path: Path) -> None:
    folder = save_digits(tmp_path / "real", count=2)
    assert "no such folder or file" in refused(quick_teacher, "--against", tmp_path / "nothing")
    assert "leave out --protocol" in refused(quick_teacher, "--against", folder, "--protocol", protocol)
    compared = ("compare", quick_teacher, quick_teacher, "--protocol", protocol)
    assert "not with eval compare" in refused(*compared, "--against", quick_teacher)


def test_images_whose_classes_are_renamed_are_another_reference(tmp_path: Path) -> None:
    """The reference holds the names that a model's classes are drawn by."""
    picture = encode(Image.new("L", (8, 8), 90), "PNG")
    place = write_folder(tmp_path / "pets", {f"{name}/{n}.png": picture for name in ("ant", "bee") for n in range(4)})

    def names() -> tuple[str, ...]:
        kept = protocol_of_images(str(place), Made((1, 8, 8), 2, False), find_workers("cpu"))
        return open_reference(Path(kept.references[0].partition("=")[2]), label="pixels").about.class_names

    assert names() == ("ant", "bee")
    (place / "ant").rename(place / "cat")
    assert names() == ("bee", "cat")
