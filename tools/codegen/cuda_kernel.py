"""The kernels of the CUDA C++ provider: which there are, what the tables count on, what each must read and write."""

from __future__ import annotations

from dataclasses import dataclass

from tools.codegen.cuda_forms import resident_blocks

STAGED, VECTORS, ELEMENTS = range(3)  # how the backward reads its rows
NO_EPILOGUE, EPILOGUE, SAMPLE_EPILOGUE = range(3)  # the last: with parameters that are one vector for each sample
SHARED_BYTES = 48 << 10
SIZES = {"BFloat16": 2, "Float16": 2, "float": 4, "double": 8}
NAMES = (
    *("add_layer_norm_fwd", "add_layer_norm_bwd", "add_layer_norm_bwd_sums"),
    *("bias_act_dropout_fwd", "bias_act_dropout_bwd", "sum_partials", "sum_sample_partials"),
)
OF_PARTIALS = ("sum_partials", "sum_sample_partials")
TAKES = ("", "plain", "epilogue", "everything", "samples")
# of each source, what its kernels are made for: rows of a dtype, and of the stream beside it
PAIRS: dict[str, list[tuple[str, ...]]] = {
    "norm_bfloat16": [("BFloat16", "BFloat16"), ("BFloat16", "float")],
    "norm_float16": [("Float16", "Float16"), ("Float16", "float")],
    "norm_float32": [("float", "float")],
    "norm_float64": [("double", "double")],
    "activation": [("float",), ("double",), ("BFloat16",), ("Float16",)],
    "partials": [("float",), ("double",)],
}


