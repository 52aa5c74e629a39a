"""The models: MDTv2, MDT (version 1) and the DiT baseline, in all sizes.

Masked Diffusion Transformer (Gao et al., ICCV 2023, and arXiv:2303.14389v2 for MDTv2); DiT (Peebles & Xie, ICCV 2023).
The names of parameters are those of the published checkpoints, which load with `strict=True`.
"""

import difflib
from collections import namedtuple
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .guidance import Guidance, guide, resolve_channels, scale_of_pairs
from .layers.attention import Attention, RelativePositionBias, gather_pairs  # noqa: F401 (published names)
from .layers.base import BlockModel
from .layers.blocks import DiTBlock, FinalLayer, MDTBlock, modulate  # noqa: F401 (published names)
from .layers.embeddings import (  # noqa: F401 (published names)
    Draw,
    LabelEmbedder,
    PatchEmbed,
    TimestepEmbedder,
    add_positions,
    get_1d_sincos_pos_embed_from_grid,
    get_2d_sincos_pos_embed,
    get_2d_sincos_pos_embed_from_grid,
    sincos_pos_embed_2d,
)
from .layers.relative_attention import KeptTokens, look_up_kept, relative_position_index
from .utils.errors import UserError


class DiT(BlockModel):
    """Diffusion transformer: the baseline, and the base class of MDT and MDTv2.

    :param input_size: height and width of the input (a latent: image_size / 8). :param patch_size: those of a patch.
    :param in_channels: C, the number of channels of the input.
    :param class_dropout_prob: probability of replacing a label by the null class in training mode.
    :param num_classes: number of classes; 0 for an unconditional model.
    :param learn_sigma: the output has 2C channels, for a learned variance, instead of C.
    :param qk_norm: see `Attention`.
    :raises UserError: for options that are out of range or do not fit together.
    """

    # The defaults of the family.
    default_optimizer: str = "adamw"
    default_snr_gamma: float | None = None
    guidance_rule: str = "constant"
    trains_positions: bool = False  # whether the position table is learned
    mask_ratio: float | None = None  # None: no masked pass
    interpolates: bool = False  # whether there is a trained side-interpolater
    decode_layer: int | None = None

    def __init__(
        self, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152, depth: int = 28,
        num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1, num_classes: int = 1000,
        learn_sigma: bool = True, qk_norm: bool = False,
    ):  # fmt: skip
        super().__init__()
        if input_size % patch_size:
            sizes = f"input_size ({input_size}) must be a multiple of patch_size ({patch_size})"
            raise UserError(f"{sizes}: choose another --image_size")
        if not 0 <= class_dropout_prob < 1:
            raise UserError(f"class_dropout_prob is {class_dropout_prob}: it must lie in [0, 1)")
        if num_classes < 0:
            raise UserError(f"num_classes is {num_classes}: it must be 0 (unconditional) or positive")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.hidden_size, self.depth, self.num_heads, self.mlp_ratio = hidden_size, depth, num_heads, mlp_ratio
        self.num_classes, self.learn_sigma, self.qk_norm = num_classes, learn_sigma, qk_norm
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.grid_size, self.num_patches = input_size // patch_size, (input_size // patch_size) ** 2
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, hidden_size), self.trains_positions)
        self.x_embedder = PatchEmbed(input_size, patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        for name, blocks in self.make_stacks().items():
            setattr(self, name, nn.ModuleList(blocks))
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)
        self.initialize_weights()

    @property
    def null_label(self) -> int | None:
        """The label of the null class; None for a model without label dropout."""
        return self.y_embedder.null_label

    def make_stacks(self) -> dict[str, list[DiTBlock]]:
        """Create the stacks of blocks: name of the attribute -> blocks. MDT and MDTv2 override this."""
        size = (self.hidden_size, self.num_heads, self.mlp_ratio)
        return {"blocks": [DiTBlock(*size, qk_norm=self.qk_norm) for _ in range(self.depth)]}

    def decoder_blocks(self) -> list[DiTBlock]:
        """The blocks after the side-interpolater; DiT has none."""
        return []

    def initialize_weights(self) -> None:
        """Initialize the weights from PyTorch's global random number generator."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.pos_embed.data.copy_(sincos_pos_embed_2d(self.hidden_size, self.grid_size))
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.data.flatten(1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for module in (self.y_embedder.embedding_table, self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, DiTBlock | FinalLayer):  # adaLN-Zero: at first every block is the identity
                nn.init.zeros_(module.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def embed(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, T, D) tokens, with their position embedding added."""
        self.check_input(x)
        # Contiguous, since the strides after the convolution differ from those after a block: torch.compile would
        # compile the blocks for both, and PyTorch 2.14 compiles them wrongly for the former in bf16 on a CPU.
        return add_positions(self.x_embedder(x), self.pos_embed).contiguous()

    def condition(self, t: Tensor, y: Tensor | None, drop_labels: Tensor | None) -> Tensor:
        """(N,) timesteps and (N,) labels -> (N, D) conditioning vectors; y None means the null class."""
        if y is None:
            if self.null_label is None:
                raise UserError("y is None, but this model was made with class_dropout_prob=0 and has no null class")
            y = torch.full(t.shape, self.null_label, dtype=torch.long, device=t.device)
        return self.t_embedder(t) + self.y_embedder(y, self.training, drop_labels)

    def unpatchify(self, x: Tensor) -> Tensor:
        """(N, T, patch_size**2 * C) -> (N, C, H, W)."""
        n, g, p, c = x.shape[0], self.grid_size, self.patch_size, self.out_channels
        return x.view(n, g, g, p, p, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, g * p, g * p)

    def draw_drop_labels(self, num_samples: int, device: torch.device, rand: Draw = torch.rand) -> Tensor | None:
        """Draw the labels that a training step drops. See `LabelEmbedder.draw_drop_ids`."""
        return self.y_embedder.draw_drop_ids(num_samples, device, rand)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, *, drop_labels: Tensor | None = None) -> Tensor:
        """
        :param x: (N, C, H, W) noisy input. :param t: (N,) timesteps. :param y: (N,) int64 labels; None: null class.
        :param drop_labels: (N,) bool, True = null class; None draws them in training mode.
        :return: (N, C or 2C, H, W).
        :raises UserError: for an input of the wrong shape, and for labels outside the table (on the CPU only).
        """
        x = self.embed(x)  # (N, T, D)
        c = self.condition(t, y, drop_labels)  # (N, D)
        for block in self.blocks:
            x = block(x, c)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, c))  # (N, out_channels, H, W)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float | Tensor | None = None,
        diffusion_steps: int = 1000, scale_pow: float = 4.0, guided_channels: int | str | None = "auto",
    ) -> Tensor:  # fmt: skip
        """A forward pass with classifier-free guidance.

        :param x: (2n, C, H, W), of which only the first n rows are used. :param t: (2n,) timesteps.
        :param y: (2n,) labels: n classes, then the null label n times.
        :param cfg_scale: guidance scale; None is `forward`; a tensor of n scales, or of 2n of which the first n count,
            gives each pair its own. The weight is constant for DiT; for MDT and MDTv2 it is the power-cosine schedule
            over `diffusion_steps`, with the power `scale_pow`.
        :param guided_channels: see `guidance.resolve_channels`.
        :return: (2n, C or 2C, H, W); the guided channels are the same in both halves.
        :raises UserError: for an odd number of rows, and for another number of scales.
        """
        if cfg_scale is None:
            return self(x, t, y)
        if len(x) % 2:
            raise UserError(f"guidance takes pairs of rows, n with a class and n with the null class, but got {len(x)}")
        half, guided = x[: len(x) // 2], resolve_channels(guided_channels, x.shape[1]) or x.shape[1]
        scale = scale_of_pairs(cfg_scale, len(half), x.device)
        guidance = Guidance(self.guidance_rule, scale, scale_pow, diffusion_steps=diffusion_steps)
        out_cond, out_null = self(torch.cat([half, half]), t, y).chunk(2)
        return torch.cat(guide(out_cond, out_null, guidance.weight(t[: len(half)]), guided))


def take_tokens(x: Tensor, ids_keep: Tensor) -> Tensor:
    """The tokens at (N, K) positions: (N, T, D) -> (N, K, D)."""
    return x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2]))


