"""The C header: names, constants and text; test_runtimes.py compares its outputs with torch's."""

import hashlib
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from policykd.agents.networks import MLP, FrameNet
from policykd.agents.student import Size, make_student
from policykd.export.c99 import to_c

STRICT = ["gcc", "-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic"]


def test_two_policies_in_one_program_act(frames: Tensor, tmp_path: Path) -> None:
    """Different prefixes do not clash; `act` returns the best action, and -1 for a vector that is not finite."""
    one, net = make_student("1%", 6, seed=1), MLP(3, (8,), 4, activation=nn.ReLU)
    (tmp_path / "one.h").write_text(to_c(one.folded_net(), prefix="one", actions=("NOOP", "*/ evil")))
    (tmp_path / "other.h").write_text(to_c(net, prefix="other"))
    (tmp_path / "main.c").write_text("""
        #include "one.h"
        #include "other.h"
        #include <stdio.h>
        static uint8_t obs[4][84][84];  /* as docs/export.md calls it: no cast, no warning */
        int main(void) {
          const float fine[3] = {1.0f, 2.0f, 3.0f}, not_finite[3] = {1.0f, NAN, 3.0f};
          while (fread(obs, sizeof obs, 1, stdin) == 1) printf("%d ", one_act(&obs[0][0][0]));
          printf("%d %d", other_act(fine), other_act(not_finite));
          return 0;
        }""")
    program = tmp_path / "program"
    subprocess.run([*STRICT, "-O1", str(tmp_path / "main.c"), "-o", str(program), "-lm"], check=True)
    done = subprocess.run([str(program)], input=frames.numpy().tobytes(), capture_output=True, check=True)
    with torch.inference_mode():
        expected = [*one(frames).argmax(-1).tolist(), int(net(torch.tensor([[1.0, 2.0, 3.0]])).argmax()), -1]
    assert [int(word) for word in done.stdout.split()] == expected


@pytest.mark.parametrize(
    ("size", "sha256"),
    [("0.1%", "976939b59e894c4a"), ("half", "22ee1eb26914c1b4"), ("depthwise", "8986e9d545adddb8"),
     ("impala", "09953d1a8c9751a8")],
)  # fmt: skip
def test_the_same_weights_give_the_same_text(size: Size, sha256: str) -> None:
    """Multiples of 1/64 and a scaling by powers of two make all sums exact, so the hash holds on every machine."""
    net = make_student(size, 6).net
    assert isinstance(net, FrameNet)
    with torch.no_grad():
        net.centre.fill_(64.0)
        net.scale.fill_(32.0)
        for parameter in net.parameters():
            multiples = (torch.arange(parameter.numel()) * 37) % 101 - 50
            parameter.copy_(multiples.reshape(parameter.shape) / 64.0)
    assert hashlib.sha256(to_c(net, actions=("NOOP", "FIRE")).encode()).hexdigest().startswith(sha256)


def test_weights_read_back_exactly() -> None:
    net = MLP(2, (), 1, activation=nn.ReLU)
    weights = torch.tensor([[1.1754944e-38, -0.1]])
    dense = net.dense[0]
    assert isinstance(dense, nn.Linear)
    dense.weight.data.copy_(weights)
    numbers = [float.fromhex(word) for word in re.findall(r"-?0x[0-9a-f.]+p[+-]?\d+", to_c(net))]
    assert {float(weight) for weight in weights[0]} <= set(numbers)


@pytest.mark.parametrize("prefix", ["", "9a", "a b", "a-b", "int main(){}"])
def test_an_invalid_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="not a C identifier"):
        to_c(MLP(2, (), 1, activation=nn.ReLU), prefix=prefix)
