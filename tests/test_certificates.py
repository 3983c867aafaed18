"""Certificates as files and as bytes: what is told of them, and when they change."""

from __future__ import annotations

import os
import select
from pathlib import Path

import pytest
from authority import DAY, NOW, Authority
from live import Log

from prefork import _tls
from prefork.certificates import (
    Certificates,
    Data,
    Files,
    Watch,
    split_ciphers,
    way,
)
from prefork.config import Config
from prefork.errors import CertificateError, ConfigError
from prefork.log import error_logger

SOON = 10.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


def refused(error: type[Exception], **options: object) -> str:
    with pytest.raises(error) as caught:
        certificates = Certificates.of(Config(**options))
        assert certificates is not None
        certificates.load()
    return str(caught.value)


# ---- What is loaded ------------------------------------------------------------------


def test_without_certfile_there_are_none():
    assert Certificates.of(Config()) is None


def test_a_certificate_is_told_by_its_names_and_its_end(authority):
    issued = authority.issue("a.test", "*.b.test", not_after=NOW + DAY)
    certificates = Certificates.of(Config(**issued.options))
    assert isinstance(certificates.load(), _tls.Tls)
    (line,) = certificates.describe()
    end = (NOW + DAY).strftime("%Y-%m-%d %H:%M")
    assert line.startswith("certificate of a.test, *.b.test")
    assert f"until {end}" in line and line.endswith(" UTC")


def test_the_key_may_be_in_the_file_of_the_certificate(authority):
    issued = authority.issue()
    both = issued.cert.with_name("both.pem")
    both.write_bytes(issued.key.read_bytes() + issued.cert.read_bytes())
    certificates = Certificates.of(Config(certfile=both))
    certificates.load()
    assert certificates.paths == [str(both)]


def test_an_encrypted_key_is_opened_by_its_password(authority):
    issued = authority.issue(password=b"secret")
    Certificates.of(Config(**issued.options, keyfile_password="secret")).load()


def test_keys_are_paired_with_certificates_in_order(authority):
    one, two = authority.issue("a.test", file="a"), authority.issue("b.test", file="b")
    certs, keys = [one.cert, two.cert], [one.key, two.key]
    certificates = Certificates.of(Config(certfile=certs, keyfile=keys))
    certificates.load()
    assert [found.names[0] for found in certificates.found] == ["a.test", "b.test"]
    text = refused(CertificateError, certfile=certs, keyfile=keys[::-1])
    assert text.startswith(f"{one.cert} with key {two.key}: ")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        (NOW - 3 * DAY, NOW - DAY, "expired"),
        (NOW + DAY, NOW + 3 * DAY, "is not valid before"),
    ],
    ids=["expired", "not yet"],
)
def test_dates_that_are_not_today_are_warned_of(authority, before, after, told):
    issued = authority.issue("a.test", not_before=before, not_after=after)
    certificates = Certificates.of(Config(**issued.options))
    certificates.load()
    log = Log()
    certificates.warn(error_logger(log))
    day = (after if told == "expired" else before).strftime("%Y-%m-%d")
    assert f"certificate of a.test {told} {day}" in log.text


# ---- What is wrong -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "what"),
    [
        ("certfile", "certificate"),
        ("keyfile", "key"),
        ("ca_certs", "CAs"),
        ("ocsp_file", "OCSP response"),
    ],
)
def test_a_file_that_is_not_there_is_the_true_error(authority, option, what):
    options = {"cert_reqs": "required"} if option == "ca_certs" else {}
    missing = str(authority.directory / "no.pem")
    values = {**authority.issue().options, **options, option: missing}
    with pytest.raises(FileNotFoundError) as caught:
        Certificates.of(Config(**values)).load()
    assert caught.value.filename == missing
    assert caught.value.strerror == f"cannot read the {what}: no such file or directory"


