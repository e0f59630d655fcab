"""Networks as one C99 header: weights and two functions, no library, no memory but the stack."""

import math
import re
from collections.abc import Sequence

from policykd.agents.networks import Net
from policykd.export.c99_layers import ADD_LAYER, Source, Value
from policykd.export.layers import layers_of

# Words in capitals are replaced; the comment at the top documents the header for its users.
_HEADER = """\
/* A policy, written by policykd: C99, reentrant, nothing but the stack, and of libm only what tanh and ELU need.
 *
 *   void PREFIX_scores(const KIND *obs, float *scores);    NUM_ACTIONS scores
 *   int PREFIX_act(const KIND *obs);    the best action, the first of equals
 *
 * obs: SHAPE of KIND one behind the other, RANGE
 * Actions: NAMES
 * Stack: STACK bytes. Fastest with -O3 -march=native. Include it in one file of a program.
 * With GUARD_MAIN defined it is one: observations on standard input, scores, as floats, on standard output.
 */
#ifndef GUARD_H
#define GUARD_H
#include <math.h>
#include <stdint.h>

ARRAYS

FUNCTIONS

static inline void PREFIX_scores(const KIND *obs, float *scores)
{
  BUFFERS
  CALLS
}

static inline int PREFIX_act(const KIND *obs)
{
  float scores[NUM_ACTIONS];
  REFUSED
  PREFIX_scores(obs, scores);
  int best = 0;
  for (int i = 1; i < NUM_ACTIONS; i++)
    if (scores[i] > scores[best]) best = i;
  return best;
}

#ifdef GUARD_MAIN
#include <stdio.h>
int main(void)
{
  static KIND obs[OBS_SIZE];
  float scores[NUM_ACTIONS];
  while (fread(obs, sizeof obs, 1, stdin) == 1) {
    PREFIX_scores(obs, scores);
    if (fwrite(scores, sizeof scores, 1, stdout) != 1) return 1;
  }
  return 0;
}
#endif
#endif
"""


def to_c(net: Net, *, prefix: str = "policykd", actions: Sequence[str] = ()) -> str:
    """Returns a header with `PREFIX_scores` and `PREFIX_act`; the same text for the same weights.

    Args:
        net: the network, such as a student's `folded_net()`.
        prefix: prefix of every name in it.
        actions: meaning of each action, for a comment.

    Raises:
        ValueError: the prefix is not a C identifier, or a module of the user's, whose layers are unknown.
    """
    check_prefix(prefix)
    layers = layers_of(net)
    shape = net.obs_shape
    is_frames = len(shape) == 3
    source = Source(prefix, values={"obs": Value(shape, "obs", channels_first=is_frames)})
    for layer in layers:
        # A ReLU right after sums of products is computed with them, unless something else reads the sums.
        readers = [other for other in layers if layer.gives in other.takes]
        with_relu = layer.operator in ("conv", "dense") and [r.operator for r in readers] == ["relu"]
        gives = readers[0].gives if with_relu else layer.gives
        if layer.gives not in source.values:
            ADD_LAYER[layer.operator](source, layer, gives, with_relu)
    # Stack: the arrays between layers, and the outputs that PREFIX_act keeps.
    buffers, calls = _buffers(source)
    stack = 4 * (sum(buffers.values()) + net.num_actions)
    # Longest words first, so that a word is never mistaken for a shorter one that it begins with.
    words = {
        "PREFIX": prefix,
        "GUARD": prefix.upper(),
        "KIND": "uint8_t" if is_frames else "float",
        "SHAPE": "".join(f"[{n}]" for n in shape),
        "RANGE": "grey frames from 0 to 255, newest last" if is_frames else "finite, or the action is -1",
        "NUM_ACTIONS": str(net.num_actions),
        "NAMES": ", ".join(f"{i} {_plain(name)}" for i, name in enumerate(actions)) or f"0 to {net.num_actions - 1}",
        "STACK": f"{stack:,}",
        "ARRAYS": "\n".join(source.arrays),
        "FUNCTIONS": "\n\n".join(source.functions),
        "BUFFERS": f"float {', '.join(f'{name}[{size}]' for name, size in buffers.items())};" if buffers else "",
        "CALLS": "\n  ".join(calls),
        "REFUSED": "" if is_frames else f"for (int i = 0; i < {shape[0]}; i++)\n    if (!isfinite(obs[i])) return -1;",
        "OBS_SIZE": str(math.prod(shape)),
    }
    return re.sub("|".join(sorted(words, key=len, reverse=True)), lambda word: words[word[0]], _HEADER)


def check_prefix(prefix: str) -> None:
    """Raises ValueError unless C names may begin with the prefix."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,62}", prefix):
        raise ValueError(f"prefix {prefix!r} is not a C identifier; use a letter, then letters, digits, underscores")


def stack_bytes(header: str) -> int:
    """Returns the stack that a header's functions need for their arrays, as its first lines document it."""
    return int(header.partition("Stack: ")[2].partition(" bytes")[0].replace(",", ""))


def _plain(name: str) -> str:
    """Returns a name that cannot end the comment around it."""
    return re.sub(r"[^A-Za-z0-9_ ]", "", name)


def _buffers(source: Source) -> tuple[dict[str, int], list[str]]:
    """Returns the arrays on the stack, name -> size, and the calls in C.

    An array is free again after the last call that reads its value, so that a few arrays serve all layers.
    """
    last_use = {value: i for i, call in enumerate(source.calls) for value in call.takes}
    sizes: dict[str, int] = {}
    array_of: dict[str, str] = {}
    lines = []
    for i, call in enumerate(source.calls):
        if call.gives != "scores":
            free = [name for name in sizes if name not in array_of.values()] or [f"values{len(sizes)}"]
            large_enough = [name for name in free if sizes.get(name, 0) >= call.size]
            chosen = large_enough[0] if large_enough else max(free, key=lambda name: sizes.get(name, 0))
            array_of[call.gives] = chosen
            sizes[chosen] = max(sizes.get(chosen, 0), call.size)
        arguments = ", ".join(array_of.get(name, name) for name in (*call.takes, call.gives))
        lines.append(f"{call.function}({arguments});")
        array_of = {value: name for value, name in array_of.items() if last_use.get(value, -1) > i}
    return sizes, lines
