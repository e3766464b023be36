"""Sharded tensors, of which each process holds a part (torch's DTensor), and whole ones."""

from torch import Tensor


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered: all processes ask for it. Any other as it is."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor, if `like` is sharded. Nothing is sent."""
    if not is_sharded(like) or is_sharded(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, placements, src_data_rank=None)


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part. Says so without the import of what it is, which takes long."""
    return hasattr(tensor, "full_tensor")
