"""The GPU instructions that Numba has no word for, as inline PTX.

Intrinsics in scalars.py emit LLVM's instruction on a CPU and one of these on a GPU: libNVVM fuses a
product and a sum into one multiply-add wherever it sees both, and cannot see into these.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

__all__ = [
    "Ptx",
    "effect",
    "emit",
    "f32",
    "i32",
    "i64",
    "packed",
    "targets_gpu",
    "unpacked",
]

WORD, FLOAT = ir.IntType(32), ir.FloatType()


def i32(value: int) -> ir.Constant:
    """A word."""
    return ir.Constant(WORD, value)


def i64(value: int) -> ir.Constant:
    """An address, or a distance between two."""
    return ir.Constant(ir.IntType(64), value)


def f32(value: float) -> ir.Constant:
    """A float32."""
    return ir.Constant(FLOAT, value)


def targets_gpu(builder: ir.IRBuilder) -> bool:
    """Whether the function being built is for an NVIDIA GPU."""
    return builder.module.triple.startswith("nvptx")


def emit(builder: ir.IRBuilder, instruction: str, constraints: str, result, arguments):
    """One PTX instruction without side effects: `constraints` as in CUDA C, "=f,h" say."""
    types = [argument.type for argument in arguments]
    assembly = ir.InlineAsm(ir.FunctionType(result, types), f"{instruction};", constraints)
    return builder.call(assembly, arguments)


def unpacked(builder: ir.IRBuilder, value: ir.Value) -> list[ir.Value]:
    """The members of a tuple."""
    return [builder.extract_value(value, i) for i in range(len(value.type))]


def packed(builder: ir.IRBuilder, values: list[ir.Value]) -> ir.Value:
    """The inverse of `unpacked`: a tuple of values of one type."""
    tuple_ = ir.Constant(ir.ArrayType(values[0].type, len(values)), ir.Undefined)
    for i, value in enumerate(values):
        tuple_ = builder.insert_value(tuple_, value, i)
    return tuple_


class Ptx:
    """Writes PTX instructions over LLVM values, in the order in which they are asked for.

    Words are 32-bit registers; a word may hold two halves, fp16 or bf16, the lower first.
    """

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def emit(self, text: str, constraints: str, results: list, arguments: list, ordered=False):
        """One instruction, or a few in braces; `ordered` where it must keep its place."""
        if not results:
            results = [ir.VoidType()]
        result = results[0] if len(results) == 1 else ir.LiteralStructType(results)
        types = [argument.type for argument in arguments]
        function = ir.FunctionType(result, types)
        text = text if text.startswith("{") else f"{text};"
        assembly = ir.InlineAsm(function, text, constraints, side_effect=ordered)
        value = self.builder.call(assembly, arguments)
        if len(results) == 1:
            return value
        return [self.builder.extract_value(value, i) for i in range(len(results))]

    def load_shared(self, address: ir.Value, words: int = 4) -> list[ir.Value]:
        """1, 2 or 4 words of shared memory, at an i32 address that their size divides."""
        return self._load_shared(address, words, "u32", "=r", WORD)

    def load_shared_floats(self, address: ir.Value, count: int) -> list[ir.Value]:
        """2 or 4 float32 of shared memory, as `load_shared`."""
        return self._load_shared(address, count, "f32", "=f", FLOAT)

    def _load_shared(self, address, count, kind, constraint, result) -> list[ir.Value]:
        wide = f".v{count}" if count > 1 else ""
        names = ", ".join(f"${i}" for i in range(count))
        names = f"{{{names}}}" if count > 1 else names
        text = f"ld.shared{wide}.{kind} {names}, [${count}]"
        constraints = ",".join([constraint] * count + ["r"])
        loaded = self.emit(text, constraints, [result] * count, [address], ordered=True)
        return loaded if count > 1 else [loaded]

    def load_matrices(self, address: ir.Value, count: int) -> list[ir.Value]:
        """2 or 4 matrices of 8 x 8 halves from shared memory, transposed: of each, of column g the
        rows 2t and 2t + 1. Lane 8i + j has the address of row j of matrix i, which 16 divides."""
        names = ", ".join(f"${i}" for i in range(count))
        text = f"ldmatrix.sync.aligned.m8n8.x{count}.trans.shared.b16 {{{names}}}, [${count}]"
        constraints = ",".join(["=r"] * count + ["r"])
        return self.emit(text, constraints, [WORD] * count, [address], ordered=True)

    def load_shared_half(self, address: ir.Value) -> ir.Value:
        """An fp16 number of shared memory, as float32."""
        text = "{ .reg .b16 half; ld.shared.b16 half, [$1]; cvt.f32.f16 $0, half; }"
        return self.emit(text, "=f,r", [FLOAT], [address], ordered=True)

    def store_shared_floats(self, address: ir.Value, values: list[ir.Value]) -> None:
        """1, 2 or 4 float32 to shared memory, at an i32 address that their size divides."""
        names = ", ".join(f"${i + 1}" for i in range(len(values)))
        wide, names = (f".v{len(values)}", f"{{{names}}}") if len(values) > 1 else ("", names)
        text = f"st.shared{wide}.f32 [$0], {names}"
        constraints = ",".join(["r"] + ["f"] * len(values))
        self.emit(text, constraints, [], [address, *values], ordered=True)

    def store_shared(self, address: ir.Value, words: list[ir.Value]) -> None:
        """Four words to shared memory, at an i32 address that 16 divides."""
        text = "st.shared.v4.b32 [$0], {$1, $2, $3, $4}"
        self.emit(text, "r,r,r,r,r", [], [address, *words], ordered=True)

    def meet_warp(self) -> None:
        """Wait for the warp, and see what its lanes have written."""
        self.emit("bar.warp.sync 0xffffffff", "~{memory}", [], [], ordered=True)

    def of_quad_lane(self, word: ir.Value, lane: ir.Value) -> ir.Value:
        """The word that a lane of the own four has, which each lane chooses."""
        text = "shfl.sync.idx.b32 $0, $1, $2, 0x1c1f, 0xffffffff"
        return self.emit(text, "=r,r,r", [WORD], [word, lane], ordered=True)

    def word_of(self, value: ir.Value) -> ir.Value:
        """The bits of a float32."""
        return self.builder.bitcast(value, WORD)

    def rounded_pair(self, low: ir.Value, high: ir.Value, kind: str) -> ir.Value:
        """Two float32 rounded to "f16" or "bf16", in a word."""
        return self.emit(f"cvt.rn.{kind}x2.f32 $0, $1, $2", "=r,f,f", [WORD], [high, low])

    def store_global_where(self, there: ir.Value, address: ir.Value, words: list) -> None:
        """Four words to an i64 address that 16 divides, where a bit is set."""
        text = (
            "{ .reg .pred there; setp.ne.b32 there, $0, 0;"
            " @there st.global.v4.b32 [$1], {$2, $3, $4, $5}; }"
        )
        condition = self.builder.zext(there, WORD)
        self.emit(text, "r,l,r,r,r,r", [], [condition, address, *words], ordered=True)

    def masked_or(self, word: ir.Value, mask: int, other: ir.Value) -> ir.Value:
        """word & mask | other, in one instruction."""
        arguments = [word, i32(mask), other]
        return self.emit("lop3.b32 $0, $1, $2, $3, 0xEA", "=r,r,r,r", [WORD], arguments)

    def fma_halves(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a * b + c of both fp16 halves, rounded once."""
        return self.emit("fma.rn.f16x2 $0, $1, $2, $3", "=r,r,r,r", [WORD], [a, b, c])

    def negated(self, word: ir.Value) -> ir.Value:
        """Both halves, of the other sign."""
        return self.builder.xor(word, i32(0x80008000))

    def shifted_left(self, word: ir.Value, places: ir.Value) -> ir.Value:
        """A word moved by 0, 1, 2 ... places; by 32 and more there is nothing left of it."""
        return self.emit("shl.b32 $0, $1, $2", "=r,r,r", [WORD], [word, places])

    def signs(self, word: ir.Value, first: int) -> ir.Value:
        """Two halves full of the highest bit of a byte each, of the bytes `first`, an even number,
        and the next."""
        chosen = 0x8888 | first * 0x1111 | 0x1100
        return self.emit(f"prmt.b32 $0, $1, 0, {chosen}", "=r,r", [WORD], [word])

    def upper_halves(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """Those of two words, in one."""
        return self.emit("prmt.b32 $0, $1, $2, 0x7632", "=r,r,r", [WORD], [low, high])

    def bytes_of(self, word: ir.Value, chosen: ir.Value) -> ir.Value:
        """Four bytes of a word, by their numbers, the lowest digit first."""
        return self.emit("prmt.b32 $0, $1, 0, $2", "=r,r,r", [WORD], [word, chosen])

    def floats(self, word: ir.Value) -> list[ir.Value]:
        """Both fp16 halves of a word as float32."""
        text = (
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2;"
            " cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
        )
        return self.emit(text, "=f,=f,r", [FLOAT] * 2, [word])

    def mma(self, sums: list, a: list, b: list) -> list[ir.Value]:
        """sums + A B in float32 of fp16 A [16, k], row-major, and B [k, 8], as the lanes hold them
        for mma.m16n8k8 or m16n8k16: two or four words of A."""
        kind = f"mma.sync.aligned.m16n8k{4 * len(a)}.row.col.f32.f16.f16.f32"
        names = iter(f"${i}" for i in range(4 + len(a) + len(b) + 4))
        groups = [[next(names) for _ in part] for part in (sums, a, b, sums)]
        operands = ", ".join("{" + ", ".join(group) + "}" for group in groups)
        constraints = ["=f"] * 4 + ["r"] * (len(a) + len(b)) + ["f"] * 4
        results = [FLOAT] * 4
        return self.emit(f"{kind} {operands}", ",".join(constraints), results, [*a, *b, *sums])

    def tf32_parts(self, value: ir.Value) -> list[ir.Value]:
        """Words of two float32 whose sum a float32 is: its first eleven bits, and the rest."""
        text = (
            "{ .reg .b32 high; .reg .f32 low; and.b32 high, $2, 0xffffe000;"
            " mov.b32 low, high; sub.rn.f32 low, $3, low; mov.b32 $0, high; mov.b32 $1, low; }"
        )
        bits = self.builder.bitcast(value, WORD)
        return self.emit(text, "=r,=r,r,f", [WORD] * 2, [bits, value])

    def mma_tf32(self, sums: list, a: list, b: list) -> list[ir.Value]:
        """sums + A B in float32 of A [16, 8], row-major, and B [8, 8], of which the first eleven
        bits count, as the lanes hold them for mma.m16n8k8."""
        text = (
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
            " {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13}"
        )
        return self.emit(text, "=f,=f,=f,=f,r,r,r,r,r,r,f,f,f,f", [FLOAT] * 4, [*a, *b, *sums])


# --- For kernels: memory, barriers, the copy engine


KINDS: dict[str, tuple[Any, str, Any]] = {
    "int32": (types.int32, "r", WORD),
    "float32": (types.float32, "f", FLOAT),
    "uint16": (types.uint16, "h", ir.IntType(16)),
}
"""Name of a number -> Numba's type, the letter of its registers, LLVM's type."""


def _loader(name: str, instruction: str, kind: str, doc: str, count: int = 1) -> Any:
    """An intrinsic that loads a number of a kind, or so many side by side as a tuple: from an int64
    address, of shared memory int32."""
    number, letter, llvm = KINDS[kind]
    pointer, pointer_letter = (types.int32, "r") if ".shared" in instruction else (types.int64, "l")
    result = number if count == 1 else types.UniTuple(number, count)
    places = ", ".join(f"${i}" for i in range(count))
    text = f"{instruction} {places if count == 1 else f'{{{places}}}'}, [${count}]"
    constraints = ",".join([f"={letter}"] * count + [pointer_letter])

    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, arguments):
            loaded = Ptx(builder).emit(text, constraints, [llvm] * count, arguments, ordered=True)
            return loaded if count == 1 else packed(builder, loaded)

        return result(pointer), codegen

    load.__name__, load.__doc__ = name, doc
    return load


