"""The denoisers: MDTv2, MDT (version 1) and the DiT baseline, with all their sizes.

Masked Diffusion Transformer (Gao et al., ICCV 2023 and arXiv:2303.14389v2); DiT (Peebles & Xie, ICCV 2023).
Attribute names are those of the published checkpoints, which load with `strict=True`.
"""

import difflib
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
from huggingface_hub import PyTorchModelHubMixin
from timm.layers import Mlp, PatchEmbed
from torch.utils.checkpoint import checkpoint

from .guidance import Guidance, guide
from .layers.attention import Attention, gather_pairs
from .layers.embeddings import LabelEmbedder, TimestepEmbedder, sincos_pos_embed_2d
from .utils.errors import UserError
from .utils.model_card import MODEL_CARD

# ---------------------------------------------------------------- blocks


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class Block(nn.Module):
    """A transformer block with adaLN-Zero conditioning and, where `skip` is set, a long skip input."""

    grad_checkpoint = False

    def __init__(self, hidden_size, num_heads, mlp_ratio=4.0, window_size=None, skip=False):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads, window_size)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(hidden_size, int(hidden_size * mlp_ratio), act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.skip_linear = nn.Linear(2 * hidden_size, hidden_size) if skip else None

    def forward(self, x, c, skip=None, pair_index=None):
        """
        :param x: (N, T, D) tokens. :param c: (N, D) condition.
        :param skip: (N, T, D) input of the long skip, for blocks made with one.
        :param pair_index: see `Attention.forward`.
        """
        if self.grad_checkpoint and torch.is_grad_enabled():
            return checkpoint(self.compute, x, c, skip, pair_index, use_reentrant=False)
        return self.compute(x, c, skip, pair_index)

    def compute(self, x, c, skip, pair_index):
        if self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa[:, None] * self.attn(modulate(self.norm1(x), shift_msa, scale_msa), pair_index)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """(N, T, D) tokens -> (N, T, patch_size**2 * out_channels)."""

    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


# ---------------------------------------------------------------- DiT


class DiT(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="masked-diffusion",
    pipeline_tag="unconditional-image-generation",
    tags=["diffusion", "image-generation", "class-conditional"],
    paper_url="https://arxiv.org/abs/2303.14389",
    model_card_template=MODEL_CARD,
):
    """Diffusion transformer: the baseline, and the frame that MDT and MDTv2 fill with their own blocks.

    :param input_size: height and width of the input (a latent: image_size / 8).
    :param in_channels: C of the input; the output has 2C channels with `learn_sigma`, else C.
    :param num_classes: classes of the label table; 0 makes an unconditional model.
    :param class_dropout_prob: chance of replacing a label by the null class in training mode.
    :param mask_ratio: share of tokens dropped in a masked pass; None makes a model without one.
    :param decode_layer: blocks after the side-interpolater (MDT and MDTv2).
    :raises UserError: for sizes that do not divide each other, and for a mask ratio that leaves no token.
    """

    # What a family is trained and sampled with unless the user asks for something else.
    default_optimizer = "adamw"
    default_snr_gamma: float | None = None
    guidance_rule = "constant"

    def __init__(
        self,
        input_size=32,
        patch_size=2,
        in_channels=4,
        hidden_size=1152,
        depth=28,
        num_heads=16,
        mlp_ratio=4.0,
        class_dropout_prob=0.1,
        num_classes=1000,
        learn_sigma=True,
        mask_ratio=None,
        decode_layer=None,
    ):
        super().__init__()
        if input_size % patch_size:
            raise UserError(f"input_size ({input_size}) must be a multiple of patch_size ({patch_size})")
        if not 0 <= class_dropout_prob < 1:
            raise UserError(f"class_dropout_prob is {class_dropout_prob}: it must lie in [0, 1)")
        if num_classes < 0:
            raise UserError(f"num_classes is {num_classes}: it must be 0 (unconditional) or positive")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads, self.mlp_ratio = hidden_size, depth, num_heads, mlp_ratio
        self.num_classes, self.learn_sigma = num_classes, learn_sigma
        self.mask_ratio, self.decode_layer = mask_ratio, decode_layer
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.grid_size = input_size // patch_size
        self.num_patches = self.grid_size**2

        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, hidden_size))
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.build_blocks()
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @property
    def null_label(self):
        """The label of the null class, or None for a model trained without label dropout."""
        return self.y_embedder.null_label

    def build_blocks(self):
        if self.mask_ratio is not None or self.decode_layer is not None:
            raise UserError(
                f"DiT has no masked pass, but got mask_ratio={self.mask_ratio}, decode_layer={self.decode_layer}: "
                "leave both unset, or choose an MDT or MDTv2 model"
            )
        self.pos_embed.requires_grad_(False)
        self.blocks = self.make_blocks(self.depth, window_size=None)

    def make_blocks(self, count, **options):
        return nn.ModuleList(Block(self.hidden_size, self.num_heads, self.mlp_ratio, **options) for _ in range(count))

    def all_blocks(self):
        """Every `Block`, wherever the family keeps it."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def decoder_blocks(self):
        """The blocks after the side-interpolater; none in DiT."""
        return []

    def enable_grad_checkpoint(self):
        """Compute activations of a block again in the backward pass instead of keeping them."""
        for block in self.all_blocks():
            block.grad_checkpoint = True

    def compile_blocks(self, dynamic=False):
        """Compile the blocks, which hold nearly all arithmetic, and let a failure to compile be an error.

        Blocks share one compiled form for each kind and shape of input: with and without skip, full length, and every
        kept length. `dynamic` compiles one form for all lengths instead.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for block in self.all_blocks():
            block.compile(dynamic=None if dynamic else False)

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.pos_embed.data.copy_(sincos_pos_embed_2d(self.hidden_size, self.grid_size))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block | FinalLayer):  # adaLN-Zero: every block starts as the identity
                nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(self, x):
        """(N, C, H, W) -> (N, T, D) patches with their positions."""
        # The convolution leaves other strides than the blocks do: those would be compiled for both, and PyTorch 2.14
        # compiles the bf16 blocks wrongly for the former on a CPU.
        return (self.x_embedder(x) + self.pos_embed).contiguous()

    def condition(self, t, y, drop_labels=None):
        """(N,) timesteps and (N,) labels, or None for the null class -> (N, D)."""
        if y is None:
            if self.null_label is None:
                raise UserError("y is None, but this model was made with class_dropout_prob=0 and has no null class")
            y = torch.full(t.shape, self.null_label, dtype=torch.long, device=t.device)
        return self.t_embedder(t) + self.y_embedder(y, drop_labels)

    def unpatchify(self, x):
        """(N, T, patch_size**2 * C) -> (N, C, H, W)."""
        n, g, p, c = x.shape[0], self.grid_size, self.patch_size, self.out_channels
        return x.view(n, g, g, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, g * p, g * p)

    def forward(self, x, t, y=None, enable_mask=False, ids_keep=None, drop_labels=None):
        """
        :param x: (N, C, H, W) noisy input. :param t: (N,) timesteps. :param y: (N,) int64 labels; None: null class.
        :param enable_mask, ids_keep: of no effect in a model without a `mask_ratio`, as DiT always is.
        :param drop_labels: (N,) bool, True = null class; drawn in training mode if None.
        :return: (N, C or 2C, H, W).
        """
        x = self.embed(x)  # (N, T, D)
        c = self.condition(t, y, drop_labels)  # (N, D)
        for block in self.blocks:
            x = block(x, c)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x, t, y, cfg_scale=None, diffusion_steps=1000, scale_pow=4.0, guided_channels=3):
        """A forward pass with classifier-free guidance.

        :param x: (2n, C, H, W), of which the first n rows matter.
        :param y: (2n,) labels: n classes, then n nulls.
        :param cfg_scale: guidance scale; None is a plain forward. DiT guides with a constant weight, MDT with the
            power-cosine schedule over `diffusion_steps`.
        :param guided_channels: see `guidance.guide`.
        :return: (2n, C or 2C, H, W); both halves carry the same guided channels.
        """
        if cfg_scale is None:
            return self(x, t, y)
        half = x[: len(x) // 2]
        out_cond, out_null = self(torch.cat([half, half]), t, y).chunk(2)
        guidance = Guidance(self.guidance_rule, cfg_scale, scale_pow, diffusion_steps=diffusion_steps)
        return torch.cat(guide(out_cond, out_null, guidance.weight(t[: len(half)]), guided_channels))


# ---------------------------------------------------------------- MDT and MDTv2


class MDT(DiT):
    """Masked Diffusion Transformer, version 1: one stack of blocks, the side-interpolater before the last ones."""

    guidance_rule = "power-cosine"
    mask_ratio_spread = 0.0
    default_decode_layer = 2

    def build_blocks(self):
        if self.decode_layer is None:
            self.decode_layer = self.default_decode_layer
        if not 0 <= self.decode_layer <= self.depth:
            raise UserError(f"decode_layer is {self.decode_layer}: it must lie in [0, depth ({self.depth})]")
        largest = (self.mask_ratio or 0.0) + self.mask_ratio_spread
        if self.mask_ratio is not None and (self.mask_ratio < 0 or int(self.num_patches * (1 - largest)) < 1):
            raise UserError(
                f"mask_ratio is {self.mask_ratio}: up to {largest:.2f} of {self.num_patches} tokens would be dropped; "
                "it must be at least 0 and leave one token"
            )
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, self.hidden_size))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, self.hidden_size))
        self.build_stacks(window_size=(self.grid_size, self.grid_size))
        if self.mask_ratio is None:  # never run then: DDP waits for ever for gradients that do not come
            self.mask_token.requires_grad_(False)
            self.sideblocks.requires_grad_(False)

    def build_stacks(self, window_size):
        self.blocks = self.make_blocks(self.depth, window_size=window_size)
        self.sideblocks = self.make_blocks(1, window_size=window_size)

    def initialize_weights(self):
        super().initialize_weights()
        self.decoder_pos_embed.data.copy_(sincos_pos_embed_2d(self.hidden_size, self.grid_size))
        if self.mask_ratio is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        for module in self.modules():
            if isinstance(module, Attention):
                nn.init.trunc_normal_(module.rel_pos_bias.relative_position_bias_table, std=0.02)

    def draw_kept(self, num_samples, device, rand=torch.rand, host_rand=torch.rand, multiple=1):
        """Draw the tokens that each sample of a masked pass keeps.

        :param host_rand: where the ratio comes from; it is drawn on the host, so that nothing waits for the device.
        :param rand: where the (N, T) scores on `device` come from.
        :param multiple: round K to a multiple of this, so that few lengths occur.
        :return: (N, K) int64 positions, ascending: those of the K = int(T (1 - r)) smallest scores.
        """
        ratio = self.mask_ratio
        if self.mask_ratio_spread:
            ratio = host_rand(1) * self.mask_ratio_spread + ratio
        num_kept = int(self.num_patches * (1 - ratio))
        num_kept = max(round(num_kept / multiple), 1) * multiple
        scores = rand(num_samples, self.num_patches, device=device)
        return scores.argsort(dim=1)[:, :num_kept].sort(dim=1).values

    def interpolate_dropped(self, x, c, ids_keep):
        """The side-interpolater: predict the dropped tokens from the kept ones.

        :param x: (N, K, D) kept tokens. :param ids_keep: (N, K) their positions.
        :return: (N, T, D); kept tokens pass unchanged but for the decoder position.
        """
        num_samples, _, dim = x.shape
        full = self.mask_token.to(x.dtype).expand(num_samples, self.num_patches, -1)
        full = full.scatter(1, ids_keep[:, :, None].expand(-1, -1, dim), x) + self.decoder_pos_embed
        dropped = torch.ones(full.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, ids_keep, False)
        return torch.where(dropped[:, :, None], self.sideblocks[0](full, c), full)

    def decoder_blocks(self):
        return list(self.blocks[self.depth - self.decode_layer :])

    def encode(self, x, c, pair_index):
        """(N, K, D) tokens through the blocks before the side-interpolater."""
        for block in self.blocks[: self.depth - self.decode_layer]:
            x = block(x, c, pair_index=pair_index)
        return x

    def decode(self, x, c, patches):
        """(N, T, D) tokens through the blocks after the side-interpolater."""
        for block in self.decoder_blocks():
            x = block(x, c)
        return x

    def forward(self, x, t, y=None, enable_mask=False, ids_keep=None, drop_labels=None):
        """
        :param x: (N, C, H, W) noisy input. :param t: (N,) timesteps. :param y: (N,) int64 labels; None: null class.
        :param enable_mask: run the masked pass, if the model has a `mask_ratio`.
        :param ids_keep: (N, K) ascending positions of the tokens that a masked pass keeps; drawn if None.
        :param drop_labels: (N,) bool, True = null class; drawn in training mode if None.
        :return: (N, C or 2C, H, W).
        """
        patches = self.embed(x)  # (N, T, D)
        c = self.condition(t, y, drop_labels)  # (N, D)
        if enable_mask and self.mask_ratio is not None:
            ids_keep = self.draw_kept(len(x), x.device) if ids_keep is None else ids_keep
            pair_index = gather_pairs(self.sideblocks[0].attn.rel_pos_bias.relative_position_index, ids_keep)
            x = patches.gather(1, ids_keep[:, :, None].expand(-1, -1, self.hidden_size))  # (N, K, D)
            x = self.encode(x, c, pair_index)  # (N, K, D)
            x = self.interpolate_dropped(x, c, ids_keep)  # (N, T, D)
        else:
            x = self.encode(patches, c, None) + self.decoder_pos_embed  # (N, T, D)
        x = self.decode(x, c, patches)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, c))


