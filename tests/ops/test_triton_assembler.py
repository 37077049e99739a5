"""The assembler of kernels on Hopper, with a compiler that only notes which one it was given."""

from types import SimpleNamespace

import pytest

from statetrack.ops.triton_assembler import use_newer_assembler

HOPPER, AMPERE = 90, 80


@pytest.fixture
def assembler_on(monkeypatch):
    """assembler_on(arch, backend="cuda"): the path of the assembler that a kernel is compiled with on such a card."""
    triton = pytest.importorskip("triton", reason="needs triton")
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)

    def found(arch, backend="cuda"):
        target = SimpleNamespace(arch=arch, backend=backend)
        active = SimpleNamespace(get_current_target=lambda: target)
        monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
        kernel = SimpleNamespace(_do_compile=lambda key, *, warmup: (key, warmup, knobs.nvidia.ptxas.path))
        use_newer_assembler(kernel)
        key, warmup, path = kernel._do_compile("key", warmup=True)
        assert (key, warmup) == ("key", True)
        return path

    return found


def paths():
    nvidia = pytest.importorskip("triton.knobs").nvidia
    return nvidia.ptxas.path, nvidia.ptxas_blackwell.path


def test_on_hopper_it_is_the_newer_one_and_afterwards_as_before(assembler_on):
    before = paths()
    older, newer = before
    assert older != newer
    assert assembler_on(HOPPER) == newer
    assert paths() == before


@pytest.mark.parametrize(("arch", "backend"), [(AMPERE, "cuda"), (HOPPER, "hip")])
def test_elsewhere_it_is_tritons_choice(arch, backend, assembler_on):
    older, _ = paths()
    assert assembler_on(arch, backend) == older


def test_what_the_user_has_chosen_stays(assembler_on, monkeypatch):
    older, newer = paths()
    monkeypatch.setenv("TRITON_PTXAS_PATH", older)
    assert assembler_on(HOPPER) == older != newer


def test_a_failed_compilation_leaves_tritons_choice(assembler_on, monkeypatch):
    before = paths()

    def fail():
        raise RuntimeError("out of registers")

    assembler_on(HOPPER)
    kernel = SimpleNamespace(_do_compile=fail)
    use_newer_assembler(kernel)
    with pytest.raises(RuntimeError, match="out of registers"):
        kernel._do_compile()
    assert paths() == before


def test_a_kernel_is_prepared_once_and_other_things_not_at_all():
    kernel, other = SimpleNamespace(_do_compile=print), SimpleNamespace()
    use_newer_assembler(kernel)
    once = kernel._do_compile
    use_newer_assembler(kernel)
    use_newer_assembler(other)
    assert kernel._do_compile is once
    assert not vars(other)