load_int32 = _loader("load_int32", "ld.global.nc.b32", "int32", "int32 at an address.")
load_word = _loader("load_word", "ld.global.b32", "int32", "int32 at an address, of a kernel's.")
load_float = _loader("load_float", "ld.global.f32", "float32", "float32 at an address.")
load_uint16 = _loader("load_uint16", "ld.global.nc.b16", "uint16", "uint16 at an address.")
shared_int32 = _loader("shared_int32", "ld.shared.b32", "int32", "int32 in shared memory.")
shared_float = _loader("shared_float", "ld.shared.f32", "float32", "float32 in shared memory.")
shared_uint16 = _loader("shared_uint16", "ld.shared.b16", "uint16", "uint16 in shared memory.")
load_words = _loader(
    "load_words", "ld.global.v4.u32", "int32", "Four int32 at an address that 16 divides.", 4
)
four_floats = _loader(
    "four_floats",
    "ld.shared.v4.f32",
    "float32",
    "Four float32 in shared memory; 16 divides that.",
    4,
)


@intrinsic
def divide(typingctx, one, other):
    """one // other of int32 that are not negative; Numba's own is one of 64 bits, in a loop."""

    def codegen(context, builder, signature, arguments):
        return emit(builder, "div.u32 $0, $1, $2", "=r,r,r", WORD, arguments)

    return types.int32(types.int32, types.int32), codegen


