"""The assembler's mistakes in lines of machine code, as `nvdisasm` prints them."""

import pytest

from benchmarks.machine_code import overwritten, unwritten


def listing(*lines):
    """With addresses; a line that ends in a colon is a label."""
    numbered = (
        x if x.endswith(":") else f"        /*{16 * n:04x}*/                   {x} ;" for n, x in enumerate(lines)
    )
    return "\n".join(("\t.section .text.kernel", *numbered))


WRITES = ("S2UR UR4, SR_CgaCtaId", "UIADD3 UR5, UR4, 0x400, URZ", "ULDC.64 UR6, c[0x0][0x230]")


def test_addresses_that_are_written_first_are_fine():
    assert (
        unwritten(listing(*WRITES, "HGMMA.64x64x16.F32.BF16 R56, gdesc[UR4], RZ, !UPT", "IADD3 R1, R2, UR6, RZ")) == []
    )


@pytest.mark.parametrize(
    ("line", "registers"),
    [
        ("UIADD3 UR30, UP0, UR30, 0x20, URZ", [30]),
        ("@P1 UIADD3.64 UR6, UR30, 0x40, URZ", [30, 31]),
        ("HGMMA.64x16x16.F32.BF16 R60, gdesc[UR4].tnspB, RZ, !UPT, gsb0", [6, 7]),
        # With its left operand in registers the address of the right one is all.
        ("HGMMA.64x16x16.F32.BF16 R60, R104, gdesc[UR2].tnspB, R60", []),
        ("STS.128 [R158+UR20+0x4000], R28", [20]),
        ("LDG.E.128 R12, desc[UR20][R2.64]", [20, 21]),
        ("REDUX.SUM UR20, R2", []),
        ("UIMAD.WIDE.U32 UR20, UR4, UR5, URZ", []),
    ],
)
def test_a_uniform_register_read_before_it_is_written_is_found(line, registers):
    first = listing(*WRITES[:2], line)
    assert unwritten(first) == [f"UR{n} is read at 0020 before it is written" for n in registers]


@pytest.mark.parametrize(
    ("write", "registers"),
    [
        ("REDUX.SUM UR20, R2", [21]),
        ("UIMAD.WIDE.U32 UR20, UR4, UR5, URZ", []),
        ("@UP0 ULDC.64 UR20, c[0x0][0x230]", []),
        ("STS.64 [R2+UR4], R20", [20, 21]),
    ],
)
def test_results_have_their_width(write, registers):
    found = unwritten(listing(*WRITES[:2], write, "UIADD3.64 UR6, UR20, 0x40, URZ"))
    assert found == [f"UR{n} is read at 0030 before it is written" for n in registers]


PRODUCT = "HGMMA.64x128x16.F32.BF16 R24, R140, gdesc[UR24].tnspB, R24"
LOAD = "LDSM.16.MT88.4 R140, [R20+0xe800]"
JUMP = "@P6 BRA `(.L_x_4)"


@pytest.mark.parametrize(
    ("lines", "registers"),
    [
        ([".L_x_4:", PRODUCT, LOAD, JUMP], [140, 141, 142, 143]),
        ([".L_x_4:", PRODUCT, "CS2R R142, SRZ", JUMP], [142, 143]),
        ([".L_x_4:", PRODUCT, "CS2R.32 R142, SRZ", JUMP], [142]),
        ([".L_x_4:", PRODUCT, "LDS.128 R136, [R20]", JUMP], []),
        ([".L_x_4:", PRODUCT, "LDS.128 R138, [R20]", JUMP], [140, 141]),
        ([".L_x_4:", PRODUCT, "LDSM.16.M88.2 R140, [R20]", JUMP], [140, 141]),
        ([".L_x_4:", PRODUCT, "STS.128 [R20], R140", JUMP], []),
        # Written before it, or after the loop, or not at all, or read by another product from shared memory.
        ([".L_x_4:", LOAD, PRODUCT, LOAD, JUMP], []),
        ([".L_x_4:", PRODUCT, JUMP, LOAD], []),
        ([LOAD, ".L_x_4:", PRODUCT, JUMP], []),
        ([".L_x_4:", "HGMMA.64x64x16.F32.BF16 R56, gdesc[UR12], R56", LOAD, JUMP], []),
        # A jump forward is no loop.
        ([JUMP, PRODUCT, LOAD, ".L_x_4:"], []),
    ],
)
def test_an_operand_that_its_loop_overwrites_is_found(lines, registers):
    found = overwritten(listing(*lines))
    assert [int(sentence.split(",")[0][1:]) for sentence in found] == registers
    assert all("multiplied at 0010" in sentence for sentence in found)
