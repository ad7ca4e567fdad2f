"""Engine, trainer and the plain PyTorch model choose the same experts for every token (fp32)."""

from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from test_trainer_gradients import save_logical

from coterie import _engine, _train

BATCH, LENGTH = 4, 96


@pytest.mark.parametrize("name", ["coterie_pyramid", "coterie_gpt_style", "coterie_deepseek_style"])
def test_every_token_meets_the_same_experts(name: str, tmp_path: Path) -> None:
    model = tiny_models.build(name)
    tokens = np.array(tiny_models.prompt(BATCH * LENGTH, seed=21), dtype=np.int32).reshape(BATCH, LENGTH)
    engine = _engine.Engine(str(tiny_models.save(model, tmp_path)))
    trainer = _train.Model(model.config.to_json_string(), "fp32", 0)
    trainer.load(save_logical(model, tmp_path))

    trained = trainer.expert_ids(tokens)
    by_sequence = [engine.expert_ids(sequence.tolist()) for sequence in tokens]
    served = [np.concatenate(layer) for layer in zip(*by_sequence, strict=True)]
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens).long()).expert_ids
    assert len(trained) == len(served) == len(expected) == 4
    for layer in range(len(expected)):
        assert len(np.unique(trained[layer])) > 1, "the router decides nothing"
        np.testing.assert_array_equal(trained[layer], served[layer])
        np.testing.assert_array_equal(trained[layer], expected[layer].numpy())