@intrinsic
def anew(typingctx, number):
    """An int32 as it is; what is computed from it is computed here, each time, and not kept in a
    register from before."""

    def codegen(context, builder, signature, arguments):
        return Ptx(builder).emit("mov.b32 $0, $1", "=r,r", [WORD], arguments, ordered=True)

    return types.int32(types.int32), codegen


@cache
def divider(by: int) -> Any:
    """An intrinsic: one // by of an int32 that is not negative, without a division."""

    @intrinsic
    def divide_by(typingctx, one):
        def codegen(context, builder, signature, arguments):
            return builder.udiv(arguments[0], i32(by))

        return types.int32(types.int32), codegen

    return divide_by


def effect(name: str, instruction: str, arguments: tuple[Any, ...], doc: str) -> Any:
    """An intrinsic without a result, that nothing may move across."""
    signature_of = types.none(*arguments)
    letters = {types.uint16: "h", types.int32: "r", types.int64: "l", types.float32: "f"}
    constraints = ",".join([letters[argument] for argument in arguments] + ["~{memory}"])

    def codegen(context, builder, signature, values):
        Ptx(builder).emit(instruction, constraints, [], values, ordered=True)
        return context.get_dummy_value()

    def typing(typingctx, *given):
        return signature_of, codegen

    parameters = ", ".join(f"a{i}" for i in range(len(arguments)))
    scope: dict[str, Any] = {"typing": typing}
    exec(f"def {name}(typingctx, {parameters}): return typing(typingctx)", scope)
    scope[name].__doc__ = doc
    return intrinsic(scope[name])


