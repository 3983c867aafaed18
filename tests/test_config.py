"""Every option: what it takes, where it comes from, and what a wrong one is told."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import ssl
from pathlib import Path

import pytest

from prefork import config as options
from prefork import configfile
from prefork.config import (
    DEFAULTS,
    EVERYONE,
    OPTIONS,
    PREFORK,
    SERVER,
    Config,
    Group,
    usable_cpus,
)
from prefork.errors import ConfigError
from prefork.prefork import Prefork


def refusal(values: dict[str, object], groups=EVERYONE, environ=None) -> str:
    with pytest.raises(ConfigError) as caught:
        Config.load(values, groups, environ or {})
    text = str(caught.value)
    assert "\n" not in text
    return text


# ---- Defaults ------------------------------------------------------------------------


def test_defaults_are_those_of_the_documentation():
    config = Config.load({}, environ={})
    told = {
        "bind": ("127.0.0.1:8000",),
        "backlog": 2048,
        "network": "tcp4",
        "interface": "auto",
        "recover_window": 60.0,
        "recover_interval": 0.0,
        "shutdown_grace_period": 5.0,
        "reuseport": False,
        "concurrency": 65536,
        "header_timeout": 30.0,
        "idle_timeout": 75.0,
        "drain_idle": 1.0,
        "min_body_rate": 240,
        "max_request_body_size": 1 << 30,
        "max_header_size": 65536,
        "max_fields": 100,
        "name": "prefork",
        "close_on_shutdown": True,
    }
    assert {name: getattr(config, name) for name in told} == told


def test_every_default_is_valid_and_survives_being_read_again():
    config = Config.load({}, environ={})
    again = Config.load(dataclasses.asdict(config), environ={})
    assert again == config
    for name, default in DEFAULTS.items():
        assert getattr(config, name) == default


@pytest.mark.contract("option: no timeout is unlimited")
def test_no_timeout_is_unlimited_by_default():
    config = Config.load({}, environ={})
    for name in ("header", "read", "write", "idle", "linger"):
        assert 0 < getattr(config, f"{name}_timeout") <= 75


def test_every_option_explains_itself():
    for name, option in OPTIONS.items():
        assert option.help.endswith((".", ")")) or option.keyword_only, name
        assert option.group in Group, name


def test_flags_and_variables_are_unique():
    flags = [flag for option in OPTIONS.values() for flag in option.flags]
    assert len(set(flags)) == len(flags)
    assert options.variable("max_fields") == "PREFORK_MAX_FIELDS"


@pytest.mark.contract("RecoverThreshold")
def test_the_threshold_is_half_the_workers_but_at_least_one():
    for workers, threshold in [(1, 1), (2, 1), (3, 1), (4, 2), (9, 4)]:
        assert Config(workers=workers).threshold == threshold
    assert Config(workers=8, recover_threshold=0).threshold == 0


@pytest.mark.contract("GOMAXPROCS")
def test_workers_are_the_usable_cpus_by_default():
    assert Config(workers=None).worker_count == usable_cpus()
    assert Config(workers=3).worker_count == 3


# ---- Kinds ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("64K", 65536),
        ("64k", 65536),
        ("10M", 10 << 20),
        ("10 MiB", 10 << 20),
        ("10mb", 10 << 20),
        ("1.5G", 3 << 29),
        (4096, 4096),
    ],
)
def test_sizes_take_units(text, size):
    assert Config(max_request_body_size=text).max_request_body_size == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0),
        ("2.5", 2.5),
        ("500ms", 0.5),
        ("30s", 30.0),
        ("5m", 300.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("1d", 86400.0),
        (3, 3.0),
    ],
)
def test_durations_take_units(text, seconds):
    assert Config(idle_timeout=text).idle_timeout == seconds


@pytest.mark.parametrize("text", ["1", "true", "Yes", "ON", True])
def test_switches_are_turned_on(text):
    assert Config(get_only=text).get_only is True


@pytest.mark.parametrize("text", ["0", "false", "No", "OFF", False])
def test_switches_are_turned_off(text):
    assert Config(tcp_keepalive=text).tcp_keepalive is False


@pytest.mark.parametrize(
    ("given", "bind"),
    [
        ("a:1", ("a:1",)),
        ("a:1, b:2", ("a:1", "b:2")),
        (["a:1", "unix:/b"], ("a:1", "unix:/b")),
        (("a:1",), ("a:1",)),
    ],
)
def test_bind_takes_one_address_or_several(given, bind):
    assert Config(bind=given).bind == bind


def test_none_says_what_it_means_where_it_is_allowed():
    assert Config(recover_window="none").recover_window is None
    assert Config(recover_window=None).recover_window is None
    assert Config(workers="none").workers is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("workers", 0, "workers must be at least 1, not 0"),
        ("workers", "0", "workers must be at least 1, not 0"),
        ("workers", -3, "workers must be at least 1, not -3"),
        ("workers", "many", "workers must be a whole number, not 'many'"),
        ("workers", 2.0, "workers must be a whole number, not 2.0"),
        ("workers", True, "workers must be a whole number, not True"),
        ("workers", 5000, "workers must be at most 4096, not 5000"),
        ("backlog", None, "backlog must be a whole number, not None"),
        ("reuseport", "maybe", "reuseport must be true or false, not 'maybe'"),
        ("reuseport", 1, "reuseport must be true or false, not 1"),
        ("network", "udp", "network must be one of tcp, tcp4, tcp6, unix, not 'udp'"),
        ("read_timeout", 0, "read_timeout must be at least 0.001s, not 0.0"),
        (
            "read_timeout",
            "5 parsecs",
            "read_timeout must be a duration in seconds, or like 500ms, 30s or 1h30m, "
            "not '5 parsecs'",
        ),
        ("recover_interval", -1, "recover_interval must be at least 0s, not -1.0"),
        (
            "max_header_size",
            "64X",
            "max_header_size must be a size in bytes, like 65536, 64K or 10M, "
            "not '64X'",
        ),
        ("max_fields", 129, "max_fields must be at most 128, not 129"),
        (
            "read_buffer_size",
            "2G",
            "read_buffer_size must be at most 1G, not 2147483648",
        ),
        (
            "max_target_size",
            "1M",
            "max_target_size must be at most max_header_size (65536), not 1048576",
        ),
        ("bind", [], "bind must be one address or several, not []"),
        ("bind", 8000, "bind must be one address or several, not 8000"),
        ("bind", ["a:1", ""], "bind must be one address or several, not ['a:1', '']"),
        ("name", "a\r\nX: y", "name must be printable ASCII text, not 'a\\r\\nX: y'"),
        ("name", "préfork", "name must be printable ASCII text, not 'préfork'"),
        ("on_child_spawn", "print", "on_child_spawn must be callable, not 'print'"),
        (
            "logger",
            "stderr",
            "logger must be a logging.Logger or an object with printf(fmt, *args), "
            "not 'stderr'",
        ),
    ],
)
def test_a_wrong_value_is_told_with_option_value_and_remedy(name, value, text):
    assert refusal({name: value}) == text


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", float("nan"), "1e400"])
def test_no_duration_is_endless_or_no_number(value):
    assert refusal({"drain_idle": value}).startswith("drain_idle must be a duration")


def test_a_logger_is_one_of_logging_or_has_printf():
    class Printer:
        def printf(self, fmt: str, *args: object) -> None: ...

    adapter = logging.LoggerAdapter(logging.getLogger("a"), {})
    for logger in (logging.getLogger("a"), adapter, Printer()):
        assert Config(logger=logger).logger is logger


# ---- Names ---------------------------------------------------------------------------


def test_an_unknown_name_is_told_with_what_may_be_meant():
    text = refusal({"worker": 3})
    assert text == "prefork has no option worker; did you mean workers?"
    assert refusal({"zzz": 3}) == "prefork has no option zzz"
    assert refusal({"recover_treshold": 1}, PREFORK).endswith("recover_threshold?")


def test_an_option_of_somebody_else_is_told_whose_it_is():
    text = refusal({"workers": 3}, SERVER)
    assert text == "workers is no option of Server; give it to Prefork"
    text = refusal({"read_timeout": 3}, PREFORK)
    assert text == "read_timeout is no option of Prefork; give it to Server"
    text = refusal({"app_dir": "."}, SERVER)
    assert text == "app_dir is no option of Server; give it to the command line"


def test_server_and_prefork_share_the_listeners_options():
    for groups in (SERVER, PREFORK):
        config = Config.load({"backlog": 5, "network": "tcp"}, groups, {})
        assert (config.backlog, config.network) == (5, "tcp")
        assert set(config.keywords(groups)) >= {"backlog", "network", "logger"}


@pytest.mark.contract("attributes")
def test_prefork_declares_an_attribute_for_each_of_its_options():
    declared = {*Prefork.__annotations__, "workers"}
    assert declared == set(options.names(PREFORK))
    for name in options.names(PREFORK):
        assert hasattr(Prefork(serve_func=print), name)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().workers = 3  # type: ignore[misc]


def test_a_config_takes_keywords_only():
    parameters = inspect.signature(Config).parameters.values()
    assert {parameter.kind for parameter in parameters} == {
        inspect.Parameter.KEYWORD_ONLY
    }


# ---- Precedence ----------------------------------------------------------------------


def test_the_environment_beats_defaults_and_keywords_beat_the_environment():
    environ = {"PREFORK_WORKERS": "5", "PREFORK_BACKLOG": "7"}
    config = Config.load({"backlog": 9}, environ=environ)
    assert (config.workers, config.backlog) == (5, 9)


def test_a_wrong_variable_is_told_by_its_name():
    text = refusal({}, environ={"PREFORK_WORKERS": "0"})
    assert text == "workers must be at least 1, not 0 (from PREFORK_WORKERS)"


def test_a_wrong_variable_is_told_even_if_a_keyword_overrides_it():
    assert "(from PREFORK_WORKERS)" in refusal(
        {"workers": 3}, environ={"PREFORK_WORKERS": "x"}
    )


def test_a_file_is_above_the_defaults_and_below_the_environment(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("workers = 3\nbacklog = 4\nmax-fields = 5\nidle_timeout = '1m'")
    environ = {"PREFORK_BACKLOG": "7", "PREFORK_MAX_FIELDS": "8"}
    config = Config.load({"config_file": path, "max_fields": 9}, environ=environ)
    assert (config.workers, config.backlog, config.max_fields) == (3, 7, 9)
    assert config.idle_timeout == 60.0


def test_server_and_prefork_take_their_part_of_one_file(tmp_path):
    path = tmp_path / "some.toml"
    path.write_text("workers = 3\nbacklog = 4\nidle_timeout = 5.5\napp = 'a:b'")
    for groups in (SERVER, PREFORK):
        assert Config.load({"config_file": path}, groups, {}).backlog == 4
    assert len(Prefork(serve_func=print, config_file=path).workers) == 3
    assert Config.load({"config_file": path}, SERVER, {}).idle_timeout == 5.5


def test_python_reads_no_file_unless_it_is_told_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefork.toml").write_text("backlog = 4")
    assert Config.load({}, environ={}).backlog == DEFAULTS["backlog"]
    (tmp_path / "empty").mkdir()
    assert configfile.find(tmp_path / "empty") is None


def test_a_key_is_found_on_its_line_whatever_its_form(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text(
        "[other]\nworkers = 1\n\n[ tool . 'prefork' ]\n# workers = 2\n"
        "  'workers'  = 3\n[later]\nworkers = 4\n"
    )
    file = configfile.read(path)
    assert (file.values, file.place("workers")) == ({"workers": 3}, f"{path}:6")
    assert file.place("elsewhere") == str(path)


@pytest.mark.parametrize("value", ["660", "0660", "0o660", 0o660])
def test_permissions_are_octal_text_or_a_number(value):
    assert Config(unix_mode=value).unix_mode == 0o660


def test_a_wrong_mode_is_told():
    told = "unix_mode must be octal permission bits, like 660, not '888'"
    assert refusal({"unix_mode": "888"}) == told
    assert refusal({"unix_mode": 0o1777}).startswith("unix_mode must be at most 777")


def test_variables_of_others_are_left_alone():
    environ = {
        "PREFORK_CHILD": "1",
        "PREFORK_CHILD_X": "1",
        "PREFORK_ON_CHILD_SPAWN": "print",
        "PREFORK_WORKERS": "x",
    }
    Config.load({}, SERVER, environ)


@pytest.mark.parametrize("name", [n for n, o in OPTIONS.items() if not o.keyword_only])
def test_every_option_is_an_environment_variable(name):
    option, default = OPTIONS[name], DEFAULTS[name]
    text = "none" if default is None else option.show(default)
    config = Config.load({}, environ={options.variable(name): text})
    assert getattr(config, name) == default


def test_the_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv("PREFORK_NAME", "mine")
    assert Config.load({}).name == "mine"


# ---- TLS -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "files"),
    [
        ("a.pem", ("a.pem",)),
        ("a.pem, b.pem", ("a.pem", "b.pem")),
        (["a.pem", Path("/b.pem")], ("a.pem", "/b.pem")),
        (Path("/a.pem"), ("/a.pem",)),
        ("", ()),
        ("none", ()),
        ((), ()),
    ],
)
def test_certfile_takes_one_file_or_several(given, files):
    assert Config(certfile=given).certfile == files


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("none", "none"),
        ("required", "required"),
        ("1", "optional"),
        (2, "required"),
        (ssl.CERT_NONE, "none"),
        (ssl.CERT_OPTIONAL, "optional"),
    ],
)
def test_cert_reqs_is_a_word_or_the_number_that_others_have(given, wanted):
    cas = "ca.pem" if wanted != "none" else None
    assert Config(cert_reqs=given, ca_certs=cas).cert_reqs == wanted


@pytest.mark.parametrize("given", ["1.3", 1.3, "tls1.3", "TLSv1.3"])
def test_tls_min_is_a_version_as_anybody_writes_it(given):
    assert Config(tls_min=given).tls_min == "1.3"


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"certfile": 3}, "certfile must be the path of a file, or several, not 3"),
        ({"tls_min": "1.1"}, "tls_min must be one of 1.2, 1.3, not '1.1'"),
        ({"tls_min": 1}, "tls_min must be 1.2 or 1.3, not 1"),
        (
            {"cert_reqs": "yes"},
            "cert_reqs must be one of none, optional, required, not 'yes'",
        ),
        (
            {"cert_reqs": True},
            "cert_reqs must be none, optional or required, not True",
        ),
        (
            {"cert_reqs": "required"},
            "cert_reqs must be none where no ca_certs are given, not 'required'",
        ),
        (
            {"ca_certs": "ca.pem"},
            "cert_reqs must be optional or required where ca_certs are given, "
            "not 'none'",
        ),
        (
            {"certfile": "a,b", "keyfile": "c"},
            "keyfile must be as many files as certfile (2), not ['c']",
        ),
        (
            {"certfile": "a", "ocsp_file": "b,c"},
            "ocsp_file must be at most as many files as certfile (1), not ['b', 'c']",
        ),
        (
            {"tls_handshake_timeout": 0},
            "tls_handshake_timeout must be at least 0.001s, not 0.0",
        ),
    ],
)
def test_what_of_tls_does_not_belong_together_is_told(values, text):
    assert refusal(values) == text


def test_a_secret_is_never_shown():
    option = OPTIONS["keyfile_password"]
    assert option.show("hunter2") == "(not shown)"
    assert "hunter2" not in option.literal("hunter2")
    assert "hunter2" not in refusal({"keyfile_password": "hunter2\0"})


# ---- The machine ---------------------------------------------------------------------


def quota(tmp_path: Path, files: dict[str, str], own: str) -> list[float]:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    cgroup = tmp_path / "self"
    cgroup.write_text(own)
    return list(options._cpu_quotas(tmp_path / "cgroup", cgroup))


def test_a_quota_of_cgroup_2_is_seen_in_the_group_and_above(tmp_path):
    files = {
        "a/b/cpu.max": "150000 100000\n",
        "a/cpu.max": "max 100000\n",
        "cpu.max": "400000 100000\n",
    }
    assert quota(tmp_path, files, "0::/a/b\n") == [1.5, 4.0]


def test_a_quota_of_cgroup_1_is_seen(tmp_path):
    files = {
        "cpu,cpuacct/a/cpu.cfs_quota_us": "50000",
        "cpu,cpuacct/a/cpu.cfs_period_us": "100000",
        "cpu,cpuacct/cpu.cfs_quota_us": "-1",
        "cpu,cpuacct/cpu.cfs_period_us": "100000",
    }
    own = "4:memory:/a\n2:cpu,cpuacct:/a\n1:cpuset:/a\n"
    assert quota(tmp_path, files, own) == [0.5]


def test_without_cgroups_there_is_no_quota(tmp_path):
    assert quota(tmp_path, {}, "") == []


def test_usable_cpus_are_those_of_the_affinity_mask(tmp_path):
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert usable_cpus(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, mask)
    assert usable_cpus(tmp_path) == len(mask)


@pytest.mark.contract("GOMAXPROCS")
def test_a_quota_is_rounded_up_and_never_beyond_the_mask(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    for quotas, cpus in [
        ([1.5], 2),
        ([0.1], 1),
        ([100.0], 8),
        ([4.0, 2.5], 3),
        ([], 8),
    ]:
        monkeypatch.setattr(options, "_cpu_quotas", lambda root, quotas=quotas: quotas)
        assert usable_cpus() == cpus
