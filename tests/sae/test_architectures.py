"""What each architecture learns and how it encodes afterwards."""

import pytest

from jaxsae.artifacts import InputError
from jaxsae.sae import architectures


def test_architecture__of_an_unknown_name__lists_those_there_are():
    with pytest.raises(InputError, match="'relu', expected one of topk, batchtopk, jumprelu_l1"):
        architectures.architecture("relu")
