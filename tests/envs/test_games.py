import pytest

from policykd.envs.games import RANDOM_AND_HUMAN_SCORES, canonical_name, human_normalised_score, rom_id


@pytest.mark.parametrize(
    "name", ["Pong", "pong", "PongNoFrameskip-v4", "PongDeterministic-v4", "ALE/Pong-v5", "Pong-v5"]
)
def test_every_name_means_the_game(name: str) -> None:
    assert (canonical_name(name), rom_id(name)) == ("Pong", "pong")


def test_names_of_several_words() -> None:
    assert rom_id("ALE/MsPacman-v5") == rom_id("ms_pacman") == "ms_pacman"
    assert canonical_name("UpNDownNoFrameskip-v4") == "UpNDown"


@pytest.mark.parametrize("name", ["Pongg", "Breakuot", "../../x", "$(touch x)", "", "CartPole-v1"])
def test_an_unknown_game_says_so_in_one_line(name: str) -> None:
    with pytest.raises(ValueError, match="unknown game") as error:
        canonical_name(name)
    assert "\n" not in str(error.value)


def test_near_matches_are_listed() -> None:
    with pytest.raises(ValueError, match="did you mean Breakout"):
        canonical_name("Breakuot-v5")


def test_the_table_holds_57_games_of_ale_where_humans_beat_chance() -> None:
    assert len(RANDOM_AND_HUMAN_SCORES) == 57
    assert all(canonical_name(game) == game for game in RANDOM_AND_HUMAN_SCORES)
    worse = {game for game, (random, human) in RANDOM_AND_HUMAN_SCORES.items() if human <= random}
    assert not worse


def test_normalised_scores_at_the_anchors() -> None:
    assert human_normalised_score("Pong", -20.7) == 0.0
    assert human_normalised_score("ALE/Pong-v5", 14.6) == 1.0
    assert human_normalised_score("Entombed", 0.0) is None
