# cython: language_level=3, binding=True, freethreading_compatible=False
"""TLS as Python sees it: certificates for the core, and what is known of a connection.

Handshakes, records and tickets are the core's; nothing here runs while they do.
"""
import time

from prefork.errors import CertificateError

from cpython.bytes cimport PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport uint16_t
from libc.string cimport memcmp, memset, strlen

from prefork._core cimport (
    PF_ERR_TLS_CERTIFICATE,
    PF_ERR_TLS_VERSION,
    Loop,
    Request,
    Scoreboard,
    check,
    pf_certificate,
    pf_error_text,
    pf_loop_secure,
    pf_request_tls,
    pf_scoreboard_tickets,
    pf_tls,
    pf_tls_add,
    pf_tls_certificate,
    pf_tls_close,
    pf_tls_describe,
    pf_tls_forget,
    pf_tls_info,
    pf_tls_key,
    pf_tls_open,
    pf_tls_options,
    pf_tls_reason,
    pf_tls_share,
)


# ---- Certificates ----

class Certificate:
    """The facts of an X.509 certificate.

    subject and issuer are written as RFC 2253 has it, serial in hexadecimal; names are
    its DNS names, not_before and not_after unix time, pem and der the whole of it.
    """

    __slots__ = (
        "subject", "issuer", "serial", "names", "not_before", "not_after", "pem", "der"
    )

    def __init__(self, **facts):
        for name, value in facts.items():
            setattr(self, name, value)

    def __repr__(self):
        return f"<Certificate {self.subject}>"


cdef str text_of(const char *text):
    return text[:strlen(text)].decode("utf-8", "replace")


cdef tuple names_of(const char *names):
    cdef list found = []
    while names[0] != 0:
        found.append(text_of(names))
        names += strlen(names) + 1
    return tuple(found)


cdef object described(const char *der, size_t size):
    """The first certificate of these bytes, and how many they are."""
    cdef pf_certificate facts
    check(pf_tls_describe(der, size, &facts))
    try:
        return Certificate(
            subject=text_of(facts.subject), issuer=text_of(facts.issuer),
            serial=text_of(facts.serial), names=names_of(facts.names),
            not_before=float(facts.not_before), not_after=float(facts.not_after),
            pem=text_of(facts.pem), der=PyBytes_FromStringAndSize(der, facts.size),
        )
    finally:
        pf_tls_forget(&facts)


cdef enum:
    KNOWN_MAX = 256  # chains that are remembered: clients come back

cdef dict known = {}


cdef tuple chain_of(const void *der, size_t size):
    """The certificates that lie here one after the other."""
    cdef bytes whole = PyBytes_FromStringAndSize(<const char *>der, <Py_ssize_t>size)
    cdef size_t at = 0
    found = known.get(whole)
    if found is not None:
        return <tuple>found
    chain = []
    while at < size:
        chain.append(described(<const char *>whole + at, size - at))
        at += len(chain[-1].der)
    if len(known) >= KNOWN_MAX:
        known.clear()
    known[whole] = tuple(chain)
    return tuple(chain)


# ---- What connections use ----

cdef class Tls:
    """Certificates, and how they are used. Once it is served it does not change.

    min_version: 0x0303 (TLS 1.2) or 0x0304; ciphers: of TLS 1.2, in OpenSSL's words;
    ciphersuites: of TLS 1.3; verify: 0 asks clients for no certificate, 1 lets them
    present one that ca vouches for, 2 wants it; ca: certificates in PEM; kernel: have
    the kernel encrypt where it can (kTLS). Raises CertificateError.
    """

    cdef pf_tls *handle

    def __cinit__(self, *, int min_version=0x0303, ciphers=None, ciphersuites=None,
                  int verify=0, ca=None, bint kernel=False):
        cdef pf_tls_options o
        cdef bytes authorities = ca
        cdef bytes list12 = None if ciphers is None else ciphers.encode()
        cdef bytes list13 = None if ciphersuites is None else ciphersuites.encode()
        memset(&o, 0, sizeof(o))
        o.min_version = min_version
        o.verify = verify
        o.kernel = kernel
        if list12 is not None:
            o.ciphers = list12
        if list13 is not None:
            o.ciphersuites = list13
        if authorities is not None:
            o.ca = authorities
            o.ca_len = len(authorities)
        self.judge(pf_tls_open(&self.handle, &o))

    def __dealloc__(self):
        pf_tls_close(self.handle)

    cdef int judge(self, int rc) except -1:
        """Raise a bad result of the core, with what OpenSSL says of it."""
        if rc >= 0:
            return rc
        if rc > PF_ERR_TLS_CERTIFICATE or rc < PF_ERR_TLS_VERSION:
            return check(rc)
        text = text_of(pf_error_text(rc))
        reason = text_of(pf_tls_reason(self.handle)) if self.handle is not NULL else ""
        raise CertificateError(f"{text} ({reason})" if reason else text)

    def add(self, bytes cert, bytes key=None, bytes password=None, bytes ocsp=None):
        """Serve with one more certificate; before any connection. Returns it.

        cert: it and the chain behind it, in PEM; key: its private key, in PEM, None if
        it stands there, too; password: of that key; ocsp: a response to staple, in DER.
        The first is the default one, others are chosen by the name that a client asks
        for (SNI). Raises CertificateError.
        """
        cdef pf_tls_key k
        cdef const void *der
        cdef size_t size
        cdef int place
        memset(&k, 0, sizeof(k))
        k.cert, k.cert_len = cert, len(cert)
        if key is not None:
            k.key, k.key_len = key, len(key)
        if password is not None:
            k.password = password
        if ocsp is not None:
            k.staple, k.staple_len = ocsp, len(ocsp)
        place = self.judge(pf_tls_add(self.handle, &k))
        check(pf_tls_certificate(self.handle, place, &der, &size))
        return described(<const char *>der, size)

    def secure(self, Loop loop not None):
        """Connections that this loop accepts from now on speak TLS."""
        check(pf_loop_secure(loop.opened(), self.handle))
        loop.secured = True

    def share_tickets(self, Scoreboard board not None):
        """Use the session ticket keys of a scoreboard, which must outlive this.

        So whoever counts there can resume a session that another one began.
        """
        pf_tls_share(self.handle, pf_scoreboard_tickets(board.opened()))


