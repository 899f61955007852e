"""Modular vision, 2023, arXiv 2306.17165: a router for each task over experts that all share.

Claim: with a loss on the mutual information of tasks and experts (Mod-Squad, arXiv 2212.08066)
each task comes to use experts of its own choice while all are used, and one task's part can be
taken out of the model without the rest.

    moejax train --config modular_vision # or :small: laptop CPU, Fashion-MNIST, float32

Three tasks on Fashion-MNIST in place of classification, detection and segmentation: the class of a
picture, by how many quarters it is turned, and its group of classes (tops, trousers, shoes, bags).
Each picture of a batch has one of them. To the model the task is the picture's modality: routers
(2 of 8 experts, weights that sum to 1) and the loss go by it. Departures: attention has no experts;
classes of each task are read from the mean of the patches. :dense is the same without experts.
Device, minutes, expected accuracy: not measured.
"""

from moejax.config import default_config, load_config_dict

ARGS = ("", "small", "dense")


def get_config(arg=""):
    config = default_config("task_vit", "multitask")
    vit = load_config_dict("vit")
    for group in ("data", "optim", "train", "log", "eval"):
        config[group].update(vit[group])
    model, moe, about = config.model, config.model.moe, config.about
    for name in ("num_layers", "d_model", "num_heads", "ffn_hidden", "image_size"):
        model[name] = vit.model[name]
    model.update(num_classes=18, task_classes=(10, 4, 4))
    # T-shirt, trouser, pullover, dress, coat, sandal, shirt, sneaker, bag, ankle boot.
    config.objective.groups = (0, 1, 0, 0, 0, 2, 0, 2, 3, 2)
    config.objective.augment.update(flip="all")
    config.eval.metrics = ("task_accuracy",)
    about.paper, about.family = "arXiv 2306.17165", "vision-mixture-of-experts"
    about.mechanism_test = "tests/papers/test_modular_vision.py::test_each_task_has_its_own_router"
    about.total_params = about.active_params = 199_442
    if arg != "dense":
        model.block_pattern = ("dense", "moe")
        moe.num_experts, moe.top_k = 8, 2
        moe.score.per_modality = True
        moe.router.options = {"renormalise": True}
        moe.losses = ({"name": "modality_information", "coefficient": 0.005},)
        about.approximate = (
            "model.block_pattern",
            "model.moe.losses",
            "model.moe.num_experts",
            "model.moe.router.options",
            "model.moe.top_k",
        )
        about.total_params, about.active_params = 654_098, 264_978
    return config
