"""Tensors of which each process holds a part (torch's DTensor), and whole ones."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which the processes hold parts, gathered: all ask for it. Any other as it is."""
    return tensor.full_tensor() if has_parts(tensor) else tensor  # type: ignore[attr-defined]


def shared_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, if the processes hold parts of `like`. Nothing is sent."""
    if not has_parts(like) or has_parts(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


def has_parts(tensor: Tensor) -> bool:
    """Whether the processes hold parts of it. Says so without the import of what it is, which takes long."""
    return hasattr(tensor, "full_tensor")