class MDTv2(MDT):
    """Masked Diffusion Transformer, version 2: a U-shaped encoder, and decoder blocks that see the patches again."""

    default_optimizer = "adan"
    default_snr_gamma = 5.0
    mask_ratio_spread = 0.2
    default_decode_layer = 4

    def build_stacks(self, window_size):
        half, odd = divmod(self.depth - self.decode_layer, 2)
        if odd:
            raise UserError(
                f"depth ({self.depth}) - decode_layer ({self.decode_layer}) must be even: "
                "the encoder is two equal halves"
            )
        self.en_inblocks = self.make_blocks(half, window_size=window_size)
        self.en_outblocks = self.make_blocks(half, window_size=window_size, skip=True)
        self.de_blocks = self.make_blocks(self.decode_layer, window_size=window_size, skip=True)
        self.sideblocks = self.make_blocks(1, window_size=window_size)

    def decoder_blocks(self):
        return list(self.de_blocks)

    def encode(self, x, c, pair_index):
        skips = []
        for block in self.en_inblocks:
            x = block(x, c, pair_index=pair_index)
            # A view: a block whose two inputs are one object would be compiled once more.
            skips.append(x.view_as(x))
        for block in self.en_outblocks:
            x = block(x, c, skip=skips.pop(), pair_index=pair_index)
        return x

    def decode(self, x, c, patches):
        for block in self.de_blocks:
            x = block(x, c, skip=patches)
        return x


