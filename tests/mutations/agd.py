"""Faults of AGD, its adapters, and the networks that take the guidance scale."""

from mutate import Fault

FAULTS = (
    Fault(
        "guidance goes the wrong way",
        "diffdistill/diffusion/guidance_rules.py",
        "return without_cond + scale * (with_cond - without_cond)",
        "return without_cond - scale * (with_cond - without_cond)",
        "methods/test_agd.py::test_a_target_is_the_guided_estimate_in_every_form",
    ),
    Fault(
        "the weight of the loss is dropped",
        "methods/agd.py",
        "weight=self.weight",
        'weight="x0"',
        "methods/test_agd.py::test_the_loss_is_the_weighted_mean_square_of_what_is_missing",
    ),
    Fault(
        "the adapters are not told the scale",
        "methods/agd.py",
        'guidance_input=stored["scale"][row]',
        'guidance_input=torch.ones_like(stored["scale"][row])',
        "methods/test_agd.py::test_offset_adapters_reach_the_guided_gaussian_and_new_ones_do_not",
    ),
    Fault(
        "the adapters are told another trajectory's class",
        "methods/agd.py",
        'adapted.class_cond(stored["label"][row])',
        'adapted.class_cond(stored["label"][row].flip(0))',
        "methods/test_agd.py::test_offset_adapters_reach_the_guided_gaussian_and_new_ones_do_not",
    ),
    Fault(
        "the trajectories are those of the condition alone",
        "methods/agd.py",
        "seen = Recorder(scale.float())",
        "seen = Recorder(1.0)",
        "methods/test_agd.py::test_a_target_is_the_guided_estimate_in_every_form",
    ),
    Fault(
        "the base is trained too",
        "diffdistill/networks/adapters.py",
        "        freeze(base)\n",
        "",
        "methods/test_agd.py::test_a_run_changes_the_adapters_and_no_bit_of_the_base",
    ),
    Fault(
        "the optimiser takes frozen weights",
        "diffdistill/training/optimizers.py",
        "[parameter for parameter in module.parameters() if parameter.requires_grad]",
        "list(module.parameters())",
        "methods/test_agd.py::test_a_run_changes_the_adapters_and_no_bit_of_the_base",
    ),
    Fault(
        "the student's base is not the teacher",
        "methods/agd.py",
        '        take_weights(student, problem.initial.get("adapted", teacher))\n',
        "",
        "methods/test_agd.py::test_a_run_changes_the_adapters_and_no_bit_of_the_base",
    ),
    Fault(
        "new adapters do not start at nothing",
        "diffdistill/networks/guided.py",
        "    nn.init.zeros_(linear.weight)\n",
        "",
        "networks/test_guided_networks.py::test_a_new_one_is_the_base_bit_for_bit_whatever_the_scale",
    ),
    Fault(
        "the blocks stay changed after a call",
        "diffdistill/networks/guided.py",
        "                block.around = None",
        "                pass",
        "networks/test_guided_networks.py::test_the_base_is_left_as_it_was_even_by_a_call_that_fails",
    ),
    Fault(
        "the teacher stays in memory",
        "methods/agd.py",
        "    keeps_teacher = False\n",
        "",
        "methods/test_agd.py::test_a_run_trains_without_its_teacher_from_a_file_that_is_mapped_into_memory",
    ),
    Fault(
        "the estimate is stored as x0 whatever the loss",
        "methods/agd.py",
        "        kind = STORED.get(self.weight)\n",
        "        kind = None\n",
        "methods/test_agd.py::test_the_estimate_is_stored_as_what_the_loss_compares",
    ),
)
