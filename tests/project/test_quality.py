"""What decides quality: the screen's variants are runs that exist, and the page says what the records say."""

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from diffdistill.eval.records.record import read_records
from diffdistill.settings.schema import UserError
from diffdistill.training.config import find_config, load_config

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ("variants", "records", "page")


@pytest.fixture(scope="module")
def quality() -> Iterator[SimpleNamespace]:
    """The scripts' modules by name."""
    sys.path.insert(0, str(SCRIPTS))
    yield SimpleNamespace(**{name: importlib.import_module(f"quality_{name}") for name in NAMES})
    sys.path.remove(str(SCRIPTS))


def test_every_variant_is_a_config_that_can_be_read(quality):
    for network, variants in quality.variants.VARIANTS.items():
        for variant in variants:
            base = quality.variants.BASES[network][variant.method]
            file = find_config(variant.config or base.config)
            overrides = [*base.overrides, *variant.overrides]
            changed = load_config(file, overrides)
            assert variant.factor == "base" or variant.config or changed != load_config(file, base.overrides)


def test_no_two_variants_share_a_folder(quality):
    for variants in quality.variants.VARIANTS.values():
        slugs = [variant.slug for variant in variants]
        assert sorted(set(slugs)) == sorted(slugs)


def test_the_page_says_what_the_records_say(quality):
    records = quality.records.read(quality.records.RECORDS)
    text = quality.page.PAGE.read_text(encoding="utf-8")
    longer = read_records(quality.page.LONGER)
    parts = {
        quality.page.MARKS: quality.page.tables(records),
        quality.page.LONGER_MARKS: quality.page.longer_table(longer),
        quality.page.OPTIMA_MARKS: quality.page.optima(),
    }
    for (begin, end), made_now in parts.items():
        assert text.split(begin)[1].split(end)[0].strip() == "".join(made_now).strip()


def made(records: ModuleType, **changes: object) -> object:
    teacher = records.Measured(
        network="mlp",
        run="teacher",
        method="pretrain",
        factor="base",
        variant="teacher",
        config="pretrain/digits",
        overrides=(),
        seed=0,
        step=8,
        total_steps=8,
        cpu_seconds=2.0,
        to_teacher=0.03,
        to_data=0.08,
        precision=0.6,
        recall=0.9,
        fd_pixels=0.1,
    )
    return replace(teacher, **changes)


def test_a_row_is_the_mean_of_its_seeds_and_lists_what_is_missing(quality):
    base = quality.variants.BASE_DMD2
    ends = [
        made(quality.records, run=base.slug, method="dmd2", variant=base.name, seed=i, to_teacher=x)
        for i, x in enumerate((0.2, 0.4))
    ]
    half = replace(ends[0], step=4, to_teacher=0.5, precision=None, recall=None, fd_pixels=None)
    smooth = replace(ends[0], average=quality.page.LONG, to_teacher=0.15)
    text = "".join(quality.page.tables([made(quality.records), *ends, half, smooth]))
    row = f"{base.name} | 0.500, 0.300 (0.200 to 0.400) | 0.150 | 0.080 (0.080 to 0.080) | 0.10, 0.60, 0.90 | 2 | 2"
    assert f"| base | {row} |" in text
    missing = text.split("Planned but not run: ")[1]
    assert "DMD2, GAN: without" in missing
    assert f"DMD2, base: {base.name}" not in missing


def test_records_come_back_as_they_were_and_a_broken_line_is_named(quality, tmp_path):
    file, record = tmp_path / "records.jsonl", made(quality.records)
    quality.records.append(file, record, replace(record, seed=1))
    assert quality.records.read(file) == [record, replace(record, seed=1)]
    file.write_text(file.read_text() + '{"network": "mlp"}\n')
    with pytest.raises(UserError, match="line 3"):
        quality.records.read(file)
