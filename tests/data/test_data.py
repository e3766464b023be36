"""Own data: the same images in any wrapping train the same, damage is named, and preparation happens once."""

import errno
import json
import multiprocessing
import os
import pickle
from collections.abc import Callable
from hashlib import md5
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pytest
import torch
from conftest import small_config
from support.pictures import NAMES, Pixels, by_class, encode, pictures, write_folder, write_hugging_face, write_zip
from torch import Tensor

from diffdistill.data import MNIST, Cifar10, Digits, FashionMNIST, HuggingFace, ImageFolder, Npz
from diffdistill.data import prepare as preparation
from diffdistill.data.order import DataOrder
from diffdistill.data.source import MappedImages
from diffdistill.settings.schema import UserError
from diffdistill.training.config import RunConfig, parse_config
from diffdistill.training.trainer import Trainer

COUNT = 400


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is written to the user's caches."""
    import datasets

    monkeypatch.setenv("DIFFDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def images() -> tuple[Pixels, list[int]]:
    return pictures(COUNT)


@pytest.fixture(scope="module")
def files(images: tuple[Pixels, list[int]]) -> dict[str, bytes]:
    return by_class(*images)


@pytest.fixture
def folder(tmp_path: Path, files: dict[str, bytes]) -> Path:
    """Twenty images in a folder by class."""
    return write_folder(tmp_path / "twenty", dict(list(files.items())[:: COUNT // 20]))


def refuse_to_decode(*_: object) -> None:
    raise AssertionError("decoded again")


def run_config(tmp_path: Path, run: str, data: dict[str, Any], *overrides: str) -> RunConfig:
    return small_config("pretrain", tmp_path / run, f"data={json.dumps(data)}", "train.steps=3", *overrides)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.trained["teacher"].state_dict().items()}


def equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_folder_zip_with_broken_files_and_hugging_face_set_train_the_same(
    tmp_path: Path, images: tuple[Pixels, list[int]], files: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    broken = {"cat/00000-torn.png": files["cat/" + next(n for n in files if n.startswith("cat"))[4:]][:200]}
    broken |= {"truck/zzz.png": b"no image at all"}
    wrapped: dict[str, dict[str, Any]] = {
        "folder": {"path": str(write_folder(tmp_path / "f", files)), "labels": "folders"},
        "zip": {"path": str(write_zip(tmp_path / "z.zip", files | broken)), "labels": "folders"},
        "hf": {"path": str(write_hugging_face(tmp_path / "h", files)), "label_column": "label"},
    }
    trainers, batches = {}, {}
    for kind, data in wrapped.items():
        name = "huggingface" if kind == "hf" else "image_folder"
        trainers[kind] = Trainer(run_config(tmp_path, kind, {"name": name, **data}), quiet=True)
        batches[kind] = trainers[kind].plan.order.take(0, 8, next_first=8)
        for _ in range(3):
            trainers[kind].train_step()
    order = sorted(range(COUNT), key=lambda n: (NAMES[images[1][n]], n))
    expected = torch.from_numpy(images[0][order]).permute(0, 3, 1, 2).float() / 127.5 - 1
    for kind, trainer in trainers.items():
        assert torch.equal(trainer.plan.source.rows(torch.arange(COUNT)), expected), kind
        assert torch.equal(batches[kind][0], batches["folder"][0])
        assert torch.equal(batches[kind][1], batches["folder"][1])
        assert equal(weights(trainer), weights(trainers["folder"])), kind
        assert trainer.plan.source.key == trainers["folder"].plan.source.key
    lines = [line for line in capsys.readouterr().err.splitlines() if "cannot be read" in line]
    assert len(lines) == 1
    assert "2 of 402 images (0.50%)" in lines[0]
    assert "cat/00000-torn.png (" in lines[0]
    assert "truck/zzz.png (not an image" in lines[0]


def test_a_hundredth_of_broken_images_is_one_clear_error(tmp_path: Path, files: dict[str, bytes]) -> None:
    chosen = dict(list(files.items())[:99]) | {"zebra/1.png": b"\x89PNG\r\n"}
    root = write_folder(tmp_path / "f", chosen)
    with pytest.raises(UserError, match=r"1 of 100 images cannot be read.*zebra/1\.png") as caught:
        ImageFolder(path=str(root)).load()
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("[!.]*"))


def test_more_broken_images_are_left_out_where_the_config_says_so(tmp_path: Path, files: dict[str, bytes]) -> None:
    chosen = dict(list(files.items())[:9]) | {"zebra/1.png": b"\x89PNG\r\n"}
    root = str(write_folder(tmp_path / "f", chosen))
    found = ImageFolder(path=root, max_unreadable=0.11).load()
    assert len(found) == 9
    assert "1 of 10 images (10.00%) cannot be read and are left out: zebra/1.png" in found.notes[-1]
    with pytest.raises(UserError, match=r"fewer than 10% are left out"):
        ImageFolder(path=root, max_unreadable=0.1).load()
    with pytest.raises(UserError, match=r"fewer than 1% are left out"):
        ImageFolder(path=root).load()  # although such a set lies in the cache
    whole = write_folder(tmp_path / "whole", dict(list(files.items())[:9]))
    assert ImageFolder(path=str(whole), max_unreadable=0).load().key == found.key


def test_the_second_load_decodes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = ImageFolder(path=str(folder), labels="folders").load()
    monkeypatch.setattr(preparation, "decode", refuse_to_decode)
    monkeypatch.setattr(preparation, "_key", refuse_to_decode)
    second = ImageFolder(path=str(folder), labels="folders").load()
    assert np.array_equal(first.images, second.images)
    assert first.key == second.key
    assert isinstance(np.asarray(second.images).base, np.memmap)


def test_the_same_content_elsewhere_is_found_by_its_hash(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ImageFolder(path=str(folder)).load()
    folder.rename(tmp_path / "moved")
    monkeypatch.setattr(preparation, "decode", refuse_to_decode)
    assert ImageFolder(path=str(tmp_path / "moved")).load().key == first.key


@pytest.mark.parametrize("change", ["pixels", "name", "more", "resolution", "channels", "labels"])
def test_another_content_or_setting_is_prepared_anew(folder: Path, files: dict[str, bytes], change: str) -> None:
    before = ImageFolder(path=str(folder)).load()
    settings: dict[str, Any] = {}
    first, second = sorted(folder.rglob("*.png"))[:2]
    if change == "pixels":
        first.write_bytes(second.read_bytes())
    elif change == "name":
        first.rename(first.with_name("zzz.png"))
    elif change == "more":
        (folder / "more.png").write_bytes(next(iter(files.values())))
    else:
        settings = {"resolution": {"resolution": 16}, "channels": {"channels": 1}, "labels": {"labels": "folders"}}[
            change
        ]
    after = ImageFolder(path=str(folder), **settings).load()
    assert after.key != before.key


def test_a_damaged_cache_is_prepared_again(folder: Path, own_caches: Path) -> None:
    good = np.array(ImageFolder(path=str(folder)).load().images)
    (array,) = own_caches.glob("*/images.npy")
    content = bytearray(array.read_bytes())
    content[-1] ^= 1
    array.write_bytes(content)
    assert np.array_equal(ImageFolder(path=str(folder)).load().images, good)
    array.write_bytes(content[:-7])
    assert np.array_equal(ImageFolder(path=str(folder)).load().images, good)


def test_an_interrupted_preparation_leaves_nothing_half_written(
    folder: Path, own_caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = preparation.decode, []

    def stop_at_the_tenth(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(preparation, "decode", stop_at_the_tenth)
    with pytest.raises(KeyboardInterrupt):
        ImageFolder(path=str(folder)).load()
    assert [path for path in own_caches.rglob("*") if path.suffix != ".lock"] == []
    monkeypatch.undo()
    assert len(ImageFolder(path=str(folder), cache=str(own_caches)).load()) == 20


def test_what_a_killed_preparation_left_is_cleared_by_the_next(folder: Path, own_caches: Path) -> None:
    ImageFolder(path=str(folder)).load()
    (done,) = (path.parent for path in own_caches.glob("*/images.npy"))
    leftover = own_caches / f".preparing-{done.name}-1-dead"
    done.rename(leftover)
    ImageFolder(path=str(folder)).load()
    assert (done / "images.npy").exists()
    assert not leftover.exists()


def _prepare_at_once(path: str, cache: str, barrier: Any, answers: Any) -> None:
    barrier.wait()
    source = ImageFolder(path=path, cache=cache).load()
    answers.put((source.key, int(np.asarray(source.images, dtype=np.int64).sum())))


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.mark.parametrize("knows_locks", [True, False])
def test_processes_that_prepare_at_once_agree(
    folder: Path, own_caches: Path, monkeypatch: pytest.MonkeyPatch, knows_locks: bool
) -> None:
    whole = preparation.decode
    monkeypatch.setattr(preparation, "decode", lambda *arguments: (sleep(0.01), whole(*arguments))[1])
    if not knows_locks:  # as on some network drives
        monkeypatch.setattr("fcntl.flock", without_locks)
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(3), context.Queue()
    arguments = (str(folder), str(own_caches), barrier, answers)
    processes = [context.Process(target=_prepare_at_once, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    found = {answers.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    source = ImageFolder(path=str(folder)).load()
    assert found == {(source.key, int(np.asarray(source.images, dtype=np.int64).sum()))}
    assert len(list(own_caches.glob("*/images.npy"))) == 1
    assert not list(own_caches.glob(".preparing-*"))


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"set data\.cache or \$DIFFDISTILL_CACHE"):
        ImageFolder(path=str(folder), cache=str(tmp_path / "file")).load()


def test_a_resumed_run_on_mapped_images_ends_as_one_that_never_stopped(tmp_path: Path, folder: Path) -> None:
    data = {"name": "image_folder", "path": str(folder), "labels": "folders"}
    Trainer(run_config(tmp_path, "whole", data, "train.steps=4"), quiet=True).run()
    Trainer(run_config(tmp_path, "parts", data, "train.steps=2"), quiet=True).run()
    moved = folder.rename(tmp_path / "moved")  # the content counts, not the place
    resumed = Trainer(
        run_config(tmp_path, "parts", data | {"path": str(moved)}, "train.steps=4"), resume=True, quiet=True
    )
    resumed.run()
    ended = Trainer(run_config(tmp_path, "whole", data | {"path": str(moved)}, "train.steps=4"), resume=True)
    assert equal(weights(resumed), weights(ended))
    next(moved.rglob("*.png")).unlink()
    with pytest.raises(UserError, match="differ from those at the start of the run"):
        Trainer(run_config(tmp_path, "parts", data | {"path": str(moved)}, "train.steps=5"), resume=True)


def test_reading_ahead_changes_nothing(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path, "run", {"name": "image_folder", "path": str(folder)})
    asked: list[Tensor] = []
    read = MappedImages._read
    monkeypatch.setattr(MappedImages, "_read", lambda self, index: (asked.append(index), read(self, index))[1])

    def trained() -> tuple[dict[str, Tensor], int]:
        asked.clear()
        trainer = Trainer(config, quiet=True)
        for _ in range(6):  # 6 x 8 of 20 images: across the ends of epochs
            trainer.train_step()
        return weights(trainer), len(asked)

    ahead, num_reads = trained()
    assert num_reads <= 1 + 6, "what was read ahead was not used"
    monkeypatch.setattr(MappedImages, "expect", lambda self, index: None)
    plain, _ = trained()
    assert equal(ahead, plain)


def test_a_fault_while_reading_ahead_reaches_the_trainer() -> None:
    source = MappedImages(np.zeros((4, 1, 2, 2), np.uint8), None, key="", num_classes=0)
    source.expect(torch.tensor([4]))
    with pytest.raises(IndexError):
        source.rows(torch.tensor([4]))


def test_every_byte_is_mapped_to_x_over_127_5_minus_1() -> None:
    source = MappedImages(np.arange(256, dtype=np.uint8).reshape(256, 1, 1, 1), None, key="", num_classes=0)
    values = source.rows(torch.arange(256)).flatten()
    assert torch.equal(values, torch.arange(256) / 127.5 - 1)
    assert (float(values.min()), float(values.max())) == (-1, 1)


def test_the_order_is_one_permutation_an_epoch_whatever_the_batch() -> None:
    source = Digits().load()
    order = DataOrder(source, 3)
    count = len(source)
    long = order.rows(0, 3 * count)
    for epoch in range(3):
        assert torch.equal(long[epoch * count : (epoch + 1) * count].sort().values, torch.arange(count))
    assert not torch.equal(long[:count], long[count : 2 * count])
    short = torch.cat([DataOrder(source, 3).rows(first, 431) for first in range(0, 3 * count, 431)])
    assert torch.equal(short[: 3 * count], long)
    assert not torch.equal(order.rows(0, count), DataOrder(source, 4).rows(0, count))


def test_a_teacher_of_classes_refuses_data_without_labels(teacher: Path, tmp_path: Path) -> None:
    flat = [encode(np.full((8, 8), 12 * number, np.uint8)) for number in range(20)]
    write_folder(tmp_path / "f", {f"{number}.png": content for number, content in enumerate(flat)})
    data = f"data={{name: image_folder, path: {tmp_path / 'f'}, channels: 1}}"
    with pytest.raises(UserError, match="has no labels, but the teacher was trained on 10 classes"):
        Trainer(small_config("dmd2", tmp_path / "run", data, teacher=teacher))


def csv_of(folder: Path, label: Callable[[Path], str]) -> str:
    lines = [f"{file.relative_to(folder).as_posix()},{label(file)}" for file in folder.rglob("*.png")]
    return "\ufefffile,label\r\n" + "\r\n".join(lines) + "\r\n"


@pytest.mark.parametrize("place", ["beside", "inside"])
def test_labels_from_a_csv(folder: Path, tmp_path: Path, place: str) -> None:
    file = (tmp_path if place == "beside" else folder) / "labels.csv"
    file.write_text(csv_of(folder, lambda f: f.parent.name), encoding="utf-8")
    name = str(file) if place == "beside" else "labels.csv"
    by_csv = ImageFolder(path=str(folder), labels="csv", labels_file=name).load()
    by_folder = ImageFolder(path=str(folder), labels="folders").load()
    assert by_csv.labels is not None
    assert by_folder.labels is not None
    assert torch.equal(by_csv.labels, by_folder.labels)


def test_labels_that_are_numbers_stay_as_they_are(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(csv_of(folder, lambda f: str(int(f.stem) % 12)), encoding="utf-8")
    source = ImageFolder(path=str(folder), labels="csv", labels_file=str(tmp_path / "labels.csv")).load()
    assert source.labels is not None
    assert source.labels.tolist() == [int(file.stem) % 12 for file in sorted(folder.rglob("*.png"))]
    assert source.num_classes == int(source.labels.max()) + 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name,class\na,1\n", r"needs the columns file and label.*\['name', 'class'\]"),
        (b"file;label\na;1\n", r"needs the columns"),
        (b"", r"needs the columns"),
        (b"file,label\na.png,1\na.png,2\n", r"line 3: a\.png is listed twice"),
        (b"file,label\nother.png,1\n", r"20 of 20 images have no label"),
        (b"file,label\n\xff\xfe,1\n", r"line 2: byte 0xff is not UTF-8"),
        (b'file,label\n"torn,1\n', r"unexpected end of data"),
    ],
)
def test_a_table_of_labels_that_does_not_fit_is_one_clear_error(
    folder: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "labels.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        ImageFolder(path=str(folder), labels="csv", labels_file=str(tmp_path / "labels.csv")).load()


def test_labels_file_and_labels_csv_go_together(folder: Path) -> None:
    for settings in ({"labels": "csv"}, {"labels_file": "labels.csv"}):
        with pytest.raises(ValueError, match="goes with labels: csv"):
            ImageFolder(path=str(folder), **settings)  # type: ignore[arg-type]


def test_images_outside_the_class_folders_are_named(folder: Path, files: dict[str, bytes]) -> None:
    (folder / "loose.png").write_bytes(next(iter(files.values())))
    with pytest.raises(UserError, match=r"in no subfolder: loose\.png"):
        ImageFolder(path=str(folder), labels="folders").load()


def test_both_layouts_of_npz_give_the_same_images(tmp_path: Path, images: tuple[Pixels, list[int]]) -> None:
    pixels, labels = images[0][:20], np.array(images[1][:20])
    np.savez(tmp_path / "last.npz", images=pixels, labels=labels)
    np.savez_compressed(tmp_path / "first.npz", images=pixels.transpose(0, 3, 1, 2), labels=labels.astype(np.uint8))
    last, first = (Npz(path=str(tmp_path / f"{name}.npz")).load() for name in ("last", "first"))
    assert np.array_equal(last.images, pixels.transpose(0, 3, 1, 2))
    assert last.key == first.key
    assert last.labels is not None
    assert last.labels.tolist() == labels.tolist()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 4, 4, 3), np.uint8)}, r"has the arrays x; it needs `images`"),
        ({"images": np.zeros((2, 4, 4, 3), np.float32)}, r"`images` is float32 \[2, 4, 4, 3\]; it must be uint8"),
        ({"images": np.zeros((4, 4, 3), np.uint8)}, r"it must be uint8 \[N, H, W, C\]"),
        ({"images": np.zeros((2, 5, 4, 4), np.uint8)}, r"one or three channels"),
        ({"images": np.zeros((2, 3, 4, 3), np.uint8)}, r"is ambiguous; set data\.layout"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(3, int)}, r"integers \[2\]"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.array([0, -1])}, r"labels go from -1 to 0"),
        ({"images": np.array([{}, {}], dtype=object)}, r"cannot be read as \.npz.*pickle"),
    ],
)
def test_an_npz_that_does_not_fit_is_one_clear_error(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(UserError, match=message):
        Npz(path=str(tmp_path / "a.npz")).load()


def test_a_pickle_called_npz_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(pickle.dumps({"images": 1}))
    with pytest.raises(UserError, match=r"cannot be read as \.npz"):
        Npz(path=str(tmp_path / "a.npz")).load()


def test_a_missing_cifar10_says_what_belongs_where(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Cifar10(root=str(tmp_path / "none")).load()
    message = str(caught.value)
    assert str(tmp_path / "none" / "cifar-10-batches-py" / "data_batch_1") in message
    assert "unpack cifar-10-python.tar.gz" in message
    assert "data.download=true" in message


def write_cifar10(root: Path, pixels: Pixels, labels: list[int]) -> dict[str, str]:
    """torchvision's layout with a few images, and the checksums of its files."""
    home, rows = root / "cifar-10-batches-py", np.split(pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1), 6)
    home.mkdir(parents=True)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    parts = np.split(np.array(labels), 6)
    for name, part, numbers in zip(names, rows, parts, strict=True):
        (home / name).write_bytes(pickle.dumps({"data": part, "labels": numbers.tolist()}))
    (home / "batches.meta").write_bytes(pickle.dumps({"label_names": list(NAMES)}))
    return {file.name: md5(file.read_bytes()).hexdigest() for file in home.iterdir()}


def test_cifar10_through_torchvision(
    tmp_path: Path, images: tuple[Pixels, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import CIFAR10

    pixels, labels = images[0][:60], images[1][:60]
    sums = write_cifar10(tmp_path, pixels, labels)
    with pytest.raises(UserError, match=r"cannot be read: Dataset not found or corrupted"):
        Cifar10(root=str(tmp_path)).load()  # not the true checksums, and so not unpickled
    monkeypatch.setattr(CIFAR10, "train_list", [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": sums["batches.meta"]})
    train, test = Cifar10(root=str(tmp_path)).load(), Cifar10(root=str(tmp_path), split="test").load()
    assert np.array_equal(train.images, pixels[:50].transpose(0, 3, 1, 2))
    assert (len(test), test.num_classes) == (10, 10)
    assert train.labels is not None
    assert train.labels.tolist() == labels[:50]
    monkeypatch.setattr(CIFAR10, "__init__", refuse_to_decode)
    assert Cifar10(root=str(tmp_path)).load().key == train.key


@pytest.mark.parametrize("of", [MNIST, FashionMNIST])
def test_mnist_and_fashion_mnist_through_torchvision(tmp_path: Path, of: type[MNIST | FashionMNIST]) -> None:
    raw = tmp_path / of.__name__ / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (10, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        head = np.array([0x803, 10, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([0x801, 10], ">i4").tobytes() + bytes(range(10)))
    source = of(root=str(tmp_path)).load()
    assert np.array_equal(source.images, pixels[:, None])
    assert source.image_shape == (1, 28, 28)
    (raw / "train-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match="train-labels-idx1-ubyte"):
        of(root=str(tmp_path)).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_column": "picture"}, r"data\.image_column = 'picture': choose from image, label"),
        ({"image_column": "label"}, r"holds no images"),
        ({"label_column": "class"}, r"data\.label_column = 'class': choose from"),
        ({"label_column": "image"}, r"neither integers nor text"),
        ({"path": "./nowhere"}, r"no such folder"),
    ],
)
def test_a_hugging_face_set_that_does_not_fit_is_one_clear_error(
    tmp_path: Path, files: dict[str, bytes], settings: dict[str, str], message: str
) -> None:
    path = str(write_hugging_face(tmp_path / "h", dict(list(files.items())[:5])))
    with pytest.raises(UserError, match=message):
        HuggingFace(**({"path": path} | settings)).load()  # type: ignore[arg-type]


def test_a_split_that_is_not_there_names_those_that_are(tmp_path: Path, files: dict[str, bytes]) -> None:
    import datasets

    write_hugging_face(tmp_path / "h", dict(list(files.items())[:5]))
    part = datasets.load_from_disk(str(tmp_path / "h"))
    datasets.DatasetDict({"all": part, "some": part.select(range(2))}).save_to_disk(str(tmp_path / "both"))
    assert len(HuggingFace(path=str(tmp_path / "both"), split="some").load()) == 2
    with pytest.raises(UserError, match="choose from all, some"):
        HuggingFace(path=str(tmp_path / "both")).load()


def test_a_folder_as_hugging_face_reads_it_gives_the_same_images(folder: Path) -> None:
    theirs = HuggingFace(path=str(folder), label_column="label").load()
    ours = ImageFolder(path=str(folder), labels="folders").load()
    assert theirs.key == ours.key


def test_a_misspelt_setting_of_data_is_named_with_the_choices(tmp_path: Path) -> None:
    base = {"run": "r", "method": {"name": "pretrain"}, "optimizers": {"default": {"lr": 1e-3}}}
    train = {"steps": 1, "global_batch_size": 1}
    with pytest.raises(UserError, match="did you mean 'resolution'"):
        parse_config({**base, "train": train, "data": {"name": "image_folder", "path": "x", "resolutoin": 32}})
    with pytest.raises(UserError, match=r"data\.name = 'cifar': unknown; did you mean 'cifar10'"):
        parse_config({**base, "train": train, "data": {"name": "cifar"}})
