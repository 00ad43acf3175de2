"""What does noise on the inputs do to a model of one's own? ``python examples/own_model.py`` (half a minute) tells.

The plan serves the command line too: ``perturbed compare METHOD --plan examples/own_model.py:plan``.
"""

from datasets import Dataset
from sklearn.datasets import load_digits
from transformers import ViTConfig, ViTForImageClassification

import perturbed as pt

SIZES = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "num_hidden_layers": 2}


def model():
    """Any torch module will do as it is; a function that makes one gives each seed random weights of its own."""
    return ViTForImageClassification(ViTConfig(**SIZES, num_attention_heads=4, intermediate_size=64, num_labels=10))


x, y = load_digits(return_X_y=True)
data = Dataset.from_dict({"pixel_values": x.reshape(-1, 1, 8, 8) / 16, "labels": y}).train_test_split(450, seed=0)
plan = pt.Plan.from_model(
    model, data=data["train"], held_out=data["test"], steps=300, batch=64, optim=pt.optim.AdamW(4e-3),
    facts={"input_range": (0, 1)},
)  # fmt: skip

if __name__ == "__main__":
    arms = {"noise": [pt.inputs.InputNoise(0.4)]}
    print(pt.compare(plan, arms, metric="accuracy", direction="higher", seeds=6)["arms"])
