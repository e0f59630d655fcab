"""The grammar of references, cards, and the zoo's files next to an agent."""

import json
import shutil
from pathlib import Path

import gymnasium as gym
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from stable_baselines3 import DQN, PPO

from policykd.agents.card import Card
from policykd.agents.references import find_teacher, read_zoo_files
from policykd.agents.teacher import TEACHER_HELP, Teacher, load_teacher

NAME = "PongNoFrameskip-v4"
WRAPPER = "stable_baselines3.common.atari_wrappers.AtariWrapper"
ORDERED = "!!python/object/apply:collections.OrderedDict\n"


class Frames(gym.Env[np.ndarray, np.int64]):
    """Spaces of preprocessed Atari, nothing behind them."""

    observation_space = gym.spaces.Box(0, 255, (4, 84, 84), np.uint8)
    action_space = gym.spaces.Discrete(6)


@pytest.fixture(scope="module")
def dqn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sb3") / "dqn.zip"
    DQN("CnnPolicy", Frames(), buffer_size=1, seed=0, device="cpu").save(path)
    return path


@pytest.fixture
def zoo(dqn: Path, tmp_path: Path) -> Path:
    """What the zoo writes for an agent: dqn/ENV_1/ENV.zip and dqn/ENV_1/ENV/*.yml."""
    folder = tmp_path / "dqn" / f"{NAME}_1"
    (folder / NAME).mkdir(parents=True)
    shutil.copy(dqn, folder / f"{NAME}.zip")
    (folder / NAME / "args.yml").write_text(f"{ORDERED}- - - algo\n    - dqn\n  - - env\n    - {NAME}\n")
    (folder / NAME / "config.yml").write_text(
        f"{ORDERED}- - - env_wrapper\n    - - {WRAPPER}\n  - - frame_stack\n    - 4\n"
    )
    (folder / NAME / "env_kwargs.yml").write_text("{}\n")
    return folder


def test_auto_prefers_the_bundled_teacher() -> None:
    teacher = load_teacher(game="ALE/Pong-v5")
    assert (teacher.ref, teacher.revision, teacher.algorithm) == ("bundled:ppo", "", "PPO")
    assert (
        teacher.sha256 == load_teacher("bundled:ppo", game="Pong").sha256 == load_teacher("bundled", game="Pong").sha256
    )
    assert teacher.reported_return == teacher.card.protocols["noop_sampled"].mean


def test_auto_without_a_bundled_teacher_is_the_hubs_ppo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError, match=r"^hub:sb3/ppo-MsPacmanNoFrameskip-v4: .*HF_HUB_OFFLINE is set"):
        load_teacher(game="ms_pacman")


@pytest.mark.parametrize(
    ("ref", "game", "message"),
    [
        ("auto", None, r"which bundled teacher\? give its game"),
        ("bundled", None, r"which bundled teacher\? give its game"),
        ("bundled", "Breakout", r"no bundled teacher for Breakout, only .*ppo-Pong.*; give .* or hub:ppo$"),
        ("bundled:a2c", "Pong", r"no bundled A2C for Pong, only .*ppo-Pong.*hub:a2c$"),
        ("bundled:pp0", "Pong", r"bundled:pp0: unknown algorithm; give one of ppo, a2c, dqn, qrdqn"),
        ("bundled:", "Pong", r"file or folder not found; did you mean bundled"),
        ("bundle", "Pong", r"bundle: file or folder not found; did you mean bundled"),
        ("Auto", "Pong", r"did you mean auto"),
        ("hub:dqn", None, r"hub:dqn: which game\? give it"),
        ("hub:dqm", "Pong", r"hub:dqm: unknown algorithm; give one of ppo, a2c, dqn, qrdqn, or a repository"),
        ("hub:sac", "Pong", r"hub:sac: unknown algorithm; give one of ppo, a2c, dqn, qrdqn, or a repository"),
        ("hub:", "Pong", r"hub:: unknown algorithm; give one of ppo, a2c, dqn, qrdqn, or"),
        ("hub:dqn@", "Pong", r"invalid revision ''; give a branch, a tag or a commit"),
        ("hub:dqn@a b", "Pong", r"invalid revision 'a b'"),
        ("hub:dqn@../../x", "Pong", r"invalid revision '../../x'"),
        ("hub:dqn@main@x", "Pong", r"invalid revision 'main@x'"),
        ("hub:../../x", "Pong", r"invalid repository '../../x'; give OWNER/NAME"),
        ("hub:../x", "Pong", r"invalid repository '../x'"),
        ("hub:sb3/", "Pong", r"invalid repository 'sb3/'"),
        ("hub:a/b/c", "Pong", r"invalid repository 'a/b/c'"),
        ("hub:a--b/c", "Pong", r"invalid repository 'a--b/c'"),
        ("hub:sb3/dqn\n", "Pong", r"invalid repository 'sb3/dqn\\n'"),
        ("hub:dqn", "Nogame", r"unknown game 'Nogame'"),
        ("HUB:dqn", "Pong", r"did you mean hub:dqn"),
        ("hf:dqn", "Pong", r"did you mean hub:dqn"),
        ("s3:bucket/x", "Pong", r"unknown kind 's3'; give auto, bundled, hub:"),
        ("https://example.org/sb3/dqn-Pong", "Pong", r"web addresses are not supported; give hub:sb3/dqn-Pong$"),
        ("sb3/dqn-Pong", "Pong", r"did you mean hub:sb3/dqn-Pong\?"),
        ("./none.zip", "Pong", r"\./none.zip: file or folder not found; give the path"),
        ("", "Pong", r"expected policy.pth and data|file or folder not found"),
    ],
)
def test_a_malformed_reference_is_answered_in_one_line(
    ref: str, game: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        load_teacher(ref, game=game)
    assert len(str(caught.value).splitlines()) == 1


def test_a_path_is_never_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"^bundled: file or folder not found"):
        load_teacher(Path("bundled"), game="Pong")


