"""Features that cost no forward pass: the mean of a sample's input embeddings, as they were at the start."""

from typing import Any

import torch
from gradient_selectors.features.embeddings import EmbeddingFeatures

from stream_trainer.models.loading import load_model
from stream_trainer.settings.schema import LoraSettings
from tests.helpers.tiny_models import CONFIGS, settings_of, shake


def test_features_are_the_normalised_mean_embedding() -> None:
    model: Any = load_model(settings_of("gpt2"), seed=0).model
    features = EmbeddingFeatures.of_model(model)
    found = features([(5, 7, 7, 9), (5,)])
    mean = model.get_input_embeddings().weight.detach()[[5, 7, 7, 9]].mean(0)
    assert found.dtype == torch.float32
    assert found.shape == (2, features.size)
    assert float(torch.nn.functional.cosine_similarity(found[0], mean, dim=0)) > 0.9999
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(features.centre([(5,), (5,)]), found[1])
    assert features([]).shape == (0, features.size)


def test_features_stay_as_the_model_moves() -> None:
    model = load_model(settings_of("qwen2"), seed=0).model
    features, samples = EmbeddingFeatures.of_model(model), [(3, 4), (8,)]
    before = features(samples)
    shake(model)
    assert torch.equal(features(samples), before)
    assert not torch.allclose(EmbeddingFeatures.of_model(model)(samples), before, atol=1e-3)


def test_features_are_the_same_with_and_without_adapters() -> None:
    plain, adapted = (load_model(settings_of("llama", lora=lora), seed=0).model for lora in (None, LoraSettings()))
    samples = [(1, 2, 3)]
    assert torch.equal(EmbeddingFeatures.of_model(plain)(samples), EmbeddingFeatures.of_model(adapted)(samples))
    assert EmbeddingFeatures.of_model(plain).size == CONFIGS["llama"]["hidden_size"]
