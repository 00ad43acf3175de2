"""The attention tap: what comes out of a layer is what the edit says, and nothing is left behind."""

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.models.attention_processor import PAGIdentitySelfAttnProcessor2_0
from own_models import bert, generator, llama, transformer, unet, vit

from perturbed.errors import PlanError
from perturbed.features.attention import (
    Disturb,
    blurred,
    edited_attention,
    identity_map,
    matching,
    probabilities,
    random_mask,
)

MID = "mid_block.attentions.*"


def heads(tokens=6, dim=4, seed=0):
    g = generator(seed)
    return [torch.randn(2, 3, tokens, dim, generator=g) for _ in range(3)]


def attention(query, key, value):
    def attend(**more):
        return F.scaled_dot_product_attention(query, key, value, **more)

    return attend


def spoilt(kind, strength, seed=0):
    q, k, v = heads()
    return Disturb(kind, strength, generator(seed))(q, k, v, attention(q, k, v))


# --- which modules ---


def test_the_outermost_modules_that_are_called_are_matched():
    model = unet()
    assert matching(model, "mid_block*") == [model.mid_block]
    assert matching(model, MID) == [model.mid_block.attentions[0]]
    found = matching(model, "*attentions*")  # not the lists, nor what lies within the layers
    assert {type(m).__name__ for m in found} == {"Attention"}
    assert len(found) == 1 + 1 + 2
    with pytest.raises(PlanError, match=r"'mid_blok\.\*' matches no module.*mid_block"):
        matching(model, "mid_blok.*")


# --- the tap on models of three libraries' kinds ---


@torch.no_grad()
def test_identity_on_a_unet_is_that_of_diffusers_own_processor():
    model, g = unet().eval(), generator()
    x, t = torch.randn(4, 1, 8, 8, generator=g), torch.tensor([10, 200, 500, 900])
    plain = model(x, t).sample
    with edited_attention(model, matching(model, MID), identity_map):
        ours = model(x, t).sample
    layer = model.mid_block.attentions[0]
    before = layer.processor
    layer.set_processor(PAGIdentitySelfAttnProcessor2_0())  # the second half of its batch is perturbed
    theirs = model(torch.cat([x, x]), torch.cat([t, t])).sample
    layer.set_processor(before)
    assert torch.allclose(theirs[:4], plain, atol=1e-6)
    assert torch.allclose(theirs[4:], ours, atol=1e-6)
    assert (ours - plain).abs().max() > 1e-3
    for part in (0, 1):  # plausible mistakes: keys or queries for values
        with edited_attention(model, [layer], lambda *a, part=part: a[part]):
            assert (model(x, t).sample - ours).abs().max() > 1e-4


def values_only(module, query, key, value, attention_mask, **more):
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register("values_only", values_only)