def _function(name: str, instruction: str, doc: str) -> Any:
    """An intrinsic that makes a float32 of one."""

    @intrinsic
    def compute(typingctx, number):
        def codegen(context, builder, signature, arguments):
            return emit(builder, f"{instruction} $0, $1", "=f,f", FLOAT, arguments)

        return types.float32(types.float32), codegen

    compute.__name__, compute.__doc__ = name, doc
    return compute


exp2 = _function("exp2", "ex2.approx.ftz.f32", "2^number, to 2 ulp.")
reciprocal = _function("reciprocal", "rcp.approx.ftz.f32", "1 / number, to 1 ulp.")
inverse_root = _function("inverse_root", "rsqrt.approx.ftz.f32", "1 / sqrt(number), to 2 ulp.")


@cache
def pair_rounder(kind: str) -> Any:
    """An intrinsic: two float32, the lower first, as a word of two numbers of fp16 ("f16") or bf16
    ("bf16")."""

    @intrinsic
    def rounded_pair(typingctx, low, high):
        def codegen(context, builder, signature, arguments):
            return emit(builder, f"cvt.rn.{kind}x2.f32 $0, $2, $1", "=r,f,f", WORD, arguments)

        return types.int32(types.float32, types.float32), codegen

    return rounded_pair


@cache
def pair_multiplier(kind: str) -> Any:
    """An intrinsic: the products of the pairs in two words, each rounded once."""

    @intrinsic
    def multiplied_pairs(typingctx, one, other):
        def codegen(context, builder, signature, arguments):
            text = f"fma.rn.{kind}x2 $0, $1, $2, $3"
            minus_zeros = i32(0x80008000)
            return emit(builder, text, "=r,r,r,r", WORD, [*arguments, minus_zeros])

        return types.int32(types.int32, types.int32), codegen

    return multiplied_pairs