# ---- What is known of a connection ----

class Info:
    """The TLS of a request's connection.

    version: "TLSv1.3"; cipher: its name at IANA; version_number, cipher_number: as on
    the wire; server_name: what the client asked for (SNI), or None; alpn: the protocol
    agreed on, or None; resumed; server: our Certificate; client: that of the client,
    verified, or None; client_chain: it and those that vouch for it.
    """

    __slots__ = (
        "version", "version_number", "cipher", "cipher_number", "server_name", "alpn",
        "resumed", "server", "client", "client_chain",
    )


cdef dict fixed = {}  # texts that the core lends for ever, by where they are


cdef str fixed_text(const char *text):
    found = fixed.get(<size_t>text)
    if found is None:
        found = fixed[<size_t>text] = text_of(text)
    return <str>found


cdef str text_or_none(const char *text, Py_ssize_t size):
    return None if text is NULL else text[:size].decode("latin-1")


cdef object info_of(Request request):
    """Info, or None of a connection in clear.

    The loop may be at work meanwhile: none of it changes behind the handshake.
    """
    cdef pf_tls_info found
    if not pf_request_tls(request.known(), &found):
        return None
    return told(&found)


cdef object told(const pf_tls_info *found):
    """The same of what the core tells."""
    info = Info()
    info.version = fixed_text(found.version_name)
    info.version_number = found.version
    info.cipher = fixed_text(found.cipher_name)
    info.cipher_number = found.cipher
    name = found.server_name
    info.server_name = None if name is NULL else text_of(name)
    info.alpn = text_or_none(found.protocol, found.protocol_len)
    info.resumed = bool(found.resumed)
    info.server = chain_of(found.server, found.server_len)[0]
    chain = () if found.client is NULL else chain_of(found.client, found.client_len)
    info.client_chain = chain
    info.client = chain[0] if chain else None
    return info


cdef str stamp(double when):
    """As OpenSSL prints it: Jan  1 00:00:00 2030 GMT."""
    moment = time.gmtime(when)
    return time.strftime(f"%b {moment.tm_mday:2d} %H:%M:%S %Y GMT", moment)


cdef str native(str text):
    """As PEP 3333 has it: bytes, each of them a character."""
    return text.encode().decode("latin-1")


cdef int set_environ(dict environ, Request request) except -1:
    """The variables of Apache's mod_ssl, for what they are known by."""
    cdef pf_tls_info found
    if not pf_request_tls(request.known(), &found):
        return 0
    environ["SSL_PROTOCOL"] = fixed_text(found.version_name)
    environ["SSL_CIPHER"] = fixed_text(found.cipher_name)
    if found.server_name is not NULL:
        environ["SSL_TLS_SNI"] = native(text_of(found.server_name))
    environ["SSL_CLIENT_VERIFY"] = "NONE" if found.client is NULL else "SUCCESS"
    if found.client is NULL:
        return 0
    client = chain_of(found.client, found.client_len)[0]
    environ["SSL_CLIENT_S_DN"] = native(client.subject)
    environ["SSL_CLIENT_I_DN"] = native(client.issuer)
    environ["SSL_CLIENT_M_SERIAL"] = client.serial
    environ["SSL_CLIENT_V_START"] = stamp(client.not_before)
    environ["SSL_CLIENT_V_END"] = stamp(client.not_after)
    environ["SSL_CLIENT_CERT"] = client.pem
    return 0


cdef bytes last_server = b""  # of a connection whose client had no certificate:
cdef int last_version
cdef uint16_t last_cipher
cdef dict last_extension      # most are like it


cdef bint is_like_last(const pf_tls_info *found):
    return (found.client is NULL and found.version == last_version
            and found.cipher == last_cipher
            and found.server_len == <size_t>PyBytes_GET_SIZE(last_server)
            and memcmp(found.server, <const char *>last_server, found.server_len) == 0)


cdef dict extension_of(Request request):
    """What ASGI's tls extension tells."""
    global last_server, last_version, last_cipher, last_extension
    cdef pf_tls_info found
    cdef dict extension
    if not pf_request_tls(request.known(), &found):
        return {}
    if is_like_last(&found):
        extension = last_extension.copy()
        extension["client_cert_chain"] = []  # the app's own
        return extension
    extension = extension_with(told(&found))
    if found.client is NULL:
        last_server = <bytes>(<const char *>found.server)[:found.server_len]
        last_version, last_cipher = found.version, found.cipher
        last_extension = extension.copy()
    return extension


cdef dict extension_with(info):
    client = info.client
    return {
        "server_cert": info.server.pem,
        "client_cert_chain": [each.pem for each in info.client_chain],
        "client_cert_name": None if client is None else client.subject,
        "client_cert_error": None,
        "tls_version": info.version_number,
        "cipher_suite": info.cipher_number,
    }
