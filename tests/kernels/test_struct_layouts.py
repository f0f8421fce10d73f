"""What C and Python say of each structure that is handed from one to the other."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from c_library import COMPILER, needs_c

from octavo.kernels import cpu_build, decoder_stack, paged_attention, quantized_weight, rotary

MIRRORS: dict[str, tuple[str, type[ctypes.Structure]]] = {
    "attention_args": ("operations.h", paged_attention._AttentionArgs),
    "rotary_args": ("operations.h", rotary._RotaryArgs),
    "weight": ("quantized.h", quantized_weight._Described),
    "product": ("decoder.c", decoder_stack._Product),
    "layer": ("decoder.c", decoder_stack._Layer),
    "step": ("decoder.c", decoder_stack._Step),
}
# A pointer is of none of these types; arrays are told by their first element, and structures by their size.
C_TYPES = {ctypes.c_int64: "int64_t", ctypes.c_int32: "int32_t", ctypes.c_float: "float"}


def claims(name: str, mirror: type[ctypes.Structure]) -> list[str]:
    """What C would have to agree with, each an expression of it."""
    said = [f"sizeof({name}) == {ctypes.sizeof(mirror)}"]
    for field, kind, *_ in mirror._fields_:
        place = getattr(mirror, field)
        there = f"(({name} *)0)->{field}"
        said += [f"offsetof({name}, {field}) == {place.offset}", f"sizeof({there}) == {place.size}"]
        element, value = (kind._type_, f"{there}[0]") if issubclass(kind, ctypes.Array) else (kind, there)
        if element in C_TYPES:
            said.append(f"_Generic({value}, {C_TYPES[element]}: 1, default: 0)")
        elif element is ctypes.c_void_p:
            said.append(f"_Generic({value}, {', '.join(f'{other}: 0' for other in C_TYPES.values())}, default: 1)")
    return said


def complaints(name: str, header: str, said: list[str]) -> str:
    source = f'#include <stddef.h>\n#include <stdint.h>\n#include <string.h>\n#include "{header}"\n' + "".join(
        f'_Static_assert({claim}, "{claim}");\n' for claim in said
    )
    done = subprocess.run(
        [COMPILER, *cpu_build._flags("-fopenmp"), f"-I{cpu_build._SOURCES}", "-fsyntax-only", "-x", "c", "-"],
        input=source,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stderr if done.returncode else ""


@needs_c
@pytest.mark.parametrize("name", MIRRORS)
def test_a_structure_has_the_same_fields_at_the_same_places_in_c_as_in_python(name: str) -> None:
    header, mirror = MIRRORS[name]
    assert complaints(name, header, claims(name, mirror)) == ""


@needs_c
def test_two_fields_of_one_type_that_change_places_are_noticed() -> None:
    fields = list(quantized_weight._Described._fields_)
    fields[0], fields[1] = fields[1], fields[0]

    class Swapped(ctypes.Structure):
        _fields_ = tuple(fields)

    assert "offsetof(weight, codes) == 8" in complaints("weight", "quantized.h", claims("weight", Swapped))


def test_no_structure_is_left_out() -> None:
    modules = Path(cpu_build.__file__).parent.glob("*.py")
    assert sum(module.read_text().count("(ctypes.Structure)") for module in modules) == len(MIRRORS)
