"""The three files that `init` writes: a teacher's config, its student's, and the protocol that evaluates both."""

from dataclasses import dataclass
from typing import Any

import yaml

from diffdistill.commands.own_pictures import Pictures
from diffdistill.data.image_folder import ImageFolder
from diffdistill.eval.protocols.own import Made, choose_features, make_protocol
from diffdistill.eval.protocols.protocol import Protocol, Reference
from diffdistill.settings.values import dump

TEACHER, STUDENT, PROTOCOL = "teacher.yaml", "student.yaml", "protocol.yaml"


@dataclass(frozen=True)
class Size:
    """What goes with a side of images.  mean: of the log of the noise levels.  student_lr: of its generator, and of the
    other players. Those up to 16 pixels are the tutorial's; the others were not run to their end.
    """

    channels: tuple[int, ...]
    attention: tuple[bool, ...]
    mean: float
    sigma_max: int
    teacher_lr: str
    student_lr: tuple[str, str]
    steps: int


SIZES = {
    8: Size((16, 48), (False, True), -0.6, 20, "2e-3", ("3e-4", "6e-4"), 2_000),
    16: Size((32, 64), (False, True), -0.6, 20, "2e-3", ("3e-4", "6e-4"), 2_000),
    32: Size((64, 128, 128), (False, True, False), -1.2, 80, "5e-4", ("1e-4", "2e-4"), 10_000),
    64: Size((64, 128, 128, 128), (False, False, True, False), -1.2, 80, "5e-4", ("1e-4", "2e-4"), 20_000),
    128: Size((64, 128, 128, 128, 128), (False, False, False, True, False), -1.2, 80, "5e-4", ("1e-4", "2e-4"), 20_000),
}


