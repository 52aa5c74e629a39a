"""The model card that `save_pretrained` and `push_to_hub` write beside a model."""

# huggingface_hub fills in the placeholders.
MODEL_CARD = """\
---
{{ card_data }}
---

# Masked Diffusion Transformer

A denoiser of images, or of latents of an autoencoder, conditioned on a class, of the family of *Masked
Diffusion Transformer is a Strong Image Synthesizer* ([arXiv:2303.14389](https://arxiv.org/abs/2303.14389)).
`config.json` holds its sizes, `model.safetensors` its weights.

```python
from masked_diffusion import load_model

model = load_model("{{ model_id | default("FOLDER OR HUB ID", true) }}")
```

```bash
python scripts/image_sample.py --model_path {{ model_id | default("FOLDER", true) }} --num_samples 50 --cfg_cond True
```
"""
