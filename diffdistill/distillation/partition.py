"""Rules that part the classes into cells of equal size: disjoint, all of them, sizes that differ by at most one."""

from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from diffdistill.data.source import ImageSource
from diffdistill.diffusion.prompt_table import PromptTable
from diffdistill.diffusion.router import QuadrantRouter, fit_quadrants, text_embedding
from diffdistill.settings.schema import PositiveInt, UserError, schema


class Partition(Protocol):
    def __call__(self, num_classes: int, num_cells: int, source: ImageSource) -> Tensor:
        """The cell of each class, [num_classes] int64 in 0 .. num_cells - 1.  source: what the classes look like.

        Raises UserError where classes and source do not allow it.
        """
        ...


@schema
class LabelRanges:
    """Consecutive classes.  Song et al. 2024, arXiv:2410.23274: 250 of ImageNet's for each of four students."""

    name: Literal["label_ranges"] = "label_ranges"

    def __call__(self, num_classes: int, num_cells: int, source: ImageSource) -> Tensor:
        return torch.arange(num_classes) * num_cells // num_classes


@schema
class KMeans:
    """Similar classes together: k-means of their mean images, with cells of equal size.

    images_per_class: the data's first, for each mean.
    """

    name: Literal["kmeans"] = "kmeans"
    images_per_class: PositiveInt = 100

    def __call__(self, num_classes: int, num_cells: int, source: ImageSource) -> Tensor:
        return equal_kmeans(class_means(source, num_classes, self.images_per_class), num_cells)


@schema
class Quadrants:
    """Four cells: the mean images on their two principal axes, split on the first, then each half on the second.

    images_per_class: the data's first, for each mean.
    """

    name: Literal["quadrants"] = "quadrants"
    images_per_class: PositiveInt = 100

    def __call__(self, num_classes: int, num_cells: int, source: ImageSource) -> Tensor:
        if num_cells != 4:
            raise UserError(f"method.num_students = {num_cells}: there are four quadrants; use 4, or partition kmeans")
        means = class_means(source, num_classes, self.images_per_class)
        return fit_quadrants(means).cell(means)


PROMPTS_AT_ONCE = 1024


def prompt_cells(table: PromptTable) -> tuple[QuadrantRouter, Tensor]:
    """The router whose four cells hold equally many of these prompts, and the cell of each, [N] int64.

    Raises UserError with fewer prompts than cells.
    """
    if len(table) < 4:
        raise UserError(f"method.num_students = 4: too many for {len(table)} prompts")
    numbers = torch.arange(len(table)).split(PROMPTS_AT_ONCE)
    embeddings = torch.cat([text_embedding(table.rows(some)).double() for some in numbers])
    router = fit_quadrants(embeddings)
    return router, router.cell(embeddings)


AnyPartition = Annotated[LabelRanges | KMeans | Quadrants, Field(discriminator="name")]
"""The rules that a config may name."""


def class_means(source: ImageSource, num_classes: int, images_per_class: int) -> Tensor:
    """The mean image of each class as an embedding, [num_classes, D] float64 on the CPU.

    Raises UserError without labels, and for a class without images.
    """
    if source.labels is None:
        raise UserError("data: has no labels, which the class means need; use partition label_ranges")
    labels, means = source.labels.cpu(), []
    for label in range(num_classes):
        rows = (labels == label).nonzero()[:images_per_class, 0]
        if not len(rows):
            raise UserError(f"data: no image of class {label}, whose mean is needed; use partition label_ranges")
        means.append(source.rows(rows).cpu().double().flatten(1).mean(0))
    return torch.stack(means)


def equal_kmeans(embeddings: Tensor, num_cells: int, max_rounds: int = 100) -> Tensor:
    """k-means whose cells have equal sizes: each round assigns at the least total squared distance.

    embeddings: [N, D].  Returns the cell of each, [N] int64.  A function of the embeddings alone: it begins with points
    that are far apart. A round never raises the total, so it ends.
    """
    centres = _far_apart(embeddings, num_cells)
    cells = torch.full((len(embeddings),), -1)
    for _ in range(max_rounds):
        before, cells = cells, _assign(torch.cdist(embeddings, centres) ** 2)
        if torch.equal(before, cells):
            break
        centres = torch.stack([embeddings[cells == cell].mean(0) for cell in range(num_cells)])
    return cells


def _far_apart(embeddings: Tensor, count: int) -> Tensor:
    """The point farthest from the mean, then again and again the one farthest from those chosen."""
    chosen = [int((embeddings - embeddings.mean(0)).norm(dim=1).argmax())]
    while len(chosen) < count:
        chosen.append(int(torch.cdist(embeddings, embeddings[chosen]).min(1).values.argmax()))
    return embeddings[chosen]


def _assign(costs: Tensor) -> Tensor:
    """The cheapest assignment of N points to K cells of sizes that differ by at most one.  costs: [N, K]."""
    from scipy.optimize import linear_sum_assignment

    count, num_cells = costs.shape
    places = torch.arange(count) % num_cells  # one column a place: the first N mod K cells have one more
    points, columns = linear_sum_assignment(costs[:, places].numpy())
    cells = torch.empty(count, dtype=torch.int64)
    cells[torch.from_numpy(points)] = places[torch.from_numpy(columns)]
    return cells
