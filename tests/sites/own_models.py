"""Small models of real classes and examples for them, importable by worker processes."""

import diffusers
import torch
import torch.nn.functional as F
import transformers
from torch import nn

WORDS, LENGTH = 40, 7


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def transformer(kind, config, **more):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind(config(**sizes, **more))


def bert(**more):
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = {"vocab_size": WORDS, "num_labels": 3, **dropout, **more}
    return transformer(transformers.BertForSequenceClassification, transformers.BertConfig, **config)


def llama():
    return transformer(transformers.LlamaForCausalLM, transformers.LlamaConfig, vocab_size=WORDS)


def vit():
    config = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": 3}
    return transformer(transformers.ViTForImageClassification, transformers.ViTConfig, **config)


def unet():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=4,
        )  # fmt: skip


def texts(number=12, labels=True):
    """Padded token sequences of several lengths, as dicts of lists."""
    g, found = generator(), []
    for i in range(number):
        length = 3 + i % (LENGTH - 2)
        ids = torch.randint(1, WORDS, (length,), generator=g).tolist()
        mask = [1] * length + [0] * (LENGTH - length)
        example = {"input_ids": ids + [0] * (LENGTH - length), "attention_mask": mask}
        found.append({**example, "label": i % 3} if labels else example)
    return found


def images(number=12):
    g = generator()
    return [{"pixel_values": torch.rand(1, 8, 8, generator=g), "labels": i % 3} for i in range(number)]


def denoising(model, batch, ctx):
    """The loss of a denoising diffusion model at a random share of noise."""
    x, rng = batch["images"], ctx.rng("noise")
    noise, time = torch.randn(x.shape, generator=rng), torch.randint(0, 100, (len(x),), generator=rng)
    share = (time / 100).view(-1, 1, 1, 1)
    return F.mse_loss(model((1 - share).sqrt() * x + share.sqrt() * noise, time).sample, noise)


class Scaled(nn.Module):
    """A linear classifier with an attribute that no state dict holds."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.scale * self.linear(x)


def scaled(scale=1.0):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Scaled(scale)


def points(number=12):
    x = torch.randn(number, 4, generator=generator())
    return [{"x": row, "labels": int(i % 3)} for i, row in enumerate(x)]


def classify(model, batch, ctx):
    return F.cross_entropy(model(batch["x"]), batch["labels"])


class Counted(torch.utils.data.Dataset):
    """A torch data set that computes its examples."""

    def __len__(self):
        return 12

    def __getitem__(self, i):
        example = points()[i]
        return example["x"], example["labels"]
