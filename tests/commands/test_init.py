"""`init`: from a folder of pictures to a student and its evaluation, without editing a file."""

from fractions import Fraction
from io import BytesIO
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image
from support.pictures import NAMES, by_class, encode, pictures, write_folder, write_zip
from typer.testing import CliRunner

from diffdistill.commands import init as command
from diffdistill.commands import own_pictures
from diffdistill.commands.cli import app
from diffdistill.commands.own_pictures import look_at, share_above
from diffdistill.commands.starting_configs import SIZES, Start
from diffdistill.data.image_folder import ImageFolder
from diffdistill.diffusion.sampling import Heun
from diffdistill.eval.protocols.packaged import find_protocol
from diffdistill.models.spec import ModelSpec
from diffdistill.settings.schema import UserError
from diffdistill.settings.values import parse_yaml
from diffdistill.storage.checkpoint import read_state
from diffdistill.training import step_time
from diffdistill.training.config import load_config, parse_config

COUNT = 24
SHORT = ("train.steps=2", "train.global_batch_size=8", "train.preview_every=0", "train.device=cpu")
SMALL = ("model.network={name: mlp, width: 16, blocks: 1}", "method.teacher_sampler={name: heun, num_steps: 2}")


def call(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [*map(str, arguments)])


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DIFFDISTILL_REFERENCES", str(tmp_path / "references"))
    return tmp_path