@pytest.mark.parametrize("option", ["certfile", "keyfile"])
@pytest.mark.parametrize("content", [b"", b"\0\xff", b"-----BEGIN CERTIFICATE-----\n"])
def test_a_malformed_file_is_named(authority, option, content):
    issued = authority.issue()
    path = issued.cert if option == "certfile" else issued.key
    path.write_bytes(content)
    text = refused(CertificateError, **issued.options)
    assert text.startswith(f"{issued.cert} with key {issued.key}: ")
    assert "\n" not in text


def test_a_key_of_another_certificate_is_told(authority):
    one, two = authority.issue(file="a"), authority.issue(file="b")
    text = refused(CertificateError, certfile=one.cert, keyfile=two.key)
    assert text.startswith(f"{one.cert} with key {two.key}: ")


@pytest.mark.parametrize("password", [None, "wrong"])
def test_an_encrypted_key_needs_its_password(authority, password):
    issued = authority.issue(password=b"secret")
    text = refused(CertificateError, **issued.options, keyfile_password=password)
    assert text.startswith(f"{issued.cert} with key {issued.key}: ")
    assert "encrypted" in text


def test_malformed_cas_are_named(authority):
    issued, cas = authority.issue(), authority.directory / "cas.pem"
    cas.write_bytes(b"nothing")
    options = {"ca_certs": cas, "cert_reqs": "optional"}
    text = refused(CertificateError, **issued.options, **options)
    assert text.startswith(f"{cas}: ")


def test_a_malformed_ocsp_response_is_named(authority):
    issued, response = authority.issue(), authority.directory / "ocsp.der"
    response.write_bytes(b"nothing")
    text = refused(CertificateError, **issued.options, ocsp_file=response)
    assert text.startswith(f"{issued.cert} with key {issued.key}: ")
    assert "OCSP" in text


@pytest.mark.parametrize("ciphers", ["NONE-SUCH", "TLS_NONE_SUCH"])
def test_ciphers_that_do_not_exist_are_named(authority, ciphers):
    text = refused(CertificateError, **authority.issue().options, ciphers=ciphers)
    assert text.startswith(f"ciphers {ciphers}: ")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keyfile": "k"}, "certfile must name the certificate of keyfile"),
        ({"ocsp_file": "o"}, "certfile must name the certificate of ocsp_file"),
        (
            {"cert_reqs": "required", "ca_certs": "c"},
            "certfile must name a certificate for cert_reqs required",
        ),
        ({"tls_watch": True}, "certfile must name a certificate for tls_watch"),
    ],
)
def test_options_that_would_do_nothing_are_refused(options, text):
    assert refused(ConfigError, **options) == text


def test_a_call_that_names_a_certificate_leaves_no_room_for_another(authority):
    issued = authority.issue()
    place = Files.named(**issued.files)
    with pytest.raises(ConfigError, match="certfile must be left out"):
        Certificates.chosen(Config(certfile="a.pem"), place)
    with pytest.raises(ConfigError, match="tls_watch must be off"):
        Certificates.chosen(Config(tls_watch=True), Data(b"", b""))
    assert Certificates.chosen(Config(), place).paths == [
        str(issued.cert),
        str(issued.key),
    ]


@pytest.mark.parametrize("value", [None, 3, "", b"a.pem", "a\0b"])
def test_a_path_that_is_none_is_told(value):
    with pytest.raises(ConfigError, match="key_file must be the path of a file, not"):
        Files.named("cert.pem", value)


def test_a_key_in_memory_is_bytes_and_is_not_shown():
    with pytest.raises(ConfigError) as caught:
        Data.named(b"", "secret")
    assert str(caught.value) == "key_data must be bytes, not str"
    assert "secret" not in repr(Data.named(b"", b"secret"))


def test_ciphers_of_both_versions_are_told_apart():
    assert split_ciphers(None) == (None, None)
    assert split_ciphers("ECDHE+AESGCM:!aNULL") == ("ECDHE+AESGCM:!aNULL", None)
    assert split_ciphers("TLS_AES_128_GCM_SHA256, ECDHE+AESGCM") == (
        "ECDHE+AESGCM",
        "TLS_AES_128_GCM_SHA256",
    )


