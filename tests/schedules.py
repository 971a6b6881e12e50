"""In which order a program compiled for GPUs runs its exchanges and its attention kernels.

XLA fixes that order when it compiles; an exchange runs beside the kernels that stand between its
start and its end. A schedule is a text with a letter for each event:

    F B          a kernel of the forward pass, of the backward pass
    P(F)         a permute, with a kernel beside it; so G, a gather; S, a reduce-scatter; T, an
                 all-to-all; R, an all-reduce
    P            a permute that runs alone
    [P(F) F]     what a loop repeats
"""

import re

_COMPUTATION = re.compile(r"(ENTRY )?%([\w.-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\((.*)")
_CALLED = re.compile(r"(?:body|calls|to_apply)=%([\w.-]+)")
_KERNEL = re.compile(r'custom_call_target="jax_fa3_(forward|backward)')
_KERNELS = {"forward": "F", "backward": "B"}
_EXCHANGES = {
    "all-gather": "G",
    "all-reduce": "R",
    "all-to-all": "T",
    "collective-permute": "P",
    "reduce-scatter": "S",
}


def schedule(compiled):
    """The schedule of a program that XLA compiled for GPUs."""
    text = compiled.as_text()
    assert "is_scheduled=true" in text
    computations, entry = {}, None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            lines = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif instruction := _INSTRUCTION.match(line):
            lines.append(instruction.groups())
    events = " ".join(_events(computations, entry))
    return re.sub(r"\(\s*\)", "", events).replace("( ", "(").replace(" )", ")")


def alone(text):
    """The exchanges of a schedule that have no kernel beside them, as a text."""
    return "".join(re.findall(r"[GPRST](?!\()", text))


def _events(computations, name):
    for operation, rest in computations[name]:
        kind = re.sub("-(start|done)$", "", operation)
        if kind in _EXCHANGES and operation.endswith("-done"):
            yield ")"
        elif kind in _EXCHANGES:
            yield _EXCHANGES[kind] + "(" * operation.endswith("-start")
        elif operation == "custom-call":
            kernel = _KERNEL.search(rest)
            yield from _KERNELS[kernel[1]] if kernel else ()
        elif operation in ("while", "call", "fusion"):
            inside = list(_events(computations, _CALLED.search(rest)[1]))
            yield from ["[", *inside, "]"] if inside and operation == "while" else inside
