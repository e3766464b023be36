"""What `scripts/quality.py` trains: one factor at a time against a base of each method, on two networks."""

from dataclasses import dataclass, replace

LENGTHS = (1 / 8, 1 / 4, 1 / 2, 1)  # of a run, at which it is measured; a half is the base's cost
AVERAGES = {
    "none": 1,
    "1,100 images": 1100,
    "17,600 images": 17600,
}  # half-lives beside the base's own, of 4,400 images


@dataclass(frozen=True)
class Variant:
    """A run of a base with some settings changed.

    length: its steps over the base's, so that what is cheaper or dearer a step costs about as much.
    """

    method: str
    factor: str
    name: str
    overrides: tuple[str, ...] = ()
    length: float = 1.0
    config: str = ""

    @property
    def slug(self) -> str:
        text = "".join(c if c.isalnum() or c == "." else "-" for c in f"{self.factor} {self.name}".lower())
        return f"{self.method}-{text}"


@dataclass(frozen=True)
class Base:
    """config: packaged.  steps: of the whole run, twice those of the base's cost."""

    config: str
    steps: int
    overrides: tuple[str, ...] = ()


# The screen's bases: what was packaged while it was made.
_FAKE_S_FEATURES = ("method.gan_features=fake",)
# The MLP's rates are half the U-Net's and SiD's gradients are bounded, as on the digits board.
_SLOWER = ("optimizers.generator.lr=3e-4", "optimizers.default.lr=5e-4")
_SLOWER_SID = ("optimizers.generator.lr=3e-4", "optimizers.fake.lr=5e-4")
_CLIPPED = ("optimizers.fake.clip_norm=100", "optimizers.generator.clip_norm=2000")
TEACHERS: dict[str, tuple[str, ...]] = {
    "mlp": ("model.network={name: mlp, width: 256, blocks: 3}", "train.steps=1500"),
    "unet": (),
}
BASES = {
    "mlp": {
        "dmd2": Base("dmd2/digits", 2000, (*_FAKE_S_FEATURES, *_SLOWER)),
        "sid": Base("sid/digits", 1600, (*_SLOWER_SID, *_CLIPPED)),
    },
    "unet": {
        "dmd2": Base("dmd2/digits", 1048, _FAKE_S_FEATURES),
        "sid": Base("sid/digits", 496),
        "sim": Base("sim/digits", 496),
        "f_distill": Base("f_distill/digits", 600, _FAKE_S_FEATURES),
        "disback": Base("disback/digits", 560, ("method.base.gan_features=fake",)),
    },
}


def _time(name: str, **values: float) -> tuple[str, ...]:
    return tuple(f"method.{name}.{key}={value}" for key, value in values.items())


NO_GAN = ("method.gan_weight=0",)
FROM_10 = ("method.steps.init_ratio=10",)
WIDE = _time("generator_time_law", ratio_max=20)
WIDE_SID = _time("time_law", ratio_max=20)


def _decay(value: str, *players: str) -> tuple[str, ...]:
    return tuple(f"optimizers.{player}.decay={value}" for player in players)


CRITICS_KEEP = _decay("constant", "default")


def _rates(generator: float, fake: float, player: str = "default") -> tuple[str, ...]:
    return (f"optimizers.generator.lr={generator}", f"optimizers.{player}.lr={fake}")


def _dmd2(factor: str, name: str, *overrides: str, length: float = 1.0, config: str = "") -> Variant:
    return Variant("dmd2", factor, name, overrides, length, config=config)


def _sid(factor: str, name: str, *overrides: str, length: float = 1.0, config: str = "") -> Variant:
    return Variant("sid", factor, name, overrides, length, config=config)


BASE_DMD2 = Variant("dmd2", "base", "GAN on the fake score's features")
BASE_SID = Variant("sid", "base", "as packaged")
TEACHERS_FEATURES = "on the teacher's features"

