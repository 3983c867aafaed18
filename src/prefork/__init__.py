"""prefork: an HTTP server with a C core, many worker processes, and one command.

from prefork import Prefork, Server

def app(request):
    return b"Hello, World!"

Prefork(Server(app)).listen_and_serve(":8080")
"""

from prefork.config import Config
from prefork.errors import (
    AppLoadError,
    AppStartupError,
    CertificateError,
    ClientDisconnected,
    CommandProducerNoneError,
    CommandProducerNotStartedError,
    ConfigError,
    InheritanceError,
    NoReuseportError,
    OnlyReuseportOnWindowsError,
    OverRecoveryError,
    PreforkError,
    ProtocolError,
    RequestError,
    WorkerBootError,
)
from prefork.native import Query, Request, RequestLimits, Response
from prefork.prefork import Prefork
from prefork.server import Server
from prefork.worker import is_child

__all__ = [
    "AppLoadError",
    "AppStartupError",
    "CertificateError",
    "ClientDisconnected",
    "CommandProducerNoneError",
    "CommandProducerNotStartedError",
    "Config",
    "ConfigError",
    "InheritanceError",
    "NoReuseportError",
    "OnlyReuseportOnWindowsError",
    "OverRecoveryError",
    "Prefork",
    "PreforkError",
    "ProtocolError",
    "Query",
    "Request",
    "RequestError",
    "RequestLimits",
    "Response",
    "Server",
    "WorkerBootError",
    "is_child",
]