def _storer(name: str, instruction: str, kind: str, doc: str) -> Any:
    """An intrinsic that stores a number of a kind: to an int64 address, of shared memory int32."""
    pointer = types.int32 if ".shared" in instruction else types.int64
    return effect(name, f"{instruction} [$0], $1", (pointer, KINDS[kind][0]), doc)


store_float = _storer("store_float", "st.global.f32", "float32", "float32 to an address.")
store_uint16 = _storer("store_uint16", "st.global.b16", "uint16", "uint16 to an address.")
to_shared_float = _storer(
    "to_shared_float", "st.shared.f32", "float32", "float32 to shared memory."
)
to_shared_int32 = _storer("to_shared_int32", "st.shared.b32", "int32", "int32 to shared memory.")
to_shared_uint16 = _storer(
    "to_shared_uint16", "st.shared.b16", "uint16", "uint16 to shared memory."
)
clear_shared = effect(
    "clear_shared", "st.shared.b64 [$0], 0", (types.int32,), "Eight zero bytes to shared memory."
)
to_shared_load = effect(
    "to_shared_load",
    "st.shared.v4.b32 [$0], {$1, $2, $3, $4}",
    (types.int32,) * 5,
    "16 bytes to shared memory.",
)
wait_for_dependencies = effect(
    "wait_for_dependencies",
    "griddepcontrol.wait",
    (),
    "Until what ran before has written its results.",
)
let_dependents_start = effect(
    "let_dependents_start", "griddepcontrol.launch_dependents", (), "What runs next may start."
)


@cache
def pair_loader(rows: int) -> Any:
    """load(x, step, count, column) -> a word of each row: int32 tuple. x: address of halves
    [count, ...], `step` bytes from row to row; column: an even one; rows from `count` on: like the
    last."""

    @intrinsic
    def load(typingctx, x, step, count, column):
        def codegen(context, builder, signature, arguments):
            return packed(builder, loaded_pairs(Ptx(builder), rows, *arguments))

        words = types.UniTuple(types.int32, rows)
        return words(types.int64, types.int64, types.int32, types.int32), codegen

    return load


def loaded_pairs(
    ptx: Ptx, rows: int, x: ir.Value, step: ir.Value, count: ir.Value, column: ir.Value
) -> list[ir.Value]:
    """What `pair_loader` loads."""
    builder, address = ptx.builder, ir.IntType(64)
    last, words = builder.sub(count, i32(1)), []
    for row in range(rows):
        there = builder.icmp_signed("<", i32(row), last)
        own = builder.zext(builder.select(there, i32(row), last), address)
        first = builder.add(x, builder.mul(own, step))
        place = builder.add(first, builder.zext(builder.shl(column, i32(1)), address))
        words.append(ptx.emit("ld.global.b32 $0, [$1]", "=r,l", [WORD], [place], ordered=True))
    return words


