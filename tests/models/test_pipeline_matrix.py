"""What people name as a teacher is read as what it is, or refused in one line that says what to do."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import diffusers
import pytest
from support.pipeline_matrix import PAGE, ROWS, Row, page_with
from support.stand_ins import save_stand_in

from diffdistill.models.load import describe_model, load_model
from diffdistill.models.teachers import FAMILIES, find_family
from diffdistill.settings.schema import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's stand-in, saved once."""
    return cache(lambda family: save_stand_in(family, tmp_path_factory.mktemp(family)))


@pytest.mark.parametrize("row", ROWS, ids=[f"{row.verdict}: {row.what}" for row in ROWS])
def test_a_row(row: Row, made: Callable[[str], Path], tmp_path: Path) -> None:
    place = row.make(made, tmp_path)
    if row.verdict == "refused":
        with pytest.raises(UserError) as error:
            load_model(place)
        assert row.told in str(error.value)
        assert "\n" not in str(error.value)
        return
    spec = describe_model(place)
    assert spec.pipeline == str(place)
    named = row.told.partition("`")[2].partition("`")[0]
    assert named in ("", spec.model.network.family)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", FAMILIES.own)
def test_each_folder_is_read_as_a_class_that_diffusers_has(name: str) -> None:
    family = find_family(name)
    kinds = (*family.pipelines, *family.variants.values())
    assert [kind for kind in kinds if not hasattr(diffusers, kind)] == []


def test_the_matrix_is_wide_and_its_page_is_of_now() -> None:
    """Mended by `python tests/support/pipeline_matrix.py`."""
    count = {verdict: sum(row.verdict == verdict for row in ROWS) for verdict in ("accepted", "adapted", "refused")}
    assert sum(count.values()) >= 80
    assert min(count.values()) >= 15
    text = PAGE.read_text(encoding="utf-8")
    assert page_with(text) == text
