"""Faults of MSD and of its router."""

from mutate import Fault

FAULTS = (
    Fault(
        "a student draws all classes",
        "methods/msd.py",
        "return tuple((cells == self.student_index).nonzero()[:, 0].tolist())",
        "return ()",
        "methods/test_msd.py::test_a_student_draws_its_own_classes_evenly_and_together_they_draw_all",
    ),
    Fault(
        "the pairs are of the student's classes",
        "diffdistill/distillation/pairs.py",
        'label = rng.integers("pair label", max(problem.num_classes, 1))',
        'label = problem.label_of(rng.uniform("pair label"))',
        "methods/test_msd.py::test_every_student_has_the_pairs_of_all_classes",
    ),
    Fault(
        "real images are of all classes",
        "diffdistill/training/plan.py",
        "batch=train.global_batch_size, classes=problem.classes)",
        "batch=train.global_batch_size)",
        "methods/test_msd.py::test_a_student_s_real_images_are_of_its_classes",
    ),
    Fault(
        "every row goes to the first student",
        "diffdistill/diffusion/router.py",
        "return by_student(self.which(cond), estimate)",
        "return by_student(0 * self.which(cond), estimate)",
        "methods/test_msd.py::test_a_joined_model_makes_each_class_by_its_own_student",
    ),
    Fault(
        "rows come back in the order of the students",
        "diffdistill/diffusion/router.py",
        "return made[torch.cat(parts).argsort()]",
        "return made",
        "methods/test_msd.py::test_rows_keep_their_places",
    ),
    Fault(
        "no class is always the first student's",
        "diffdistill/diffusion/router.py",
        "return replace(null, label=null.label + self.which(cond))",
        "return null",
        "methods/test_msd.py::test_both_estimates_of_a_guided_sample_are_of_its_own_student",
    ),
    Fault(
        "k-means without equal sizes",
        "diffdistill/distillation/partition.py",
        "before, cells = cells, _assign(torch.cdist(embeddings, centres) ** 2)",
        "before, cells = cells, torch.cdist(embeddings, centres).argmin(1)",
        "methods/test_msd.py::test_kmeans_moves_a_point_where_clusters_are_of_unequal_size",
    ),
    Fault(
        "one median for both halves of the quadrants",
        "diffdistill/diffusion/router.py",
        "torch.where(is_above, second > above, second > below)",
        "(second > below)",
        "methods/test_msd.py::test_quadrants_split_the_first_axis_and_then_each_half",
    ),
    Fault(
        "a tie falls above",
        "diffdistill/diffusion/router.py",
        "is_above = first > split",
        "is_above = first >= split",
        "methods/test_msd.py::test_a_tie_on_a_quadrant_s_threshold_falls_below",
    ),
    Fault(
        "no prompt forgets whose it is",
        "diffdistill/diffusion/router.py",
        "return torch.where(cond.label < null, found, cond.label - null)\n\n    def unconditional",
        "return found\n\n    def unconditional",
        "methods/test_msd.py::test_four_students_of_prompts_are_joined_and_each_prompt_is_its_own_students",
    ),
    Fault(
        "filling is part of a text",
        "diffdistill/diffusion/router.py",
        "if cond.text_mask is None:",
        "if True:",
        "methods/test_msd.py::test_prompts_are_parted_by_their_embeddings_and_the_router_agrees",
    ),
)
