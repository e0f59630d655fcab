"""The 7 % network as a features extractor of Stable-Baselines3."""

import gymnasium
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn


class SmallCNN(BaseFeaturesExtractor):
    """Convolutions of 16, 16 and 16 channels and 128 dense units: net 2 of Rusu et al. (2015)."""

    def __init__(self, observation_space: gymnasium.spaces.Box) -> None:
        super().__init__(observation_space, 128)
        self.layers = nn.Sequential(
            nn.Conv2d(4, 16, 8, 4), nn.ReLU(), nn.Conv2d(16, 16, 4, 2), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
            nn.Flatten(), nn.Linear(16 * 49, 128), nn.ReLU(),
        )  # fmt: skip

    def forward(self, obs_BCHW: Tensor) -> Tensor:
        """Returns the features, float32 `(batch, 128)`."""
        features_BF: Tensor = self.layers(obs_BCHW)
        return features_BF