@pytest.fixture
def no_prediction(monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes seconds, and is tested once."""
    monkeypatch.setattr(command, "_predict", lambda start: ())


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """PNGs of 32 x 32 pixels by name, in folders of three classes."""
    images, _ = pictures(COUNT)
    return by_class(images, [number % 3 for number in range(COUNT)])


def flat(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name.replace("/", "-"): content for name, content in files.items()}


def go_the_whole_way(result: Result) -> Result:
    """Type the three commands that `init` has printed, with a short and small training. Returns the evaluation's."""
    assert result.exit_code == 0, result.output
    lines = result.stderr.splitlines()
    commands = [line.split()[1:] for line in lines[lines.index("next:") + 1 :]]
    assert [words[0] for words in commands] == ["pretrain", "train", "eval"]
    for words, overrides in zip(commands, ((*SHORT, *SMALL), SHORT, ()), strict=True):
        done = call(*words, *overrides)
        assert done.exit_code == 0, done.output
    return done


def test_a_folder_with_classes_becomes_a_student_and_its_evaluation(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_time, "PASSES", 1)
    write_folder(Path("pictures"), files)
    result = call("init", "pictures", "--resolution", "8")
    told = dict(line[6:].split(": ", 1) for line in result.stdout.splitlines() if line.startswith("ok "))
    assert told["images"] == f"{COUNT} in pictures"
    assert told["sizes"] == "all 32 x 32, resized to 8 x 8"
    assert told["classes"] == f"3, by folder: {', '.join(f'{name} (8)' for name in NAMES[:3])}"
    for name in ("teacher", "student"):
        assert " of activations for 64 samples" in told[f"{name}'s memory (predicted)"]
        assert told[f"{name}'s time (predicted)"].startswith("2,000 steps at ")
    done = go_the_whole_way(result)
    assert "runs/pictures/student" in done.stdout
    state = read_state(Path("runs/pictures/student/checkpoints/step-00000002"))
    assert state["model"]["class_names"] == [*NAMES[:3]]
    [reference] = Path("references").iterdir()
    again = call(*["eval", "runs/pictures/student", "--protocol", "runs/pictures/protocol.yaml"])
    assert again.exit_code == 0, again.output
    assert [*Path("references").iterdir()] == [reference], "is computed once"


def test_a_folder_without_classes(files: dict[str, bytes], no_prediction: None) -> None:
    write_folder(Path("My Pictures"), flat(files))
    result = call("init", "My Pictures", "--resolution", "8")
    assert "ok    classes: none\n" in result.stdout
    assert "class_dropout" not in Path("runs/my-pictures/teacher.yaml").read_text()
    assert "runs/my-pictures/student" in go_the_whole_way(result).stdout


def test_broken_files_are_named_and_left_out(files: dict[str, bytes], no_prediction: None) -> None:
    torn = {"torn.png": files[next(iter(files))][:200], "zzz.jpg": b"no image"}
    write_folder(Path("pictures"), flat(files) | torn | {"notes.txt": b"x"})
    result = call("init", "pictures", "--resolution", "8")
    assert "unreadable files: 2 of 26 images (7.69%) cannot be read and are left out: torn.png (" in result.stdout
    assert result.stderr.count("torn.png") == 1
    assert load_config("runs/pictures/teacher.yaml").data.max_unreadable == 0.08  # type: ignore[union-attr]
    assert "runs/pictures/student" in go_the_whole_way(result).stdout


def test_one_broken_file_of_ten_is_left_out(files: dict[str, bytes]) -> None:
    write_folder(Path("pictures"), dict([*flat(files).items()][:9]) | {"zzz.png": b"no image"})
    found = look_at("pictures", side=8, with_classes=None)
    assert (found.num_files, found.num_broken, found.data.max_unreadable) == (10, 1, 0.11)


def test_the_share_that_is_tolerated_is_the_least_hundredth_above_that_of_the_broken() -> None:
    for total in range(2, 401):
        for broken in range(1, (total + 1) // 2):
            share = share_above(broken, total)
            assert broken < share * total, "prepare refuses as many as this"
            assert round(100 * share) - 1 <= Fraction(100 * broken, total) < round(100 * share)


@pytest.mark.parametrize("what", ["empty", "no images", "none that can be read", "all of one colour", "tiny"])
def test_what_holds_no_pictures_is_refused(what: str) -> None:
    contents = {
        "empty": {},
        "no images": {"a.txt": b"x"},
        "none that can be read": {"a.png": b"x", "b.png": b"y"},
        "all of one colour": {f"{n}.png": encode(Image.new("RGB", (16, 16), (9, 9, 9))) for n in range(3)},
        "tiny": {f"{n}.png": encode(Image.new("RGB", (20, 4), (90 * n, 9, 9))) for n in range(3)},
    }
    Path("pictures").mkdir()
    write_folder(Path("pictures"), contents[what])
    result = call("init", "pictures")
    assert result.exit_code == 2
    message = {
        "empty": "pictures = 'pictures': holds no images; image files end in .png",
        "no images": "pictures = 'pictures': holds no images but 1",
        "none that can be read": "pictures: none of 2 files can be read as an image: a.png, b.png",
        "all of one colour": "pictures: all 3 images measured have a single colour",
        "tiny": "pictures: the shorter side of the images is 4 pixels; at least 8 are needed",
    }
    assert message[what] in result.stderr
    assert not Path("runs").exists()


def test_what_is_there_is_not_written_over_unless_asked_to(files: dict[str, bytes], no_prediction: None) -> None:
    write_folder(Path("pictures"), files)
    Path("runs/pictures").mkdir(parents=True)
    Path("runs/pictures/student.yaml").write_text("mine")
    refused = call("init", "pictures", "--resolution", "8")
    assert refused.exit_code == 2
    assert (
        "runs/pictures/student.yaml: exists; overwrite it with --force, or name another folder with --out"
        in refused.stderr
    )
    assert call("init", "pictures", "--resolution", "8", "--out", "runs/b").exit_code == 0
    assert Path("runs/pictures/student.yaml").read_text() == "mine"
    assert load_config("runs/b/student.yaml").teacher == "runs/b/teacher"
    assert call("init", "pictures", "--resolution", "8", "--force").exit_code == 0
    assert load_config("runs/pictures/student.yaml").run == "runs/pictures/student"


@pytest.mark.parametrize(("place", "folder"), [("data.1", "data-1"), ("data.2", "data-2"), ("more.zip", "more")])
def test_runs_have_the_pictures_name(
    files: dict[str, bytes], no_prediction: None, monkeypatch: pytest.MonkeyPatch, place: str, folder: str
) -> None:
    monkeypatch.setattr(command, "_num_threads", lambda start: None)
    (write_zip if place.endswith(".zip") else write_folder)(Path(place), files)
    assert call("init", place, "--resolution", "8").exit_code == 0
    assert load_config(f"runs/{folder}/student.yaml").teacher == f"runs/{folder}/teacher"


@pytest.mark.parametrize("broken", ["a\nmodel: 3", "b\u2028c", "d\re"])
def test_a_name_with_line_breaks_stays_in_its_line(
    files: dict[str, bytes], no_prediction: None, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    monkeypatch.setattr(command, "_num_threads", lambda start: None)
    write_folder(Path(broken), files)
    result = call("init", broken, "--resolution", "8", "--out", "runs/mine")
    assert result.exit_code == 0, result.output
    for file in ("teacher", "student"):
        assert load_config(f"runs/mine/{file}.yaml").data.path == broken  # type: ignore[union-attr]
    assert find_protocol("runs/mine/protocol.yaml").reference


def test_nothing_is_written_among_the_pictures(files: dict[str, bytes]) -> None:
    write_folder(Path("pictures"), files)
    result = call("init", ".")
    assert result.exit_code == 2
    assert "is inside the folder of images" in result.stderr
    assert call("init", "pictures", "--resolution", "20").exit_code == 2


def test_folders_are_classes_where_they_look_so_or_the_user_says_so(files: dict[str, bytes]) -> None:
    write_folder(Path("loose"), files | {"loose.png": files[next(iter(files))]})
    found = look_at("loose", side=8, with_classes=None)
    assert found.classes == {}
    assert "none: 1 images are in no subfolder (loose.png)" in [finding.text for finding in found.findings()]
    albums = {f"{number}/a.png": content for number, content in enumerate(files.values())}
    write_zip(Path("albums.zip"), albums)
    assert look_at("albums.zip", side=8, with_classes=None).classes == {}
    assert len(look_at("albums.zip", side=8, with_classes=True).classes) == COUNT
    write_folder(Path("classes"), files)
    assert len(look_at("classes", side=8, with_classes=None).classes) == 3
    assert look_at("classes", side=8, with_classes=False).classes == {}


@pytest.mark.parametrize("above", ["", "set/"])
def test_folders_of_a_split_are_no_classes(files: dict[str, bytes], above: str) -> None:
    split = {f"{above}{('test', 'Train')[n % 2]}/{name}": content for n, (name, content) in enumerate(files.items())}
    write_folder(Path("pictures"), split)
    result = call("init", "pictures", "--resolution", "8")
    assert result.exit_code == 2
    assert (
        f"test, Train: these are splits of a data set, not classes; name one of them, as pictures/{above}Train"
        in result.stderr
    )
    assert look_at(f"pictures/{above}Train", side=8, with_classes=None).classes.keys() == set(NAMES[:3])
    assert look_at("pictures", side=8, with_classes=False).num_files == COUNT
    assert look_at("pictures", side=8, with_classes=True).classes.keys() == {"test", "Train"}, "who says so gets it"
    write_folder(Path("words"), {name.replace(NAMES[0], "train"): content for name, content in files.items()})
    assert len(look_at("words", side=8, with_classes=None).classes) == 3, "a class of trains"


def test_sigma_data_is_that_of_the_pixels_as_the_network_will_see_them(files: dict[str, bytes]) -> None:
    write_folder(Path("pictures"), files)
    found = look_at("pictures", side=8, with_classes=None)
    images = ImageFolder(path="pictures", resolution=8).load().rows(torch.arange(COUNT))
    assert found.sigma_data == round(float(images.std()), 2)


def test_dark_and_faint_pictures_are_no_single_colour() -> None:
    faint = {f"{n}.png": encode(Image.new("RGB", (8, 8), (0, 0, n % 2))) for n in range(4)}
    write_folder(Path("pictures"), faint)
    found = look_at("pictures", side=8, with_classes=None)
    std = float(found.source.rows(torch.arange(4)).std())
    assert 0 < std < 0.005
    assert found.sigma_data == pytest.approx(std, rel=0.05), "two digits, the zeros in front not counted"


def test_one_colour_is_nothing_to_learn_whatever_its_channels() -> None:
    write_folder(Path("pictures"), {f"{n}.png": encode(Image.new("RGB", (8, 8), (200, 9, 9))) for n in range(3)})
    with pytest.raises(UserError, match="all 3 images measured have a single colour"):
        look_at("pictures", side=8, with_classes=None)


def test_a_single_coloured_picture_anywhere_makes_the_set_coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_pictures, "MEASURED", 2)
    grey = {f"{n}.png": encode(Image.new("RGB", (8, 8), (n * 30,) * 3)) for n in range(7)}
    write_folder(Path("pictures"), grey | {"3.png": encode(Image.new("RGB", (8, 8), (9, 99, 9)))})
    assert look_at("pictures", side=8, with_classes=None).data.channels == 3


def test_grey_pictures_have_one_channel(files: dict[str, bytes]) -> None:
    grey = {name: encode(Image.open(BytesIO(content)).convert("L")) for name, content in files.items()}
    write_folder(Path("pictures"), grey)
    found = look_at("pictures", side=None, with_classes=None)
    assert found.source.image_shape == (1, 16, 16)
    assert found.data.channels == 1


@pytest.mark.parametrize("side", sorted(SIZES))
@pytest.mark.parametrize("has_gpu", [False, True])
def test_what_is_written_for_each_size_is_read_back(files: dict[str, bytes], side: int, has_gpu: bool) -> None:
    place = 'pic: "tures" #1'
    write_folder(Path(place), files)
    start = Start(
        look_at(place, side=side, with_classes=None), "a: folder", "mine", has_gpu, 1 if not has_gpu else None
    )
    teacher, student = (
        parse_config(parse_yaml(text, origin="x"), origin="x") for text in (start.teacher(), start.student())
    )
    assert teacher.data == student.data == ImageFolder(path=place, labels="folders", resolution=side)
    assert student.teacher == teacher.run == "a: folder/teacher"
    assert teacher.train.precision == ("bf16" if has_gpu else "fp32")
    assert teacher.model is not None
    shape = start.pictures.source.image_shape
    spec = ModelSpec(model=teacher.model, image_shape=shape, num_classes=3, class_dropout=0.1, sampler=Heun())
    assert spec.build_empty().net is not None  # which refuses sides that it cannot halve
    Path("protocol.yaml").write_text(start.protocol())
    protocol = find_protocol("protocol.yaml")
    assert protocol.image_shape == shape
    assert protocol.num_images == COUNT
    assert [metric.name for metric in protocol.metrics] == ["frechet", "kid"]
    assert protocol.metrics[1].subset_size == COUNT  # type: ignore[union-attr]


def test_threads_are_those_of_the_faster_step(
    files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, no_prediction: None
) -> None:
    write_folder(Path("pictures"), files)
    seconds = {1: 1.0, 4: 2.0}
    threads = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", threads.append)

    def measured(assembly: object, budget: float) -> object:
        return type("Timed", (), {"step": seconds[threads[-1]]})

    monkeypatch.setattr(step_time, "measure_step_time", measured)
    assert call("init", "pictures", "--resolution", "8").exit_code == 0
    assert threads[-1] == 4
    assert load_config("runs/pictures/student.yaml").train.num_threads == 1
    seconds[4] = 0.5
    assert call("init", "pictures", "--resolution", "8", "--force").exit_code == 0
    assert load_config("runs/pictures/student.yaml").train.num_threads is None
