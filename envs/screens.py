"""The emulators' screens as Stable-Baselines3 shows them to an agent, computed only where they have changed.

An agent sees the maximum of two 210x160 RGB screens in grey, reduced to 84x84 by OpenCV (SB3's MaxAndSkipEnv and
WarpFrame). Three facts make this fast, and the pixels stay bit-equal:

- ALE holds a screen as colour indices, which are twenty times cheaper to fetch than RGB, and the grey of the maximum of
  two indices is a table.
- Reducing 210 rows to 84 reduces 42 bands of five rows to two, each independent of its neighbours. So only bands that
  differ from the last picture are reduced.
- The bands of all games are reduced in one call, since a call on a cold cache costs as much as a band.

ALE's own 84x84 grey screen differs: it takes the maximum after the grey.
"""

import functools

import cv2
import numpy as np

NTSC = bytes.fromhex(
    "0000004a4a4a6f6f6f8e8e8eaaaaaac0c0c0d6d6d6ececec48480069690f86861da2a22abbbb35d2d240e8e84afcfc54"
    "7c2c00904811a26221b47a30c3903dd2a44adfb755ecc860901c00a33915b55328c66c3ad5824ae39759f0aa67fcbc74"
    "940000a71a1ab83232c84848d65c5ce46f6ff08080fc909084006497197aa8308fb846a2c659b3d46cc3e07cd2ec8ce0"
    "50008468199a7d30ad9246c0a459d0b56ce0c57ceed48cfc140090331aa34e32b56848c67f5cd5956fe3a980f0bc90fc"
    "000094181aa72d32b84248c8545cd6656fe47580f08490fc001c88183b9d2d57b04272c2548ad265a0e175b5ef84c8fc"
    "0030641850802d6d984288b054a0c565b7d975cceb84e0fc00403018624e2d8169429e8254b89965d1ae75e7c284fcd4"
    "0044001a661a32843248a0485cba5c6fd26f80e88090fc90143c00355f18527e2d6e9c4287b7549ed065b4e775c8fc84"
    "3038005059166d762b88923ea0ab4fb7c25fccd86ee0ec7c482c00694d14866a26a28638bb9f47d2b656e8cc63fce070"
)
"""RGB of the 128 colours of ALE's NTSC games"""
PAL = bytes.fromhex(
    "0000002b2b2b525252767676979797b6b6b6d2d2d2ececec0000002b2b2b525252767676979797b6b6b6d2d2d2ececec"
    "80580096711aab8732be9c48cfaf5cdfc06feed180fce090445c005e791a7693328cac48a0c25cb3d76fc4ea80d4fc90"
    "70340089511aa06b32b68448c99a5cdcaf6fecc280fcd4900064141a803532985248b06e5cc5876fd99e80ebb490fcc8"
    "700014891a35a03252b6486ec95c87dc6f9eec80b4fc90c8005c5c1a7676328e8e48a4a45cb8b86fcbcb80dcdc90ecec"
    "70005c841a74963289a8489eb75cb0c66fc1d380d1e090e0003c70195a892f75a0448eb657a5c968badc79ceec88e0fc"
    "5800706e1a898332a09648b6a75cc9b76fdcc680ecd490fc002070193f892f5aa04474b6578bc968a1dc79b5ec88c8fc"
    "3400804a1a965f32ab7248be835ccf936fdfa280eeb090fc0000881a1a9d3232b04848c25c5cd26f6fe18080ef9090fc"
    "0000002b2b2b525252767676979797b6b6b6d2d2d2ececec0000002b2b2b525252767676979797b6b6b6d2d2d2ececec"
)
"""RGB of the 128 colours of the few PAL games, which have 250 rows"""


def palette(height: int) -> np.ndarray:
    """Returns the RGB of every byte on a screen of `height` rows, uint8 `(256, 3)`; odd bytes are grey."""
    colours = np.frombuffer(PAL if height == 250 else NTSC, np.uint8).reshape(128, 3)
    # An odd byte is a grey of the luma of the colour before it, as in ALE.
    greys = np.rint(colours @ [0.2989, 0.587, 0.114]).astype(np.uint8)
    return np.stack([colours, np.repeat(greys[:, None], 3, axis=1)], axis=1).reshape(256, 3)


@functools.cache
def grey_of_maximum(height: int) -> np.ndarray:
    """Returns the grey of the maximum, per channel, of two colour indices, uint8 `(256, 256)`."""
    colours = palette(height)
    grey: np.ndarray = cv2.cvtColor(np.maximum(colours[:, None], colours[None]), cv2.COLOR_RGB2GRAY)
    return grey


class Screens:
    """The last two screens of every game, and the frames that an agent sees of them."""

    def __init__(self, frames: np.ndarray, height: int) -> None:
        """Writes to `frames`, uint8 `(num_games, 84, 84)`; an emulator's screen is `(height, 160)`."""
        self.next = np.zeros((len(frames), 2, height, 160), np.uint8)
        """colour indices that the emulators write"""
        self.drawn = ~self.next
        """colour indices that the frames show; at first nothing equals them"""
        self._num_bands = 42 if height == 210 else 1
        self._frames = frames.reshape(len(frames) * self._num_bands, -1)
        self._grey_of_maximum = grey_of_maximum(height)
        self._grey = np.diagonal(self._grey_of_maximum).copy()

    def draw(self) -> None:
        """Updates the frames to the `next` screens."""
        # Eight pixels are compared at a time.
        differ = self.next.view(np.uint64) != self.drawn.view(np.uint64)
        self.next, self.drawn = self.drawn, self.next
        bands = np.flatnonzero((differ[:, 0] | differ[:, 1]).reshape(len(self._frames), -1).any(axis=1))
        if not bands.size:
            return
        # Where both screens agree, which is nearly everywhere, one index gives the grey.
        games, bands_of_game = np.divmod(bands, self._num_bands)
        pairs = self.drawn.reshape(len(self.drawn), 2, self._num_bands, -1, 160)
        first, second = pairs[games, 0, bands_of_game], pairs[games, 1, bands_of_game]
        grey = cv2.LUT(first.reshape(-1, 160), self._grey).reshape(first.shape)
        # Elsewhere it is the grey of the maximum of two.
        moved = np.flatnonzero(first != second)
        grey.reshape(-1)[moved] = self._grey_of_maximum[first.take(moved), second.take(moved)]
        self._frames[bands] = self._reduce(grey).reshape(len(bands), -1)

    def keep(self, game: int) -> None:
        """Keeps a game's frame in the next `draw`."""
        self.next[game] = self.drawn[game]

    def rgb(self) -> np.ndarray:
        """Returns what a person would see: the maximum of both screens, uint8 `(num_games, height, 160, 3)`."""
        pairs = palette(self.drawn.shape[2])[self.drawn]
        return np.asarray(np.maximum(pairs[:, 0], pairs[:, 1]))

    def _reduce(self, grey: np.ndarray) -> np.ndarray:
        """Returns pictures of 84 pixels per row: whole frames, or bands stacked to one tall picture."""
        if self._num_bands == 1:
            return np.stack([cv2.resize(picture, (84, 84), interpolation=cv2.INTER_AREA) for picture in grey])
        reduced: np.ndarray = cv2.resize(grey.reshape(-1, 160), (84, 2 * len(grey)), interpolation=cv2.INTER_AREA)
        return reduced
