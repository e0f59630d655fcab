"""Names of Atari games, and the returns of random play and of humans."""

import difflib
import functools
import re

RANDOM_AND_HUMAN_SCORES: dict[str, tuple[float, float]] = {
    "Alien": (227.8, 7127.7),
    "Amidar": (5.8, 1719.5),
    "Assault": (222.4, 742.0),
    "Asterix": (210.0, 8503.3),
    "Asteroids": (719.1, 47388.7),
    "Atlantis": (12850.0, 29028.1),
    "BankHeist": (14.2, 753.1),
    "BattleZone": (2360.0, 37187.5),
    "BeamRider": (363.9, 16926.5),
    "Berzerk": (123.7, 2630.4),
    "Bowling": (23.1, 160.7),
    "Boxing": (0.1, 12.1),
    "Breakout": (1.7, 30.5),
    "Centipede": (2090.9, 12017.0),
    "ChopperCommand": (811.0, 7387.8),
    "CrazyClimber": (10780.5, 35829.4),
    "Defender": (2874.5, 18688.9),
    "DemonAttack": (152.1, 1971.0),
    "DoubleDunk": (-18.6, -16.4),
    "Enduro": (0.0, 860.5),
    "FishingDerby": (-91.7, -38.7),
    "Freeway": (0.0, 29.6),
    "Frostbite": (65.2, 4334.7),
    "Gopher": (257.6, 2412.5),
    "Gravitar": (173.0, 3351.4),
    "Hero": (1027.0, 30826.4),
    "IceHockey": (-11.2, 0.9),
    "Jamesbond": (29.0, 302.8),
    "Kangaroo": (52.0, 3035.0),
    "Krull": (1598.0, 2665.5),
    "KungFuMaster": (258.5, 22736.3),
    "MontezumaRevenge": (0.0, 4753.3),
    "MsPacman": (307.3, 6951.6),
    "NameThisGame": (2292.3, 8049.0),
    "Phoenix": (761.4, 7242.6),
    "Pitfall": (-229.4, 6463.7),
    "Pong": (-20.7, 14.6),
    "PrivateEye": (24.9, 69571.3),
    "Qbert": (163.9, 13455.0),
    "Riverraid": (1338.5, 17118.0),
    "RoadRunner": (11.5, 7845.0),
    "Robotank": (2.2, 11.9),
    "Seaquest": (68.4, 42054.7),
    "Skiing": (-17098.1, -4336.9),
    "Solaris": (1236.3, 12326.7),
    "SpaceInvaders": (148.0, 1668.7),
    "StarGunner": (664.0, 10250.0),
    "Surround": (-10.0, 6.5),
    "Tennis": (-23.8, -8.3),
    "TimePilot": (3568.0, 5229.2),
    "Tutankham": (11.4, 167.6),
    "UpNDown": (533.4, 11693.2),
    "Venture": (0.0, 1187.5),
    "VideoPinball": (16256.9, 17667.9),
    "WizardOfWor": (563.5, 4756.5),
    "YarsRevenge": (3092.9, 54576.9),
    "Zaxxon": (32.5, 9173.3),
}
"""game -> mean returns of (random play, a professional human) from no-op starts (Wang et al., 2016; Badia et al., 2020;
the same 57 rows as DQN Zoo's `atari_data.py`)"""


@functools.cache
def _rom_ids() -> dict[str, str]:
    """Returns ALE's id of every game that it ships, keyed without case or underscores: mspacman -> ms_pacman."""
    from ale_py import roms  # takes a quarter of a second to import

    return {rom_id.replace("_", ""): rom_id for rom_id in roms.get_all_rom_ids()}


def rom_id(name: str) -> str:
    """Returns ALE's name of a game's ROM, such as `ms_pacman`.

    Args:
        name: `MsPacman`, `ms_pacman`, `MsPacmanNoFrameskip-v4` and `ALE/MsPacman-v5` all name the same game.

    Raises:
        ValueError: an unknown game; the message lists near matches.
    """
    # ALE/Pong-v5, PongNoFrameskip-v4, pong -> pong
    key = re.sub(r"^ALE/|(NoFrameskip|Deterministic)?(-v\d+)?$", "", name.strip()).replace("_", "").lower()
    known = _rom_ids()
    if key not in known:
        near = [_camel_case(known[k]) for k in difflib.get_close_matches(key, known, n=3, cutoff=0.6)]
        hint = f"did you mean {' or '.join(near)}?" if near else "names look like Pong, MsPacman or ALE/Breakout-v5"
        raise ValueError(f"unknown game {name!r}: {hint}")
    return known[key]


def canonical_name(name: str) -> str:
    """Returns a game's name as papers write it, such as `MsPacman` for `ALE/MsPacman-v5`.

    Raises:
        ValueError: an unknown game.
    """
    return _camel_case(rom_id(name))


def canonical_names(names: str) -> tuple[str, ...]:
    """Returns the names of one game, or of several joined by commas, as papers write them.

    Raises:
        ValueError: an unknown game, or one that is named twice.
    """
    games = tuple(canonical_name(name) for name in names.split(","))
    if len(set(games)) < len(games):
        raise ValueError(f"--game {names}: a game is named twice; give each one once")
    return games


def human_normalised_score(game: str, score: float) -> float | None:
    """Returns (score - random) / (human - random), or None for a game outside the table (Mnih et al., 2015)."""
    if (row := RANDOM_AND_HUMAN_SCORES.get(canonical_name(game))) is None:
        return None
    # 0 is random play, 1 the human; the best agents are far above.
    random, human = row
    return (score - random) / (human - random)


def _camel_case(rom: str) -> str:
    return "".join(part.capitalize() for part in rom.split("_"))
