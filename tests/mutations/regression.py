"""Faults of regression on pairs."""

from mutate import Fault

FAULTS = (
    Fault(
        "the images belong to other noises",
        "diffdistill/distillation/pairs.py",
        '"image": torch.cat(parts)',
        '"image": torch.cat(parts).roll(1, 0)',
        "methods/test_regression.py::test_a_pair_is_a_noise_and_what_the_teacher_makes_of_it",
    ),
    Fault(
        "the condition is dropped",
        "methods/regression.py",
        'class_cond(pair["label"])',
        'class_cond(pair["label"] * 0)',
        "methods/test_regression.py::test_the_loss_is_the_squared_distance_of_the_drawn_pairs",
    ),
    Fault(
        "the noise of another draw",
        "methods/regression.py",
        'players.generator, pair["noise"], step=0',
        'players.generator, -pair["noise"], step=0',
        "methods/test_regression.py::test_a_student_that_gives_the_stored_images_has_no_gradient",
    ),
    Fault(
        "the student is cut off",
        "methods/regression.py",
        'made = players.generator(start.x, start.t, players.generator.class_cond(pair["label"]))',
        'made = players.generator(start.x, start.t, players.generator.class_cond(pair["label"])).detach() * 1',
        "methods/test_regression.py::test_training_brings_the_student_nearer_to_the_pairs",
    ),
    Fault(
        "only the first pairs are drawn",
        "methods/regression.py",
        'integer_of(rng.uniform("pair"), self.pairs)',
        'integer_of(rng.uniform("pair"), 2)',
        "methods/test_regression.py::test_every_pair_is_drawn",
    ),
    Fault(
        "a later run's fake score starts as the one-step student",
        "diffdistill/distillation/method.py",
        "if len(self.initial) == 1 and (lone is None",
        "if len(self.initial) == 1 or (lone is None",
        "methods/test_regression.py::test_a_later_run_s_generator_starts_as_the_student_and_its_fake_score_as_the_teacher",
    ),
    Fault(
        "pairs that are held out are trained on",
        "methods/regression.py",
        'integer_of(rng.uniform("pair"), self.pairs)',
        'integer_of(rng.uniform("pair"), self.pairs + self.held_out)',
        "distillation/test_pairs.py::test_held_out_pairs_stand_behind_the_others_which_are_as_without_them",
    ),
    Fault(
        "fresh pairs are compared with themselves",
        "diffdistill/distillation/pairs.py",
        'for pair in (fresh, draw["pair"])',
        "for pair in (fresh, fresh)",
        "distillation/test_pairs.py::test_memorisation_is_the_loss_on_held_out_pairs_over_that_on_stored_ones",
    ),
    Fault(
        "the Gaussian has one mean for all classes",
        "diffdistill/distillation/pairs.py",
        "by_class=bool(teacher.num_classes)",
        "by_class=False",
        "distillation/test_teleported_pairs.py::test_pairs_are_those_of_the_data_s_gaussian_and_the_rest_of_the_grid",
    ),
    Fault(
        "pairs of another Gaussian are taken",
        "diffdistill/distillation/pairs.py",
        '{"teleport": teleport, "data": problem.data.key if problem.data else None}',
        '{"teleport": teleport, "data": None}',
        "distillation/test_teleported_pairs.py::test_a_folder_tells_the_ratio_and_the_data",
    ),
    Fault(
        "the first images of the data make the Gaussian",
        "diffdistill/data/gaussian.py",
        "torch.arange(count) * len(images) // max(count, 1)",
        "torch.arange(count)",
        "distillation/test_teleported_pairs.py::test_of_many_images_evenly_spaced_ones_are_taken",
    ),
)
