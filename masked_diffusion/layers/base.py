"""The base class of all models: saving for the Hugging Face hub, activation checkpointing and compilation."""

import json
import textwrap
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from huggingface_hub import PyTorchModelHubMixin
from typing_extensions import Self

from ..utils.errors import UserError
from ..utils.model_card import MODEL_CARD
from ..utils.safetensors_files import read_safetensors
from .blocks import DiTBlock
from .relative_attention import check_implementation, runs_kernel, runs_products


class BlockModel(
    nn.Module,
    PyTorchModelHubMixin,
    library_name="masked-diffusion",
    pipeline_tag="unconditional-image-generation",
    tags=["diffusion", "image-generation", "class-conditional"],
    paper_url="https://arxiv.org/abs/2303.14389",
    model_card_template=MODEL_CARD,
):
    """A model of transformer blocks.

    Subclasses set `in_channels` and `input_size`, the shape of their inputs, and `hidden_size`, the width D.
    """

    in_channels: int
    input_size: int
    hidden_size: int

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "BlockModel":
        """A model that `save_pretrained` left in a folder, or on the hub.

        :param options: of `PyTorchModelHubMixin.from_pretrained`.
        :raises UserError: for a damaged `config.json`, and for weights of another class.
        """
        file = Path(pretrained_model_name_or_path, "config.json")
        if file.is_file():  # huggingface_hub would end in an error of JSON, or of the type that it found
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file} cannot be read as JSON ({error}): restore it, or remove it") from error
            if not isinstance(found, dict):
                raise UserError(f"{file} holds a {type(found).__name__} instead of a dictionary: restore it")
        return super().from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, strict: bool = True, **options: Any) -> "BlockModel":
        # strict=True: by default huggingface_hub ignores missing keys, and so takes the weights of another family.
        # Then all weights come from the file, and none are drawn that it would overwrite.
        try:
            with torch.device("meta" if strict else "cpu"):
                return super()._from_pretrained(model_id=model_id, strict=strict, **options)
        except (RuntimeError, TypeError, UserError) as error:
            reason = textwrap.shorten(str(error), 300, placeholder=" ...")
            raise UserError(
                f"{model_id} does not hold the weights of a {cls.__name__} ({reason}): use the class that was saved, "
                "or masked_diffusion.load_model, which finds the class"
            ) from error

    @classmethod
    def _load_as_safetensor(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        with torch.device("cpu"):
            return model._take_weights(read_safetensors(model_file), map_location, strict)

    @classmethod
    def _load_as_pickle(cls, model: Self, model_file: str, map_location: str, strict: bool) -> Self:
        with torch.device("cpu"):
            state = torch.load(model_file, map_location="cpu", weights_only=True)
            return model._take_weights(state, map_location, strict)

    def _take_weights(self, state: dict[str, torch.Tensor], device: str, strict: bool) -> Self:
        own = self.state_dict()
        for name in state.keys() & own.keys():
            state[name] = state[name].to(own[name].dtype)
        self.load_state_dict(state, strict=strict, assign=True)
        return self.to(device).eval()

    def check_input(self, x: torch.Tensor) -> None:
        """Check the shape of an input.

        :param x: (N, C, H, W).
        :raises UserError: if C, H or W are not those of the model.
        """
        # Users put a wider convolution there, for inputs with channels of their own.
        channels = getattr(getattr(self.x_embedder, "proj", None), "in_channels", self.in_channels)
        shape = (channels, self.input_size, self.input_size)
        if x.shape[1:] != shape:
            raise UserError(
                f"each input has the shape {tuple(x.shape[1:])}, but this model was made for {shape}: create the model "
                "with the in_channels and input_size of the latents"
            )

    def all_blocks(self) -> list[DiTBlock]:
        """The transformer blocks of all stacks."""
        return [module for module in self.modules() if isinstance(module, DiTBlock)]

    def enable_grad_checkpoint(self) -> None:
        """Turn on activation checkpointing: the backward pass recomputes the activations of a block, to save memory."""
        for block in self.all_blocks():
            block.grad_checkpoint = True

    def set_attention(self, implementation: str, device: torch.device) -> None:
        """Choose what computes attention with a relative position bias.

        :param implementation: one of `relative_attention.IMPLEMENTATIONS`.
        :param device: where the model computes, which may still be on the meta device.
        :raises UserError: for one that this machine does not have.
        """
        check_implementation(implementation, device)
        for block in self.all_blocks():
            block.attn.implementation = implementation

    def attention_in_use(self, device: torch.device, dtype: torch.dtype | None) -> str:
        """What computes attention, for a log: `sdpa`, `triton`, or `cpu`, which is `cpu_attention`.

        :param device: where the model computes, which may still be on the meta device.
        :param dtype: of the matrix products; None: that of the weights.
        """
        attention, dtype = self.all_blocks()[0].attn, dtype or next(self.parameters()).dtype
        if attention.rel_pos_bias is None:
            return "sdpa"
        if runs_products(attention.implementation, device, dtype):
            return "cpu"
        width = self.hidden_size // attention.num_heads
        return "triton" if runs_kernel(attention.implementation, device, dtype, width) else "sdpa"

    def compile_blocks(self, dynamic: bool = False) -> None:
        """Compile every block with torch.compile. The blocks do nearly all of the model's computation.

        All blocks share their compiled code. It is compiled once for every kind of input: with or without a skip input,
        all tokens, and each number of kept tokens. Too many recompilations are an error, not a silent slowdown.

        :param dynamic: compile code for any number of tokens instead.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        for block in self.all_blocks():
            block.compile(dynamic=None if dynamic else False)
