"""ADM's evaluation suite. Scripts of this folder run from anywhere; nothing here imports `masked_diffusion`."""
