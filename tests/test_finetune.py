import json

import pytest
import torch
from fill import fill

from masked_diffusion import create_model
from masked_diffusion.training.finetune import load_pretrained
from masked_diffusion.weights.checkpoint import save_checkpoint


def make(**options):
    return create_model("MDTv2_Nano_2", **{"input_size": 8, "in_channels": 3, "num_classes": 3} | options)


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "mdt_xl2_v2_ckpt.pt"
    torch.save(fill(make()).state_dict(), path)
    return path


def test_the_same_model_takes_all(weights):
    model = make()
    load_pretrained(model, weights)
    assert all(torch.equal(value, fill(make()).state_dict()[key]) for key, value in model.state_dict().items())


def test_other_classes_start_afresh_and_are_listed(weights, capsys):
    model = make(num_classes=5)
    fresh = model.y_embedder.embedding_table.weight.detach().clone()
    load_pretrained(model, weights, class_names=list("abcde"))
    table, old = model.y_embedder.embedding_table.weight, fill(make()).y_embedder.embedding_table.weight
    assert torch.equal(table[:5], fresh[:5]) and torch.equal(table[5], old[3])
    assert "5 of 5 classes are new and start from random rows: a, b, c, d, e" in capsys.readouterr().out


def test_classes_move_by_their_names(weights, capsys):
    (weights.parent / "config.json").write_text(json.dumps({"classes": ["cat", "dog", "owl"]}))
    model = make(num_classes=4)
    load_pretrained(model, weights, class_names=["ant", "dog", "eel", "owl"])
    table, old = model.y_embedder.embedding_table.weight, fill(make()).y_embedder.embedding_table.weight
    assert torch.equal(table[[1, 3, 4]], old[[1, 2, 3]])
    assert "2 of 4 classes are new and start from random rows: ant, eel" in capsys.readouterr().out


def test_a_larger_image_interpolates_positions_and_biases(weights):
    model = make(input_size=16)
    load_pretrained(model, weights)
    small = fill(make())
    new, old = (m.pos_embed.detach().view(m.grid_size, m.grid_size, -1).mean(dim=(0, 1)) for m in (model, small))
    torch.testing.assert_close(new, old, atol=0.05, rtol=0)
    table = model.en_inblocks[0].attn.rel_pos_bias.relative_position_bias_table
    source = small.en_inblocks[0].attn.rel_pos_bias.relative_position_bias_table
    assert table.shape == (15 * 15 + 3, 4)
    assert torch.equal(table[-3:], source[-3:])
    torch.testing.assert_close(table[15 * 15 // 2], source[7 * 7 // 2], atol=1e-6, rtol=1e-5)  # offset (0, 0)
    assert torch.isfinite(model(torch.randn(1, 3, 16, 16), torch.tensor([5]))).all()


def test_smooth_tables_survive_interpolation(tmp_path):
    small, large = make(), make(input_size=16)
    torch.save(small.state_dict(), tmp_path / "w.pt")
    load_pretrained(large, tmp_path / "w.pt")
    grid = large.pos_embed.detach().view(8, 8, -1)
    old = small.pos_embed.detach().view(4, 4, -1)
    middle = (old[1, 1] + old[1, 2] + old[2, 1] + old[2, 2]) / 4
    torch.testing.assert_close(grid[3:5, 3:5].mean(dim=(0, 1)), middle, atol=0.12, rtol=0)


def test_a_training_folder_gives_its_newest_ema(tmp_path, capsys):
    old, new = fill(make()).state_dict(), {key: v * 2 for key, v in fill(make()).state_dict().items()}
    new = {key: old[key] if key.endswith("relative_position_index") else v for key, v in new.items()}
    save_checkpoint(tmp_path, 5, old, {"0.9": old}, {"step": 5})
    save_checkpoint(tmp_path, 9, old, {"0.9": new}, {"step": 9})
    (tmp_path / "config.json").write_text(json.dumps({"classes": ["cat", "dog", "owl"]}))
    model = make(num_classes=2)
    load_pretrained(model, tmp_path, class_names=["owl", "yak"])
    assert torch.equal(model.pos_embed, new["pos_embed"])
    assert torch.equal(model.y_embedder.embedding_table.weight[0], new["y_embedder.embedding_table.weight"][2])
    said = capsys.readouterr().out
    assert f"weights of {tmp_path} from {tmp_path / 'ema_0.9_000009.pt'}" in said
    assert "1 of 2 classes are new and start from random rows: yak" in said


def test_classes_beyond_the_names_are_listed_by_number(weights, capsys):
    load_pretrained(make(num_classes=4), weights, class_names=["ant", "bee"])
    assert "4 of 4 classes are new and start from random rows: ant, bee, 2, 3" in capsys.readouterr().out


def test_another_model_is_refused(weights, tmp_path):
    with pytest.raises(ValueError, match=r"belongs to another model: it lacks"):
        load_pretrained(create_model("DiT_Nano_2", input_size=8, in_channels=3, num_classes=3), weights)
    with pytest.raises(ValueError, match=r"choose the --model that these weights"):
        load_pretrained(make(hidden_size=64), weights)
    with pytest.raises(ValueError, match=r"absent does not exist: name a checkpoint"):
        load_pretrained(make(), tmp_path / "absent")
    torch.save({"conv": torch.zeros(1)}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="holds no state dict of DiT, MDT or MDTv2"):
        load_pretrained(make(), tmp_path / "foreign.pt")
