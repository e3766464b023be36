"""Faults of reading SiT's checkpoints."""

from mutate import Fault

READER, TEST = "diffdistill/models/teachers/sit_checkpoint.py", "models/test_sit_checkpoint.py::test_"

FAULTS = (
    Fault(
        "SiT's velocity keeps its sign",
        READER,
        "{name: -tensor for name, tensor",
        "{name: tensor for name, tensor",
        f"{TEST}sit_s_network_is_turned_about_in_time",
    ),
    Fault(
        "SiT's time is not turned about",
        READER,
        "cosines * f.sin() - sines * f.cos()",
        "cosines * f.sin() + sines * f.cos()",
        f"{TEST}sit_s_network_is_turned_about_in_time",
    ),
    Fault(
        "the network is told a thousand times t",
        READER,
        "TIME_SCALE = 1e-3",
        "TIME_SCALE = 1.0",
        f"{TEST}repa_s_network_gives_the_published_velocity",
    ),
    Fault(
        "the weights are taken for their average",
        READER,
        'content.get("ema", content.get("model", content))',
        'content.get("model", content.get("ema", content))',
        f"{TEST}repa_s_network_gives_the_published_velocity",
    ),
    Fault(
        "projectors do not tell REPA's",
        READER,
        "return 1 if is_repa else 0",
        "return 0 if is_repa else 1",
        f"{TEST}repa_s_network_gives_the_published_velocity",
    ),
    Fault(
        "a tensor may be larger than the file",
        READER,
        "tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()",
        "False",
        f"{TEST}what_is_no_such_network_is_refused_in_one_line",
    ),
)