# In the order in which they are run: the most telling ones first.
ON_MLP = (
    BASE_DMD2,
    _dmd2("GAN", "without", *NO_GAN),
    _dmd2("GAN", TEACHERS_FEATURES, "method.gan_features=teacher"),
    _dmd2("GAN", "in the fake score's loss alone", "method.gan_weight=1e-6"),
    BASE_SID,
    _dmd2("noise range", "to 20, from 10", *WIDE, *FROM_10),
    _dmd2("decay", "none", *_decay("constant", "generator", "default")),
    _dmd2("fake updates", "1", "method.fake_updates=1", length=0.7),
    _dmd2("fake updates", "5", "method.fake_updates=5", length=1.3),
    _dmd2("decay", "of the generator alone", *CRITICS_KEEP),
    _dmd2("decay", "none, no GAN", *NO_GAN, *_decay("constant", "generator", "default")),
    _dmd2("pairs", "decay of the generator alone, 1 fake update", *CRITICS_KEEP, "method.fake_updates=1", length=0.7),
    _sid("noise range", "to 20, from 10", *WIDE_SID, *FROM_10),
    _sid("decay", "none", *_decay("constant", "generator", "fake")),
    _sid("decay", "of the generator alone", *_decay("constant", "fake")),
    _dmd2("GAN", "weight 0.03", "method.gan_weight=0.03"),
    _dmd2("batch", "128", "train.global_batch_size=128", length=0.6),
    _dmd2("rates", "discriminator's four times", "optimizers.discriminator.lr=2e-3"),
    _dmd2("pairs", "decay of the generator alone, GAN weight 0.03", *CRITICS_KEEP, "method.gan_weight=0.03"),
    _dmd2("batch", "32", "train.global_batch_size=32", length=1.5),
    _dmd2("noise range", "to 20, from 10, no GAN", *NO_GAN, *WIDE, *FROM_10),
    _sid("fake updates", "2", "method.fake_updates=2", length=1.3),
    _dmd2("normaliser", "none, no GAN", *NO_GAN, "method.normaliser_minimum=10"),
    _sid("normaliser", "none", "method.weight=one"),
    _sid("alpha", "0.5", "method.alpha=0.5"),
    _dmd2("init ratio", "2.5, no GAN", *NO_GAN, "method.steps.init_ratio=2.5"),
    _dmd2("noise range", "to 20, no GAN", *NO_GAN, *WIDE),
    _dmd2("rates", "doubled", *_rates(6e-4, 1e-3)),
    _dmd2("divergence", "reverse KL, f-distill", "method.divergence=rkl", config="f_distill/digits"),
    _dmd2("divergence", "Jensen-Shannon, f-distill", config="f_distill/digits"),
    _dmd2("divergence", "forward KL, f-distill", "method.divergence=kl", config="f_distill/digits"),
    _sid("alpha", "1.2", "method.alpha=1.2"),
    _dmd2("noise range", "to 6, no GAN", *NO_GAN, *_time("generator_time_law", ratio_max=6)),
    _dmd2("init ratio", "10, no GAN", *NO_GAN, *FROM_10),
    _sid("init ratio", "4", "method.steps.init_ratio=4"),
    _sid("init ratio", "10", *FROM_10),
    _sid("noise range", "to 20", *WIDE_SID),
    _dmd2("rates", "halved", *_rates(1.5e-4, 2.5e-4)),
    _dmd2("rates", "fake's alone doubled", *_rates(3e-4, 1e-3)),
    _sid("rates", "doubled", *_rates(6e-4, 1e-3, "fake")),
    _sid("rates", "halved", *_rates(1.5e-4, 2.5e-4, "fake")),
    _dmd2("decay", "cosine", *_decay("cosine", "generator", "default")),
    _dmd2("GAN", "over the matching's range", *_time("gan_time_law", ratio_max=4)),
    _dmd2("GAN", "over all noise", *_time("gan_time_law", ratio_max=20)),
    _dmd2("GAN", "on three blocks", "method.gan_taps=[0, 1, 2]"),
    _dmd2("GAN", "its own loss at weight 0.01", "method.gan_fake_weight=0.01"),
    _sid("batch", "32", "train.global_batch_size=32", length=1.5),
    _sid("batch", "128", "train.global_batch_size=128", length=0.6),
    _dmd2("fake score's loss", "unweighted, no GAN", *NO_GAN, "method.fake_weight=x0"),
)
ON_UNET = (
    BASE_DMD2,
    _dmd2("decay", "of the generator alone", *CRITICS_KEEP),
    _dmd2("pairs", "decay of the generator alone, 1 fake update", *CRITICS_KEEP, "method.fake_updates=1", length=0.7),
    _dmd2("fake updates", "1", "method.fake_updates=1", length=0.7),
    _dmd2("decay", "none", *_decay("constant", "generator", "default")),
    BASE_SID,
    _dmd2("GAN", TEACHERS_FEATURES, "method.gan_features=teacher", length=1200 / 1048),
    _dmd2("GAN", "weight 0.03", "method.gan_weight=0.03"),
    Variant("f_distill", "GAN", TEACHERS_FEATURES, ("method.gan_features=teacher",)),
    Variant("disback", "GAN", TEACHERS_FEATURES, ("method.base.gan_features=teacher",)),
    Variant("sim", "base", "as packaged"),
)
VARIANTS = {"mlp": ON_MLP, "unet": ON_UNET}


def longer(variant: Variant, times: int) -> Variant:
    """The same at so many times its steps; its rates fall from the half of those."""
    return replace(variant, name=f"{variant.name}, {times} times as long", length=times * variant.length)
