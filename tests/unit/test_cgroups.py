"""What control groups allow, on fake files of both versions."""

from pathlib import Path

import pytest

from workers.node import cgroups, hardware

GIB = 1 << 30


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def limits(tmp_path: Path, membership: str) -> cgroups.Limits:
    put(tmp_path, {"membership": membership})
    return cgroups.read(tmp_path / "fs", tmp_path / "membership")


def test_version_2_in_a_container_of_its_own_namespace(tmp_path: Path) -> None:
    put(tmp_path / "fs", {"memory.max": f"{4 * GIB}\n", "memory.current": f"{3 * GIB}\n", "cpu.max": "150000 100000\n",
                          "memory.stat": f"anon {2 * GIB}\ninactive_file {GIB}\n"})  # fmt: skip
    assert limits(tmp_path, "0::/\n") == cgroups.Limits(memory=4 * GIB, memory_free=2 * GIB, cpus=2)


def test_the_lowest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    put(tmp_path / "fs/a.slice", {"memory.max": f"{GIB}", "memory.current": "0", "cpu.max": "max 100000"})
    put(
        tmp_path / "fs/a.slice/b.service",
        {"memory.max": f"{2 * GIB}", "memory.current": "0", "cpu.max": "300000 100000"},
    )
    put(tmp_path / "fs/other.slice", {"memory.max": "5", "cpu.max": "1 100000"})
    assert limits(tmp_path, "0::/a.slice/b.service\n") == cgroups.Limits(memory=GIB, memory_free=GIB, cpus=3)


def test_version_1_where_the_containers_own_path_is_not_mounted(tmp_path: Path) -> None:
    put(tmp_path / "fs/memory", {"memory.limit_in_bytes": f"{GIB}", "memory.usage_in_bytes": f"{GIB // 2}",
                                 "memory.stat": f"cache 5\ntotal_inactive_file {GIB // 4}\n"})  # fmt: skip
    put(tmp_path / "fs/cpu,cpuacct", {"cpu.cfs_quota_us": "50000", "cpu.cfs_period_us": "100000"})
    (tmp_path / "fs/cpu").symlink_to("cpu,cpuacct")
    found = limits(tmp_path, "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n")
    assert found == cgroups.Limits(memory=GIB, memory_free=GIB * 3 // 4, cpus=1)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"memory.max": "max\n", "cpu.max": "max 100000\n"},
        {"memory.max": "", "cpu.max": ""},
        {"memory.max": "garbage", "cpu.max": "100000"},
        {"cpu.cfs_quota_us": "-1", "cpu.cfs_period_us": "100000"},
        {"cpu.max": "100000 0"},
    ],
)
def test_no_limit_and_what_cannot_be_read_are_none(tmp_path: Path, files: dict[str, str]) -> None:
    put(tmp_path / "fs", files)
    assert limits(tmp_path, "0::/\n") == cgroups.Limits()
    assert cgroups.read(tmp_path / "nothing", tmp_path / "nothing") == cgroups.Limits()
    assert limits(tmp_path, "nonsense\n0::/\n") == cgroups.Limits()


def test_a_node_has_what_it_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = cgroups.Limits(memory=GIB // 8, memory_free=GIB // 16, cpus=1)
    monkeypatch.setattr(cgroups, "read", lambda: allowed)
    found = hardware.read(tmp_path, lambda total: total)
    assert (found["ram_total"], found["ram_available"], found["cpus"]) == (GIB // 8, GIB // 16, 1)
    monkeypatch.setattr(cgroups, "read", lambda: cgroups.Limits(memory=1 << 62, memory_free=1 << 62, cpus=1 << 20))
    free = hardware.read(tmp_path, lambda total: total)
    assert free["ram_total"] > GIB // 8
    assert free["cpus"] < 1 << 20


def test_what_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("the disk does not answer")

    monkeypatch.setattr(hardware.shutil, "disk_usage", fail)
    found = hardware.read(tmp_path, lambda total: total)
    assert "disk_total" not in found
    assert found["ram_total"] > 0