@dataclass(frozen=True)
class Start:
    """What the three files say of the run.  folder: that holds them, and the runs.  has_gpu: trains in bf16.
    num_threads: on a CPU, where one is the fastest."""

    pictures: Pictures
    folder: str
    name: str
    has_gpu: bool
    num_threads: int | None

    @property
    def size(self) -> Size:
        return SIZES[self.pictures.side]

    def teacher(self) -> str:
        """teacher.yaml."""
        size, about = self.size, self.pictures
        dropout = "\n  class_dropout: 0.1  # share of images trained without their class, for classifier-free guidance"
        dropout = dropout if about.classes else ""
        network: dict[str, Any] = {"name": "unet", "channels": [*size.channels], "attention": [*size.attention]}
        if about.side == 8:
            network["head_channels"] = 48
        return f"""# A teacher for the images in {inline(about.data.path)}, written by `diffdistill init`.
# Values marked "measured" come from these images; the others were chosen on small images. For better quality: more
# steps first, then more channels.
run: {inline(f"{self.folder}/teacher")}
method:
  name: pretrain
  time_law: {{name: lognormal, mean: {size.mean}, std: 1.2}}  # noise levels to train at{dropout}
  teacher_sampler: {{name: heun, num_steps: 18, rho: 5}}  # 35 NFE
{self._data()}
model:
  network: {inline(network)}
  path: {{name: edm, sigma_min: 0.02, sigma_max: {size.sigma_max}}}
  sigma_data: {about.sigma_data:g}  # measured: the standard deviation of the pixels in [-1, 1]
optimizers:
  teacher: {{lr: {size.teacher_lr}, betas: [0.9, 0.99], warmup_steps: 50, decay: linear}}
ema: {{halflife_images: 44000}}
{self._train()}
"""

    def student(self) -> str:
        """student.yaml."""
        size, about = self.size, self.pictures
        guidance = "\n  guidance: 1  # scale of the teacher; above 1, clearer classes and less diversity"
        own, others = size.student_lr
        return f"""# A one-step (1 NFE) student of teacher.yaml by DMD2, written by `diffdistill init`.
run: {inline(f"{self.folder}/student")}
teacher: {inline(f"{self.folder}/teacher")}
method:
  name: dmd2
  steps: {{init_ratio: 2.5}}  # one step, from sigma / alpha = 2.5{guidance if about.classes else ""}
  fake_updates: 2  # of the fake score, per update of the student; raise it if the health signals say that it lags
  generator_time_law: {{name: karras, ratio_min: 0.03, ratio_max: 6, rho: 5}}
  fake_time_law: {{name: lognormal, mean: {size.mean}, std: 1.2}}
  gan_time_law: {{name: karras, ratio_min: 0.03, ratio_max: 6, rho: 5}}
  gan_weight: 0.15
  gan_fake_weight: 0.1
{self._data()}
optimizers:
  generator: {{lr: {own}, betas: [0, 0.999], decay: linear}}
  default: {{lr: {others}, betas: [0, 0.999], decay: linear}}
ema: {{halflife_images: 4400, ramp: 0}}
{self._train()}
"""

    def protocol(self) -> str:
        """protocol.yaml."""
        about = self.pictures
        choice = choose_features(about.source.image_shape)
        made = Made(about.source.image_shape, len(about.classes), takes_text=False)
        reference = Reference(
            name=self.name, dataset=inline(data_of(about.data)), split="whole", num_images=len(about.source)
        )
        usual = make_protocol(self.name, made, choice, reference=reference).num_images
        count = min(usual, len(about.source))
        protocol = make_protocol(self.name, made, choice, reference=reference, num_images=count)
        few = "\n# With so few images the distance of a perfect model is large, too." if count < usual else ""
        return f"""# How teacher and student are evaluated: FD and KID to the images, in {choice.why}.
# Compare numbers of one protocol only; give a changed protocol another name.{few}
{_told(protocol)}"""

    def _data(self) -> str:
        told = data_of(self.pictures.data)
        broken = f"  # {self.pictures.num_broken:,} are unreadable" if "max_unreadable" in told else ""
        return f"data: {inline(told)}{broken}"

    def _train(self) -> str:
        steps = self.size.steps
        often = {"preview_every": steps // 4, "checkpoint_every": steps // 8}
        more: dict[str, Any] = {"precision": "bf16"} if self.has_gpu else {}
        more |= {"num_threads": self.num_threads} if self.num_threads else {}
        return f"train: {inline({'steps': steps, 'global_batch_size': 64, **often, **more})}"


def data_of(data: ImageFolder) -> dict[str, Any]:
    """Its settings, without those that have their default."""
    usual = dump(ImageFolder(path=data.path))
    return {key: value for key, value in dump(data).items() if key in ("name", "path") or value != usual[key]}


def _told(protocol: Protocol) -> str:
    """What of it is not the default, as YAML with a line for each setting."""
    every, usual = dump(protocol), dump(Protocol(name="x", num_images=1, metrics=protocol.metrics))
    changed = {
        key: value for key, value in every.items() if value != usual[key] and key not in ("reference", "metrics")
    }
    lines = [f"{key}: {inline(value)}" for key, value in changed.items()]
    assert protocol.reference
    lines += ["reference:", *(f"  {key}: {inline(value)}" for key, value in dump(protocol.reference).items() if value)]
    lines += ["metrics:", *(f"  - {inline(_told_metric(metric))}" for metric in protocol.metrics)]
    return "\n".join(lines) + "\n"


def _told_metric(metric: Any) -> dict[str, Any]:
    every, usual = dump(metric), dump(type(metric)(features=metric.features))
    changed = {key: value for key, value in every.items() if value != usual[key]}
    return {"name": metric.name, "features": {"name": metric.features.name}, **changed}


class _OneLine(yaml.SafeDumper):
    """Strings that hold a line break or the like are quoted with escapes."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_OneLine.add_representer(str, _OneLine.represent_str)


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(
        [value], Dumper=_OneLine, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True
    )
    return str(text).strip()[1:-1]
