"""Which wheels are one and the same, and which processors they run on."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.utils import parse_wheel_filename

from localai_q.cluster.wheels import LEVELS, Level, Machine, WheelKey, level_of, wheel_key
from localai_q.errors import Unavailable

V2 = {"cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"}
V3 = V2 | {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
HERE = Machine(python="cp311-cp311-linux_x86_64", libc="glibc-2.36", arch="x86_64", level="x86-64-v4")
FLAGS = {"cmake.define.GGML_NATIVE": "OFF", "cmake.define.GGML_RPC": "ON"}


def key(machine: Machine = HERE, **changes: Any) -> WheelKey:
    given = {
        "package": "llama-cpp-python",
        "version": "0.3.36",
        "settings": FLAGS,
        "level": "x86-64-v3",
        "build": "cpu",
    }
    return wheel_key(**{**given, **changes}, machine=machine)


@pytest.mark.parametrize(
    ("flags", "level"),
    [
        (set(), "x86-64"),
        (V2, "x86-64-v2"),
        (V3, "x86-64-v3"),
        (V4 | {"amx_int8"}, "x86-64-v4"),
        (V4 - {"avx512vl"}, "x86-64-v3"),
        (V3 - {"fma"}, "x86-64-v2"),
        (V4 - {"ssse3"}, "x86-64"),
    ],
)
def test_the_level_of_a_processor_is_the_highest_that_it_has_all_of(flags: set[str], level: Level) -> None:
    assert level_of(flags) == level


def test_machines_that_differ_in_nothing_that_matters_share_a_wheel() -> None:
    older = HERE.model_copy(update={"level": "x86-64-v3"})
    assert key().digest == key(older).digest
    assert key(settings=dict(reversed(FLAGS.items()))).digest == key().digest
    assert len(key().digest) == 64


@pytest.mark.parametrize(
    "changes",
    [
        {"package": "other"},
        {"version": "0.3.37"},
        {"settings": {**FLAGS, "cmake.define.GGML_RPC": "OFF"}},
        {"settings": {}},
        {"build": "cuda12"},
        {"build": "cuda13"},
        {"level": "x86-64-v4"},
        {"machine": HERE.model_copy(update={"python": "cp312-cp312-linux_x86_64"})},
        {"machine": HERE.model_copy(update={"libc": "glibc-2.39"})},
        {"machine": HERE.model_copy(update={"arch": "aarch64", "level": None})},
    ],
)
def test_whatever_makes_another_wheel_makes_another_key(changes: dict[str, Any]) -> None:
    assert key(**changes).digest != key().digest


@given(machine=st.sampled_from(LEVELS), code=st.sampled_from(LEVELS))
def test_code_goes_only_to_processors_that_can_run_it(machine: Level, code: Level) -> None:
    here = HERE.model_copy(update={"level": machine})
    if LEVELS.index(machine) >= LEVELS.index(code):
        assert key(here, level=code).cpu == code
    else:
        with pytest.raises(Unavailable, match=f"of the level {code} or newer, and this machine's is {machine}"):
            key(here, level=code)


def test_code_for_whatever_the_machine_has_stays_among_its_like() -> None:
    older = HERE.model_copy(update={"level": "x86-64-v3"})
    assert key(level=None).cpu == "x86-64-v4"
    assert key(level=None).digest != key(older, level=None).digest


def test_a_processor_of_which_nothing_is_known_is_left_to_try() -> None:
    assert key(HERE.model_copy(update={"level": None})).cpu == "x86-64-v3"
    arm = HERE.model_copy(update={"arch": "arm64", "level": None})
    assert key(arm).cpu == "arm64"


def test_the_name_of_the_file_is_one_that_installers_read() -> None:
    name, version, _, found = parse_wheel_filename(key().filename)
    assert (name, str(version), [str(tag) for tag in found]) == ("llama-cpp-python", "0.3.36", [HERE.python])