# ---------------------------------------------------------------- sizes


class Size(NamedTuple):
    depth: int
    hidden_size: int
    num_heads: int
    decode_layer: int  # of MDTv2 in the paper's runs


SIZES = {
    "Nano": Size(4, 128, 4, 2),
    "Tiny": Size(8, 192, 6, 2),
    "S": Size(12, 384, 6, 6),
    "B": Size(12, 768, 12, 4),
    "L": Size(24, 1024, 16, 4),
    "XL": Size(28, 1152, 16, 4),
}


def build_model(family, size, patch_size, /, **options):
    """Make a `family` model of a named size; every option of the class may be given, the size's own too."""
    config = {"patch_size": patch_size} | SIZES[size]._asdict()
    if family is not MDTv2:
        del config["decode_layer"]
    return family(**(config | options))


MODELS = {
    f"{family.__name__}_{size}_{patch_size}": partial(build_model, family, size, patch_size)
    for family in (MDTv2, MDT, DiT)
    for size in SIZES
    for patch_size in (2, 4, 8)
}
globals().update(MODELS)  # so that `from masked_diffusion.models import MDTv2_XL_2` works


def find_name(name: str) -> str:
    """The key of `MODELS` that a name in either spelling means.

    :raises UserError: for a name that means no model; names the nearest.
    """
    key = name.replace("-", "_").replace("/", "_")
    if key not in MODELS:
        near = difflib.get_close_matches(key, MODELS, n=3, cutoff=0.0)
        raise UserError(f"no model is called {name!r}: did you mean {' or '.join(near)}?")
    return key


def model_class(name: str) -> type["DiT"]:
    """The class of a named model, which holds the defaults of its family: MDTv2, MDT or DiT.

    :param name: as for `create_model`.
    :raises UserError: for a name that means no model.
    """
    return MODELS[find_name(name)].args[0]


def create_model(name: str, **options) -> "DiT":
    """Make a model by name.

    :param name: `MDTv2_XL_2`, or DiT's spelling `MDTv2-XL/2`.
    :param options: `input_size`, `in_channels`, `num_classes`, `mask_ratio`, `decode_layer` and the rest; see `DiT`.
    :raises UserError: for a name that is not in `MODELS`.
    """
    return MODELS[find_name(name)](**options)