def test_a_zoo_folder_says_its_game_and_the_benchmark_its_return(zoo: Path, dqn: Path) -> None:
    for ref in (zoo, zoo / f"{NAME}.zip"):
        teacher = load_teacher(ref, game="Pong")
        assert (teacher.algorithm, teacher.temperature) == ("DQN", 0.01)
        assert teacher.card == Card(game="Pong", algorithm="DQN", reported_return=20.6)
        assert teacher.reported_return == 20.6
        assert (teacher.ref, teacher.path.name) == (str(ref), f"{NAME}.zip")
        assert teacher.sha256 == load_teacher(dqn).sha256


def test_a_copy_of_a_hub_repository_is_read_like_a_zoo_folder(zoo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "clone"
    shutil.copytree(zoo / NAME, copy)
    shutil.unpack_archive(zoo / f"{NAME}.zip", copy / f"dqn-{NAME}")
    shutil.copy(zoo / f"{NAME}.zip", copy / f"dqn-{NAME}.zip")
    (copy / "results.json").write_text('{"mean_reward": 19.5}')
    assert load_teacher(copy, game="Pong").reported_return == 19.5
    unpacked = load_teacher(copy / f"dqn-{NAME}")
    assert unpacked.path == copy / f"dqn-{NAME}"
    assert unpacked.reported_return is None


def test_a_zoo_agent_of_another_game_is_refused(zoo: Path) -> None:
    with pytest.raises(ValueError, match=r"this teacher plays Pong, not Breakout; give another --teacher"):
        load_teacher(zoo, game="Breakout")
    (zoo / NAME / "args.yml").write_text("algo: dqn\nenv: CartPole-v1\n")
    with pytest.raises(ValueError, match=r"this teacher plays CartPole-v1, not Pong"):
        load_teacher(zoo, game="Pong")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (f"frame_stack: 1\nenv_wrapper: [{WRAPPER}]", r"config.yml: expected frame_stack: 4, found 1; give another"),
        (f"env_wrapper: [{WRAPPER}]", r"expected frame_stack: 4, found 1"),
        (
            f"frame_stack: 4\nnormalize: true\nenv_wrapper: {WRAPPER}",
            r"expected plain observations, found normalize: True",
        ),
        ("x: !!python/object/apply:os.system ['touch pwned']", r"config.yml: not the YAML of an rl-zoo agent"),
        ("x: !!python/name:os.system", r"config.yml: not the YAML of an rl-zoo agent"),
        (f"{ORDERED}- 3", r"config.yml: not the YAML of an rl-zoo agent"),
        ("[1, 2]", r"config.yml: expected names and values, found a list"),
        ("a: [", r"config.yml: not the YAML"),
        ("[" * 5000, r"config.yml: not the YAML of an rl-zoo agent"),
        ("- " * 5000, r"config.yml: not the YAML of an rl-zoo agent"),
        ("a: &a {k: 1}\nb: {<<: [*a, *a]}", r"merged keys"),
        ("#" * 20_000, r"config.yml: larger than 16,384 bytes"),
        ("a: \x00", r"config.yml: "),
    ],
)
def test_a_config_that_is_unsafe_or_does_not_fit_is_one_line(
    zoo: Path, config: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(zoo)
    (zoo / NAME / "config.yml").write_text(config)
    with pytest.raises(ValueError, match=message) as caught:
        load_teacher(zoo, game="Pong")
    assert len(str(caught.value).splitlines()) == 1
    assert not (zoo / "pwned").exists()


def test_aliases_that_multiply_cost_nothing(zoo: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))
    (zoo / NAME / "config.yml").write_text(bomb + "frame_stack: *a29\n")
    with pytest.raises(ValueError, match="expected frame_stack: 4, found"):
        load_teacher(zoo, game="Pong")
    (zoo / NAME / "args.yml").write_text(bomb + "env: *a29\n")
    with pytest.raises(ValueError, match="algo and env are not text"):
        load_teacher(zoo, game="Pong")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "env_kwargs.yml",
            "full_action_space: true",
            "trained with {'full_action_space': True}, policykd plays without",
        ),
        ("env_kwargs.yml", "repeat_action_probability: 0.25", "trained with {'repeat_action_probability': 0.25}"),
        ("config.yml", "frame_stack: 4\nenv_wrapper: my.Wrapper", r"with env_wrapper 'my.Wrapper'; policykd plays"),
        ("config.yml", f"frame_stack: 4\nenv_wrapper: [{WRAPPER}: {{screen_size: 96}}]", "screen_size"),
        ("args.yml", "algo: dqn\nenv: ALE/Pong-v5", "trained on ALE/Pong-v5 with env_wrapper"),
    ],
)
def test_what_policykds_games_do_not_have_is_warned_of(zoo: Path, file: str, content: str, message: str) -> None:
    (zoo / NAME / file).write_text(content)
    with pytest.warns(UserWarning, match=message) as caught:
        load_teacher(zoo, game="Pong")
    assert caught[0].filename == __file__


