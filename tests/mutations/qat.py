"""Faults of students of few bits."""

from mutate import Fault

QAT, TEST = "diffdistill/networks/qat.py", "networks/test_qat.py::test_"
COMPUTED = f"{TEST}training_computes_with_what_is_loaded_and_keeps_names_and_weights"
BYTES = f"{TEST}bytes_are_of_the_bits_and_a_scale_a_row"

FAULTS = (
    Fault(
        "first and last layers are rounded as well",
        QAT,
        "if isinstance(part, nn.Linear) and id(part) in within}",
        "if isinstance(part, nn.Linear)}",
        f"{TEST}the_layers_of_blocks_are_rounded_and_no_first_last_or_embedding",
    ),
    Fault("nothing is rounded in training", QAT, "        net.set_submodule(name, made)\n", "", COMPUTED),
    Fault(
        "what is loaded is not rounded",
        QAT,
        "layer.weight.copy_(rounded)",
        "layer.weight.copy_(layer.weight)",
        COMPUTED,
    ),
    Fault("bytes are of eight bits whatever their number", QAT, "* settings.bits + 7) // 8", "* 8 + 7) // 8", BYTES),
    Fault("scales take no room", QAT, " + groups * SCALE_BYTES", "", BYTES),
    Fault(
        "a group that does not divide a row is taken",
        QAT,
        "if settings.group and layer.in_features % settings.group:",
        "if False:",
        f"{TEST}what_cannot_be_rounded_is_refused",
    ),
)