@dataclass(frozen=True)
class Kernel:
    """One instantiation: which it is, and what it compiled to."""

    arch: str
    name: str  # of the op, without "kernel"
    types: tuple[str, ...]
    constants: tuple[int, ...]
    registers: int
    stack: int
    spilled: int
    shared: int
    accesses: tuple[tuple[str, int], ...]  # global, by opcode
    local: int = 0
    hot: int = 0  # instructions of the loop over rows; of the program, where a thread has but one row
    hot_loads: int = 0  # in that loop
    units: tuple[
        tuple[str, int], ...
    ] = ()  # matrix instructions, loads of matrices, copies to shared memory; by opcode

    @property
    def aligned(self) -> bool:
        if self.name == "add_layer_norm_bwd":
            return self.constants[0] != ELEMENTS
        return self.name not in OF_PARTIALS and bool(self.constants[-1])

    @property
    def plain(self) -> bool:
        """Of rows and a stream of one dtype, with nothing but a residual: what most calls take."""
        switch = {
            "add_layer_norm_fwd": self.constants[1:] == (0, 1),
            "add_layer_norm_bwd": self.constants == (STAGED, 0),
        }
        return switch.get(self.name, False) and SIZES[self.types[0]] == SIZES[self.types[1]]

    @property
    def bounds(self) -> tuple[int, int]:
        """(most threads of a block, blocks on a multiprocessor) that the tables of csrc/cuda count on."""
        if self.name == "add_layer_norm_fwd":
            chunks, epilogue, aligned = self.constants
            double = self.types[0] == "double"
            two = self.plain and not double and self.arch != "80"
            blocks = {1: 8, 2: 3, 4: 1} if epilogue else {1: 8 if double else 10, 2: 4, 4: 2 if two else 1}
            return (128 * chunks, blocks[chunks]) if aligned else (512, 1)
        if self.name.startswith("bias_act_dropout"):
            return 256, 2 if self.types[0] == "double" else 4
        if self.name in OF_PARTIALS:
            return 1024, 1
        return (256, 2) if self.name == "add_layer_norm_bwd_sums" else (512, 2 if self.plain else 1)

    @property
    def of_samples(self) -> bool:
        """Whether weight, bias and layer scale may be one vector for each sample."""
        if self.name == "add_layer_norm_bwd_sums":
            return bool(self.constants[0])
        return self.name in NAMES[:2] and self.constants[1] == SAMPLE_EPILOGUE

    @property
    def takes(self) -> str:
        """What of a call."""
        if self.name in OF_PARTIALS:
            return ""
        if self.of_samples:
            return "samples" if self.aligned else "samples, rows not aligned"
        if not self.aligned:
            return "everything, rows not aligned"
        if self.name == "add_layer_norm_fwd" or (self.name == "add_layer_norm_bwd" and self.constants[0] == STAGED):
            return "epilogue" if self.constants[1] else "plain"
        return "everything"

    @property
    def order(self) -> tuple[object, ...]:
        """Where it stands in a table."""
        types = [list(SIZES).index(t) for t in self.types]
        return NAMES.index(self.name), types, not self.aligned, TAKES.index(self.takes.split(",")[0]), self.chunks

    def model(self) -> tuple[int, int]:
        """16-byte loads and stores in the program: each operand once on each of its paths, each result once.

        A parameter is read in the rows' dtype, or in float32: two paths beside 16-bit rows. So are what was saved and
        the residual, and its gradient is stored, where the stream is wider than the rows. What comes through shared
        memory is counted by `staged`.
        """
        row = SIZES[self.types[0]]
        sums, parameter = 16 // row * max(row, 4) // 16, 1 if row >= 4 else 3
        if self.name == "bias_act_dropout_fwd":
            return 1 + parameter, 1
        if self.name == "bias_act_dropout_bwd":
            return 2 + parameter, 1 + sums
        s = SIZES[self.types[1]] // row
        saved = s if s == 1 else s + 1
        if self.name == "add_layer_norm_fwd":  # z or x again where a row takes several tiles
            parameters = 4 if self.constants[1] else 2
            return self.constants[0] * (1 + saved + parameters * parameter + s + 1), self.constants[0] * (s + 1)
        if self.name == "add_layer_norm_bwd_sums":
            return 1 + saved + 2 * parameter, 0
        if self.constants[0] == STAGED:
            return parameter, saved + 1 + (3 if self.constants[1] else 2) * sums
        return 1 + saved + 2 * parameter + s + 1 + 2 * parameter, saved + 1 + 4 * sums

    def staged(self) -> int:
        """16-byte copies of a row to shared memory; they stand in the program for the first two rows, and for each."""
        if self.name != "add_layer_norm_bwd" or self.constants[0] != STAGED:
            return 0
        return 1 + 2 * SIZES[self.types[1]] // SIZES[self.types[0]]

    @property
    def wide(self) -> tuple[int, int]:
        """16-byte loads and stores that there are."""
        ops = [(op.split(".")[0], n) for op, n in self.accesses if ".128" in op]
        return sum(n for op, n in ops if op == "LDG"), sum(n for op, n in ops if op == "STG")

    @property
    def copies(self) -> int:
        return dict(self.accesses).get("LDGSTS.E.BYPASS.128", 0)

    @property
    def chunks(self) -> int:
        """Vectors of a row that a thread has."""
        return self.constants[0] if self.name == "add_layer_norm_fwd" else 1

    @property
    def per_element(self) -> float:
        """Instructions of the loop over rows, for each element that a thread has in it."""
        loaded = self.hot_loads if self.name in OF_PARTIALS else self.chunks * 16 // SIZES[self.types[0]]
        return self.hot / max(loaded, 1)

    @property
    def resident(self) -> int:
        """Threads on a multiprocessor, in blocks of the most threads."""
        threads = self.bounds[0]
        return threads * resident_blocks(self.registers, threads)

    @property
    def in_flight(self) -> int:
        """Bytes of rows that a multiprocessor has asked for before it waits; the least where rows are staged."""
        row, stream = 16, 16 * SIZES[self.types[-1]] // SIZES[self.types[0]]
        a_thread = {
            "add_layer_norm_fwd": self.chunks * (row + stream),
            "add_layer_norm_bwd": row + 2 * stream,
            "add_layer_norm_bwd_sums": row + stream,
            "bias_act_dropout_fwd": row,
            "bias_act_dropout_bwd": 2 * row,
            **dict.fromkeys(OF_PARTIALS, self.hot_loads * SIZES[self.types[0]]),
        }
        return self.resident * a_thread[self.name]


def expected(source: str) -> set[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Every instantiation there should be, and no other."""
    forms: dict[str, tuple[tuple[int, ...], ...]] = {
        "add_layer_norm_fwd": (
            *((chunks, epilogue, 1) for chunks in (1, 2, 4) for epilogue in (NO_EPILOGUE, EPILOGUE, SAMPLE_EPILOGUE)),
            *((2, epilogue, 0) for epilogue in (EPILOGUE, SAMPLE_EPILOGUE)),
        ),
        "add_layer_norm_bwd": (
            *((STAGED, epilogue) for epilogue in (NO_EPILOGUE, EPILOGUE)),
            *((access, epilogue) for access in (VECTORS, ELEMENTS) for epilogue in (EPILOGUE, SAMPLE_EPILOGUE)),
        ),
        "add_layer_norm_bwd_sums": ((0, 1), (0, 0), (1, 1), (1, 0)),
    }
    if source == "activation":
        forms = {"bias_act_dropout_fwd": ((1,), (0,)), "bias_act_dropout_bwd": ((1,), (0,))}
    elif source == "partials":
        forms = dict.fromkeys(OF_PARTIALS, ((),))
    return {(name, pair, c) for pair in PAIRS[source] for name in forms for c in forms[name]}