def test_what_policykd_does_anyway_is_no_warning(zoo: Path) -> None:
    (zoo / NAME / "env_kwargs.yml").write_text("full_action_space: false\nframeskip: 1\nrender_mode: rgb_array\n")
    with (zoo / NAME / "config.yml").open("a") as config:
        config.write("  - - normalize\n    - 'dict(norm_obs=False, norm_reward=True)'\n")
    assert load_teacher(zoo, game="Pong").algorithm == "DQN"


@pytest.mark.parametrize("bad", ["NaN", "1e400", '"much"', "[1]", "1" + "0" * 400])
def test_results_that_are_no_number_count_for_nothing(tmp_path: Path, bad: str) -> None:
    (tmp_path / "results.json").write_text(f'{{"mean_reward": {bad}}}')
    with pytest.warns(UserWarning, match=r"results.json: invalid"):
        assert read_zoo_files(f"dqn-{NAME}", tmp_path).reported_return == 20.6  # the benchmark


def test_results_that_the_hub_reports(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text('{"mean_reward": -3, "std_reward": 1}')
    assert read_zoo_files(f"dqn-{NAME}", tmp_path) == Card(game="Pong", algorithm="DQN", reported_return=-3)


def test_a_folder_without_one_archive_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected policy.pth and data, or an rl-zoo agent's ENV.zip .*, found none"):
        load_teacher(tmp_path)


def test_a_card_beside_counts_more_than_the_zoo(zoo: Path) -> None:
    (zoo / f"{NAME}.json").write_text(json.dumps({"reported_return": 12.5}))
    assert load_teacher(zoo, game="Pong").reported_return == 12.5


PROTOCOL = {"returns": [1, 2.5], "mean": 7.0, "interval": [0, 0]}


@pytest.mark.parametrize(
    ("card", "reason"),
    [
        ({"protocols": [["noop_sampled", PROTOCOL]]}, "protocols: Input should be"),
        ({"protocols": {"noop_sampled": [1.0]}}, "protocols.noop_sampled: Input should be"),
        ({"protocols": {"noop_sampled": {"returns": ["a"] * 40}}}, "returns.0: Input should be a valid number"),
        ({"protocols": {"noop_sampled": {"returns": "12"}}}, "returns: Input should be a valid array"),
        ({"protocols": {"noop_sampled": {"returns": [1.0, float("nan")]}}}, "expected value"),
        ({"protocols": {"noop_sampled": {"returns": [10**400]}}}, "returns.0: Input should be a finite number"),
        ({"protocols": {"noop_sampled": {"returns": [1e13]}}}, "returns.0: Input should be less than"),
        ({"protocols": {"noop_sampled": {"returns": []}}}, "returns: Tuple should have at least 1 item"),
        ({"protocols": {"noop_sampled": {"mean": 1.0}}}, "returns: Field required"),
        ({"sha256": "", "protocols": {"noop_sampled": PROTOCOL}}, "protocols without the sha256"),
        ({"reported_return": "much"}, "reported_return: Input should be a valid number"),
        ({"game": "\x1b[31m" * 200}, "game: String should have at most 500 characters"),
    ],
)
def test_a_card_that_would_fail_later_is_refused_at_once(
    card: dict[str, object], reason: str, dqn: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copy(dqn, tmp_path / "agent.zip"))
    sha256 = load_teacher(path).sha256
    path.with_suffix(".json").write_text(json.dumps({"sha256": sha256, "protocols": {"noop_sampled": PROTOCOL}}))
    assert load_teacher(path).reported_return == 1.75  # the mean of its returns, whatever else it contains
    path.with_suffix(".json").write_text(json.dumps({"sha256": sha256, **card}))
    with pytest.raises(
        ValueError, match=rf"agent\.json: invalid \(.*{reason}.*; fix or remove the teacher's card$"
    ) as caught:
        load_teacher(path)
    assert len(str(caught.value).splitlines()) == 1


def test_a_vector_agent_of_the_zoo_needs_no_frames(tmp_path: Path) -> None:
    folder = tmp_path / "CartPole-v1_1"
    (folder / "CartPole-v1").mkdir(parents=True)
    PPO("MlpPolicy", "CartPole-v1", n_steps=8, batch_size=8, device="cpu").save(folder / "CartPole-v1.zip")
    (folder / "CartPole-v1" / "config.yml").write_text("n_steps: 8\n")
    (folder / "CartPole-v1" / "args.yml").write_text("algo: ppo\nenv: CartPole-v1\n")
    teacher = load_teacher(folder)
    assert (teacher.obs_shape, teacher.num_actions, teacher.reported_return) == ((4,), 2, None)


def test_the_help_names_every_kind() -> None:
    for word in ("auto", "bundled", ".zip", "rl-zoo", ".onnx", "hub:ALGO", "hub:OWNER/NAME[@REVISION]", "qrdqn"):
        assert word in TEACHER_HELP


def test_a_source_is_found_again_by_its_own_reference(zoo: Path) -> None:
    for ref in ("auto", "bundled", str(zoo)):
        source = find_teacher(ref, game="Pong")
        assert find_teacher(source.ref, game="Pong") == source


def test_sb3s_own_load_is_used_where_it_is_asked_for(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    obs = torch.randint(256, (8, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    safe, trusted = load_teacher(zoo), load_teacher(zoo, trust_pickle=True)
    torch.testing.assert_close(trusted(obs), safe(obs))
    assert (trusted.sha256, trusted.algorithm, trusted.card) == (safe.sha256, "DQN", safe.card)
    assert "executes code in the file" in capsys.readouterr().err
    (zoo / f"{NAME}.json").write_text(json.dumps({"sha256": "0" * 64}))
    with pytest.raises(ValueError, match="is not its card's 000000000000"):
        load_teacher(zoo, trust_pickle=True)
    assert capsys.readouterr().err == ""  # refused before anything was executed


def test_an_onnx_file_scores_as_its_card_says(tmp_path: Path) -> None:
    obs = helper.make_tensor_value_info("obs", TensorProto.FLOAT, ["batch", 4])
    scores = helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 2])
    weight = numpy_helper.from_array(np.eye(4, 2, dtype=np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["obs", "weight"], ["scores"])], "g", [obs], [scores], [weight]
    )
    path = tmp_path / "policy.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    teacher = load_teacher(path)
    assert (teacher.algorithm, teacher.temperature, teacher.obs_shape, teacher.num_actions) == ("ONNX", 1, (4,), 2)
    assert teacher(torch.tensor([[1.0, 2.0, 3.0, 4.0]])).tolist() == [[1.0, 2.0]]
    card = {"algorithm": "dqn", "sha256": teacher.sha256}
    path.with_suffix(".json").write_text(json.dumps(card))
    assert (load_teacher(path).algorithm, load_teacher(path).temperature) == ("DQN", 0.01)
    path.with_suffix(".json").write_text(json.dumps({"algorithm": "SAC"}))
    with pytest.raises(ValueError, match="unknown algorithm 'SAC' in its card; give one of PPO, A2C, DQN, QRDQN, ONNX"):
        load_teacher(path)
    path.with_suffix(".json").write_text(json.dumps({**card, "sha256": "0" * 64}))
    with pytest.raises(ValueError, match="is not its card's 000000000000"):
        load_teacher(path)


def test_a_quantile_teachers_scores_are_q_values() -> None:
    net = load_teacher(game="Pong").net
    assert [Teacher(net, a, Path(), "").temperature for a in ("PPO", "A2C", "DQN", "QRDQN", "ONNX")] == [
        1,
        1,
        0.01,
        0.01,
        1,
    ]
