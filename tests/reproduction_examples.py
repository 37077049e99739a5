"""A grid of two small runs, with a publication that there is none of."""

SMALL = {
    "title": "small",
    "published": {
        "source": "a paper",
        "protocol": "paper",
        "measure": "scaled_accuracy",
        "differences": ["fewer steps"],
    },
    "shared": {
        "task": "modular_arithmetic:3",
        "lengths": [4, 8],
        "sequences": 16,
        "chance": 0.2,
        "model": {"d_model": 8, "num_layers": 1},
        "mixer": {"name": "deltanet", "num_heads": 2},
        "training": {"steps": 2, "batch_size": 4, "max_length": 8, "last_label_only": True},
    },
    "run": [
        {
            "sweep": [
                {"eigenvalue_range": [0, 1], "published": {"best": 0.25, "median": 0.125}},
                {"eigenvalue_range": [-1, 1], "published": {"text": "perfect"}, "model": {"num_layers": 2}},
            ]
        }
    ],
    "preset": {"one": {"seeds": [5], "training": {"steps": 1}}},
}
