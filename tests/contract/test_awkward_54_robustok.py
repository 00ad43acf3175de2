"""Sheet 54 on the contract: tokenizer on perturbed latents, generator of its tokens, decoder tuned on those."""

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from awkward import Drawn, Sgd, end, moved, ran, repeats_and_resumes, same, treated
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss, one_hot

from perturbed.core.plan import Facts, Feature, Plan, Stage

CODES, WIDTH, CELLS = 16, 4, 4  # codebook, its width, tokens of an 8x8 image


class Quantiser(nn.Module):
    """Nearest code, straight-through; gives (quantised, token, code loss)."""

    def __init__(self):
        super().__init__()
        self.book = nn.Parameter(torch.randn(CODES, WIDTH) / 2)

    def forward(self, z):
        token = torch.cdist(z, self.book).argmin(-1)
        code = self.book[token]
        return z + (code - z).detach(), token, mse_loss(code, z.detach()) + 0.25 * mse_loss(z, code.detach())


class Tokenizer(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.quantiser, self.decoder = nn.Linear(16, WIDTH), Quantiser(), nn.Linear(WIDTH, 16)

    def encode(self, pixels):
        return self.quantiser(self.encoder(cells(pixels)))

    def decode(self, h):
        return picture(self.decoder(h))


class Generator(nn.Module):
    """Next token from those before; the start is a token of its own."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = (
            nn.Embedding(CODES + 1, 8),
            nn.GRU(8, 8, batch_first=True),
            nn.Linear(8, CODES),
        )

    def forward(self, tokens):
        begun = torch.cat([tokens.new_full((len(tokens), 1), CODES), tokens], 1)
        return self.head(self.mix(self.embed(begun))[0])


def cells(pixels):
    return pixels.unfold(2, 4, 4).unfold(3, 4, 4).reshape(len(pixels), CELLS, 16)


def picture(flat):
    return flat.view(-1, 1, 2, 2, 4, 4).permute(0, 1, 2, 4, 3, 5).reshape(-1, 1, 8, 8)


def build_tokenizer(ctx):
    return Tokenizer()


def build_generator(ctx):
    return Generator()


def draw(ctx):
    g = ctx.rng("data")
    return {"pixels": torch.rand(6, 1, 1, 8, generator=g) * torch.rand(6, 1, 8, 1, generator=g)}


def autoencode(model, batch, ctx):
    h, _, code_loss = model.encode(batch["pixels"])
    return mse_loss(model.decode(h), batch["pixels"]) + code_loss


def token_loss(model, batch, ctx):
    tokens = ctx.past["tokenizer"].encode(batch["pixels"])[1]
    return cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens.flatten())


def reconstruct(model, batch, ctx):
    return model.decode(model.encode(batch["pixels"])[0])


tokenizer = Stage(name="tokenizer", steps=6, data=Drawn(draw), loss=autoencode, optim=Sgd(0.5))
generator = Stage(
    name="generator", steps=4, data=Drawn(draw), loss=token_loss, optim=Sgd(0.5), build=build_generator,
    reads=("tokenizer",),
)  # fmt: skip
last = Stage(name="final", steps=0, data=Drawn(draw), loss=autoencode, optim=Sgd(), start="tokenizer")
PLAN = Plan(
    build=build_tokenizer, stages=(tokenizer, generator, last), predict=reconstruct, measures=(),
    facts=Facts(modality="vision", target="pixels", output="pixels", input="pixels"),
)  # fmt: skip

# ---- perturbed latents ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SwapCodes:
    """A share of codes replaced by one of their ``delta`` nearest, less and less; gradients pass straight through."""

    share: float
    delta: int
    end: float

    def __call__(self, h, ctx):
        book, g = ctx.model.quantiser.book.detach(), ctx.rng("robustok/swap")
        left = 1 - (1 - self.end) * ctx.step / ctx.steps
        near = torch.cdist(h.detach(), book).topk(max(1, int(left * self.delta)), largest=False).indices
        pick = torch.randint(near.shape[-1], (*h.shape[:2], 1), generator=g)
        swap = torch.rand(h.shape[:2], generator=g)[..., None] < left * self.share
        shift = book[near.gather(-1, pick)[..., 0]] - book[near[..., 0]]  # exactly 0 where the code stays
        return torch.where(swap, h + shift, h)


@dataclass(frozen=True)
class PerturbLatents:
    share: float = 0.5
    delta: int = 8
    end: float = 0.5
    stage: str = "tokenizer"
    where: str = "quantiser"
    SITES: ClassVar = ("features",)

    def __call__(self, plan):
        return plan.add_feature(self.stage, Feature(self.where, SwapCodes(self.share, self.delta, self.end)))


# ---- post-training -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Regenerate:
    """Tokens from the generator, each kept true with chance ``sigma``; the next one is drawn after it."""

    sigma: float

    @torch.no_grad()
    def __call__(self, batch, ctx):
        g, true = ctx.rng("robustok/regenerate"), ctx.past["tokenizer"].encode(batch["pixels"])[1]
        tokens = true[:, :0]
        for at in range(CELLS):
            drawn = torch.multinomial(ctx.past["generator"](tokens)[:, -1].softmax(-1), 1, generator=g)
            keep = torch.rand(drawn.shape, generator=g) < self.sigma
            tokens = torch.cat([tokens, torch.where(keep, true[:, at : at + 1], drawn)], 1)
        return {**batch, "tokens": tokens, "true": true}


def true_tokens(batch, ctx):
    return {**batch, "tokens": ctx.past["tokenizer"].encode(batch["pixels"])[1]}


def decode_loss(model, batch, ctx):
    codes = one_hot(batch["tokens"], CODES).float() @ model.quantiser.book
    return mse_loss(model.decode(codes), batch["pixels"])


@dataclass(frozen=True)
class PostTrain:
    """A stage more, from the tokenizer: its decoder alone learns to draw what the generator says."""

    sigma: float = 0.5
    steps: int = 5
    SITES: ClassVar = ("inputs", "objectives", "optim")

    def __call__(self, plan):
        stage = dataclasses.replace(
            plan.stage("tokenizer"), name="post-train", steps=self.steps, start="tokenizer", features=(),
            reads=("tokenizer", "generator"), inputs=Regenerate(self.sigma), loss=decode_loss,
            optim=Sgd(0.25, only=("decoder",)),
        )  # fmt: skip
        return plan.insert(stage, after="generator").edit("final", lambda s: dataclasses.replace(s, start="post-train"))


def post(plan, **fields):
    return treated(plan, PostTrain(**fields))


@pytest.mark.parametrize("off", [{"share": 0.0}, {"delta": 1}])
def test_no_share_or_no_neighbours_is_the_plain_tokenizer_bit_for_bit(off):
    control, arm = (end(ran(p))["model"] for p in (PLAN, treated(PLAN, PerturbLatents(**off))))
    assert same(arm, control)
    assert not same(end(ran(treated(PLAN, PerturbLatents())))["model"], control)


def test_post_training_moves_the_decoder_alone():
    engine = ran(post(PLAN))
    before, after = engine.snapshot("tokenizer")["model"], engine.snapshot("post-train")["model"]
    assert moved(before, after) == {"decoder"}
    assert same(end(engine)["model"], after)
    assert same(engine.snapshot("generator")["model"], ran(PLAN).snapshot("generator")["model"])


def test_no_steps_is_the_tokenizer_and_true_tokens_are_the_compute_control():
    assert same(end(ran(post(PLAN, steps=0)))["model"], end(ran(PLAN))["model"])
    arm = post(PLAN, sigma=1.0)
    compute = arm.edit("post-train", lambda s: dataclasses.replace(s, inputs=true_tokens))
    assert same(end(ran(arm))["model"], end(ran(compute))["model"])
    assert not same(end(ran(post(PLAN, sigma=0.5)))["model"], end(ran(compute))["model"])


@dataclass(frozen=True)
class CountKept:
    inner: Regenerate

    def __call__(self, batch, ctx):
        batch = self.inner(batch, ctx)
        ctx.state["kept"] = ctx.state.get("kept", 0) + (batch["tokens"] == batch["true"]).float().mean().item()
        return batch


def test_the_generator_speaks_where_sigma_lets_it():
    shares = []
    for sigma in (0.0, 0.5, 1.0):
        plan = post(PLAN, sigma=sigma)
        plan = plan.edit("post-train", lambda s: dataclasses.replace(s, inputs=CountKept(s.inputs)))
        shares.append(end(ran(plan))["state"]["kept"] / 5)
    assert shares[0] < shares[1] < shares[2] == 1.0


@pytest.mark.parametrize(("stage", "at"), [("tokenizer", 3), ("generator", 2), ("post-train", 3)])
def test_all_of_it_repeats_and_resumes(stage, at, tmp_path):
    repeats_and_resumes(post(treated(PLAN, PerturbLatents())), tmp_path, stage, at)