class MDT(DiT):
    """Masked Diffusion Transformer, version 1: one stack of blocks, with the side-interpolater before the last ones.

    :param mask_ratio: share of the tokens that a masked pass drops; None for a model without a masked pass.
    :param decode_layer: number of blocks after the side-interpolater; None is the default of the family.
    :raises UserError: for options that are out of range or do not fit together. The other options: see `DiT`.
    """

    guidance_rule = "power-cosine"
    trains_positions = True
    mask_ratio_spread: float = 0.0  # a masked pass draws its ratio from [mask_ratio, mask_ratio + this]
    default_decode_layer: int = 2

    def __init__(
        self, input_size: int = 32, patch_size: int = 2, in_channels: int = 4, hidden_size: int = 1152, depth: int = 28,
        num_heads: int = 16, mlp_ratio: float = 4.0, class_dropout_prob: float = 0.1, num_classes: int = 1000,
        learn_sigma: bool = True, mask_ratio: float | None = None, decode_layer: int | None = None,
        qk_norm: bool = False,
    ):  # fmt: skip
        # Set before the constructor of DiT, which calls `make_stacks`. Published scripts pass on words of a flag.
        self.decode_layer = self.default_decode_layer if decode_layer is None else int(decode_layer)
        mask_ratio = None if mask_ratio is None else float(mask_ratio)
        if not 0 <= self.decode_layer <= depth:
            raise UserError(f"decode_layer is {self.decode_layer}: it must lie in [0, depth ({depth})]")
        num_patches, largest = (input_size // patch_size) ** 2, (mask_ratio or 0.0) + self.mask_ratio_spread
        if mask_ratio is not None and not (0 <= mask_ratio < 1 and int(num_patches * (1 - largest)) >= 1):
            raise UserError(
                f"mask_ratio is {mask_ratio}, so up to {largest:.2f} of {num_patches} tokens would be dropped: "
                "it must be at least 0 and keep at least one token"
            )
        super().__init__(
            input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio,
            class_dropout_prob, num_classes, learn_sigma, qk_norm,
        )  # fmt: skip
        self.mask_ratio = mask_ratio
        self.decoder_pos_embed = nn.Parameter(self.pos_embed.data.clone())
        self.mask_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        if mask_ratio is not None:
            nn.init.normal_(self.mask_token, std=0.02)
        else:  # unused without a masked pass, and DDP would wait forever for their gradients
            self.mask_token.requires_grad_(False)
            self.sideblocks.requires_grad_(False)
        for block in self.all_blocks():
            nn.init.trunc_normal_(block.attn.rel_pos_bias.relative_position_bias_table, std=0.02)

    def make_blocks(self, count: int, skip: bool = False) -> list[MDTBlock]:
        """Create blocks with a relative position bias, and with `skip` also with a long skip connection."""
        size = (self.hidden_size, self.num_heads, self.mlp_ratio)
        options = {"num_patches": self.num_patches, "qk_norm": self.qk_norm}
        return [MDTBlock(*size, skip, **options) for _ in range(count)]

    def make_stacks(self) -> dict[str, list[MDTBlock]]:
        return {"blocks": self.make_blocks(self.depth), "sideblocks": self.make_blocks(1)}

    def draw_ratio(self, host_rand: Draw = torch.rand) -> float | Tensor:
        """Draw the share of the tokens that a masked pass drops.

        :param host_rand: `host_rand(1)` draws on the CPU: the ratio decides a shape, so the CPU needs its value.
        """
        return host_rand(1) * self.mask_ratio_spread + self.mask_ratio if self.mask_ratio_spread else self.mask_ratio

    def draw_kept(
        self, num_samples: int, device: torch.device, rand: Draw = torch.rand, host_rand: Draw = torch.rand,
        multiple: int = 1, ratio: float | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Draw the tokens that each sample keeps in a masked pass, with one ratio r for all samples.

        :param rand: `rand(N, T, device=device)` draws the scores of the tokens.
        :param host_rand: see `draw_ratio`.
        :param multiple: round K to a multiple of this, for fewer different shapes to compile.
        :param ratio: r; None draws it.
        :return: (N, K) int64 positions in ascending order: the tokens with the K = int(T (1 - r)) smallest scores.
        """
        ratio = self.draw_ratio(host_rand) if ratio is None else ratio
        num_kept = int(self.num_patches * (1 - ratio))
        num_kept = max(round(num_kept / multiple), 1) * multiple
        scores = rand(num_samples, self.num_patches, device=device)
        return scores.argsort(dim=1)[:, :num_kept].sort(dim=1).values

    def random_masking(self, x: Tensor, mask_ratio: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Keep some of the (N, T, D) tokens of each sample. A subclass that overrides this masks as it likes.

        :return: the kept tokens (N, K, D); a mask (N, T), 1 where a token was dropped; (N, T) int64 `ids_restore`, the
            place of each token in the order of those kept, then those dropped; (N, K) int64 `ids_keep`.
        """
        ids_keep = self.draw_kept(len(x), x.device, ratio=mask_ratio)
        mask = x.new_ones(x.shape[:2]).scatter_(1, ids_keep, 0)
        ids_restore = mask.argsort(dim=1, stable=True).argsort(dim=1)
        return take_tokens(x, ids_keep), mask, ids_restore, ids_keep

    def forward_side_interpolater(self, x: Tensor, c: Tensor, mask: Tensor, ids_restore: Tensor) -> Tensor:
        """`interpolate_dropped` with the published arguments. A subclass that overrides this interpolates as it likes.

        :param x: (N, K, D) kept tokens. :param c: (N, D) conditioning vectors.
        :param mask, ids_restore: see `random_masking`; of `ids_restore`, all dropped tokens may have place K.
        :return: (N, T, D) tokens.
        """
        return self.interpolate_dropped(x, c, ids_restore.argsort(dim=1, stable=True)[:, : x.shape[1]])

    def interpolate_dropped(self, x: Tensor, c: Tensor, ids_keep: Tensor) -> Tensor:
        """The side-interpolater: predict the dropped tokens from the kept ones.

        :param x: (N, K, D) kept tokens. :param c: (N, D) conditioning vectors. :param ids_keep: (N, K) kept positions.
        :return: (N, T, D) tokens; the kept ones are x with the decoder's position embedding added.
        """
        num_samples, _, dim = x.shape
        full = self.mask_token.to(x.dtype).expand(num_samples, self.num_patches, -1)
        full = full.scatter(1, ids_keep[:, :, None].expand(-1, -1, dim), x)
        full = add_positions(full, self.decoder_pos_embed)
        dropped = torch.ones(full.shape[:2], dtype=torch.bool, device=x.device).scatter_(1, ids_keep, False)
        return torch.where(dropped[:, :, None], self.sideblocks[0](full, c), full)

    @property
    def interpolates(self) -> bool:
        """Whether the side-interpolater was trained: without masking, the mask token stays zero."""
        return bool(self.mask_token.any())

    def decoder_blocks(self) -> list[MDTBlock]:
        return list(self.blocks[self.depth - self.decode_layer :])

    def encode(self, x: Tensor, c: Tensor, kept: KeptTokens | None) -> Tensor:
        """Run (N, K, D) tokens through the blocks before the side-interpolater; `kept` is None for all tokens."""
        for block in self.blocks[: self.depth - self.decode_layer]:
            x = block(x, c, ids_keep=kept)
        return x

    def decode(self, x: Tensor, c: Tensor, patches: Tensor) -> Tensor:
        """Run (N, T, D) tokens through the blocks after the side-interpolater; `patches` are the output of `embed`."""
        for block in self.decoder_blocks():
            x = block(x, c)
        return x

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, enable_mask: bool = False,
        ids_keep: Tensor | None = None, drop_labels: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """
        :param x, t, y, drop_labels: see `DiT.forward`.
        :param enable_mask: run the masked pass, if the model has a `mask_ratio`.
        :param ids_keep: (N, K) ascending positions of the tokens to keep: a masked pass with them is run, whatever the
            other options say; None draws them for `enable_mask`.
        :return: (N, C or 2C, H, W).
        """
        patches = self.embed(x)  # (N, T, D)
        c = self.condition(t, y, drop_labels)  # (N, D)
        if ids_keep is not None or (enable_mask and self.mask_ratio is not None):
            if ids_keep is None:
                x, _, _, ids_keep = self.random_masking(patches, self.draw_ratio())  # (N, K, D), and (N, K)
            else:
                x = take_tokens(patches, ids_keep)  # (N, K, D)
            attention = self.sideblocks[0].attn
            if isinstance(attention, Attention):
                index = attention.rel_pos_bias.relative_position_index  # (T, T)
                kept = look_up_kept(ids_keep, index, rows_too=not attention.runs_kernel(patches))
            else:  # a user's, which gets the positions alone
                index = relative_position_index(self.grid_size, self.grid_size).to(x.device)
                kept = look_up_kept(ids_keep, index)
            x = self.encode(x, c, kept)  # (N, K, D)
            if type(self).forward_side_interpolater is MDT.forward_side_interpolater:
                x = self.interpolate_dropped(x, c, ids_keep)  # (N, T, D)
            else:
                mask = (kept.slots == x.shape[1]).to(x.dtype)
                x = self.forward_side_interpolater(x, c, mask, kept.slots)  # (N, T, D)
        else:
            x = add_positions(self.encode(patches, c, None), self.decoder_pos_embed)  # (N, T, D)
        x = self.decode(x, c, patches)  # (N, T, D)
        return self.unpatchify(self.final_layer(x, c))  # (N, out_channels, H, W)


class MDTv2(MDT):
    """Masked Diffusion Transformer, version 2: a U-shaped encoder, and a decoder with the patches as skip inputs."""

    default_optimizer = "adan"
    default_snr_gamma = 5.0
    mask_ratio_spread = 0.2
    default_decode_layer = 4

    def make_stacks(self) -> dict[str, list[MDTBlock]]:
        half, odd = divmod(self.depth - self.decode_layer, 2)
        if odd:
            numbers = f"depth ({self.depth}) - decode_layer ({self.decode_layer})"
            raise UserError(f"{numbers} must be even, for two equal halves: choose another --decode_layer")
        return {
            "en_inblocks": self.make_blocks(half),
            "en_outblocks": self.make_blocks(half, skip=True),
            "de_blocks": self.make_blocks(self.decode_layer, skip=True),
            "sideblocks": self.make_blocks(1),
        }

    def decoder_blocks(self) -> list[MDTBlock]:
        return list(self.de_blocks)

    def encode(self, x: Tensor, c: Tensor, kept: KeptTokens | None) -> Tensor:
        skips = []
        for block in self.en_inblocks:
            x = block(x, c, ids_keep=kept)
            skips.append(x.view_as(x))  # a view: if x and skip are one object, torch.compile compiles a block again
        for block in self.en_outblocks:
            x = block(x, c, skip=skips.pop(), ids_keep=kept)
        return x

    def decode(self, x: Tensor, c: Tensor, patches: Tensor) -> Tensor:
        for block in self.de_blocks:
            x = block(x, c, skip=patches)
        return x


# ---------------------------------------------------------------- sizes, and the published names of the models

Size = namedtuple("Size", "depth hidden_size num_heads decode_layer")  # decode_layer: MDTv2's in the paper
SIZES = {
    "Nano": Size(4, 128, 4, 2),
    "Tiny": Size(8, 192, 6, 2),
    "S": Size(12, 384, 6, 6),
    "B": Size(12, 768, 12, 4),
    "L": Size(24, 1024, 16, 4),
    "XL": Size(28, 1152, 16, 4),
}
MODELS: dict[str, partial] = {}  # name -> the class with the options of its size, which a caller can override


def register_sizes(family: type[DiT]) -> list[partial]:
    """Add every size of a family, with every patch size, to `MODELS`; return the new entries in their order."""
    for size, options in SIZES.items():
        options = {key: value for key, value in options._asdict().items() if key != "decode_layer" or family is MDTv2}
        for patch_size in (2, 4, 8):
            MODELS[f"{family.__name__}_{size}_{patch_size}"] = partial(family, patch_size=patch_size, **options)
    return [make for make in MODELS.values() if make.func is family]


(
    MDTv2_Nano_2, MDTv2_Nano_4, MDTv2_Nano_8, MDTv2_Tiny_2, MDTv2_Tiny_4, MDTv2_Tiny_8, MDTv2_S_2, MDTv2_S_4, MDTv2_S_8,
    MDTv2_B_2, MDTv2_B_4, MDTv2_B_8, MDTv2_L_2, MDTv2_L_4, MDTv2_L_8, MDTv2_XL_2, MDTv2_XL_4, MDTv2_XL_8,
) = register_sizes(MDTv2)  # fmt: skip
(
    MDT_Nano_2, MDT_Nano_4, MDT_Nano_8, MDT_Tiny_2, MDT_Tiny_4, MDT_Tiny_8, MDT_S_2, MDT_S_4, MDT_S_8,
    MDT_B_2, MDT_B_4, MDT_B_8, MDT_L_2, MDT_L_4, MDT_L_8, MDT_XL_2, MDT_XL_4, MDT_XL_8,
) = register_sizes(MDT)  # fmt: skip
(
    DiT_Nano_2, DiT_Nano_4, DiT_Nano_8, DiT_Tiny_2, DiT_Tiny_4, DiT_Tiny_8, DiT_S_2, DiT_S_4, DiT_S_8,
    DiT_B_2, DiT_B_4, DiT_B_8, DiT_L_2, DiT_L_4, DiT_L_8, DiT_XL_2, DiT_XL_4, DiT_XL_8,
) = register_sizes(DiT)  # fmt: skip
DiT_models = {name.replace("_", "-", 1).replace("_", "/"): make for name, make in MODELS.items() if make.func is DiT}


def find_model(name: str) -> partial:
    """The entry of `MODELS` for a name such as `MDTv2_XL_2`, or `MDTv2-XL/2` in the spelling of DiT.

    :raises UserError: for an unknown name; the message suggests the most similar names.
    """
    key = name.replace("-", "_").replace("/", "_")
    if key not in MODELS:
        near = difflib.get_close_matches(key, MODELS, n=3, cutoff=0.0)
        raise UserError(f"no model is called {name!r}: the nearest are {', '.join(near)}")
    return MODELS[key]


def model_class(name: str) -> type[DiT]:
    """The class of a named model, which has the defaults of its family. See `find_model`."""
    return find_model(name).func


def create_model(name: str, **options: Any) -> DiT:
    """Create a model by its name.

    :param name: see `find_model`.
    :param options: see `DiT` and `MDT`; None is the default of the option or of the size.
    :raises UserError: for an unknown name, options that the class refuses, and a masked pass of DiT.
    """
    make = find_model(name)
    options = {key: value for key, value in options.items() if value is not None}
    if make.func is DiT and options.keys() & {"mask_ratio", "decode_layer"}:
        raise UserError(
            f"DiT has no masked pass, but got mask_ratio={options.get('mask_ratio')}, "
            f"decode_layer={options.get('decode_layer')}: leave both unset, or choose an MDT or MDTv2 model"
        )
    return make(**options)
