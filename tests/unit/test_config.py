"""Settings come from the environment, then from what `up` has generated, then from the defaults; a bad one is named."""

import json
import os
from pathlib import Path

import pytest

from localai_q.config import Settings, child_environment, load_settings, read_state, settings, state_file, write_private
from localai_q.errors import StartupError


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("LOCALAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LOCALAI_Q_HOME", str(tmp_path))


def remember(home: Path, **state: object) -> None:
    write_private(state_file(home), json.dumps(state))


def test_the_environment_beats_what_was_generated_and_that_beats_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert load_settings().flower_port == 0
    remember(tmp_path, flower_port=7001, registration_token="generated")
    assert load_settings().flower_port == 7001
    monkeypatch.setenv("LOCALAI_Q_FLOWER_PORT", "7002")
    found = load_settings()
    assert (found.flower_port, found.registration_token) == (7002, "generated")
    assert load_settings(flower_port=7003).flower_port == 7003


def test_a_folder_of_state_is_found_by_its_setting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    remember(tmp_path / "other", redis_url="redis://other/0")
    assert load_settings().redis_url == ""
    monkeypatch.setenv("LOCALAI_Q_HOME", str(tmp_path / "other"))
    assert load_settings().redis_url == "redis://other/0"
    assert load_settings(home=tmp_path).redis_url == ""


def test_the_home_of_the_user_is_not_taken_for_the_home_of_the_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # The field is called 'home', and so is a variable that every shell sets.
    monkeypatch.delenv("LOCALAI_Q_HOME")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    assert load_settings().home != tmp_path / "user"
    assert load_settings().home.name == "localai_q"


@pytest.mark.parametrize("field", Settings.model_fields)
def test_every_setting_has_a_name_of_ours(field: str) -> None:
    alias = str(Settings.model_fields[field].validation_alias)
    assert alias.startswith(("LOCALAI_", "HF_", "AWS_"))  # the last two: as the tools of those services call them


def test_no_two_settings_share_a_name() -> None:
    aliases = [str(field.validation_alias) for field in Settings.model_fields.values()]
    assert len(set(aliases)) == len(aliases)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LOCALAI_ADDRESS", "8080"),
        ("LOCALAI_ADDRESS", "host:0"),
        ("LOCALAI_ADDRESS", "host:99999"),
        ("LOCALAI_ADDRESS", "host:http"),
        ("LOCALAI_REQUEST_TIMEOUT", "soon"),
        ("LOCALAI_Q_WEB_WORKERS", "0"),
        ("LOCALAI_Q_LEASE", "0.1"),
        ("LOCALAI_Q_NO_MODEL", "perhaps"),
        ("LOCALAI_Q_BACKEND_BUILDS", "cuda12 tpu"),
    ],
)
def test_a_bad_value_is_named_with_its_setting(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartupError) as raised:
        load_settings()
    assert raised.value.message.startswith(f"{name}='{value}' ")
    assert "\n" not in raised.value.message


@pytest.mark.parametrize(
    ("address", "host", "port", "base_url"),
    [
        ("127.0.0.1:8080", "127.0.0.1", 8080, "http://127.0.0.1:8080"),
        (":8080", "0.0.0.0", 8080, "http://127.0.0.1:8080"),
        ("0.0.0.0:80", "0.0.0.0", 80, "http://127.0.0.1:80"),
        ("[::]:9000", "::", 9000, "http://[::1]:9000"),
        ("example.org:443", "example.org", 443, "http://example.org:443"),
    ],
)
def test_an_address_names_a_host_and_a_port(
    monkeypatch: pytest.MonkeyPatch, address: str, host: str, port: int, base_url: str
) -> None:
    monkeypatch.setenv("LOCALAI_ADDRESS", address)
    found = load_settings()
    assert (found.host, found.port, found.base_url) == (host, port, base_url)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_any_spelling_of_a_postgres_url_names_the_driver_that_is_installed(scheme: str) -> None:
    assert load_settings(database_url=f"{scheme}://u@h/d").database_url == "postgresql+psycopg2://u@h/d"


def test_missing_stores_are_named_together() -> None:
    with pytest.raises(StartupError, match="LOCALAI_DATABASE_URL and LOCALAI_REDIS_URL"):
        load_settings().require_stores()
    with pytest.raises(StartupError, match=r"^LOCALAI_REDIS_URL must"):
        load_settings(database_url="postgresql://h/d").require_stores()
    both = load_settings(database_url="postgresql://h/d", redis_url="redis://h/0")
    assert both.require_stores() is both


def test_state_that_cannot_be_read_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    assert read_state(tmp_path / "nowhere") == {}
    state_file(tmp_path).write_text("{half")
    with pytest.raises(StartupError, match=r"state\.json"):
        load_settings()


def test_a_private_file_is_readable_by_its_owner_only_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "secret"
    write_private(path, "one")
    write_private(path, "two")
    assert path.read_text() == "two"
    assert path.stat().st_mode & 0o777 == 0o600
    assert [each.name for each in path.parent.iterdir()] == ["secret"]


def test_a_private_file_outlives_a_failure_of_power_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, order = tmp_path / "secret", []
    sync, replace = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        order.append("folder" if os.path.samestat(os.fstat(descriptor), tmp_path.stat()) else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", lambda part, target: order.append("name") or replace(part, target))
    write_private(path, "one")
    assert order == ["file", "name", "folder"]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_settings().lease = 3.0


def test_the_settings_of_a_process_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings.cache_clear()
    try:
        first = settings()
        monkeypatch.setenv("LOCALAI_LOG_LEVEL", "DEBUG")
        assert settings() is first
    finally:
        settings.cache_clear()


def test_the_environment_of_a_child_is_ours_with_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALAI_KEEP", "1")
    monkeypatch.setenv("LOCALAI_REGISTRATION_TOKEN", "secret")
    monkeypatch.setenv("EMPTY", "")
    made = child_environment(LOCALAI_REGISTRATION_TOKEN="", NEW="2")
    assert (made["LOCALAI_KEEP"], made["NEW"], made["EMPTY"]) == ("1", "2", "")
    assert "LOCALAI_REGISTRATION_TOKEN" not in made


@pytest.mark.parametrize(
    ("text", "budget"),
    [("", 1000), ("400", 400), ("50%", 500), ("12.5%", 125), ("100%", 1000), ("8GB", 1000), ("300b", 300)],
)
def test_a_budget_is_a_number_of_bytes_or_a_part_of_them(text: str, budget: int) -> None:
    assert load_settings(vram_budget=text).budget_of(1000) == budget


def test_units_of_a_budget() -> None:
    amounts = {"8GB": 8 * 10**9, "7.5 GiB": int(7.5 * 2**30), "512MiB": 2**29, "1tb": 10**12}
    assert {text: load_settings(vram_budget=text).budget_of(1 << 50) for text in amounts} == amounts


@pytest.mark.parametrize("text", ["much", "-1", "8 PB", "%", "1e9"])
def test_a_budget_that_cannot_be_read_is_named(text: str) -> None:
    with pytest.raises(StartupError, match="LOCALAI_VRAM_BUDGET"):
        load_settings(vram_budget=text)
