"""The registry of families."""

import dataclasses

import pytest

from tp_mamba.checkpoint.errors import ConfigError
from tp_mamba.config import MambaConfig
from tp_mamba.models import FALCON_MAMBA, JAMBA, MAMBA
from tp_mamba.models.registry import families, get_family, register_family, unregister_family


def test_the_families_of_the_package():
    assert families()[:3] == (MAMBA, FALCON_MAMBA, JAMBA)
    assert get_family("jamba") is JAMBA
    assert MAMBA.our_name("backbone.embedding.weight") == "backbone.embeddings.weight"
    assert JAMBA.our_name("model.layers.3.mamba.") == "backbone.layers.3.mamba."


def test_one_family_a_model_type():
    with pytest.raises(ValueError, match="there is a family 'mamba' already"):
        register_family(dataclasses.replace(MAMBA))
    with pytest.raises(ConfigError, match="model_type is 'nemo', supported are mamba, falcon_mamba, jamba"):
        get_family("nemo")
    with pytest.raises(ConfigError, match="model_type is 'nemo'"):
        unregister_family("nemo")


def test_a_family_from_outside_is_known_to_the_configuration():
    register_family(dataclasses.replace(FALCON_MAMBA, model_type="nemo"))
    try:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 97}
        config = MambaConfig.from_dict({"model_type": "nemo"} | sizes)
        assert (config.model_type, config.mixer_norm) == ("nemo", "weightless")
        assert MambaConfig.from_dict(config.to_dict()) == config
    finally:
        unregister_family("nemo")
    with pytest.raises(ConfigError, match="model_type 'nemo' is not a Mamba-1 model"):
        MambaConfig.from_dict({"model_type": "nemo"})
