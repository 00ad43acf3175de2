"""What does perturbed-attention guidance do to the samples of a Diffusers pipeline of one's own?

``python examples/own_pipeline.py FOLDER_OR_HUB_NAME`` saves a strip of samples by scale, all from the same noise.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import perturbed as pt

pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])  # a pipeline of a DiT has it as pipeline.transformer
for scale in (0.0, 1.0, 3.0):
    with pt.inference.perturbed_attention(pipeline.unet, scale, where="mid_block.attentions.*"):
        images = pipeline(batch_size=4, num_inference_steps=25, generator=torch.Generator().manual_seed(0)).images
    Image.fromarray(np.hstack(images)).save(Path(sys.argv[1]) / f"scale {scale}.png")