def grouped_llama():
    sizes = {"vocab_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.LlamaConfig(hidden_size=16, num_hidden_layers=2, intermediate_size=16, **sizes)
        return transformers.LlamaForCausalLM(config)


@torch.no_grad()
@pytest.mark.parametrize(
    ("make", "where", "batch"),
    [
        (vit, "*layers.0", {"pixel_values": torch.rand(2, 1, 8, 8)}),
        (bert, "*layer.0", {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}),
        (grouped_llama, "*layers.?", {"input_ids": torch.tensor([[3, 4, 5], [6, 7, 8]])}),
    ],
    ids=["vit", "bert", "llama with grouped queries"],
)
def test_identity_on_transformers_is_that_of_an_attention_function(make, where, batch):
    model, reference = make().eval(), make().eval()
    model.set_attn_implementation("sdpa")
    plain = model(**batch).logits
    with edited_attention(model, matching(model, where), identity_map):
        ours = model(**batch).logits
    reference.set_attn_implementation("values_only")
    assert torch.allclose(ours, reference(**batch).logits, atol=1e-6)
    assert not torch.allclose(ours, plain, atol=1e-5)
    assert torch.equal(model(**batch).logits, plain)


@torch.no_grad()
def test_every_call_of_the_chosen_layer_is_seen_and_none_of_another():
    sizes = {"vocab_size": 40, "attention_probs_dropout_prob": 0.0}
    model = transformer(transformers.BertModel, transformers.BertConfig, **sizes).eval()
    first = model.encoder.layer[0]
    other = transformer(transformers.BertModel, transformers.BertConfig, **sizes).encoder.layer[0].eval()
    model.encoder.layer.extend([other, first])  # the first layer again, with the same weights
    seen = []

    def edit(query, key, value, attend):
        seen.append(query)
        return attend()

    with edited_attention(model, [first.attention.self], edit):
        model(input_ids=torch.tensor([[3, 4, 5]]))
    assert len(seen) == 2
    with pytest.raises(PlanError, match=r"no self-attention was seen in BertPooler"):  # noqa: SIM117
        with edited_attention(model, [model.pooler], edit):
            model(input_ids=torch.tensor([[3, 4, 5]]))


@torch.no_grad()
def test_cross_attention_is_left_alone_even_where_it_is_square():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = diffusers.UNet2DConditionModel(
            sample_size=4, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1,
            down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=4, cross_attention_dim=8,
        ).eval()  # fmt: skip
    calls = []

    def edit(query, key, value, attend):
        calls.append(query.shape)
        return value

    text = torch.randn(1, 4, 8, generator=generator())  # as many tokens as the middle block has pixels
    with edited_attention(model, matching(model, "mid_block.attentions.*"), edit):
        model(torch.randn(1, 1, 4, 4, generator=generator(1)), 5, text)
    assert len(calls) == 1, "the block has one self-attention and one cross-attention"


def test_attention_that_is_not_torch_s_is_an_error_that_says_so():
    model = llama().eval()
    model.set_attn_implementation("eager")
    with pytest.raises(PlanError, match=r"no self-attention was seen.*attn_implementation='sdpa'"):  # noqa: SIM117
        with edited_attention(model, matching(model, "*layers.0"), identity_map):
            model(input_ids=torch.tensor([[3, 4, 5]]))


@torch.no_grad()
def test_no_hook_stays_whatever_happens_inside():
    model = unet().eval()
    x = torch.randn(1, 1, 8, 8, generator=generator())
    plain = model(x, 3).sample

    def broken(*_):
        raise ValueError("from the edit")

    with pytest.raises(ValueError, match="from the edit"):  # noqa: SIM117
        with edited_attention(model, matching(model, MID), broken):
            model(x, 3)
    assert torch.equal(model(x, 3).sample, plain)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- ways of spoiling a map ---


@pytest.mark.parametrize("kind", ["identity", "mask", "noise", "blur"])
def test_strength_zero_leaves_every_bit(kind):
    assert torch.equal(spoilt(kind, 0.0), attention(*heads())())
    assert not torch.allclose(spoilt(kind, 0.5), attention(*heads())(), atol=1e-3)


def test_the_identity_blends_maps_by_its_strength():
    q, k, v = heads()
    maps = probabilities(q, k)
    assert torch.allclose(maps.sum(-1), torch.ones(2, 3, 6))
    assert torch.allclose(maps @ v, attention(q, k, v)(), atol=1e-6)
    for u in (0.25, 0.7):
        assert torch.allclose(spoilt("identity", u), ((1 - u) * maps + u * torch.eye(6)) @ v, atol=1e-6)
    assert torch.equal(spoilt("identity", 1.0), v)


def test_a_full_mask_is_the_identity_and_a_half_one_hides_half():
    assert torch.allclose(spoilt("mask", 1.0), heads()[2], atol=1e-6)
    seen = random_mask(200, 0.5, generator())
    assert seen.diagonal().all()
    off = seen[~torch.eye(200, dtype=torch.bool)].float().mean()
    assert abs(float(off) - 0.5) < 0.01
    q, k, v = heads()
    maps = probabilities(q, k) * random_mask(6, 0.5, generator(3))
    assert torch.allclose(spoilt("mask", 0.5, seed=3), maps / maps.sum(-1, keepdim=True) @ v, atol=1e-6)


def test_noise_is_added_to_the_map():
    q, k, v = heads()
    noise = torch.randn(2, 3, 6, 6, generator=generator(5))
    assert torch.allclose(spoilt("noise", 0.3, seed=5), (probabilities(q, k) + 0.3 * noise) @ v, atol=1e-5)


def test_blur_is_a_convolution_whose_rows_sum_to_one():
    maps = torch.rand(1, 1, 5, 5, generator=generator()).softmax(-1)
    weight = torch.exp(-(torch.arange(-2, 3).float() ** 2) / 2)
    expected = torch.zeros(5, 5)
    for row in range(5):
        for column in range(5):
            for i in range(-2, 3):
                for j in range(-2, 3):
                    if 0 <= row + i < 5 and 0 <= column + j < 5:
                        expected[row, column] += weight[i + 2] * weight[j + 2] * maps[0, 0, row + i, column + j]
    expected /= expected.sum(-1, keepdim=True)
    assert torch.allclose(blurred(maps)[0, 0], expected, atol=1e-6)
    assert torch.allclose(blurred(maps).sum(-1), torch.ones(1, 1, 5))