# ---- Changes -------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory as it really is."""
    return Path(os.path.realpath(tmp_path))


def test_the_way_of_a_plain_file_is_its_directory_and_the_one_above(place):
    assert way(str(place / "a.pem")) == [str(place.parent), str(place)]


def test_the_way_goes_through_links_of_files_and_directories(place):
    (place / "real").mkdir()
    (place / "live").mkdir()
    (place / "current").symlink_to("real")
    (place / "live" / "a.pem").symlink_to("../current/a.pem")
    found = way(str(place / "live" / "a.pem"))
    assert set(found) == {str(place / "live"), str(place), str(place / "real")}
    assert found[-1] == str(place / "real")


def test_links_in_a_circle_have_an_end(place):
    (place / "a").symlink_to("b")
    (place / "b").symlink_to("a")
    assert str(place) in way(str(place / "a"))


def test_a_directory_that_cannot_be_watched_is_the_true_error(place):
    with pytest.raises(FileNotFoundError, match="tls_watch cannot watch: no such file"):
        Watch([str(place / "none" / "a.pem")])


def write_over(place: Path) -> None:
    (place / "a.pem").write_text("new")


def rename_over(place: Path) -> None:
    (place / "b.pem").write_text("new")
    (place / "b.pem").replace(place / "a.pem")


def remove(place: Path) -> None:
    (place / "a.pem").unlink()


def replace_the_directory(place: Path) -> None:
    (place.parent / "other").mkdir()
    (place.parent / "other" / "a.pem").write_text("new")
    place.rename(place.parent / "old")
    (place.parent / "other").rename(place)


@pytest.fixture
def watched(place: Path):
    """A directory with a file in it, and a watch over that."""
    directory = place / "certificates"
    directory.mkdir()
    (directory / "a.pem").write_text("old")
    watch = Watch([str(directory / "a.pem")])
    yield watch, directory
    watch.close()


def await_change(watch: Watch) -> None:
    assert select.select([watch.fileno()], [], [], SOON)[0]
    watch.read()


@pytest.mark.parametrize(
    "change", [write_over, rename_over, remove, replace_the_directory]
)
def test_a_change_is_noticed_however_it_comes(watched, change):
    watch, directory = watched
    change(directory)
    await_change(watch)
    while not watch.differs():
        await_change(watch)
    assert not watch.differs()


def test_changes_go_on_to_be_noticed_where_a_directory_was_replaced(watched):
    watch, directory = watched
    replace_the_directory(directory)
    await_change(watch)
    while not watch.differs():
        await_change(watch)
    write_over(directory)
    (directory / "a.pem").write_text("newer")
    await_change(watch)
    while not watch.differs():
        await_change(watch)


def test_a_link_that_leads_elsewhere_is_a_change(place):
    for name in ("v1", "v2"):
        (place / name).mkdir()
        (place / name / "tls.crt").write_text(name)
    (place / "..data").symlink_to("v1")
    (place / "tls.crt").symlink_to("..data/tls.crt")
    watch = Watch([str(place / "tls.crt")])
    (place / "..tmp").symlink_to("v2")
    (place / "..tmp").rename(place / "..data")
    await_change(watch)
    while not watch.differs():
        await_change(watch)
    (place / "v2" / "tls.crt").write_text("v3")  # where it leads now
    await_change(watch)
    while not watch.differs():
        await_change(watch)
    watch.close()


def test_a_change_between_the_load_and_the_watch_is_noticed(authority):
    certificates = Certificates.of(Config(**authority.issue().options))
    certificates.load()
    watch = Watch(certificates.paths, certificates.digests)
    assert not watch.differs()
    watch.close()
    authority.issue()
    watch = Watch(certificates.paths, certificates.digests)
    assert watch.differs() and not watch.differs()
    watch.close()


def test_what_happens_beside_the_files_is_no_change(watched):
    watch, directory = watched
    (directory / "other").write_text("x")
    await_change(watch)
    assert not watch.differs()
    (directory / "a.pem").write_text("old")
    await_change(watch)
    assert not watch.differs()
