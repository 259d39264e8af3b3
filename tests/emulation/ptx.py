"""Translates PTX, what nvcc makes of a kernel, to C++ that runs in the emulation.

Functions, labels and lines stay what they are: every instruction is a statement, every register a
variable of its type. What stands on a line of the PTX stands on the same line of the C++, as the
compiler and the emulation name them in messages. An instruction that is not known is an error.

Generic, global and local addresses are the host's. Shared ones are offsets into the block's memory.
A parameter, of a kernel or of a call, is the address of its bytes.
"""

import re
from dataclasses import dataclass, field

TYPES = {
    **{f"{sign}{bits}": f"uint{bits}_t" for sign in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": f"int{bits}_t" for bits in (8, 16, 32, 64)},
    "f32": "float",
    "f64": "double",
    "pred": "bool",
}
FLOATS = ("float", "double")
WIDER = {"int16_t": "int32_t", "uint16_t": "uint32_t", "int32_t": "int64_t", "uint32_t": "uint64_t"}
SPACES = ("global", "shared", "local", "param")
CACHES = ("ca", "cg", "cs", "lu", "nc")  # what a load or a store asks of caches
SPECIAL_REGISTERS = {
    "%laneid": "lane()",
    **{f"%tid.{axis}": f"threadIdx.{axis}" for axis in "xyz"},
    **{f"%ctaid.{axis}": f"blockIdx.{axis}" for axis in "xyz"},
    **{f"%ntid.{axis}": f"blockDim.{axis}" for axis in "xyz"},
    **{f"%nctaid.{axis}": f"gridDim.{axis}" for axis in "xyz"},
}

# What an instruction assigns to its first operand, from the others, which have its type. It is
# found by its name: in full, or without the type.
VALUES = {
    "mov": "{0}",
    "add": "{0} + {1}",
    "add.rn": "{0} + {1}",
    "sub": "{0} - {1}",
    "mul": "{0} * {1}",
    "mul.rn": "{0} * {1}",
    "mul.lo": "{0} * {1}",
    "prmt": "bytes_of({0}, {1}, {2})",
    "mul.hi": "high_product({0}, {1})",
    "mad.lo": "{0} * {1} + {2}",
    "fma.rn": "std::fma({0}, {1}, {2})",
    "fma.rm": "fma_rounded_down({0}, {1}, {2})",
    "div": "quotient({0}, {1})",
    "rem": "remainder({0}, {1})",
    "div.rn": "{0} / {1}",
    "rcp.rn": "1 / {0}",
    "rcp.approx.ftz": "rough_reciprocal({0})",
    "sqrt.rn": "std::sqrt({0})",
    "ex2.approx.ftz": "flushed(std::exp2(flushed({0})))",
    "abs": "std::abs({0})",
    "neg": "-{0}",
    "copysign": "std::copysign({1}, {0})",
    "min": "lesser({0}, {1})",
    "max": "greater({0}, {1})",
    "min.NaN": "either_nan({0}, {1}) ? NAN : lesser({0}, {1})",
    "max.NaN": "either_nan({0}, {1}) ? NAN : greater({0}, {1})",
    "and": "{0} & {1}",
    "or": "{0} | {1}",
    "xor": "{0} ^ {1}",
    "not": "~{0}",
    "not.pred": "!{0}",
    "bar.red.or.pred": "__syncthreads_or({1})",
    "cvta.to.global": "{0}",
    "cvta.local": "{0}",
    "cvta.param": "{0}",
    "cvta.shared": "reinterpret_cast<uint64_t>(shared) + {0}",
    "cvta.to.shared": "{0} - reinterpret_cast<uint64_t>(shared)",
}
# Those whose operands have types of their own.
MIXED_VALUES = {
    "shl": ("shifted_left({0}, {1})", ("", "u32")),
    "shr": ("shifted_right({0}, {1})", ("", "u32")),
    "bfe": ("bits_of({0}, {1}, {2})", ("", "u32", "u32")),
    "bfi": ("bits_inserted({0}, {1}, {2}, {3})", ("", "", "u32", "u32")),
    "selp": ("{2} ? {0} : {1}", ("", "", "pred")),
}
# The types are those of the operand and of the result, whatever the name says.
CONVERSIONS = {
    "cvt.f32.bf16": ("__bfloat162float({{{0}}})", "u16", "f32"),
    "cvt.f32.f16": ("__half2float({{{0}}})", "u16", "f32"),
    "cvt.rn.bf16.f32": ("__float2bfloat16_rn({0}).bits", "f32", "u16"),
    "cvt.rn.f16.f32": ("__float2half_rn({0}).bits", "f32", "u16"),
    "cvt.sat.f32.f32": ("within_0_and_1({0})", "f32", "f32"),
}
# For floating-point numbers those that end in u also hold if an operand is NaN.
COMPARISONS = {
    "eq": "{0} == {1}",
    "ne": "{0} < {1} || {0} > {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "equ": "!({0} < {1} || {0} > {1})",
    "neu": "{0} != {1}",
    "ltu": "!({0} >= {1})",
    "leu": "!({0} > {1})",
    "gtu": "!({0} <= {1})",
    "geu": "!({0} < {1})",
    "num": "!either_nan({0}, {1})",
    "nan": "either_nan({0}, {1})",
}
ROUNDINGS = {"rni": "std::nearbyint", "rzi": "std::trunc", "rmi": "std::floor", "rpi": "std::ceil"}
# Flags and counters of 32 bits, without their type.
SHARED_BY_BLOCKS = {
    "ld.acquire.gpu.global": "load_acquire",
    "st.release.gpu.global": "store_release",
    "red.release.gpu.global.add": "add_release",
    "atom.global.add": "atomicAdd",
}
# The others that have no result; of barriers with a number there is one.
STATEMENTS = {
    "bar.sync 0": "__syncthreads();",
    "bar.warp.sync": "__syncwarp({0});",
    "nanosleep.u32": "__nanosleep({0});",
    "prefetch.global.L2": ";",
}

FUNCTION = re.compile(
    r"(?:\.visible\s+|\.weak\s+)?\.(?P<kind>entry|func)\s*(?:\((?P<result>[^)]*)\))?"
    r"\s*(?P<name>\w+)\s*(?:\((?P<parameters>[^)]*)\))?(?P<directives>[^;{]*)(?P<end>[;{])"
)
ELSEWHERE = re.compile(
    r"\s+|\.(?:version|target|address_size)[^\n]*|\.extern\s+\.shared\s[^;]*?(?P<shared>\w+)\[\];"
)
PIECE = re.compile(
    r"(?P<space>\s+)|(?P<label>[$\w]+):|(?P<brace>[{}])|(?P<statement>[^\s{}][^;]*);"
)
VARIABLE = re.compile(
    r"\.(?:param|local)\s+(?:\.align\s+\d+\s+)?\.[a-z]+(?P<bits>\d+)\s+"
    r"(?:\.ptr\s+(?:\.[a-z]+\s+\d*\s*)*)?(?P<name>\w+)"
    r"(?:\[(?P<count>\d+)\])?"
)
PREDICATED = re.compile(r"@(!?)(%\w+)\s+(.*)", re.DOTALL)
OPERAND = re.compile(r"\s*(\[[^]]*\]|\{[^}]*\}|\([^)]*\)|[^,{}()\[\]]+)\s*(?:,|$)")
MEMORY = re.compile(r"\[\s*(?P<base>[%$\w]+)\s*(?:\+\s*(?P<offset>-?\w+))?\s*\]")


def translate(text: str, file: str) -> str:
    """The C++ of a file of PTX, whose name is for messages."""
    text = re.sub(r"//[^\n]*", "", text)
    parts = ['#include "ptx.h"\nnamespace gatedrnn::emulation {\nnamespace {\n']
    shared: set[str] = set()
    at = 0
    while at < len(text):
        if found := ELSEWHERE.match(text, at):
            shared |= {found["shared"]} - {None}
            at = found.end()
            continue
        found, line = FUNCTION.match(text, at), text.count("\n", 0, at) + 1
        if not found:
            raise unknown(file, line, text[at : at + 80].split("\n")[0])
        at, line = found.end(), line + found[0].count("\n")
        parameters = [*sizes(found["result"] or ""), *sizes(found["parameters"] or "")]
        names = ", ".join(f"char* {name}" for name, _ in parameters)
        parts.append(f'\n#line {line} "{file}"\nvoid {found["name"]}({names})')
        if found["end"] == ";":
            parts.append(";")
            continue
        body = Body(file, line, shared, {name for name, _ in parameters})
        statements, at = body.translate(text, at)
        parts.append(f"{{ char* const shared = shared_memory();{statements}")
        if found["kind"] == "entry":
            parts.append(registration(found["name"], [size for _, size in parameters]))
    return "".join([*parts, "\n}\n}\n"])


def registration(name: str, parameter_bytes: list[int]) -> str:
    """What says that a launch of the kernel of that name runs its translation."""
    arguments = ", ".join(f"p[{i}]" for i in range(len(parameter_bytes)))
    sizes, symbol = ", ".join(map(str, parameter_bytes)), gcc_name(name)
    return (
        f'\nextern "C" void kernel_{name}() asm("{symbol}");\nasm(".hidden {symbol}");\n'
        f"const Translation translation_{name}(kernel_{name}, "
        f"[](char* const* p) {{ {name}({arguments}); }}, {{{sizes}}});\n"
    )


def gcc_name(name: str) -> str:
    """The symbol of a kernel of which nvcc has made `name`: it names nameless namespaces."""
    found = re.search(r"(\d+)_GLOBAL__N__", name)
    if not found:
        return name
    rest = name[found.end(1) + int(found[1]) :]
    return f"{name[: found.start()]}12_GLOBAL__N_1{rest}"


def kernels(text: str) -> list[str]:
    """The symbols of the kernels in a file of PTX."""
    return [
        gcc_name(found["name"]) for found in FUNCTION.finditer(text) if found["kind"] == "entry"
    ]


def sizes(declarations: str) -> list[tuple[str, int]]:
    """Names and bytes of declarations of memory."""
    return [
        (found["name"], int(found["bits"]) // 8 * int(found["count"] or 1))
        for found in VARIABLE.finditer(declarations)
    ]


def unknown(file: str, line: int, what: str) -> ValueError:
    return ValueError(f"{file}:{line}: cannot translate {what!r}")


@dataclass
class Body:
    """Translates a function's body. `addresses` are the names of host addresses."""

    file: str
    line: int
    shared: set[str]
    addresses: set[str]
    registers: dict[str, str] = field(default_factory=dict)  # the C++ type of each

    def translate(self, text: str, at: int) -> tuple[str, int]:
        """The C++ of what follows the opening brace, and where the text goes on."""
        parts, depth = [], 1
        while depth > 0:
            piece = PIECE.match(text, at)
            if not piece:
                raise unknown(self.file, self.line, text[at : at + 80].split("\n")[0])
            if piece["brace"]:
                depth += 1 if piece["brace"] == "{" else -1
                parts.append(piece["brace"])
            elif piece["label"]:
                parts.append(f"{piece['label']}:;")
            elif piece["statement"]:
                parts.append(self.statement(piece["statement"].strip()))
                parts.append("\n" * piece[0].count("\n"))
            else:
                parts.append(piece[0])
            self.line += piece[0].count("\n")
            at = piece.end()
        return "".join(parts), at

    def statement(self, text: str) -> str:
        if text.startswith("."):
            return self.declaration(text)
        if found := PREDICATED.match(text):
            condition = found[1] + self.value(found[2], "bool")
            return f"if ({condition}) {{ {self.statement(found[3])} }}"
        name, *rest = text.split(None, 1)
        operands = OPERAND.findall(*rest or [""])
        try:
            return self.instruction(name, [operand.strip() for operand in operands])
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise unknown(self.file, self.line, text) from error

    def declaration(self, text: str) -> str:
        words = text.split()
        if words[0] == ".pragma":
            return ""
        if words[0] == ".reg":
            kind = TYPES[words[1][1:]]
            names = "".join(words[2:]).replace("%", "").replace("<", "[").replace(">", "]")
            self.registers.update((name.partition("[")[0], kind) for name in names.split(","))
            return f"{kind} {names};"
        if words[0] in (".param", ".local"):
            ((name, size),) = sizes(text)
            self.addresses.add(name)
            return f"alignas(16) char {name}[{size}];"
        raise unknown(self.file, self.line, text)

    # ---- operands --------------------------------------------------------------------------------

    def value(self, operand: str, kind: str) -> str:
        """An operand as a value of a C++ type."""
        if operand in SPECIAL_REGISTERS:
            return SPECIAL_REGISTERS[operand]
        if operand in self.shared:
            return f"{kind}{{0}}"
        if operand in self.addresses:
            return f"reinterpret_cast<uint64_t>({operand})"
        if found := re.fullmatch(r"0([fd])([0-9a-fA-F]+)", operand):
            single = found[1] == "f"
            return cast(
                f"0x{found[2]}{'u' if single else 'ull'}", f"uint{32 if single else 64}_t", kind
            )
        if re.fullmatch(r"-?\d\w*", operand):
            return f"static_cast<{kind}>({operand})"
        variable, declared = self.register(operand)
        return cast(variable, declared, kind)

    def register(self, name: str) -> tuple[str, str]:
        """The variable of a register, and its C++ type. Of those with a number it is in an array:
        many thousands of variables would take the compiler long."""
        name = name.removeprefix("%")
        if name in self.registers:
            return name, self.registers[name]
        stem = name.rstrip("0123456789")
        return f"{stem}[{name[len(stem) :]}]", self.registers[stem]

    def assign(self, register: str, kind: str, value: str) -> str:
        """Assigns an expression, once it has a C++ type, to a register; "_" takes nothing."""
        if register == "_":
            return ""
        variable, declared = self.register(register)
        if (declared in FLOATS) != (kind in FLOATS):
            value = cast(f"static_cast<{kind}>({value})", kind, declared)
        return f"{variable} = {value};"

    def address(self, operand: str, space: str) -> str:
        found = MEMORY.fullmatch(operand)
        base, offset = found["base"], int(found["offset"] or "0", 0)
        if space == "shared":
            return f"(shared + static_cast<uint32_t>({self.value(base, 'uint32_t')} + {offset}))"
        return f"({base if base in self.addresses else self.value(base, 'uint64_t')} + {offset})"

    # ---- instructions ----------------------------------------------------------------------------

    def instruction(self, name: str, operands: list[str]) -> str:
        root, *modifiers = name.split(".")
        if form := STATEMENTS.get(name) or STATEMENTS.get(" ".join([name, *operands])):
            return form.format(self.value(operands[0], "uint32_t")) if "{0}" in form else form
        if name in ("bra", "bra.uni"):
            return f"goto {operands[0]};"
        if name == "ret":
            return "return;"
        if root == "call":
            return self.call(operands)
        if name == "shfl.sync.bfly.b32":
            return self.shuffle(*operands)
        if name in CONVERSIONS:
            form, given, result = CONVERSIONS[name]
            value = form.format(self.value(operands[1], TYPES[given]))
            return self.assign(operands[0], TYPES[result], value)
        kind, untyped = TYPES[modifiers[-1]], name.rpartition(".")[0]
        if untyped in SHARED_BY_BLOCKS:
            return self.shared_by_blocks(SHARED_BY_BLOCKS[untyped], kind, operands)
        if root in ("ld", "st"):
            return self.access(root, modifiers[:-1], kind, operands)
        to, *given = operands
        if root == "mov" and "{" in to + given[0]:
            return self.move_parts(to, given[0])
        if root == "setp":
            comparison, _ = modifiers
            values = [self.value(operand, kind) for operand in given]
            return self.assign(to, "bool", COMPARISONS[comparison].format(*values))
        if root == "popc":
            return self.assign(to, "uint32_t", f"std::popcount({self.value(given[0], kind)})")
        if name.startswith("mul.wide."):
            wider = WIDER[kind]
            a, b = (f"static_cast<{wider}>({self.value(operand, kind)})" for operand in given)
            return self.assign(to, wider, f"{a} * {b}")
        if root == "cvt":
            return self.convert(modifiers, to, given[0])
        form, types = MIXED_VALUES.get(untyped) or (
            VALUES[name if name in VALUES else untyped],
            ("",) * len(given),
        )
        values = [self.value(o, TYPES.get(t, kind)) for o, t in zip(given, types, strict=True)]
        return self.assign(to, kind, form.format(*values))

    def call(self, operands: list[str]) -> str:
        *result, name, arguments = operands
        names = [word.strip() for group in (*result, arguments) for word in group[1:-1].split(",")]
        return f"{name}({', '.join(filter(None, names))});"

    def shuffle(self, to: str, value: str, flipped: str, clamp: str, mask: str) -> str:
        to, inside = to.split("|")
        values = [self.value(operand, "uint32_t") for operand in (mask, value, flipped, clamp)]
        return self.assign(
            to, "uint32_t", f"shuffle({', '.join(values)}, {self.register(inside)[0]})"
        )

    def shared_by_blocks(self, function: str, kind: str, operands: list[str]) -> str:
        assert kind in ("int32_t", "uint32_t")
        to = "" if operands[0].startswith("[") else operands.pop(0)
        at = self.address(operands[0], "global")
        values = [self.value(operand, "int32_t") for operand in operands[1:]]
        call = f"::{function}({', '.join([f'reinterpret_cast<int*>{at}', *values])})"
        return self.assign(to, "int32_t", call) if to else f"{call};"

    def access(self, root: str, modifiers: list[str], kind: str, operands: list[str]) -> str:
        """ld and st, of one value or several."""
        rest = [word for word in modifiers if word not in (*SPACES, *CACHES, "v2", "v4")]
        if rest:
            raise ValueError(rest)
        at, values = (operands[1], operands[0]) if root == "ld" else operands
        names = [name.strip() for name in values.strip("{}").split(",")]
        space = next((word for word in modifiers if word in SPACES), "")
        pointer = f"pointer<{kind}, {len(names)}>{self.address(at, space)}"
        if root == "ld":
            each = (self.assign(name, kind, f"at[{i}]") for i, name in enumerate(names))
        else:
            each = (f"at[{i}] = {self.value(name, kind)};" for i, name in enumerate(names))
        return f"{{ {kind}* at = {pointer}; {' '.join(each)} }}"

    def move_parts(self, to: str, given: str) -> str:
        """mov between a register and the two that have its halves."""
        whole, halves = (given, to) if to.startswith("{") else (to, given)
        low, high = halves.strip("{}").split(",")
        low, high, wide = low.strip(), high.strip(), self.register(whole)[1]
        bits = 64 if wide in ("uint64_t", "double") else 32
        half, wide = f"uint{bits // 2}_t", f"uint{bits}_t"
        if whole is to:
            a, b = (f"{wide}{{{self.value(part, half)}}}" for part in (low, high))
            return self.assign(to, wide, f"{a} | {b} << {bits // 2}")
        value = self.value(whole, wide)
        first = self.assign(low, half, f"static_cast<{half}>({value})")
        return f"{first} {self.assign(high, half, f'{value} >> {bits // 2}')}"

    def convert(self, modifiers: list[str], to: str, given: str) -> str:
        *how, result, kind = modifiers
        result, kind = TYPES[result], TYPES[kind]
        value = self.value(given, kind)
        if how and how[0] in ROUNDINGS:
            value = f"{ROUNDINGS[how.pop(0)]}({value})"
            value = value if result in FLOATS else f"saturated<{result}>({value})"
        elif how == ["rn"]:
            how = []
        if how:
            raise ValueError(how)
        return self.assign(to, result, f"static_cast<{result}>({value})")


def cast(value: str, given: str, wanted: str) -> str:
    """A value of a C++ type as one of another: the number between integers, else its bits."""
    if given == wanted:
        return value
    if given in FLOATS or wanted in FLOATS:
        return f"__builtin_bit_cast({wanted}, {value})"
    return f"static_cast<{wanted}>({value})"