@cache
def halves_taker(half: int) -> Any:
    """take(words) -> the lower (0) or the upper (1) half of each word, two to a word: int32 tuple,
    half as many."""
    chosen = 0x7632 if half else 0x5410

    @intrinsic
    def take(typingctx, words):
        def codegen(context, builder, signature, arguments):
            given = unpacked(builder, arguments[0])
            text = f"prmt.b32 $0, $1, $2, {chosen}"
            pairs = zip(given[::2], given[1::2], strict=True)
            taken = [emit(builder, text, "=r,r,r", WORD, pair) for pair in pairs]
            return packed(builder, taken)

        return types.UniTuple(types.int32, len(words) // 2)(words), codegen

    return take


@cache
def copier(*distances: int) -> Any:
    """copy_ahead(to, source): 16 bytes from each of these distances on, from global memory (int64)
    to shared memory (int32), while the thread goes on."""
    copies = [f"cp.async.cg.shared.global [$0 + {at}], [$1 + {at}], 16;" for at in distances]
    text = "{ " + " ".join(copies) + " }"
    return effect("copy_ahead", text, (types.int32, types.int64), "Copy runs of 16 bytes.")


copy_word = effect(
    "copy_word",
    "cp.async.ca.shared.global [$0], [$1], 4",
    (types.int32, types.int64),
    "Copy a word from global to shared memory, while the thread goes on.",
)


@cache
def word_gatherer(*distances: int) -> Any:
    """gather(address, source): 16 bytes to an address, from words of shared memory that are so far
    from `source`."""
    loads = [f"ld.shared.b32 w{i}, [$1 + {at}];" for i, at in enumerate(distances)]
    text = f"{{ .reg .b32 w<4>; {' '.join(loads)} st.global.v4.b32 [$0], {{w0, w1, w2, w3}}; }}"
    return effect("gather", text, (types.int64, types.int32), "Four words, side by side.")


end_of_copies = effect(
    "end_of_copies",
    "cp.async.commit_group",
    (),
    "What was copied ahead since the last time is one group.",
)


@cache
def copies_done(groups: int) -> Any:
    """An intrinsic that waits for all groups of copies but the latest `groups`."""
    text = f"cp.async.wait_group {groups}"
    return effect("wait_for_copies", text, (), "Until earlier copies are there.")


# --- Clusters of blocks, each with its number ("rank"), which see each other's shared memory


@intrinsic
def of_rank(typingctx, address, rank):
    """Where a block of the cluster has what is at an address of shared memory here."""

    def codegen(context, builder, signature, arguments):
        text = "mapa.shared::cluster.u32 $0, $1, $2"
        return Ptx(builder).emit(text, "=r,r,r", [WORD], arguments)

    return types.int32(types.int32, types.int32), codegen


to_cluster_int32 = _storer(
    "to_cluster_int32", "st.shared::cluster.b32", "int32", "int32 to where `of_rank` says."
)
to_cluster_load = effect(
    "to_cluster_load",
    "st.shared::cluster.v4.b32 [$0], {$1, $2, $3, $4}",
    (types.int32,) * 5,
    "16 bytes to where `of_rank` says.",
)
send_floats = effect(
    "send_floats",
    "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32"
    " [$0], {$1, $2, $3, $4}, [$5]",
    (types.int32, *(types.float32,) * 4, types.int32),
    "Four float32 to where `of_rank` says; a barrier of that block (bulk_cuda.py) is told.",
)
arrive_in_cluster = effect(
    "arrive_in_cluster",
    "barrier.cluster.arrive.relaxed.aligned",
    (),
    "This thread has read what it wanted.",
)
publish_in_cluster = effect(
    "publish_in_cluster",
    "barrier.cluster.arrive.release.aligned",
    (),
    "What this thread has written is there for all that wait in the cluster; it takes longer.",
)
wait_for_cluster = effect(
    "wait_for_cluster",
    "barrier.cluster.wait.acquire.aligned",
    (),
    "Until all threads of the cluster have arrived.",
)


prefetch = effect("prefetch", "prefetch.global.L2 [$0]", (types.int64,), "Bring a line into L2.")


@intrinsic
def shared_address(typingctx, array):
    """Where a shared array begins, as PTX counts shared memory."""

    def codegen(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.ptrtoint(data, ir.IntType(64))
        text = "{ .reg .u64 at; cvta.to.shared.u64 at, $1; cvt.u32.u64 $0, at; }"
        return Ptx(builder).emit(text, "=r,l", [WORD], [address])

    return types.int32(array), codegen
